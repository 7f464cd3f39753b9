#!/usr/bin/env python
"""Measure what of the paper's Lemma 1 and Proposition 1 holds in text encoders of other kinds than CLIP's.

    python examples/encoders.py --output_dir encoders

A word gets 1 to 50 times the mean norm of the encoder's vocabulary, behind a few texts. Measured are

    position   what the position changes in the output of the first norm, as a share of it (Lemma 1), where position
               embeddings are added to the word
    state      the norm of the state that enters the first block, as a multiple of what it is at the mean norm
    turning    the angle by which a block turns the word's hidden state, mean over the blocks (Proposition 1)
    context    the angle between the word's last states behind two texts: what it takes in of the words before it

The miniature world's encoders are trained. One encoder of each kind, built from transformers' configurations, has random
weights: it shows what the layout does, not what training makes of it. `--models` adds trained encoders from folders or the
Hub, such as google-t5/t5-base or google-bert/bert-base-uncased.

Written to --output_dir: `encoders.md`, `encoders.json` and `encoders.png`. Takes less than a minute on a CPU.
"""

import argparse
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from analyze import (
    STYLE,
    TextEncoder,
    angle,
    attenuation,
    finite,
    hidden_states,
    norm_axis,
    normalize,
    plt,
    turning_bound,
    word_ids,
)
from export import UserError, check_output_dir, make_parser, markdown_table, run, write_files
from generate import number as at_least
from rescale import one_line
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer


MINIATURE = Path(__file__).resolve().parent / "miniature"
TIMES = (1, 2, 5, 10, 20, 50)  # the word's norm / the vocabulary's mean
WORDS = ("fish", "star", "house", "heart", "flower")
CONTEXTS = ("a photo of a", "a pencil sketch of a", "in the snow, a", "a small red square left of a")

# The kinds by their configurations' model_type: name, norms, positions, transformers' class and its configuration.
KINDS = {
    "clip_text_model": ("CLIP", "before", "added", "CLIPTextModel", "CLIPTextConfig"),
    "t5": ("T5", "before", "relative", "T5EncoderModel", "T5Config"),
    "gemma2": ("Gemma-2", "before and after", "rotary", "Gemma2Model", "Gemma2Config"),
    "gemma3_text": ("Gemma-3", "before and after", "rotary", "Gemma3TextModel", "Gemma3TextConfig"),
    "bert": ("BERT", "of the stream", "added", "BertModel", "BertConfig"),
}
WIDTH, BLOCKS, HEADS = 128, 6, 4  # of the encoders with random weights
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
SHAPE |= {"intermediate_size": 4 * WIDTH, "initializer_range": WIDTH**-0.5}  # the usual 0.02 is for wider encoders
SHAPE |= {"num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS, "pad_token_id": 0}
T5_SHAPE = {"d_model": WIDTH, "d_ff": 4 * WIDTH, "d_kv": WIDTH // HEADS, "num_layers": BLOCKS, "num_heads": HEADS}


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=[], metavar="PATH", help="Further encoders with trained weights: folders or Hub ids of CLIP, T5, Gemma-2, Gemma-3 or BERT.")
    add("--words", nargs="+", default=list(WORDS), metavar="WORD", help=f"Words to grow; of a word with several tokens, its first. Default: {' '.join(WORDS)}.")
    add("--output_dir", type=Path, required=True, help="Output folder.")
    add("--seed", type=at_least(int, 0), default=0, help="Seed of the random weights.")
    return parser
# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# 1. Encoders
# ----------------------------------------------------------------------------------------------------------------------


def with_parts(name: str, model: torch.nn.Module, tokenizer) -> TextEncoder:
    """The model with its blocks and, where positions are added to the word, the norm that follows and the positions."""
    model.requires_grad_(False).eval()
    if model.config.model_type == "t5":
        model = model.get_encoder()  # T5EncoderModel's own embeddings are a second module, which forward does not call
    count = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    norm = positions = None
    if model.config.model_type == "clip_text_model":
        norm = layers[0].layer_norm1
        positions = next(m.weight for n, m in model.named_modules() if n.endswith("position_embedding"))
    elif model.config.model_type == "bert":  # which also adds a constant, the embedding of the first of two texts
        norm, added = model.embeddings.LayerNorm, model.embeddings.token_type_embeddings.weight[0]
        positions = model.embeddings.position_embeddings.weight + added
    vocabulary = model.get_input_embeddings().weight
    return TextEncoder(name, model, tokenizer, vocabulary, layers, norm, positions, scale=1.0)


def random_encoder(kind: str, tokenizer, seed: int) -> TextEncoder:
    """A small encoder with the weights that transformers initialises."""
    name, _, _, cls, config = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, config)(vocab_size=len(tokenizer), **(T5_SHAPE if kind == "t5" else SHAPE))
    return with_parts(f"{name}, random", getattr(transformers, cls)(config), tokenizer)


@dataclass
class Trained:
    """A trained encoder before its weights load: its name in the report, kind, folder or Hub id, and tokenizer."""

    name: str
    kind: str
    path: str | Path
    tokenizer: object

    def load(self) -> TextEncoder:
        """Raises UserError."""
        cls = getattr(transformers, KINDS[self.kind][3])
        try:
            model = cls.from_pretrained(self.path, torch_dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"--models {self.path} cannot be loaded: {one_line(error)}") from None
        return with_parts(self.name, model, self.tokenizer)


def find_trained(args: argparse.Namespace) -> list[Trained]:
    """The miniature's encoders and those of --models, without their weights. Raises UserError."""
    found = []
    for folder, part, name in (
        ("sdxl", "text_encoder", "the miniature SDXL's first"),
        ("sdxl", "text_encoder_2", "the miniature SDXL's second"),
        ("sana", "text_encoder", "the miniature SANA's"),
    ):
        cls, kind = (CLIPTokenizer, "clip_text_model") if folder == "sdxl" else (AutoTokenizer, "gemma2")
        tokenizer = cls.from_pretrained(MINIATURE / folder / part.replace("text_encoder", "tokenizer"))
        found.append(Trained(f"{KINDS[kind][0]}, {name}", kind, MINIATURE / folder / part, tokenizer))
    for path in args.models:
        try:
            kind = AutoConfig.from_pretrained(path).model_type
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--models {path} cannot be loaded: {one_line(error)}") from None
        if kind not in KINDS:
            known = ", ".join(kind for kind, *_ in KINDS.values())
            raise UserError(f"--models {path} is of the kind {kind}: give an encoder of these kinds: {known}.")
        found.append(Trained(f"{KINDS[kind][0]}, {Path(path).name}", kind, path, tokenizer))
    for trained in found:
        for word in args.words:
            word_ids(trained.tokenizer, word, "--words")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 2. Measurements
# ----------------------------------------------------------------------------------------------------------------------


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text before the word: with the token that begins a text, if there is one, and none that ends it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    return [start] * (start is not None) + tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def measure(encoder: TextEncoder, words: list[str]) -> dict:
    """The measurements of an encoder: lists over TIMES, means over words, contexts and blocks."""
    norms = encoder.vocabulary.norm(dim=-1)
    m = norms[norms > 0].mean() * torch.tensor(TIMES, dtype=torch.float32)
    contexts = [text_ids(encoder.tokenizer, text) for text in CONTEXTS]
    rows = {word_ids(encoder.tokenizer, word, "--words")[0] for word in words}
    directions = [normalize(encoder.vocabulary[row]) for row in sorted(rows)]
    # x (W, C, M, L + 1, d): of each word in each context at each norm, before and after each block
    grown = [m[:, None] * v for v in directions]
    x = torch.stack([torch.stack([hidden_states(encoder, ids, e) for ids in contexts]) for e in grown]).double()
    length, update = x.norm(dim=-1), (x[..., 1:, :] - x[..., :-1, :]).norm(dim=-1)
    turned = angle(x[..., 1:, :], x[..., :-1, :])
    B = update.amax(dim=(0, 1, 2))  # of each block, as in analyze.py: the true bound may be larger
    bound = turning_bound(length[..., :-1], B)
    last = x[..., -1, :]
    apart = [angle(last[:, a], last[:, b]) for a, b in itertools.combinations(range(len(contexts)), 2)]
    kind = KINDS[encoder.model.config.model_type]
    result = {"name": encoder.name, "norms": kind[1], "positions": kind[2], "blocks": len(encoder.layers)}
    result |= {"width": x.shape[-1], "mean_norm": m[0].item(), "position": None}
    if encoder.positions is not None:
        shares = []
        for v in directions:
            alone = encoder.norm(m[:, None] * v).norm(dim=-1, keepdim=True)
            shares.append(attenuation(encoder.norm, v, encoder.positions, m) / alone)
        result["position"] = torch.stack(shares).mean(dim=(0, 2)).tolist()
    state = length[..., 0].mean(dim=(0, 1))
    return result | {
        "state": (state / state[0]).tolist(),
        "update": update.mean(dim=(0, 1, 3)).tolist(),
        "turning": turned.mean(dim=(0, 1, 3)).tolist(),
        "bound": finite(bound.mean(dim=3).amax(dim=(0, 1))),
        "above_bound": int((turned > bound + 1e-4).sum()),
        "context": torch.stack(apart).mean(dim=(0, 1)).tolist(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# 3. Report
# ----------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "position": "position's share",
    "state": "norm of the state",
    "turning": "turning of a block, degrees",
    "context": "between two contexts, degrees",
}


def change(values: list[float] | None) -> str:
    """A quantity at 1, 10 and 50 times the mean norm."""
    return "none is added" if values is None else " / ".join(f"{values[TIMES.index(t)]:.3g}" for t in (1, 10, 50))


def to_markdown(results: list[dict], args: argparse.Namespace) -> str:
    names = ["encoder", "norms", "positions", *COLUMNS.values()]
    rows = [[r["name"], r["norms"], r["positions"], *(change(r[c]) for c in COLUMNS)] for r in results]
    above = sum(r["above_bound"] for r in results)
    text = f"""# Text encoders of other kinds

Each cell has a word at 1, 10 and 50 times the mean norm of its vocabulary: means over the words {", ".join(args.words)}, {len(CONTEXTS)}
texts before them, positions and blocks. *Before*: x + F(Norm(x)). *Before and after*: x + Norm(F(Norm(x))). *Of the stream*:
Norm(x + F(x)). The norm of the state that enters the first block is a multiple of its norm at 1. The random encoders have
{BLOCKS} blocks of width {WIDTH} and seed {args.seed}. {above} of the angles are above the bound of Proposition 1.

{markdown_table(names, rows)}

![the position's share, turning and context against the norm](encoders.png)
"""
    return text + f"\ntorch {torch.__version__}, transformers {transformers.__version__}.\n"


def draw(results: list[dict]) -> bytes:
    """A panel for each quantity against the norm: solid lines are trained encoders, dashed ones have random weights."""
    panels = {"position": "position's share after the first norm"}
    panels |= {"turning": "turning of a block, degrees", "context": "angle between two contexts, degrees"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
        kinds = [kind[0] for kind in KINDS.values()]
        for panel, (quantity, title) in zip(axes, panels.items(), strict=True):
            for result in results:
                if result[quantity] is not None:
                    colour = f"C{kinds.index(result['name'].split(',')[0])}"
                    line = "--" if result["name"].endswith("random") else "-"
                    panel.plot(TIMES, result[quantity], line, marker=".", color=colour, label=result["name"])
            norm_axis(panel, "norm of the word / vocabulary's mean")
            panel.set_yscale("log" if quantity == "position" else "linear")
            panel.set_title(title, loc="left")
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        figure.savefig(content := io.BytesIO(), format="png", dpi=80)
        plt.close(figure)
    return content.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = command_line().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_output_dir(args.output_dir)
    trained = find_trained(args)
    results = [measure(encoder.load(), args.words) for encoder in trained]
    results += [measure(random_encoder(kind, trained[0].tokenizer, args.seed), args.words) for kind in KINDS]
    content = json.dumps({"times": TIMES, "words": args.words, "encoders": results}, indent=1) + "\n"
    files = {
        "encoders.md": to_markdown(results, args).encode(),
        "encoders.json": content.encode(),
        "encoders.png": draw(results),
    }
    write_files({args.output_dir / name: data for name, data in files.items()})
    print(f"Wrote {args.output_dir / 'encoders.md'}")


if __name__ == "__main__":
    run(main)
