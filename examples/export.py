#!/usr/bin/env python
"""Convert a learned embedding and its LoRA weights between the formats of diffusers, ComfyUI, AUTOMATIC1111 and others.

    python examples/export.py out/my-dog --output_dir for-the-web-ui --format web a1111
    python examples/export.py downloads/my-dog.pt --output_dir out/my-dog --format diffusers --token "<my-dog>"

The input is a run's output folder or one file. For SDXL's pair, give either file: the other one is found beside it. Formats:

    diffusers  learned_embeds.safetensors, for SDXL also learned_embeds_2.safetensors, for `pipe.load_textual_inversion`
               LoRA: pytorch_lora_weights.safetensors, for `pipe.load_lora_weights`
    web        <token>.safetensors: SDXL clip_l and clip_g, Stable Diffusion 1 and 2 emb_params (ComfyUI, AUTOMATIC1111, Forge,
               InvokeAI); SANA gemma (OneTrainer)
               LoRA: <token>-lora.safetensors, in kohya's naming (the same tools)
    a1111      <token>.pt: SDXL a pickled clip_l and clip_g; the others string_to_param, the web UI's older format
               LoRA: as in web
    bin        learned_embeds.bin, for SDXL also learned_embeds_2.bin, the format of old versions of diffusers; no LoRA
    bundle     <token>-bundle.safetensors, embedding and LoRA in one file (AUTOMATIC1111, SD.Next); not for SANA

All formats can be read too. Vectors are float32, and every format keeps them bit-identical; safetensors files keep their
metadata. Pickles are read with `weights_only`, so a downloaded file cannot run code. An existing file with other vectors is
not overwritten without --overwrite.

The web tools use a file's name as the word, so a web file may have no token: `my-dog.safetensors` is read as "<my-dog>".
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


NAMES = {"sdxl": "Stable Diffusion XL", "sana": "SANA", "sd": "Stable Diffusion 1 or 2"}
ENCODERS = {"sdxl": ("text_encoder", "text_encoder_2"), "sana": ("text_encoder",), "sd": ("text_encoder",)}
WEB_KEYS = {"sdxl": ("clip_l", "clip_g"), "sana": ("gemma",), "sd": ("emb_params",)}
ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base", "sana": "sana", "sd": "stable-diffusion-v1"}
FILES = ("learned_embeds", "learned_embeds_2")  # diffusers' names, in the order of ENCODERS
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
FORMATS = ("diffusers", "web", "a1111", "bin")  # of an embedding alone
SUFFIXES = (".safetensors", ".pt", ".bin")
SD_WIDTHS = (768, 1024)  # of Stable Diffusion 1 and 2; SANA's vectors have 2304 numbers
# Windows opens a device instead of a file with this name, whatever its suffix.
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
# Names of the web file that a tool cannot use as a word, and what the tool does.
NAME_LIMITS = (
    (r"[^a-zA-Z0-9., _-]", "InvokeAI finds only words of a-z, A-Z, 0-9, '.', '_' and '-', so it ignores <{name}>"),
    (r"\b(BREAK|AND)\b", "AUTOMATIC1111 and Forge read {found} as a command, so they ignore {name}"),
    (r"^(?!BREAK$|AND$)[^\W\d_]+$", 'AUTOMATIC1111, Forge and SD.Next replace every "{name}" in a prompt'),
)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Embeddings
# ----------------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """An error in the user's input. The scripts show it as one line without a traceback."""

    def __str__(self) -> str:
        # File names may contain line breaks, control characters and invalid bytes: they are shown escaped.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class EmbeddingError(UserError):
    """An embedding that cannot be read, used or written."""


@dataclass
class Embedding:
    """A learned token.

    Attributes:
        token: the word in prompts, such as "<my-dog>".
        vectors: (n, d) float32 by text encoder: SDXL "text_encoder" and "text_encoder_2", the others only "text_encoder".
        metadata: the metadata in the safetensors file's header, such as "dti.base_model".
    """

    token: str
    vectors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """ "sdxl", "sana" or "sd", by the text encoders, then by metadata (which small models need), then by width."""
        if "text_encoder_2" in self.vectors:
            return "sdxl"
        said = self.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v")
        return "sd" if said or self.vectors["text_encoder"].shape[-1] in SD_WIDTHS else "sana"

    def __len__(self) -> int:
        """The number of vectors."""
        return len(self.vectors["text_encoder"])


@dataclass
class Lora:
    """LoRA weights.

    Attributes:
        kohya: tensors in kohya's naming, which all tools except diffusers read: for each layer down (r, in), up (out, r)
            and alpha (). The layer's output is multiplied by alpha / r.
        diffusers: the same in diffusers' naming, with alpha in the metadata; None if the file does not have this naming.
        token: the word that was learned with them, if it is known.
        metadata: the metadata in the safetensors file's header.
    """

    kohya: dict[str, torch.Tensor]
    diffusers: dict[str, torch.Tensor] | None
    token: str | None
    metadata: dict[str, str]

    @property
    def family(self) -> str:
        """ "sdxl", "sana" or "sd", by the layers' names, then by metadata and by the width of the text embeddings."""
        if any(key.startswith("lora_unet_transformer_blocks_") for key in self.kohya):
            return "sana"
        said = self.metadata.get("modelspec.architecture", "").startswith(
            ("stable-diffusion-v1", "stable-diffusion-v2")
        )
        return "sd" if said or self.text_width in SD_WIDTHS else "sdxl"

    @property
    def text_width(self) -> int | None:
        """The width of the text embeddings that the layers take as input; None if no layer does."""
        widths = (x.shape[1] for key, x in self.kohya.items() if re.search(r"_attn2_to_[kv]\.lora_down\.weight$", key))
        return next(widths, None)

    @property
    def layers(self) -> dict[str, int]:
        """The rank of each layer, by kohya's name."""
        suffix = ".lora_down.weight"
        return {key.removesuffix(suffix): len(x) for key, x in self.kohya.items() if key.endswith(suffix)}

    @property
    def alphas(self) -> list[float]:
        """The layers' distinct alphas."""
        layers = self.layers.items()
        return sorted({float(self.kohya.get(f"{layer}.alpha", rank)) for layer, rank in layers})


def web_name(token: str) -> str:
    """The token as a file name that is valid on any system. The web tools use the file's name as the word.

    It is the token without its angle brackets. If this is not a valid name, a few digits of the token's hash follow, so
    that two different words never get the same name.
    """
    bare = token[1:-1] if token.startswith("<") and token.endswith(">") else token
    name = re.sub(r"[^\w.+-]+", "", bare).strip(".")
    if name and name == bare and not WINDOWS_DEVICES.fullmatch(name):
        return name
    return f"{name.replace('.', '-') or 'word'}-{hashlib.sha256(token.encode()).hexdigest()[:6]}"


def plain_token(text: str) -> str:
    """A token made from `text` that every tool accepts."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-").removeprefix("my-")
    return f"<my-{words or 'word'}>"


def name_notes(token: str, family: str) -> list[str]:
    """One line for each tool that reads the token's files but cannot use the token, with a better token."""
    name, notes = web_name(token), []
    if token not in (name, f"<{name}>"):
        notes.append(f"no file can have this name on every system, so the web tools' word is {name}")
    for pattern, note in NAME_LIMITS if family != "sana" else ():  # OneTrainer takes any
        if found := re.search(pattern, name):
            notes.append(note.format(name=name, found=found[0]))
    return [f"{token}: {note}. {plain_token(token)} avoids this." for note in notes]


def check_token(token: str, said: str = "--token") -> str:
    """Return the token if a prompt and a file name can contain it. Raises EmbeddingError."""
    if not token or re.search(r"[\s\ud800-\udfff]", token):
        raise EmbeddingError(f'{said} {token!r} is not a word without spaces: give one such as "<my-dog>".')
    taken = (*FILES, Path(LORA_FILE).stem)
    if web_name(token).lower() in taken or len(web_name(token).encode()) > 200:
        raise EmbeddingError(f"{said} {token!r} cannot name a file: give another, such as --token '<my-dog>'.")
    return token


def usage_hint(token: str, family: str) -> str:
    """How to write the token: modelspec's `usage_hint`."""
    if family == "sana":
        return f"Write {token} in the prompt."
    name = web_name(token)
    return f"Write {token} in the prompt; in ComfyUI embedding:{name}, in AUTOMATIC1111, Forge and SD.Next {name}."


def renamed_metadata(metadata: dict[str, str], old: str | None, new: str, family: str) -> dict[str, str]:
    """The metadata under another word. Entries that do not contain the old word are unchanged."""
    metadata = dict(metadata)
    if old is not None and metadata.get("modelspec.title", "").startswith(web_name(old)):
        metadata["modelspec.title"] = web_name(new) + metadata["modelspec.title"][len(web_name(old)) :]
    if "modelspec.trigger_phrase" in metadata:
        metadata["modelspec.trigger_phrase"] = new
    if old is not None and "modelspec.usage_hint" in metadata:
        metadata["modelspec.usage_hint"] = metadata["modelspec.usage_hint"].replace(
            usage_hint(old, family), usage_hint(new, family)
        )
    if old is not None and "modelspec.description" in metadata:
        metadata["modelspec.description"] = metadata["modelspec.description"].replace(old, new)
    return metadata


def renamed(embedding: Embedding, token: str) -> Embedding:
    """The same vectors under another word, in the metadata too."""
    metadata = renamed_metadata(embedding.metadata, embedding.token, check_token(token), embedding.family)
    return replace(embedding, token=token, metadata=metadata)


def changed(embedding: Embedding, vectors: dict[str, torch.Tensor], **metadata: str) -> Embedding:
    """Other vectors under the same word, with more metadata, without the old vectors' thumbnail."""
    kept = {key: value for key, value in embedding.metadata.items() if key != "modelspec.thumbnail"}
    return replace(embedding, vectors=vectors, metadata={**kept, **metadata})


# ----------------------------------------------------------------------------------------------------------------------
# 2. Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> tuple[dict, dict[str, str]]:
    """A file's content, unchanged, and its metadata. Raises EmbeddingError."""
    if not os.path.isfile(path):  # reading a pipe would never end
        problem = "is not a file" if os.path.exists(path) else "does not exist"
        raise EmbeddingError(f"{path} {problem}: give a run's output folder, or an embedding's file.")
    if path.suffix.lower() not in SUFFIXES:
        raise EmbeddingError(f"{path} is not one of {', '.join(SUFFIXES)}: give an embedding's file.")
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        # Files of 2022 keep their parameters in a ParameterDict, which is as safe as a dict.
        torch.serialization.add_safe_globals([torch.nn.ParameterDict])
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise EmbeddingError(f"{path} cannot be read as an embedding: {reason}") from None
    if not isinstance(state, dict):
        raise EmbeddingError(f"{path} holds a {type(state).__name__}, not an embedding.")
    return state, {}


def parse_state(state: dict, metadata: dict[str, str], path: Path) -> tuple[str | None, list]:
    """The token, if the file has it, and one matrix for each text encoder in the file. Raises EmbeddingError."""
    if isinstance(state.get("string_to_param"), (dict, torch.nn.ParameterDict)):  # AUTOMATIC1111
        token, step = state.get("name"), state.get("step")
        if isinstance(step, int):
            metadata["dti.steps"] = str(step)
        if isinstance(state.get("sd_checkpoint_name"), str):
            metadata["dti.base_model"] = state["sd_checkpoint_name"]
        parameters = dict(state["string_to_param"])
        if len(parameters) != 1:
            raise EmbeddingError(f"{path} has {len(parameters)} embeddings in string_to_param: it needs exactly one.")
        return token if isinstance(token, str) and token else None, list(parameters.values())
    state, word = unbundled(state, path)
    for keys in WEB_KEYS.values():
        if set(state) == set(keys):
            return metadata.get("modelspec.trigger_phrase", word), [state[key] for key in keys]
    if holds_lora(state):
        raise EmbeddingError(f"{path} holds LoRA weights, not an embedding: give the folder or file of the embedding.")
    if len(state) == 1 and isinstance(next(iter(state)), str):  # diffusers
        return next(iter(state)), list(state.values())
    wanted = "clip_l and clip_g, gemma, emb_params, string_to_param, or exactly one"
    found = ", ".join(map(str, list(state)[:5])) + (", ..." if len(state) > 5 else "")
    raise EmbeddingError(f"{path} has the keys {found or 'of nothing'}: an embedding has {wanted}.")


def holds_lora(keys: Iterable) -> bool:
    """Whether a file with these keys holds LoRA weights, in any naming."""
    return any(isinstance(key, str) and re.search(r"(^|[._])lora[._].*\.", key) for key in keys)


def unbundled(state: dict, path: Path) -> tuple[dict, str | None]:
    """The embedding in a bundle (keys `bundle_emb.NAME.KEY`) by KEY, and its word. Other states are unchanged, with None."""
    bundle = [key.split(".", 2) for key in state if isinstance(key, str) and key.startswith("bundle_emb.")]
    names = {parts[1] for parts in bundle}
    if not bundle:
        return state, None
    if len(names) > 1 or min(map(len, bundle)) < 3:
        raise EmbeddingError(f"{path} bundles {len(names)} embeddings: it needs exactly one.")
    name = names.pop()
    return {key: state[f"bundle_emb.{name}.{key}"] for _, _, key in bundle}, word_of(name)


def embedding_metadata(bundle: dict[str, str]) -> dict[str, str]:
    """The part of a bundle's metadata that applies to its embedding too: they describe its LoRA weights."""
    common = ("modelspec.trigger_phrase", "modelspec.author", "modelspec.date", "modelspec.thumbnail")
    kept = {key: x for key, x in bundle.items() if key in common or key.startswith("dti.")}
    if model := bundle.get("modelspec.architecture", "").removesuffix("/lora"):
        kept["modelspec.architecture"] = f"{model}/textual-inversion"
    return kept


def word_of(name: str) -> str:
    """The token of a file without one, from the file's name."""
    word = re.sub(r"[^\w.+-]+", "-", name).strip(".-")
    return f"<{word or 'word'}>"


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """Both files of SDXL's pair from the name of one, such as `learned_embeds_2-steps-500.safetensors`. None: no pair."""
    match = re.match(r"learned_embeds(_2)?(?=[-.])", path.name)
    if match is None:
        return None
    rest = path.name[match.end() :]
    return path.with_name(FILES[0] + rest), path.with_name(FILES[1] + rest)


def as_rows(matrix: object, path: Path) -> torch.Tensor:
    """A matrix (n, d) in float32, which represents every half-precision number exactly. Raises EmbeddingError."""
    if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point() or matrix.ndim not in (1, 2):
        raise EmbeddingError(f"{path} does not hold rows of floating-point numbers.")
    rows = torch.atleast_2d(matrix.detach()).float().contiguous()
    if not rows.numel() or not rows.isfinite().all() or not rows.norm(dim=-1).all():
        raise EmbeddingError(f"{path} has no vectors, or vectors of zeros, NaN or infinity: it is damaged.")
    return rows.clone()


def list_files(folder: Path) -> list[Path]:
    """The folder's files with a suffix in SUFFIXES, sorted by name. Raises EmbeddingError."""
    try:
        return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise EmbeddingError(f"{folder} cannot be read: {error.strerror}.") from None


def keys_of(path: Path) -> list[str]:
    """The keys of a safetensors file, without loading its tensors. Empty for any other or damaged file."""
    if path.suffix.lower() != ".safetensors" or not os.path.isfile(path):
        return []
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def find_file(folder: Path) -> Path:
    """The embedding's file in a folder: diffusers' name, or the only candidate. Raises EmbeddingError."""
    for suffix in SUFFIXES:
        if os.path.isfile(folder / f"{FILES[0]}{suffix}"):
            return folder / f"{FILES[0]}{suffix}"
    files = [path for path in list_files(folder) if not path.name.startswith("pytorch_")]
    adapters = {path: keys for path in files if holds_lora(keys := keys_of(path))}
    bundles = [path for path, keys in adapters.items() if any(key.startswith("bundle_emb.") for key in keys)]
    files = [path for path in files if path not in adapters] or bundles
    if len(files) != 1:
        found = f"it has {', '.join(p.name for p in files[:5])}: give one of these" if files else "give a run's folder"
        raise EmbeddingError(f"{folder} holds no learned_embeds.safetensors; {found}.")
    return files[0]


def read_embedding(path: Path) -> Embedding:
    """Read a learned token from a run's output folder, or from a file in any of the formats.

    Raises:
        EmbeddingError: if there is none, half of a pair is missing, or the file is damaged.
    """
    path = Path(path)
    path = find_file(path) if os.path.isdir(path) else path
    pair = pair_of(path)
    if pair is not None and path == pair[1]:
        if not os.path.isfile(pair[0]):
            raise EmbeddingError(f"{path} is half of a pair: put {pair[0].name} beside it.")
        path = pair[0]
    state, metadata = read_state(path)
    token, matrices = parse_state(state, metadata, path)
    architecture = metadata.get("modelspec.architecture", "")
    if len(matrices) == 1 and "gemma" not in state and "sana" not in architecture and pair is not None:
        if os.path.isfile(pair[1]):
            second_token, second = parse_state(read_state(pair[1])[0], {}, pair[1])
            if second_token != token:
                raise EmbeddingError(
                    f"{path} has {token!r} and {pair[1].name} has {second_token!r}: they are not a pair."
                )
            matrices += second
        elif architecture.startswith(ARCHITECTURES["sdxl"]):
            raise EmbeddingError(f"{path} is half of a pair: put {pair[1].name} beside it.")
    rows = [as_rows(matrix, path) for matrix in matrices]
    if len(rows) == 1 and rows[0].shape[-1] == 1280:
        raise EmbeddingError(f"{path} has vectors of width 1280: the second half of SDXL's pair, without the first.")
    if len({len(matrix) for matrix in rows}) != 1:
        counts = " and ".join(str(len(matrix)) for matrix in rows)
        raise EmbeddingError(f"{path}: its text encoders have {counts} vectors, and need the same number.")
    if any(key.startswith("bundle_emb.") for key in state if isinstance(key, str)):
        metadata = embedding_metadata(metadata)
    if WEB_KEYS["sd"][0] in state:
        metadata.setdefault("modelspec.architecture", ARCHITECTURES["sd"])
    token = check_token(token if token else word_of(path.stem), f"{path}: the token")
    return Embedding(token, dict(zip(("text_encoder", "text_encoder_2"), rows, strict=False)), metadata)


# ----------------------------------------------------------------------------------------------------------------------
# 3. LoRA
# ----------------------------------------------------------------------------------------------------------------------


def told_alpha(module: str, rank: int, config: dict) -> float:
    """A layer's alpha from PEFT's configuration in the header; without one the rank, as in diffusers."""
    part, layer = module.split(".", 1)
    alpha = config.get(f"{part}.lora_alpha", rank)
    for pattern, other in (config.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = other
            break
    return alpha * math.sqrt(rank) if config.get(f"{part}.use_rslora") else alpha


def to_kohya(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Rename LoRA weights from diffusers' naming, `unet.down_blocks.1.[...].lora_A.weight`, to kohya's.

    That is `lora_unet_down_blocks_1_[...].lora_down.weight` and `.lora_up.weight`, with an `.alpha` for each layer: the
    tools scale by alpha / rank. (diffusers' convert_state_dict_to_kohya always writes the rank as alpha.)
    """
    cross = [x for key, x in state.items() if re.search(r"attn2\.to_[kv]\.lora_A", key)]
    only = bool(cross) and cross[0].shape[1] in SD_WIDTHS  # one text encoder
    prefixes = {"unet": "lora_unet", "transformer": "lora_unet"}  # for any denoiser
    prefixes |= {"text_encoder": "lora_te" if only else "lora_te1", "text_encoder_2": "lora_te2"}
    kohya = {}
    for key, x in state.items():
        module, letter = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key).groups()
        part, layer = module.split(".", 1)
        name = f"{prefixes[part]}_{layer.replace('.', '_')}"
        kohya[f"{name}.lora_{'down' if letter == 'A' else 'up'}.weight"] = x.contiguous()
        if letter == "A":
            kohya[f"{name}.alpha"] = torch.tensor(float(told_alpha(module, len(x), config)))
    return kohya


def read_lora(path: Path) -> Lora:
    """Read LoRA weights in diffusers' or kohya's naming, also from a bundle. Raises EmbeddingError."""
    state, metadata = read_state(path)
    _, word = unbundled(state, path)
    state = {key: x for key, x in state.items() if not str(key).startswith("bundle_emb.")}
    if not holds_lora(state):
        raise EmbeddingError(f"{path} holds no LoRA weights.")
    named = r"(unet|transformer|text_encoder(_2)?)\..+\.lora_[AB]\.weight"
    odd = {key for key in state if not re.fullmatch(named, key)}
    foreign = {key for key in state if not re.match(r"lora_(unet|te|te1|te2)_[^.]+\.", key)}
    if odd and foreign:
        raise EmbeddingError(
            f"{path} holds LoRA weights in an unknown naming, such as {min(odd & foreign or odd)}: "
            "load it with diffusers and save it by save_lora_weights."
        )
    if odd:
        lora = Lora(state, None, metadata.get("modelspec.trigger_phrase", word), metadata)
    else:
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            kohya = to_kohya(state, config)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise EmbeddingError(f"{path}: lora_adapter_metadata in its header is damaged: {error}") from None
        lora = Lora(kohya, state, metadata.get("modelspec.trigger_phrase"), metadata)
    check_lora(lora, path)
    return lora


def check_lora(lora: Lora, path: Path) -> None:
    """Refuse damaged weights. Raises EmbeddingError."""
    for name, rank in lora.layers.items():
        down, up = lora.kohya[f"{name}.lora_down.weight"], lora.kohya.get(f"{name}.lora_up.weight")
        if up is None or up.ndim < 2 or up.shape[1] != rank or not (down.isfinite().all() and up.isfinite().all()):
            raise EmbeddingError(f"{path} is damaged: {name} lacks a matrix, or has one that is not finite.")
    if not lora.layers:
        raise EmbeddingError(f"{path} holds adapters of another kind, not LoRA.")


def find_lora(folder: Path) -> Path | None:
    """The LoRA weights' file in a folder: diffusers' name, or the first file with LoRA weights."""
    if os.path.isfile(folder / LORA_FILE):
        return folder / LORA_FILE
    return next((path for path in list_files(folder) if holds_lora(keys_of(path))), None)


def read_both(path: Path) -> tuple[Embedding | None, Lora | None]:
    """The embedding and the LoRA weights of a folder or file; None for what it does not have. Raises EmbeddingError."""
    file = find_lora(path) if os.path.isdir(path) else path
    keys = keys_of(file) if file else []
    if not holds_lora(keys):
        return read_embedding(path), None
    lora = read_lora(file)
    alone = not any(key.startswith("bundle_emb.") for key in keys)
    if os.path.isdir(path):
        alone = all(holds_lora(keys_of(p)) for p in list_files(path)) and alone
    return None if alone else read_embedding(path), lora


# ----------------------------------------------------------------------------------------------------------------------
# 4. Writing
# ----------------------------------------------------------------------------------------------------------------------


def header(embedding: Embedding) -> dict[str, str]:
    """The metadata of the token's files by the modelspec standard: what was read, plus missing entries."""
    token, family = embedding.token, embedding.family
    architecture = ARCHITECTURES[family]
    if family == "sd" and embedding.vectors["text_encoder"].shape[-1] == 1024:
        architecture = "stable-diffusion-v2-512"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/textual-inversion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": web_name(token),
        "modelspec.description": f"{token} is a learned word for {NAMES[family]}.",
        "modelspec.usage_hint": usage_hint(token, family),
        **embedding.metadata,
        "modelspec.trigger_phrase": token,
    }


def lora_header(lora: Lora, name: str) -> dict[str, str]:
    """The metadata of LoRA weights in diffusers' naming, in files with this `name`."""
    architecture = "stable-diffusion-v2-512" if lora.text_width == 1024 else ARCHITECTURES[lora.family]
    told = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{name}-lora",
        "modelspec.description": f"LoRA weights for {NAMES[lora.family]}.",
    }
    if lora.token is not None:
        told["modelspec.description"] = f"LoRA weights for {NAMES[lora.family]}, trained with the word {lora.token}."
        told["modelspec.usage_hint"] = f"Load the word's embedding too. {usage_hint(lora.token, lora.family)}"
        told["modelspec.trigger_phrase"] = lora.token
    return {**told, **lora.metadata}


def kohya_header(lora: Lora, name: str) -> dict[str, str]:
    """The metadata of LoRA weights in kohya's naming, with the entries that AUTOMATIC1111 and kohya's tools need."""
    # diffusers refuses a file with both alphas and this entry.
    told = {key: value for key, value in lora_header(lora, name).items() if key != "lora_adapter_metadata"}
    if lora.family == "sana":
        return told
    ranks, alphas = sorted(set(lora.layers.values())), lora.alphas
    # Without the base model's version, AUTOMATIC1111 assumes Stable Diffusion 1 and hides the file from SDXL.
    version = "sdxl_base_v1-0" if lora.family == "sdxl" else "sd_v2" if lora.text_width == 1024 else "sd_v1"
    network = {
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_v2": str(version == "sd_v2"),
    }
    network["ss_network_dim"] = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    network["ss_network_alpha"] = f"{alphas[0]:g}" if len(alphas) == 1 else "Dynamic"
    return {**network, **told}


def states(embedding: Embedding, formats: Iterable[str]) -> dict[str, dict]:
    """The content of each file of the formats, by file name. Raises EmbeddingError for an unknown format."""
    rows = [embedding.vectors[name].detach().cpu().float().contiguous() for name in ENCODERS[embedding.family]]
    web = dict(zip(WEB_KEYS[embedding.family], rows, strict=True))
    name, files = web_name(embedding.token), {}
    for form in formats:
        if form in ("diffusers", "bin"):
            suffix = ".safetensors" if form == "diffusers" else ".bin"
            pairs = zip(FILES, rows, strict=False)  # only SDXL has two files
            files |= {f"{file}{suffix}": {embedding.token: matrix} for file, matrix in pairs}
        elif form == "web":
            files[f"{name}.safetensors"] = web
        elif form == "a1111" and embedding.family == "sdxl":  # it expects exactly clip_l and clip_g
            files[f"{name}.pt"] = web
        elif form == "a1111":
            steps = embedding.metadata.get("dti.steps", "")
            files[f"{name}.pt"] = {
                "string_to_token": {"*": 265},  # the id of "*" in CLIP, as the web UI writes it
                "string_to_param": {"*": rows[0]},
                "name": embedding.token,
                "step": int(steps) if steps.isdecimal() else None,
                "sd_checkpoint": None,
                "sd_checkpoint_name": embedding.metadata.get("dti.base_model"),
            }
        else:
            raise EmbeddingError(f"{form!r} is not a format: choose from {', '.join(FORMATS)}.")
    return files


def tensors_of(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of a state by name, including those in string_to_param."""
    inner = state.get("string_to_param")
    inner = {**state, **inner} if isinstance(inner, (dict, torch.nn.ParameterDict)) else state
    return {key: value for key, value in inner.items() if isinstance(value, torch.Tensor)}


def holds(path: Path, state: dict, metadata: dict[str, str]) -> bool:
    """Whether the file has exactly the tensors of `state`, and the same LoRA alphas in its metadata."""
    try:
        content, told = read_state(path)
        found, wanted = tensors_of(content), tensors_of(state)
    except EmbeddingError:
        return False
    same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    return same and told.get("lora_adapter_metadata") == metadata.get("lora_adapter_metadata")


def write_files(contents: dict[Path, bytes]) -> None:
    """Write all files under temporary names, then rename them: an interruption never leaves partial files. Raises UserError."""
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(content)
        for path in contents:
            temporary[path].replace(path)
    except OSError as error:
        for file in temporary.values():
            with contextlib.suppress(OSError):
                file.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}. Existing files are unchanged.") from None


def check_output_dir(folder: Path) -> None:
    """Make the folder and check that it is writable, before the work starts. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be written to: {error.strerror}. Choose another folder."
        ) from None


def to_bytes(name: str, state: dict, metadata: dict[str, str]) -> bytes:
    """The file's bytes. A safetensors file gets modelspec's hash of its tensors in the metadata."""
    if not name.endswith(".safetensors"):
        torch.save(state, buffer := io.BytesIO())
        return buffer.getvalue()
    content = save(state)
    tensors = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    return save(state, metadata={**metadata, "modelspec.hash_sha256": f"0x{hashlib.sha256(tensors).hexdigest()}"})


def write_states(files: dict[Path, tuple[dict, dict[str, str]]], overwrite: bool = False) -> None:
    """Write each file's tensors and metadata. A file that already holds these tensors is not changed.

    Raises:
        EmbeddingError: before anything is written, if an existing file has other tensors, unless `overwrite`.
        UserError: if the folder is not writable.
    """
    new = {path: content for path, content in files.items() if not holds(path, *content)}
    taken = [path for path in new if os.path.lexists(path)]
    if taken and not overwrite:
        raise EmbeddingError(f"{taken[0]} exists with other content: choose another folder, or add --overwrite.")
    write_files({path: to_bytes(path.name, *content) for path, content in new.items()})


def embedding_files(
    embedding: Embedding, folder: Path, formats: Iterable[str]
) -> dict[Path, tuple[dict, dict[str, str]]]:
    """Tensors and metadata of the token's files. Raises EmbeddingError for unusable vectors or an unusable token."""
    check_token(embedding.token, "the token")
    if tuple(embedding.vectors) not in ENCODERS.values():
        raise EmbeddingError(
            f"{embedding.token} has vectors for {', '.join(embedding.vectors)}: no known model has these."
        )
    for matrix in embedding.vectors.values():
        as_rows(matrix, Path(embedding.token))
    metadata = header(embedding)
    return {Path(folder) / name: (state, metadata) for name, state in states(embedding, formats).items()}


def lora_files(lora: Lora, name: str, folder: Path, formats: Iterable[str]) -> dict[Path, tuple[dict, dict[str, str]]]:
    """Tensors and metadata of the LoRA weights' files, for the formats that support them."""
    files = {}
    if "diffusers" in formats and lora.diffusers is not None:
        files[folder / LORA_FILE] = (lora.diffusers, lora_header(lora, name))
    if "web" in formats or "a1111" in formats:
        files[folder / f"{name}-lora.safetensors"] = (lora.kohya, kohya_header(lora, name))
    return files


def bundle_file(embedding: Embedding, lora: Lora, folder: Path) -> dict[Path, tuple[dict, dict[str, str]]]:
    """Embedding and LoRA weights in one file, for AUTOMATIC1111, SD.Next and OneTrainer. Raises EmbeddingError."""
    name = web_name(embedding.token)
    if embedding.family == "sana":
        raise EmbeddingError("--format bundle: no tool reads a bundle for SANA. Choose another format.")
    if "." in name:  # the keys use it as a separator
        raise EmbeddingError(
            f"--format bundle: the word {name} must not contain a full stop: add --token '{plain_token(embedding.token)}'."
        )
    keys = zip(WEB_KEYS[embedding.family], ENCODERS[embedding.family], strict=True)
    rows = {key: embedding.vectors[encoder] for key, encoder in keys}
    state = lora.kohya | {f"bundle_emb.{name}.{key}": matrix.contiguous() for key, matrix in rows.items()}
    return {folder / f"{name}-bundle.safetensors": (state, kohya_header(lora, name))}


def write_embedding(
    embedding: Embedding, folder: Path, formats: Iterable[str] = ("diffusers", "web"), overwrite: bool = False
) -> list[Path]:
    """Write the token's files to `folder`, with the training scripts' names. Returns their paths.

    Raises:
        EmbeddingError: for unusable vectors or an unusable token, and as in `write_states`.
        UserError: if the folder is not writable.
    """
    files = embedding_files(embedding, folder, formats)
    write_states(files, overwrite)
    return list(files)


def markdown_table(names: list[str], rows: list[list[str]]) -> str:
    rows = [[str(text).replace("|", "\\|") for text in row] for row in [names, ["---"] * len(names), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Command line
# ----------------------------------------------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with short errors: one line of usage and one line with the error."""
    return argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options] (--help explains them)",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class ForgivingStream:
    """Standard output or error, but that writing to it never raises and so never ends a run.

    What its encoding lacks is escaped, and what nobody reads any more, as after `| head`, is dropped.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def forgive_output() -> None:
    """Let no print and no log message raise, this script's or a library's, whatever the terminal is."""
    sys.stdout, sys.stderr = (x and ForgivingStream(x) for x in (sys.stdout, sys.stderr))


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. A UserError ends it with one line and status 1, Ctrl-C with status 130."""
    name = Path(sys.argv[0]).name
    forgive_output()
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "input", type=Path, help="A run's output folder, or a file of an embedding or of LoRA weights."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Output folder.")
    choices = [*FORMATS, "bundle"]
    parser.add_argument("--format", nargs="+", choices=choices, default=["diffusers", "web"], help="Formats to write.")
    parser.add_argument("--token", default=None, help="New word for the embedding.")
    parser.add_argument("--overwrite", action="store_true", help="Replace existing files with other content.")
    return parser


def lora_name(lora: Lora, path: Path) -> str:
    """The name for files of LoRA weights: from their word, or else from their file or its folder."""
    if lora.token is not None:
        return web_name(lora.token)
    generic = path.stem.startswith(Path(LORA_FILE).stem)
    stem = path.resolve().name if os.path.isdir(path) else path.resolve().parent.name if generic else path.stem
    return web_name(word_of(stem.removesuffix("-lora")))


def describe(embedding: Embedding | None, lora: Lora | None) -> Iterator[str]:
    """Lines that describe the input."""
    if embedding is not None:
        widths = " and ".join(f"{len(rows)} x {rows.shape[-1]}" for rows in embedding.vectors.values())
        yield f"{embedding.token}: {embedding.family}, {widths}"
    if lora is not None:
        ranks = ", ".join(map(str, sorted(set(lora.layers.values()))))
        yield f"LoRA: {lora.family}, {len(lora.layers)} layers, rank {ranks}, alpha {', '.join(f'{a:g}' for a in lora.alphas)}"


def readers(path: Path, family: str) -> str:
    """The tools that read a written file, and how to use it there."""
    name = path.stem
    if name in FILES:
        return "diffusers: pipe.load_textual_inversion"
    if path.name == LORA_FILE:
        return "diffusers: pipe.load_lora_weights"
    if family == "sana":
        return "OneTrainer"
    if name.endswith("-bundle"):
        return f"AUTOMATIC1111, SD.Next: <lora:{name}:1> and the word {name.removesuffix('-bundle')} in the prompt"
    if name.endswith("-lora"):
        return (
            f"LoRA for ComfyUI, InvokeAI, Fooocus, kohya, OneTrainer; AUTOMATIC1111, Forge, SD.Next: <lora:{name}:1>"
        )
    if path.suffix == ".pt":
        return f"AUTOMATIC1111: {name}"
    return f"ComfyUI, Fooocus: embedding:{name}; AUTOMATIC1111, Forge, SD.Next: {name}; InvokeAI: <{name}>"


def left_out(lora: Lora, formats: list[str]) -> Iterator[str]:
    """Lines that say which formats do not get the LoRA weights, and why."""
    if "bin" in formats:
        yield "the bin format has no LoRA weights, so they are not written in it."
    if "diffusers" in formats and lora.diffusers is None:
        yield (
            "kohya's naming of LoRA weights cannot be converted to diffusers', so they are not written in that format"
            + (": pipe.load_lora_weights reads the original file." if lora.family != "sana" else ".")
        )


def main() -> None:
    args = command_line().parse_args()
    embedding, lora = read_both(args.input)
    if "bundle" in args.format and (embedding is None or lora is None):
        missing = "embedding" if embedding is None else "LoRA weights"
        raise UserError(
            f"--format bundle: {args.input} has no {missing}. Give a folder with an embedding and LoRA weights."
        )
    if embedding is not None and lora is not None and embedding.family != lora.family:
        raise UserError(f"{args.input} has an embedding for {embedding.family} and LoRA weights for {lora.family}.")
    token = check_token(args.token) if args.token else embedding.token if embedding else None
    if embedding is not None:
        embedding = renamed(embedding, token)
    if lora is not None and token is not None:
        lora = replace(lora, token=token, metadata=renamed_metadata(lora.metadata, lora.token, token, lora.family))

    family, files = (embedding or lora).family, {}
    if embedding is not None:
        files |= embedding_files(embedding, args.output_dir, [x for x in args.format if x != "bundle"])
    if lora is not None:
        files |= lora_files(lora, lora_name(lora, args.input), args.output_dir, args.format)
    if "bundle" in args.format:
        files |= bundle_file(embedding, lora, args.output_dir)
    notes = [*(name_notes(token, family) if embedding else ()), *(left_out(lora, args.format) if lora else ())]
    if not files:
        raise UserError(f"There is nothing to write: {' '.join(notes)}")
    write_states(files, args.overwrite)
    print(*describe(embedding, lora), sep="\n")
    for path in files:
        print(f"{path}  ({readers(path, family)})")
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
