#!/usr/bin/env python
"""Measure how the norm of a learned word affects it inside the text encoders, and write a report.

    python examples/analyze.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --embeddings out/my-dog out/my-dog-ti --words dog car --output_dir out/analysis

`--embeddings` takes trained embeddings: folders or files in any format that examples/export.py reads. The model is SDXL,
SANA, or Stable Diffusion 1 or 2; only its text encoders and tokenizers are loaded. With nothing to download:

    python examples/make_small_sdxl.py --output_dir small
    python examples/analyze.py --pretrained_model_name_or_path small/sdxl --words dog teapot --output_dir out/analysis

The measurements follow Directional Textual Inversion (https://arxiv.org/abs/2512.13672), for each text encoder:

    norms         each vector's norm among the vocabulary's (Figure 1a)
    neighbours    nearest vocabulary tokens, by cosine and by Euclidean distance (Tables 1 and 5)
    initializer   cosine to the initializer, beside the initializer's own neighbours (Figure 1b)
    attenuation   how much of the position remains after the first LayerNorm, against the norm (Lemma 1; CLIP only)
    turning       how far the blocks turn the word's hidden state, against the norm (Proposition 1)
    positions     how well a linear classifier can still read the word's position, against the norm (CLIP only)

Written to --output_dir: `report.html`, one self-contained file, the plots as PNG, and `analysis.json` with every number.

Sections: 1 options, 2 mathematics, 3 the model, 4 vectors and words, 5 measurements, 6 plots, 7 report, 8 main.
"""

import argparse
import base64
import copy
import html
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from export import (  # noqa: E402
    ENCODERS,
    Embedding,
    EmbeddingError,
    UserError,
    check_output_dir,
    make_parser,
    read_embedding,
    run,
)
from generate import check_model_fits, choose_device, load_text_encoder  # noqa: E402
from generate import read_prompts as read_lines  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402
from pictures import training  # noqa: E402
from rescale import model_index, one_line, part_variant, weights_folder  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402


angle, normalize = training.angle, training.normalize


TEMPLATES = """
a photo of {} | a painting of {} in the snow | my {} with a hat | a close-up picture of the {} on a table
two children play with {} | an old drawing of {} | {} and a red car | in the garden there is a small {}
the {} sleeps under a tree | a dark street with {} and rain | she holds the {} in her hand | a clay figure of {}
"""
TURNING_TEMPLATES = 4  # the turning angle is measured in the first four contexts
POSITION_NORMS = (0.2, 0.4, 1.0, 2.0, 4.0, 8.0, 16.0)  # the paper's
NEIGHBOURS = 5
CHUNK = 8192  # rows of the vocabulary processed at once: Gemma's has 256,000 rows of 2,304 numbers
CLASSIFIER_STEPS, CLASSIFIER_PROMPTS = 500, 16


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the pipeline, in diffusers' format.")
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--variant", default=None, help="Variant of the model's weight files, such as fp16. The computation is in float32.")
    add("--embeddings", type=Path, nargs="+", default=[], metavar="PATH", help="Learned embeddings: folders or files.")
    add("--initializer_token", default=None, help="The class word that training started from. Default: read from the embedding's file or training_options.json.")
    add("--words", nargs="+", default=[], metavar="WORD", help="Words of the vocabulary to analyse too.")
    add("--prompts", type=Path, default=None, help="File with one prompt per line, with {} for the word. Replaces the built-in prompts.")
    add("--output_dir", type=Path, required=True, help="Output folder.")
    add("--device", default=None, help="Device of the text encoders. Default: the GPU if there is one.")
    add("--seed", type=int, default=0, help="Seed of the position classifier's prompts.")
    return parser


# fmt: on


def check_options(args: argparse.Namespace) -> list[str]:
    """Check what can be checked without the model. Returns the prompts. Raises UserError."""
    if not args.embeddings and not args.words:
        raise UserError("There is nothing to analyse: give --embeddings PATH, --words WORD or both.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} is not between 0 and {2**32 - 1}: choose another.")
    args.device = choose_device(args)
    prompts = read_prompts(args.prompts)
    check_output_dir(args.output_dir)
    return prompts


def read_prompts(path: Path | None) -> list[str]:
    """Read the prompts from a file, or take the built-in ones. Each has {} for the word. Raises UserError."""
    if path is None:
        return [prompt.strip() for line in TEMPLATES.strip().splitlines() for prompt in line.split("|")]
    lines = read_lines(path)
    for line in lines:
        if "{}" not in line:
            raise UserError(f"--prompts {path}: the line {line!r} has no {{}}: write it in place of the word.")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# 2. Mathematics
# ----------------------------------------------------------------------------------------------------------------------


def attenuation(norm: torch.nn.LayerNorm, v: torch.Tensor, p: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """|Norm(m v + p) - Norm(m v)| (M, P) for a direction `v` (d), positions `p` (P, d) and norms `m` (M).

    This is what a position adds to the first block's input (Lemma 1). In float64, because the difference is small.
    """
    norm = copy.deepcopy(norm).double()
    v, p = v.double(), p.double()
    word = m.double()[:, None, None] * v
    return (norm(word + p) - norm(word)).norm(dim=-1)


def attenuation_bound(norm: torch.nn.LayerNorm, v: torch.Tensor, p: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Lemma 1's O(|p| / m) with its constant for this LayerNorm: (M, P) for `v` (d), `p` (P, d) and `m` (M).

    LayerNorm with gain g and bias b is Norm(x) = g * f(C x) + b, with C x = x - mean(x) and
    f(y) = sqrt(d) y / sqrt(|y|^2 + d eps). Write y' = (y, sqrt(d eps)), a vector of d + 1 numbers: f(y) is the first d of
    sqrt(d) y' / |y'|. For any two vectors |a/|a| - b/|b|| <= 2 |a - b| / (|a| + |b|) (Dunkl and Williams, 1964). With
    a = (m C v + C p)' and b = (m C v)', whose difference is C p,

        |Norm(m v + p) - Norm(m v)|  <=  max|g| sqrt(d) 2 |C p| / (|a| + |b|)  <=  2 max|g| sqrt(d) |C p| / (m |C v|).

    The last step drops |a| and eps, which only makes the bound larger: it holds for every m > 0 and every eps >= 0.
    For large m the difference is at most half of the bound, because |a| is then close to |b|.
    """
    v, p = (x.double() - x.double().mean(dim=-1, keepdim=True) for x in (v, p))
    gain = norm.weight.double().abs().max() if norm.weight is not None else 1.0
    # 2 max|g| sqrt(d) |C p| / (m |C v|)
    return 2 * gain * math.sqrt(v.shape[-1]) * p.norm(dim=-1) / (m.double()[:, None] * v.norm())


def turning_bound(length: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Proposition 1, in degrees: a state of norm |x| = `length` turns by at most (pi/2) B / (|x| - B), B = `update`.

    The same formula bounds one block (B bounds its update) and all blocks (S, the sum of the blocks' B, replaces B and
    |x0| replaces |x|). It applies only where |x| > B; elsewhere the result is infinite.
    """
    # (pi/2) B / (|x| - B)
    bound = torch.rad2deg(math.pi / 2 * update / (length - update))
    return torch.where(length > update, bound, torch.inf)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model: only the pipeline's text encoders and tokenizers
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class TextEncoder:
    """A frozen text encoder in float32 and the parts of it that are measured.

    Attributes:
        vocabulary: the original E (V, d).
        layers: the pre-norm blocks, in order.
        norm: the first block's LayerNorm, or None if no positions are added (Gemma).
        positions: learned position embeddings (P, d), or None.
        scale: the factor applied to an embedding before the first block: sqrt(d) in Gemma, else 1.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    vocabulary: torch.Tensor
    layers: torch.nn.ModuleList
    norm: torch.nn.LayerNorm | None
    positions: torch.Tensor | None
    scale: float


def load_encoder(args: argparse.Namespace, name: str, cls: str, tokenizer) -> TextEncoder:
    """Load a text encoder in float32 onto the device and find its parts. Raises UserError."""
    path = args.pretrained_model_name_or_path
    try:
        folder = weights_folder(path, args.revision, args.variant)
        options = {"variant": part_variant(folder, name, args.variant), "torch_dtype": torch.float32}
        model = load_text_encoder(folder, name, cls.replace("ForCausalLM", "Model"), options)  # without a head
    except Exception as error:  # transformers, safetensors and the Hub raise many kinds
        raise UserError(f"--pretrained_model_name_or_path {path} is not complete: {one_line(error)}") from None
    model.requires_grad_(False).eval().to(args.device)
    # Found by kind, not by path: transformers 5.6 dropped CLIPTextModel's `text_model`.
    count = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    positions = next((m.weight for n, m in model.named_modules() if n.endswith("position_embedding")), None)
    return TextEncoder(
        name,
        model,
        tokenizer,
        vocabulary=model.get_input_embeddings().weight,
        layers=layers,
        norm=None if positions is None else layers[0].layer_norm1,
        positions=positions,
        scale=1.0 if positions is not None else math.sqrt(model.config.hidden_size),
    )


def hidden_states(encoder: TextEncoder, prefix: list[int], embeddings: torch.Tensor) -> torch.Tensor:
    """The last token's states (M, L + 1, d) before and after each of the L blocks, behind the tokens `prefix`.

    `embeddings` (M, d) replace the token's row in the vocabulary. The text after the token does not matter: both kinds of
    encoder are causal. Hooks read the states, because the last of the model's `hidden_states` may have a final norm on it.
    """
    vocabulary, states = encoder.model.get_input_embeddings(), []
    raw_scale = getattr(vocabulary, "embed_scale", 1.0)  # transformers 5 scales Gemma's embeddings in the vocabulary

    def put_word(module, args, output):
        return torch.cat([output[:, :-1], (embeddings * raw_scale)[:, None].to(output.dtype)], dim=1)

    def before(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [vocabulary.register_forward_hook(put_word)]
    hooks.append(encoder.layers[0].register_forward_pre_hook(before, with_kwargs=True))
    hooks += [layer.register_forward_hook(after) for layer in encoder.layers]
    ids = torch.tensor([[*prefix, prefix[0]]], device=embeddings.device).expand(len(embeddings), -1)
    options = {"use_cache": False} if encoder.model.config.model_type.startswith("gemma") else {}
    try:
        encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([state[:, -1] for state in states], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Vectors and words
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """An embedding that was read: its label in the report and the initializer's text, where it is known."""

    label: str
    embedding: Embedding
    initializer: str | None


@dataclass
class Vector:
    """A vector (d) to analyse, of kind `learned`, `initializer` or `word`. `row` is its index in the vocabulary.

    For a learned vector, `initializer_row` is the index of its initializer, if it is known.
    """

    label: str
    kind: str
    value: torch.Tensor
    row: int | None = None
    initializer_row: int | None = None
    colour: tuple | None = None

    @property
    def norm(self) -> float:
        return self.value.norm().item()


def known_initializer(path: Path, metadata: dict[str, str]) -> str | None:
    """The class word that training started from, from the embedding's file or the run's training_options.json."""
    if metadata.get("dti.initializer_token"):
        return metadata["dti.initializer_token"]
    folder = path if path.is_dir() else path.parent
    try:
        options = json.loads((folder / "training_options.json").read_text(encoding="utf-8"))
        text = options["options"]["initializer_token"]
        return text if isinstance(text, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a run of these scripts


def read_sources(args: argparse.Namespace) -> list[Source]:
    """Read --embeddings. Paths distinguish two with the same token, such as a DTI and a TI run. Raises UserError."""
    embeddings = []
    for path in args.embeddings:
        if args.embeddings.count(path) > 1:
            raise UserError(f"--embeddings {path} is given twice: leave one out.")
        try:
            embeddings.append(read_embedding(path))
        except EmbeddingError as error:
            message = str(error)
            raise UserError(message if message.startswith("--") else f"--embeddings {path}: {message}") from None
    tokens = [embedding.token for embedding in embeddings]
    sources = []
    for path, embedding in zip(args.embeddings, embeddings, strict=True):
        label = embedding.token
        if tokens.count(label) > 1:
            names = [p.name for p, t in zip(args.embeddings, tokens, strict=True) if t == label]
            label += f" ({path.name if names.count(path.name) == 1 else path})"
        initializer = args.initializer_token or known_initializer(path, embedding.metadata)
        sources.append(Source(label, embedding, initializer))
    return sources


def word_ids(tokenizer, text: str, option: str) -> list[int]:
    """Token ids of a word. Raises UserError if the vocabulary cannot spell it."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids or any("\ufffd" in tokenizer.decode([i]) for i in ids):
        raise UserError(f"{option} {text!r} is not in the vocabulary: give an English word.")
    return ids


def check_words(tokenizers: list, sources: list[Source], words: list[str]) -> None:
    """Check before weights load that the vocabularies have the words and initializers. Raises UserError."""
    for tokenizer in tokenizers:
        for word in words:
            word_ids(tokenizer, word, "--words")
        for source in sources:
            if source.initializer:
                word_ids(tokenizer, source.initializer, "--initializer_token")


def token_text(tokenizer, token_id: int) -> str:
    """A readable form of a token. A CLIP token that only begins a word gets a hyphen; Gemma's "▁" stands for a space."""
    token = tokenizer.convert_ids_to_tokens(int(token_id))
    if token is None:  # a row beyond the tokenizer: Gemma-2's vocabulary is padded
        return f"#{int(token_id)}"
    if not isinstance(tokenizer, CLIPTokenizer) or token_id in tokenizer.all_special_ids:
        return token
    # A byte-level tokenizer maps bytes to other characters; a single byte of a longer character does not decode.
    text = tokenizer.decode([token_id]).strip()
    word = text if text.isprintable() and text and "\ufffd" not in text else token.removesuffix("</w>")
    return word if token.endswith("</w>") else f"{word}-"


def collect_vectors(encoder: TextEncoder, sources: list[Source], words: list[str]) -> list[Vector]:
    """The vectors to analyse in one text encoder: learned ones, then their initializers, then words, each row once.

    As in the training scripts, several vectors start from the initializer's tokens in turn.
    """
    vectors, rows = [], {}
    for source in sources:
        values, ids = source.embedding.vectors[encoder.name], [None]
        if source.initializer:
            ids = word_ids(encoder.tokenizer, source.initializer, "--initializer_token")
        rows |= {row: "initializer" for row in ids if row is not None}
        for index, value in enumerate(values.to(encoder.vocabulary.device, torch.float32)):
            label = source.label if len(values) == 1 else f"{source.label} [{index}]"
            vectors.append(Vector(label, "learned", value, initializer_row=ids[index % len(ids)]))
    for word in words:
        rows |= {row: "word" for row in word_ids(encoder.tokenizer, word, "--words") if row not in rows}
    for row, kind in sorted(rows.items(), key=lambda item: item[1]):
        value = encoder.vocabulary[row].float().clone()  # a view would keep the whole vocabulary in memory
        if value.any():  # a zero row has no direction
            label = token_text(encoder.tokenizer, row)
            taken = any(vector.label == label for vector in vectors)
            vectors.append(Vector(f"{label} #{row}" if taken else label, kind, value, row=row))
    return vectors


# ----------------------------------------------------------------------------------------------------------------------
# 5. Measurements. Each returns a dictionary of numbers and lists, as stored in analysis.json.
# ----------------------------------------------------------------------------------------------------------------------


def chunks(vocabulary: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the vocabulary in parts: the index of the first row, and the rows (k, d) in float32."""
    for start in range(0, len(vocabulary), CHUNK):
        yield start, vocabulary[start : start + CHUNK].float()


def measure_norms(vocabulary: torch.Tensor, vectors: list[Vector]) -> tuple[dict, np.ndarray]:
    """Figure 1a: the L2 norms of the vocabulary without its zero rows, and each vector's percentile among them.

    The percentile is the share of nonzero rows, in per cent, with a norm of at most the vector's.
    Also returns the norms (V',) for the plot.
    """
    norms = torch.cat([rows.norm(dim=-1) for _, rows in chunks(vocabulary)]).cpu().double().numpy()
    zero_rows, norms = int((norms == 0).sum()), np.sort(norms[norms > 0])
    result = {
        "rows": len(vocabulary),
        "zero_rows": zero_rows,
        **{name: float(getattr(norms, name)()) for name in ("mean", "std", "min", "max")},
        "vectors": {},
    }
    for vector in vectors:
        rank = np.searchsorted(norms, vector.norm * (1 + 1e-6), side="right")  # so that a copied row counts itself
        result["vectors"][vector.label] = {
            "kind": vector.kind,
            "norm": vector.norm,
            "percentile": 100.0 * rank / len(norms),
            "times_mean": vector.norm / result["mean"],
        }
    return result, norms


def nearest_tokens(queries: torch.Tensor, vocabulary: torch.Tensor, rows: list[int | None], count: int = NEIGHBOURS):
    """The nearest `count` rows of `vocabulary` (V, d) to each of `queries` (n, d).

    Zero rows are excluded. `rows` (n) gives the index of a query that is itself a row: that row is excluded for it.
    Returns {"cosine": ..., "euclidean": ...}, each a pair of values and row indices (n, count), nearest first.
    """
    best = {"cosine": None, "euclidean": None}
    for start, part in chunks(vocabulary):
        similarity = normalize(queries) @ normalize(part).T
        # Not by matrix products: they would give an equal row the rounding error of two large squares as distance.
        distance = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
        left_out = (part.norm(dim=-1) == 0).expand_as(distance).clone()
        for query, row in enumerate(rows):
            if row is not None and start <= row < start + len(part):
                left_out[query, row - start] = True
        ids = torch.arange(start, start + len(part), device=part.device).expand_as(distance)
        for name, closeness in (("cosine", similarity), ("euclidean", -distance)):
            closeness = closeness.masked_fill(left_out, -torch.inf)
            found = ids
            if best[name] is not None:
                closeness, found = torch.cat([best[name][0], closeness], 1), torch.cat([best[name][1], found], 1)
            top, order = closeness.topk(min(count, closeness.shape[1]), dim=1)
            best[name] = top, found.gather(1, order)
    best["euclidean"] = -best["euclidean"][0], best["euclidean"][1]
    return best


def measure_neighbours(encoder: TextEncoder, vectors: list[Vector]) -> dict:
    """Tables 1 and 5: the nearest vocabulary tokens by cosine and by Euclidean distance, without the word itself."""
    queries = torch.stack([vector.value for vector in vectors])
    best = nearest_tokens(queries, encoder.vocabulary, [vector.row for vector in vectors])
    result = {}
    for index, vector in enumerate(vectors):
        result[vector.label] = {"kind": vector.kind}
        for measure, (values, rows) in best.items():
            pairs = zip(values[index].tolist(), rows[index].tolist(), strict=True)
            result[vector.label][measure] = [
                {"token": token_text(encoder.tokenizer, row), "id": row, "value": value}
                for value, row in pairs
                if math.isfinite(value)
            ]
    return result


def measure_initializers(encoder: TextEncoder, vectors: list[Vector]) -> tuple[dict, dict[str, np.ndarray]]:
    """Figure 1b: cosine and angle (degrees) of each learned vector to its initializer.

    Also returns, by initializer, the cosines (V',) of the whole vocabulary to it, for comparison in the plot.
    """
    starts = {vector.row: vector for vector in vectors if vector.row is not None}
    result, background = {}, {}
    for vector in vectors:
        start = starts.get(vector.initializer_row)
        if start is None:
            continue
        result[vector.label] = {
            "initializer": start.label,
            "cosine": F.cosine_similarity(vector.value, start.value, dim=0).item(),
            "degrees": angle(vector.value, start.value).item(),
        }
        if start.label not in background:
            parts = [normalize(part) @ normalize(start.value) for _, part in chunks(encoder.vocabulary)]
            cosines = torch.cat(parts)
            cosines[start.row] = 0  # itself
            background[start.label] = cosines[cosines != 0].cpu().numpy()
    return result, background


def norm_grid(mean: float, vectors: list[Vector], furthest: float = 0.0) -> torch.Tensor:
    """Norms m to measure at: from an eighth of the vocabulary's mean, evenly in log m, plus the vectors' own norms."""
    own = [vector.norm for vector in vectors]
    top = max(64 * mean, 2 * max(own), furthest)
    bottom = min(mean / 8, min(own) / 2)
    grid = np.geomspace(bottom, top, 3 * math.ceil(math.log2(top / bottom)) + 1)
    return torch.tensor(sorted({*grid.tolist(), *own}), dtype=torch.float64)


def measure_attenuation(encoder: TextEncoder, vectors: list[Vector], mean: float) -> dict:
    """Lemma 1: what a position adds to the first LayerNorm's output, against the norm m, and its bound.

    Mean, minimum and maximum are over all positions of the encoder; `bound` is the largest of the positions' bounds.
    `largest_share_of_bound` is the largest ratio of a difference to the bound at its own position: at most 1.
    """
    m = norm_grid(mean, vectors)
    norm, positions = copy.deepcopy(encoder.norm).cpu(), encoder.positions.cpu()  # not every device has float64
    result = {"m": m.tolist(), "positions": len(positions), "vectors": {}}
    for vector in vectors:
        v = normalize(vector.value).cpu()
        difference, bound = attenuation(norm, v, positions, m), attenuation_bound(norm, v, positions, m)
        own = m.tolist().index(vector.norm)
        result["vectors"][vector.label] = {
            "mean": difference.mean(dim=1).tolist(),
            "min": difference.amin(dim=1).tolist(),
            "max": difference.amax(dim=1).tolist(),
            "bound": finite(bound.amax(dim=1)),
            "at_own_norm": difference[own].mean().item(),
            "largest_share_of_bound": (difference / bound.clamp(min=torch.finfo(bound.dtype).tiny)).max().item(),
        }
    return result


def prefixes(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of the text before the word in the first prompts, including the start token."""
    texts = dict.fromkeys(prompt.partition("{}")[0] for prompt in prompts)
    ids = [tokenizer(text.lower()).input_ids for text in list(texts)[:TURNING_TEMPLATES]]
    ids = [prefix[:-1] if prefix[-1] == tokenizer.eos_token_id else prefix for prefix in ids]
    limit = 70  # tokens, of CLIP's 77: a longer text is cut at the front
    return [prefix if len(prefix) <= limit else [prefix[0], *prefix[-limit + 1 :]] for prefix in ids]


def turn_states(encoder: TextEncoder, vector: Vector, contexts: list[list[int]], m: torch.Tensor) -> dict:
    """Lengths, updates and angles of one direction's hidden state at the norms `m` (M), in each of the K contexts.

    Returns `length` |x| (K, M, L + 1), `update` |x' - x| (K, M, L), `block` and `total` angles in degrees, (K, M, L) and
    (K, M). A total is the angle between the state that enters the first block and the one that leaves the last.
    """
    embeddings = m.to(vector.value)[:, None] * normalize(vector.value)
    parts = {"length": [], "update": [], "block": [], "total": []}
    for prefix in contexts:
        x = hidden_states(encoder, prefix, embeddings).cpu().double()
        parts["length"].append(x.norm(dim=-1))
        parts["update"].append((x[:, 1:] - x[:, :-1]).norm(dim=-1))
        parts["block"].append(angle(x[:, 1:], x[:, :-1]))
        parts["total"].append(angle(x[:, -1], x[:, 0]))
    return {name: torch.stack(part) for name, part in parts.items()}


def measure_turning(encoder: TextEncoder, vectors: list[Vector], prompts: list[str], mean: float) -> dict:
    """Proposition 1: how far each block, and all blocks together, turn the token's hidden state, against the norm m.

    B of a block is its largest update in this sweep over norms, contexts and vectors. The true bound may be larger.
    S is their sum. A bound is given only where its assumption, |x| > B or |x0| > S, holds in every measured context.
    Each vector stands alone behind the contexts, even if its word has several vectors.
    The entries by vector are means over the contexts; `path` is the sum of the blocks' angles. The total bound covers it
    too: |x_l| >= |x0| - (B_1 + ... + B_l), so the blocks' bounds add up to no more than the total bound.
    """
    contexts = prefixes(encoder.tokenizer, prompts)
    pilot = turn_states(encoder, vectors[0], contexts, norm_grid(mean, vectors[:1]))
    reach = pilot["update"].amax(dim=(0, 1)).sum().item() / encoder.scale  # from this norm on the bound applies
    m = norm_grid(mean, vectors, furthest=8 * reach)
    measured = {vector.label: turn_states(encoder, vector, contexts, m) for vector in vectors}
    B = torch.stack([states["update"].amax(dim=(0, 1)) for states in measured.values()]).amax(dim=0)
    S = B.sum()
    result = {"m": m.tolist(), "contexts": len(contexts), "B": B.tolist(), "S": S.item(), "vectors": {}}
    applies = broken = of = 0
    for vector in vectors:
        states = measured[vector.label]
        block_bound = turning_bound(states["length"][..., :-1], B)
        total_bound = turning_bound(states["length"][..., 0], S)
        path = states["block"].sum(dim=-1)
        own = m.tolist().index(vector.norm)
        for value, bound in ((states["block"], block_bound), (states["total"], total_bound), (path, total_bound)):
            of += value.numel()
            applies += int(bound.isfinite().sum())
            broken += int((value > bound + 1e-4).sum())
        result["vectors"][vector.label] = {
            "x0": states["length"][..., 0].mean(dim=0).tolist(),
            "block": states["block"].mean(dim=0).tolist(),
            "mean_block": states["block"].mean(dim=(0, 2)).tolist(),
            "mean_block_bound": finite(block_bound.mean(dim=2).amax(dim=0)),
            "total": states["total"].mean(dim=0).tolist(),
            "path": path.mean(dim=0).tolist(),
            "total_bound": finite(total_bound.amax(dim=0)),
            "own": {
                "mean_block": states["block"][:, own].mean().item(),
                "total": states["total"][:, own].mean().item(),
                "path": path[:, own].mean().item(),
                "blocks": states["block"][:, own].mean(dim=0).tolist(),
                "block_bounds": finite(block_bound[:, own].amax(dim=0)),
                "total_bound": finite(total_bound[:, own].amax(dim=0, keepdim=True))[0],
            },
        }
    return result | {"angles": of, "angles_with_bound": applies, "angles_above_bound": broken}


def finite(values: torch.Tensor) -> list[float | None]:
    """The values as a list, with None where a bound does not apply: JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def whole_words(encoder: TextEncoder) -> list[int]:
    """Rows of the vocabulary that are whole words of letters. If there are fewer than five, all rows."""
    ids = []
    for token, row in encoder.tokenizer.get_vocab().items():
        word = token.removesuffix("</w>")
        if token != word and len(word) > 1 and word.isascii() and word.isalpha() and row < len(encoder.vocabulary):
            ids.append(row)
    return sorted(ids) if len(ids) >= 5 else list(range(len(encoder.vocabulary)))


def draw_prompts(tokenizer, prompts: list[str], words: np.ndarray, count: int, length: int, rng) -> torch.Tensor:
    """Token ids (count, length): concatenated prompts with one to three random words in each, cut at a random place.

    They fill all positions, so that every position has words and not only padding. In practice every prompt begins with
    the start token. Here only half do, so that the classifier cannot know the first position by that token alone.
    """
    pieces = [
        [tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split("{}")] for prompt in prompts
    ]
    rows = []
    for index in range(count):
        ids = []
        offset = int(rng.integers(length))
        while len(ids) < offset + length:
            for number, piece in enumerate(pieces[rng.integers(len(pieces))]):
                ids += rng.choice(words, rng.integers(1, 4)).tolist() if number else []
                ids += piece
        start = [tokenizer.bos_token_id] if index % 2 else []
        rows.append((start + ids[offset:])[:length])
    return torch.tensor(rows)


@torch.enable_grad()
def train_position_classifier(encoder: TextEncoder, prompts: list[str], words: np.ndarray, rng):
    """Fit softmax(W Norm(e + p) + b) to predict the position of a token. Returns a function from (N, d) to positions (N,).

    The authors' notebook has a hidden layer and tests only the first position. This classifier is linear and is tested at
    every position, so its accuracies differ from theirs.
    """
    device, (length, width) = encoder.positions.device, encoder.positions.shape

    def batch() -> torch.Tensor:
        ids = draw_prompts(encoder.tokenizer, prompts, words, CLASSIFIER_PROMPTS, length, rng).to(device)
        return encoder.norm(encoder.vocabulary[ids].float() + encoder.positions).flatten(0, 1)

    labels = torch.arange(length, device=device).repeat(CLASSIFIER_PROMPTS)
    shift, spread = (f(batch(), dim=0) for f in (torch.mean, torch.std))  # the features differ widely in scale
    spread = spread.clamp(min=1e-6)
    W, b = torch.zeros(length, width, device=device), torch.zeros(length, device=device)
    optimizer = torch.optim.Adam([W.requires_grad_(), b.requires_grad_()], lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLASSIFIER_STEPS)
    for _ in range(CLASSIFIER_STEPS):
        loss = F.cross_entropy((batch() - shift) / spread @ W.T + b, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    W, b = W.detach(), b.detach()
    return lambda x: ((x - shift) / spread @ W.T + b).argmax(dim=-1)


def measure_positions(encoder: TextEncoder, vectors: list[Vector], prompts: list[str], seed: int) -> dict:
    """The position classifier's accuracy at all positions, for each direction at `POSITION_NORMS` and at its own norm.

    It is trained on prompts with four fifths of the vocabulary's whole words, without the analysed ones. `held_out` is its
    accuracy on prompts with the other words, `words` the accuracy on up to 200 of them, scaled like the directions.
    """
    rng = np.random.default_rng(seed)
    analysed = {row for vector in vectors for row in (vector.row, vector.initializer_row)}
    words = rng.permutation(whole_words(encoder))
    unseen = np.array([row for row in words[: max(1, len(words) // 5)] if row not in analysed] or words[:1])
    seen = np.array([row for row in words[max(1, len(words) // 5) :] if row not in analysed])
    classify = train_position_classifier(encoder, prompts, seen, rng)
    positions, target = encoder.positions, torch.arange(len(encoder.positions), device=encoder.positions.device)

    def accuracy(embeddings: torch.Tensor) -> float:
        return (
            torch.stack([(classify(encoder.norm(e + positions)) == target).float().mean() for e in embeddings])
            .mean()
            .item()
        )

    ids = draw_prompts(encoder.tokenizer, prompts, unseen, 64, len(positions), rng).to(positions.device)
    guesses = classify(encoder.norm(encoder.vocabulary[ids].float() + positions))
    others = normalize(encoder.vocabulary[torch.tensor(unseen[:200], device=positions.device)].float())
    result = {
        "norms": list(POSITION_NORMS),
        "chance": 1 / len(positions),
        "held_out": (guesses == target).float().mean().item(),
        "words": [accuracy(norm * others) for norm in POSITION_NORMS],
        "vectors": {},
    }
    for vector in vectors:
        v = normalize(vector.value)[None]
        result["vectors"][vector.label] = {
            "accuracy": [accuracy(norm * v) for norm in POSITION_NORMS],
            "own": accuracy(vector.value[None]),
        }
    return result


@torch.no_grad()
def analyse(encoder: TextEncoder, vectors: list[Vector], prompts: list[str], seed: int) -> tuple[dict, dict]:
    """All measurements in one text encoder. Returns them and the large arrays that only the plots need.

    The sweeps over norms cover learned vectors and their initializers, or the words if there are no others.
    """
    norms, all_norms = measure_norms(encoder.vocabulary, vectors)
    initializers, background = measure_initializers(encoder, vectors)
    swept = [vector for vector in vectors if vector.kind != "word"] or vectors
    has_positions = encoder.positions is not None
    result = {
        "width": encoder.vocabulary.shape[1],
        "blocks": len(encoder.layers),
        "norms": norms,
        "neighbours": measure_neighbours(encoder, vectors),
        "initializers": initializers,
        "attenuation": measure_attenuation(encoder, swept, norms["mean"]) if has_positions else None,
        "turning": measure_turning(encoder, swept, prompts, norms["mean"]),
        "positions": measure_positions(encoder, swept, prompts, seed) if has_positions else None,
    }
    return result, {"norms": all_norms, "cosines": background}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Plots
# ----------------------------------------------------------------------------------------------------------------------

STYLE = {
    "figure.figsize": (8.5, 4.4),
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlesize": 10,
    "savefig.bbox": "tight",
}
GREY, BOUND = "0.72", "tab:red"


def choose_colours(vectors: list[Vector]) -> None:
    """Give each vector the colour that it has in all plots. Red is for the bounds."""
    palette = plt.get_cmap("tab10" if len(vectors) <= 10 else "tab20").colors
    palette = [colour for colour in palette if colour != plt.get_cmap("tab10").colors[3]]
    for index, vector in enumerate(vectors):
        vector.colour = palette[index % len(palette)]


def line_style(vector: Vector) -> dict:
    return {"color": vector.colour, "linestyle": "-" if vector.kind == "learned" else "--", "linewidth": 1.8}


def measured(found: dict, vectors: list[Vector]) -> list[tuple[Vector, dict]]:
    """The vectors that a measurement has, each with its entry."""
    return [(vector, found["vectors"][vector.label]) for vector in vectors if vector.label in found["vectors"]]


def draw_curve(axes, vector: Vector, m: list[float], values: list[float], **style) -> None:
    """Plot a quantity of a vector against the norm `m`, with a dot at the vector's own norm."""
    axes.plot(m, values, **line_style(vector), label=plain(vector.label), **style)
    own = np.interp(math.log(vector.norm), np.log(m), values)
    marker = "o" if vector.kind == "learned" else "s"
    axes.plot(vector.norm, own, marker, color=vector.colour, markeredgecolor="black", zorder=4)


def plain(label: str) -> str:
    """Escape a label for matplotlib: a dollar would begin a formula, and a leading "_" would hide it from the legend."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def norm_axis(axes, label: str = "norm m of the embedding") -> None:
    """A logarithmic axis of norms with plain numbers."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    numbers = FuncFormatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_major_formatter(numbers)
    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(numbers if high < 10 * low else NullFormatter())  # within a decade: no other ticks


def plot_norms(axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    norms = extra["norms"]
    bottom, top = min(norms[0], *(v.norm for v in vectors)), max(norms[-1], *(v.norm for v in vectors))
    axes.hist(norms, bins=np.geomspace(bottom * 0.9, top * 1.1, 90), color=GREY, label="vocabulary")
    mean = result["norms"]["mean"]
    axes.axvline(mean, color="black", linewidth=1, linestyle=":", label=f"vocabulary's mean {mean:.3g}")
    for vector in vectors:
        axes.axvline(vector.norm, **line_style(vector), label=plain(f"{vector.label}: {vector.norm:.3g}"))
    norm_axis(axes, "L2 norm of the embedding")
    axes.set_ylabel("vocabulary tokens")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def plot_initializers(axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    for height, (start, cosines) in enumerate(extra["cosines"].items()):
        # One band per initializer: the vocabulary as a line of marks, its nearest tokens by name, learned vectors above.
        axes.scatter(cosines, np.full(len(cosines), height - 0.1), s=14, marker="|", linewidth=0.5, color=GREY)
        for index, token in enumerate(result["neighbours"][start]["cosine"]):
            axes.scatter(token["value"], height - 0.1, s=40, marker="|", color="black", linewidth=1.2)
            place = (token["value"], height - 0.15 - 0.1 * index)
            axes.annotate(plain(token["token"]), place, fontsize=8, ha="center", va="top", annotation_clip=False)
        for vector in vectors:
            found = result["initializers"].get(vector.label)
            if found and found["initializer"] == start:
                label = plain(f"{vector.label}: {found['cosine']:.3f} ({found['degrees']:.1f}°)")
                place = (found["cosine"], height + 0.1)
                axes.scatter(*place, s=60, marker="v", color=vector.colour, label=label, zorder=3)
    names = list(extra["cosines"])
    axes.set_yticks(range(len(names)), map(plain, names))
    axes.set_ylim(-0.75, len(names) - 0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("cosine to the initializer (grey: every vocabulary token; black, named: its nearest)")


def plot_attenuation(axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    found = result["attenuation"]
    bounds = np.array([curve["bound"] for curve in found["vectors"].values()], dtype=float).max(axis=0)
    axes.plot(found["m"], bounds, color=BOUND, linewidth=1.2, linestyle="-.", label="bound of the largest, O(|p|/m)")
    for vector, curve in measured(found, vectors):
        axes.fill_between(found["m"], curve["min"], curve["max"], color=vector.colour, alpha=0.10, linewidth=0)
        draw_curve(axes, vector, found["m"], curve["mean"])
    norm_axis(axes)
    axes.set_yscale("log")
    axes.set_ylabel("|Norm(m v + p) − Norm(m v)|")


def plot_turning(quantity: str, bound: str, axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    found = result["turning"]
    m, curves = found["m"], measured(found, vectors)
    for vector, entry in curves:
        draw_curve(axes, vector, m, entry[quantity])
    columns = zip(*(entry[bound] for _, entry in curves), strict=True)
    worst = [max(column) if None not in column else math.nan for column in columns]
    axes.plot(m, worst, color=BOUND, linewidth=1.2, linestyle="-.", label="bound, where it applies")
    first = next((x for x, value in zip(m, worst, strict=True) if math.isfinite(value)), m[-1])
    axes.axvspan(m[0], first, color="black", alpha=0.05, linewidth=0, label="no bound here")
    norm_axis(axes)
    axes.set_xlim(m[0], m[-1])
    axes.set_yscale("log")
    axes.set_ylim(min(min(entry[quantity]) for _, entry in curves) / 1.5, 400)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylabel("angle, degrees")


def plot_turning_blocks(axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    for vector, entry in measured(result["turning"], vectors):
        own = entry["own"]
        numbers = range(1, len(own["blocks"]) + 1)
        label = plain(f"{vector.label}, m = {vector.norm:.3g}")
        axes.plot(numbers, own["blocks"], marker=".", **line_style(vector), label=label)
        bounds = [math.nan if bound is None else min(bound, 180) for bound in own["block_bounds"]]
        axes.plot(numbers, bounds, "_", color=vector.colour, markersize=14, markeredgewidth=2)
    axes.plot([], [], "_", color="black", markersize=14, markeredgewidth=2, label="bound (180° at most)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("angle, degrees")
    axes.set_ylim(bottom=0)


def plot_positions(axes, result: dict, extra: dict, vectors: list[Vector]) -> None:
    found = result["positions"]
    words = {"color": "black", "linewidth": 4, "alpha": 0.25, "label": "vocabulary words, not trained on"}
    axes.plot(found["norms"], found["words"], **words)
    for vector, curve in measured(found, vectors):
        points = dict(zip(found["norms"], curve["accuracy"], strict=True)) | {vector.norm: curve["own"]}
        draw_curve(axes, vector, *zip(*sorted(points.items()), strict=True), marker=".")
    axes.axhline(found["chance"], color=BOUND, linewidth=1, linestyle=":", label=f"chance, {found['chance']:.3f}")
    norm_axis(axes)
    axes.set_xticks(found["norms"])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("positions read correctly")


PLOTS = {
    "norms": (plot_norms, "norms of the embeddings"),
    "initializer": (plot_initializers, "cosines to the initializers"),
    "attenuation": (
        plot_attenuation,
        "what a position adds to the first LayerNorm's output (mean; shaded: all positions)",
    ),
    "turning": (partial(plot_turning, "total", "total_bound"), "angle from the first to the last hidden state"),
    "turning_mean": (
        partial(plot_turning, "mean_block", "mean_block_bound"),
        "angle by which a block turns the hidden state, mean over the blocks",
    ),
    "turning_blocks": (
        plot_turning_blocks,
        "angle by which each block turns the hidden state, at the vector's own norm",
    ),
    "positions": (plot_positions, "positions that a linear classifier reads from the first LayerNorm's output"),
}


def draw_plots(encoder: str, result: dict, extra: dict, vectors: list[Vector], folder: Path) -> dict[str, Path]:
    """Draw the plots to `<plot>-<encoder>.png`. Returns the paths by the plot's name."""
    missing = {"initializer": "initializers", "attenuation": "attenuation", "positions": "positions"}
    choose_colours(vectors)
    paths = {}
    for name, (draw, title) in PLOTS.items():
        if name in missing and not result[missing[name]]:
            continue
        with plt.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks is drawn as boxes
            size = (8.5, 1.2 + 1.6 * len(extra["cosines"])) if name == "initializer" else None
            figure, axes = plt.subplots(figsize=size)
            draw(axes, result, extra, vectors)
            axes.legend(
                loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0
            )  # room for any number of lines
            axes.set_title(f"{encoder}: {title}", loc="left")
            paths[name] = folder / f"{name}-{encoder}.png"
            figure.savefig(paths[name])
            plt.close(figure)
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# 7. Report
# ----------------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Analysis of learned embeddings</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 14px }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }} h2 {{ border-bottom: 2px solid #222; margin-top: 3rem }} .note {{ color: #666 }}
</style></head><body>
<h1>Analysis of learned embeddings</h1>
{body}
</body></html>
"""
POSITIONS_ABSENT = (
    "Does not apply: this encoder adds no position embeddings to its tokens. Its positions are rotary: they rotate queries"
    " and keys in attention, independently of the norm of the embedding."
)


def table(head: list[str], rows: list[list]) -> str:
    """An HTML table: numbers to the right, texts escaped."""

    def cell(value: str | float | None) -> str:
        if isinstance(value, str):
            return f"<td>{html.escape(value)}</td>"
        return f'<td class="number">{"–" if value is None else f"{value:.4g}"}</td>'

    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head), *("".join(map(cell, row)) for row in rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(path: Path) -> str:
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def section(title: str, text: str | None, plots: list[Path], head: list[str], rows: list[list]) -> list[str]:
    """A heading, a paragraph, the plots and a table; without rows, the text alone."""
    texts = [f"<h3>{title}</h3>"] + ([paragraph(text)] if text else [])
    return texts + ([*map(picture, plots), table(head, rows)] if rows else [])


def norms_section(result: dict, paths: dict) -> list[str]:
    norms = result["norms"]
    rows = [[k, v["kind"], v["norm"], v["times_mean"], v["percentile"]] for k, v in norms["vectors"].items()]
    text = (
        f"The vocabulary has {norms['rows']} tokens with norms of {norms['mean']:.4g} on average (deviation {norms['std']:.2g},"
        f" {norms['min']:.4g} to {norms['max']:.4g}); {norms['zero_rows']} rows are zero and left out."
    )
    head = ["vector", "kind", "norm", "times the mean", "percentile of the vocabulary"]
    return section("Norms", text, [paths["norms"]], head, rows)


def neighbours_section(result: dict, paths: dict) -> list[str]:
    rows = []
    for label, found in result["neighbours"].items():
        lists = (", ".join(f"{t['token']} ({t['value']:.3f})" for t in found[m]) for m in ("cosine", "euclidean"))
        rows.append([label, found["kind"], *lists])
    text = "The nearest tokens of the vocabulary. A token of the vocabulary is not listed as its own neighbour."
    return section("Neighbours", text, [], ["vector", "kind", "by cosine", "by Euclidean distance"], rows)


def initializers_section(result: dict, paths: dict) -> list[str]:
    title, found = "Distance from the initializer", result["initializers"]
    if not found:
        return section(title, "No learned vector has a known initializer: name it by --initializer_token.", [], [], [])
    rows = [[k, v["initializer"], v["cosine"], v["degrees"]] for k, v in found.items()]
    return section(title, None, [paths["initializer"]], ["vector", "initializer", "cosine", "angle, degrees"], rows)


def attenuation_section(result: dict, paths: dict) -> list[str]:
    title, found = "Position after the first LayerNorm", result["attenuation"]
    if found is None:
        return section(title, POSITIONS_ABSENT, [], [], [])
    text = (
        "What a position embedding p adds to the output of the first LayerNorm, |Norm(m v + p) − Norm(m v)|, where the word"
        " has direction v and norm m. Lemma 1: it falls as |p|/m. The bound is 2 max|gain| √d |p| / (m |v|), with p and v"
        " minus their means. Dots mark the vectors' own norms."
    )
    rows = [[k, v["at_own_norm"], v["largest_share_of_bound"]] for k, v in found["vectors"].items()]
    head = ["vector", "at its own norm, mean over positions", "largest share of the bound (at most 1)"]
    return section(title, text, [paths["attenuation"]], head, rows)


def turning_section(result: dict, paths: dict) -> list[str]:
    found = result["turning"]
    text = (
        f"The angle by which the blocks turn the word's hidden state, as the mean of {found['contexts']} contexts."
        " Proposition 1: at most (π/2) B/(|x| − B) for a block whose update is bounded by B, and (π/2) S/(|x0| − S) for all"
        " of them, where S is the sum of their B. Here B is a block's largest measured update, over norms, contexts and"
        f" vectors; the true bound may be larger. S = {found['S']:.4g}. The total bound needs |x0| > S, a block's |x| > B."
        f" It applies to {found['angles_with_bound']} of {found['angles']} measured angles, of which"
        f" {found['angles_above_bound']} exceed it."
    )
    rows = []
    for label, entry in found["vectors"].items():
        own = entry["own"]
        bounded = sum(bound is not None for bound in own["block_bounds"])
        total = own["total_bound"] if own["total_bound"] is not None else "does not apply here"
        blocks = f"{bounded} of {len(own['blocks'])}"
        rows.append([label, own["mean_block"], blocks, own["path"], own["total"], total])
    head = ["vector, at its own norm", "a block, mean, degrees", "blocks with a bound", "sum of blocks, degrees"]
    head += ["first to last state, degrees", "bound of both, degrees"]
    plots = [paths[name] for name in ("turning", "turning_mean", "turning_blocks")]
    return section("Turning of the hidden state", text, plots, head, rows)


def positions_section(result: dict, paths: dict) -> list[str]:
    title, found = "Reading the position", result["positions"]
    if found is None:
        return section(title, POSITIONS_ABSENT, [], [], [])
    text = (
        "The share of positions that a linear softmax classifier reads correctly from the first LayerNorm's output. It is"
        " trained on prompts of vocabulary words at all positions. On prompts of words that it has not seen, its accuracy is"
        f" {100 * found['held_out']:.1f}% (chance: {100 * found['chance']:.1f}%). Each direction is then put at every position"
        " with these norms. The paper's classifier is larger and tested at the first position, so its figures differ."
    )
    rows = [["vocabulary words, not trained on", *found["words"], None]]
    rows += [[label, *entry["accuracy"], entry["own"]] for label, entry in found["vectors"].items()]
    head = ["accuracy at norm", *(f"{norm:g}" for norm in found["norms"]), "its own norm"]
    return section(title, text, [paths["positions"]], head, rows)


SECTIONS = (
    norms_section,
    neighbours_section,
    initializers_section,
    attenuation_section,
    turning_section,
    positions_section,
)


def write_report(args: argparse.Namespace, results: dict[str, dict], paths: dict[str, dict]) -> None:
    """Write report.html, with the plots inside, and analysis.json."""
    about = {
        "model": args.pretrained_model_name_or_path,
        "embeddings": [str(path) for path in args.embeddings],
        "seed": args.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    body = [
        paragraph(
            f"Model: {about['model']}. Embeddings: {', '.join(about['embeddings']) or 'none'}. Seed {args.seed}."
        )
    ]
    key = (
        "In the plots, solid lines and round dots are learned vectors; dashed lines and squares are vocabulary tokens."
    )
    body.append(paragraph(key))
    for name, result in results.items():
        body.append(f"<h2>{name}</h2>")
        body.append(paragraph(f"{result['class']}, {result['blocks']} blocks, width {result['width']}."))
        for make_section in SECTIONS:
            body += make_section(result, paths[name])
    versions = ", ".join(f"{library} {version}" for library, version in about["versions"].items())
    body.append(f'<p class="note">{html.escape(versions)}. Every number is in analysis.json.</p>')
    text = json.dumps(about | {"encoders": results}, indent=1, allow_nan=False)
    (args.output_dir / "analysis.json").write_text(text + "\n", encoding="utf-8")
    (args.output_dir / "report.html").write_text(PAGE.format(body="\n".join(body)), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# 8. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    # Every possible user error is checked before any weight loads.
    args = command_line().parse_args(argv)
    prompts = check_options(args)
    sources, path = read_sources(args), args.pretrained_model_name_or_path
    embeddings = [source.embedding for source in sources]
    family, tokenizers = check_model_fits(path, args.revision, args.embeddings, embeddings, words=[])
    check_words(tokenizers, sources, args.words)
    index = model_index(path, args.revision)

    results, paths = {}, {}
    for name, tokenizer in zip(ENCODERS[family], tokenizers, strict=True):
        cls = index[name][1]
        encoder = load_encoder(args, name, cls, tokenizer)
        vectors = collect_vectors(encoder, sources, args.words)
        print(f"{name}: {len(vectors)} vectors and words", flush=True)
        results[name], extra = analyse(encoder, vectors, prompts, args.seed)
        results[name] = {"class": cls} | results[name]
        try:
            paths[name] = draw_plots(name, results[name], extra, vectors, args.output_dir)
        except OSError as error:
            raise UserError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}.") from None
        del encoder  # only one is in memory at a time
    write_report(args, results, paths)
    print(f"Wrote {args.output_dir / 'report.html'}")


if __name__ == "__main__":
    run(main)
