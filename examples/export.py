#!/usr/bin/env python
"""Convert a learned embedding between the formats of diffusers, ComfyUI, AUTOMATIC1111, OneTrainer and others.

    python examples/export.py out/my-dog --output_dir for-the-web-ui --format web a1111
    python examples/export.py downloads/my-dog.pt --output_dir out/my-dog --format diffusers --token "<my-dog>"

The input is a run's output folder or one file; of SDXL's pair either file will do, its partner beside it is found. Formats:

    diffusers  learned_embeds.safetensors, SDXL: and learned_embeds_2.safetensors, for `pipe.load_textual_inversion`
    web        <token>.safetensors: SDXL clip_l and clip_g, Stable Diffusion 1 and 2 emb_params (ComfyUI, AUTOMATIC1111, Forge,
               InvokeAI); SANA gemma (OneTrainer)
    a1111      <token>.pt: SDXL a pickled clip_l and clip_g; the others string_to_param, as the web UI's older models have it
    bin        learned_embeds.bin, SDXL: and learned_embeds_2.bin, as old versions of diffusers wrote them

All are read as well. Vectors are float32 and pass through every format to the bit; a safetensors file's metadata is kept.
Pickles are read with `weights_only`, so that a file from a stranger cannot run code. A file that is there already and
holds other vectors is not overwritten without --overwrite.

A web file may not say its token, for its name is the trigger there: `my-dog.safetensors` is then read as "<my-dog>".
"""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save


NAMES = {"sdxl": "Stable Diffusion XL", "sana": "SANA", "sd": "Stable Diffusion 1 or 2"}
ENCODERS = {"sdxl": ("text_encoder", "text_encoder_2"), "sana": ("text_encoder",), "sd": ("text_encoder",)}
WEB_KEYS = {"sdxl": ("clip_l", "clip_g"), "sana": ("gemma",), "sd": ("emb_params",)}
ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base", "sana": "sana", "sd": "stable-diffusion-v1"}
FILES = ("learned_embeds", "learned_embeds_2")  # diffusers' names, in the order of ENCODERS
FORMATS = ("diffusers", "web", "a1111", "bin")
SUFFIXES = (".safetensors", ".pt", ".bin")
SD_WIDTHS = (768, 1024)  # of Stable Diffusion 1 and 2; SANA's vectors have 2304 numbers


# ----------------------------------------------------------------------------------------------------------------------
# 1. Embeddings
# ----------------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake in what the user gave. The scripts show it as one line, with no traceback."""

    def __str__(self) -> str:
        # File names may hold line breaks, terminal controls and bytes that are no text: they are shown escaped.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class EmbeddingError(UserError):
    """An embedding that cannot be read, used or written."""


@dataclass
class Embedding:
    """A learned token.

    Attributes:
        token: the word in prompts, such as "<my-dog>".
        vectors: (n, d) float32 by text encoder: SDXL "text_encoder" and "text_encoder_2", the others "text_encoder" alone.
        metadata: what the safetensors file's header says, such as "dti.base_model".
    """

    token: str
    vectors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """ "sdxl", "sana" or "sd", by the text encoders, then by metadata and width: a small model's are narrower."""
        if "text_encoder_2" in self.vectors:
            return "sdxl"
        said = self.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v")
        return "sd" if said or self.vectors["text_encoder"].shape[-1] in SD_WIDTHS else "sana"

    def __len__(self) -> int:
        """The number of vectors."""
        return len(self.vectors["text_encoder"])


def web_name(token: str) -> str:
    """The token as a file name on any system: the web tools take the name of the file for the trigger."""
    return re.sub(r"[^\w.+-]+", "", token).strip(".") or "embedding"


def check_token(token: str, said: str = "--token") -> str:
    """The token, if a prompt and a file's name can hold it. Raises EmbeddingError."""
    if not token or re.search(r"[\s\ud800-\udfff]", token):
        raise EmbeddingError(f'{said} {token!r} is not a word without spaces: give one such as "<my-dog>".')
    if web_name(token).lower() in FILES or len(web_name(token).encode()) > 200:
        raise EmbeddingError(f"{said} {token!r} cannot name a file: give another, such as --token '<my-dog>'.")
    return token


def renamed(embedding: Embedding, token: str) -> Embedding:
    """The same vectors under another word, which the metadata tells too."""
    metadata = dict(embedding.metadata)
    if metadata.get("modelspec.title") == web_name(embedding.token):
        metadata["modelspec.title"] = web_name(token)
    if "modelspec.trigger_phrase" in metadata:
        metadata["modelspec.trigger_phrase"] = token
    return replace(embedding, token=check_token(token), metadata=metadata)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> tuple[dict, dict[str, str]]:
    """What a file holds, as it stands, and its metadata. Raises EmbeddingError."""
    if not os.path.isfile(path):  # reading a pipe would wait for ever
        problem = "is not a file" if os.path.exists(path) else "does not exist"
        raise EmbeddingError(f"{path} {problem}: give a run's output folder, or an embedding's file.")
    if path.suffix.lower() not in SUFFIXES:
        raise EmbeddingError(f"{path} is none of {', '.join(SUFFIXES)}: give an embedding's file.")
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        # Files of 2022 keep their parameters in a ParameterDict, which is as harmless as a dict.
        torch.serialization.add_safe_globals([torch.nn.ParameterDict])
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise EmbeddingError(f"{path} cannot be read as an embedding: {reason}") from None
    if not isinstance(state, dict):
        raise EmbeddingError(f"{path} holds a {type(state).__name__} and no embedding.")
    return state, {}


def parse_state(state: dict, metadata: dict[str, str], path: Path) -> tuple[str | None, list]:
    """The token, where the file says it, and one matrix for each text encoder that the file is about."""
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
    for keys in WEB_KEYS.values():
        if set(state) == set(keys):
            return metadata.get("modelspec.trigger_phrase"), [state[key] for key in keys]
    if len(state) == 1 and isinstance(next(iter(state)), str):  # diffusers
        return next(iter(state)), list(state.values())
    wanted = "clip_l and clip_g, gemma, emb_params, string_to_param, or exactly one"
    found = ", ".join(map(str, list(state)[:5])) + (", ..." if len(state) > 5 else "")
    raise EmbeddingError(f"{path} has the keys {found or 'of nothing'}: an embedding has {wanted}.")


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """Both files of SDXL's pair, by the name of one of them: `learned_embeds_2-steps-500.safetensors` and so on."""
    match = re.match(r"learned_embeds(_2)?(?=[-.])", path.name)
    if match is None:
        return None
    rest = path.name[match.end() :]
    return path.with_name(FILES[0] + rest), path.with_name(FILES[1] + rest)


def as_rows(matrix: object, path: Path) -> torch.Tensor:
    """A matrix (n, d) in float32, which holds every half-precision number exactly. Raises EmbeddingError."""
    if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point() or matrix.ndim not in (1, 2):
        raise EmbeddingError(f"{path} holds something else than rows of floating-point numbers.")
    rows = torch.atleast_2d(matrix.detach()).float().contiguous()
    if not rows.numel() or not rows.isfinite().all() or not rows.norm(dim=-1).all():
        raise EmbeddingError(f"{path} has no vectors, or vectors of zeros, NaN or infinity: it is damaged.")
    return rows.clone()


def find_file(folder: Path) -> Path:
    """The embedding's file in a folder: diffusers' name, or else the only one there. Raises EmbeddingError."""
    for suffix in SUFFIXES:
        if os.path.isfile(folder / f"{FILES[0]}{suffix}"):
            return folder / f"{FILES[0]}{suffix}"
    try:
        files = sorted(
            p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(("pytorch_", "."))
        )
    except OSError as error:
        raise EmbeddingError(f"{folder} cannot be read: {error.strerror}.") from None
    if len(files) != 1:
        found = f"it has {', '.join(p.name for p in files[:5])}: give one of these" if files else "give a run's folder"
        raise EmbeddingError(f"{folder} holds no learned_embeds.safetensors; {found}.")
    return files[0]


def read_embedding(path: Path) -> Embedding:
    """Read a learned token from a run's output folder, or from a file in any of the formats.

    Raises:
        EmbeddingError: where there is none, where half of a pair is missing, or where it is damaged.
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
                raise EmbeddingError(f"{path} has {token!r} and {pair[1].name} has {second_token!r}: no pair.")
            matrices += second
        elif architecture.startswith(ARCHITECTURES["sdxl"]):
            raise EmbeddingError(f"{path} is half of a pair: put {pair[1].name} beside it.")
    rows = [as_rows(matrix, path) for matrix in matrices]
    if len(rows) == 1 and rows[0].shape[-1] == 1280:
        raise EmbeddingError(f"{path} has vectors of width 1280: the second half of SDXL's pair, without the first.")
    if len({len(matrix) for matrix in rows}) != 1:
        counts = " and ".join(str(len(matrix)) for matrix in rows)
        raise EmbeddingError(f"{path}: its text encoders have {counts} vectors, and need the same number.")
    if WEB_KEYS["sd"][0] in state:
        metadata.setdefault("modelspec.architecture", ARCHITECTURES["sd"])
    token = check_token(token if token else f"<{web_name(path.stem)}>", f"{path}: the token")
    return Embedding(token, dict(zip(("text_encoder", "text_encoder_2"), rows, strict=False)), metadata)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Writing
# ----------------------------------------------------------------------------------------------------------------------


def header(embedding: Embedding) -> dict[str, str]:
    """The metadata of a safetensors file: what was read, and what model sites and `read_embedding` look for."""
    architecture = ARCHITECTURES[embedding.family]
    if embedding.family == "sd" and embedding.vectors["text_encoder"].shape[-1] == 1024:
        architecture = "stable-diffusion-v2-512"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/textual-inversion",
        "modelspec.title": web_name(embedding.token),
        **embedding.metadata,
        "modelspec.trigger_phrase": embedding.token,
    }


def states(embedding: Embedding, formats: Iterable[str]) -> dict[str, dict]:
    """What each file of the formats holds, by its name."""
    rows = [embedding.vectors[name].detach().cpu().float().contiguous() for name in ENCODERS[embedding.family]]
    web = dict(zip(WEB_KEYS[embedding.family], rows, strict=True))
    name, files = web_name(embedding.token), {}
    for form in formats:
        if form in ("diffusers", "bin"):
            suffix = ".safetensors" if form == "diffusers" else ".bin"
            pairs = zip(FILES, rows, strict=False)  # only SDXL's has two files
            files |= {f"{file}{suffix}": {embedding.token: matrix} for file, matrix in pairs}
        elif form == "web":
            files[f"{name}.safetensors"] = web
        elif form == "a1111" and embedding.family == "sdxl":  # it looks for clip_l and clip_g, and for nothing beside
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
            raise EmbeddingError(f"{form!r} is no format: choose of {', '.join(FORMATS)}.")
    return files


def tensors_of(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of a state by name, whether they lie in string_to_param or not."""
    inner = state.get("string_to_param")
    inner = {**state, **inner} if isinstance(inner, (dict, torch.nn.ParameterDict)) else state
    return {key: value for key, value in inner.items() if isinstance(value, torch.Tensor)}


def holds(path: Path, state: dict) -> bool:
    """Whether the file has exactly the tensors of `state`."""
    try:
        found, wanted = tensors_of(read_state(path)[0]), tensors_of(state)
    except EmbeddingError:
        return False
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def write_files(contents: dict[Path, bytes]) -> None:
    """Write all under temporary names, then rename: a kill or a full disk leaves the old files or new ones. Raises UserError."""
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
        raise UserError(f"{path} cannot be written: {error.strerror}. What was there before is as it was.") from None


def check_output_dir(folder: Path) -> None:
    """Make the folder, and try that it can be written to: better now than after the work. Raises UserError."""
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
    if name.endswith(".safetensors"):
        return save(state, metadata=metadata)
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def write_embedding(
    embedding: Embedding, folder: Path, formats: Iterable[str] = ("diffusers", "web"), overwrite: bool = False
) -> list[Path]:
    """Write the token's files to `folder`, named as the training scripts name them. Returns their paths.

    A file that holds these vectors already is left as it is.

    Raises:
        EmbeddingError: for vectors or a token that cannot be used, and, before anything is written, where a file is
            there that holds something else, unless `overwrite`.
        UserError: where the folder cannot be written to.
    """
    folder = Path(folder)
    check_token(embedding.token, "the token")
    if tuple(embedding.vectors) not in ENCODERS.values():
        raise EmbeddingError(f"{embedding.token} has vectors of {', '.join(embedding.vectors)}: not of a known model.")
    for matrix in embedding.vectors.values():
        as_rows(matrix, Path(embedding.token))
    files = {folder / name: state for name, state in states(embedding, formats).items()}
    new = {path: state for path, state in files.items() if not holds(path, state)}
    taken = [path for path in new if os.path.lexists(path)]
    if taken and not overwrite:
        raise EmbeddingError(f"{taken[0]} is there and holds something else: choose another folder, or --overwrite.")
    write_files({path: to_bytes(path.name, state, header(embedding)) for path, state in new.items()})
    return list(files)


def markdown_table(names: list[str], rows: list[list[str]]) -> str:
    rows = [[str(text).replace("|", "\\|") for text in row] for row in [names, ["---"] * len(names), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Command line
# ----------------------------------------------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line of usage and one that says what is wrong."""
    return argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options] (--help explains them)",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError ends it with one line and status 1, Ctrl-C with status 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("input", type=Path, help="A run's output folder, or an embedding's file.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the files are written.")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["diffusers", "web"], help="What to write.")
    parser.add_argument("--token", default=None, help="Another word for the embedding.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that hold something else.")
    return parser


def main() -> None:
    args = command_line().parse_args()
    embedding = read_embedding(args.input)
    if args.token is not None:
        embedding = renamed(embedding, args.token)
    widths = " and ".join(f"{len(rows)} x {rows.shape[-1]}" for rows in embedding.vectors.values())
    print(f"{embedding.token}: {embedding.family}, {widths}")
    for path in write_embedding(embedding, args.output_dir, args.format, args.overwrite):
        print(path)


if __name__ == "__main__":
    run(main)
