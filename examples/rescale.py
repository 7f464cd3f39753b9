#!/usr/bin/env python
"""Rescale a trained embedding to the norm of a model's vocabulary: TI-rescaled, the paper's baseline without training.

    python examples/rescale.py out/my-ti-dog --output_dir out/my-ti-dog-rescaled \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

Textual Inversion's embeddings have final norms of 20 and more; the vocabulary's are about 0.4. This script scales every
vector to m*, the mean norm of its text encoder's vocabulary (or the minimum, or a number, by --magnitude), and keeps its
direction: e <- m* e / |e|. Without an input it prints the norms of a model's vocabulary:

    python examples/rescale.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

It reads only the model's vocabularies, in parts, so it needs neither a GPU nor much memory.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from diffusers import DiffusionPipeline
from export import (
    ENCODERS,
    FORMATS,
    NAMES,
    Embedding,
    EmbeddingError,
    UserError,
    changed,
    make_parser,
    read_embedding,
    renamed,
    run,
    write_embedding,
)
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open


FAMILIES = {"StableDiffusionXLPipeline": "sdxl", "SanaPipeline": "sana", "StableDiffusionPipeline": "sd"}
VOCABULARIES = ("token_embedding.weight", "embed_tokens.weight")  # CLIP and Gemma; the prefix depends on the version
ROWS_AT_A_TIME = 8192


# ----------------------------------------------------------------------------------------------------------------------
# 1. A model's index and its vocabularies
# ----------------------------------------------------------------------------------------------------------------------


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder with a model's configurations and tokenizers: itself, or what is in the Hub's cache, also without a network.

    Raises OSError or ValueError.
    """
    small = ["model_index.json", "*.json", "tokenizer*/*"]
    return (
        Path(model)
        if Path(model).is_dir()
        else Path(snapshot_download(model, revision=revision, allow_patterns=small))
    )


def weights_folder(model: str, revision: str | None = None, variant: str | None = None, **unused) -> Path:
    """The folder with the weights too, chosen as a stock pipeline chooses. Raises OSError or ValueError."""
    if Path(model).is_dir():
        return Path(model)
    return Path(DiffusionPipeline.download(model, revision=revision, variant=variant, **unused))


def part_variant(folder: Path, part: str, variant: str | None) -> str | None:
    """The variant for a part's weights: None, the plain ones, where the part does not have it."""
    return variant if variant and any(folder.glob(f"{part}/*.{variant}*")) else None


def model_index(model: str, revision: str | None = None) -> dict:
    """The pipeline's model_index.json: its class and the classes of its parts. Raises UserError."""
    option = f"--pretrained_model_name_or_path {model}"
    if Path(model).is_file():
        raise UserError(f"{option} is a file: load it with from_single_file and save_pretrained a folder.")
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise UserError(f"{option} has no model_index.json: give the folder of a whole pipeline in diffusers' format.")
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} cannot be read: {one_line(error)}") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise UserError(f"{option} cannot be read: its model_index.json names no pipeline.")
    return index


def model_family(model: str, revision: str | None = None) -> str:
    """ "sdxl", "sana" or "sd", by the pipeline's class. Raises UserError for any other class."""
    name = model_index(model, revision)["_class_name"]
    if name not in FAMILIES:
        raise UserError(f"--pretrained_model_name_or_path {model} is a {name}: give one of {' or '.join(FAMILIES)}.")
    return FAMILIES[name]


def find_file(model: str, name: str, revision: str | None) -> Path | None:
    """A file in the model's folder or Hub repository. None if it does not exist."""
    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def read_parts(path: Path, key: str) -> Iterator[torch.Tensor]:
    """Yield a matrix of a safetensors file in parts."""
    with safe_open(path, "pt") as file:
        matrix = file.get_slice(key)
        for start in range(0, matrix.get_shape()[0], ROWS_AT_A_TIME):
            yield matrix[start : start + ROWS_AT_A_TIME]


def vocabulary(model: str, encoder: str, revision: str | None = None, variant: str | None = None) -> Iterator:
    """Yield the embedding matrix (V, d) of a text encoder in parts, in the dtype of its file.

    It is read from a safetensors file, or from several with an index. Without one the whole encoder is loaded.
    """
    if variant:
        # As a stock pipeline has it, the plain weights serve where a part has no such variant.
        names = (
            f"model.safetensors.index.{variant}.json",
            f"model.{variant}.safetensors",
            f"pytorch_model.{variant}.bin",
        )
        if not any(find_file(model, f"{encoder}/{name}", revision) for name in names):
            variant = None
    dot = f".{variant}" if variant else ""
    index = find_file(model, f"{encoder}/model.safetensors.index{dot}.json", revision)
    if index is not None:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        key = next(key for key in files if key.endswith(VOCABULARIES))
        yield from read_parts(find_file(model, f"{encoder}/{files[key]}", revision), key)
        return
    file = find_file(model, f"{encoder}/model{dot}.safetensors", revision)
    if file is not None:
        with safe_open(file, "pt") as opened:
            key = next(key for key in opened.keys() if key.endswith(VOCABULARIES))
        yield from read_parts(file, key)
        return
    cls = getattr(transformers, model_index(model, revision)[encoder][1])
    options = {"variant": variant, "torch_dtype": "auto"}
    loaded, info = cls.from_pretrained(
        weights_folder(model, revision, variant), subfolder=encoder, output_loading_info=True, **options
    )
    if any(key.endswith(VOCABULARIES) for key in info["missing_keys"]):  # the vocabulary would be random
        raise OSError(f"{encoder} has no vocabulary in its weights")
    yield loaded.get_input_embeddings().weight.detach()


def row_statistics(parts: Iterator[torch.Tensor]) -> dict[str, float]:
    """Mean, minimum and maximum of the norms of nonzero rows, the number of zero rows, and the shape."""
    width, norms = 0, []
    for part in parts:
        width = part.shape[-1]
        # Norms in float32 and in parts, the mean in float64, exactly as in the training scripts' vocabulary_magnitude.
        norms += [rows.float().norm(dim=-1) for rows in part.split(ROWS_AT_A_TIME)]
    norms = torch.cat(norms)
    used = norms[norms > 0].double()
    if not len(used) or not used.isfinite().all():
        raise ValueError("its vocabulary is all zeros, or not finite")
    return {
        "mean": used.mean().item(),
        "min": used.min().item(),
        "max": used.max().item(),
        "zero_rows": len(norms) - len(used),
        "rows": len(norms),
        "width": width,
    }


def magnitudes(model: str, revision: str | None = None, variant: str | None = None) -> dict[str, dict[str, float]]:
    """Norms of the vocabulary's rows by text encoder: "mean", "min", "max", and "zero_rows", "rows", "width".

    Args:
        model: folder or Hub id of a pipeline in diffusers' format.

    Raises:
        UserError: if the model is of another kind, or its files are missing or damaged.
    """
    family = model_family(model, revision)
    found = {}
    for encoder in ENCODERS[family]:
        try:
            found[encoder] = row_statistics(vocabulary(model, encoder, revision, variant))
        except (OSError, ValueError, TypeError, KeyError, StopIteration, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"--pretrained_model_name_or_path {model}: {encoder} cannot be read: {one_line(error)}"
            ) from None
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 2. Rescaling
# ----------------------------------------------------------------------------------------------------------------------


def magnitude_rule(text: str) -> str | float:
    """The argparse type of --magnitude: `mean`, `min` or a positive number."""
    if text in ("mean", "min"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not mean, min or a number above 0")
    return value


def chosen_magnitudes(found: dict[str, dict[str, float]], rule: str | float) -> dict[str, float]:
    """m* of each text encoder, for the value of --magnitude."""
    return {encoder: rule if isinstance(rule, float) else statistics[rule] for encoder, statistics in found.items()}


def rescale(embedding: Embedding, magnitudes: dict[str, float]) -> Embedding:
    """Scale every vector e to m* e / |e|, with the m* of its encoder. The arithmetic is float64, the result float32.

    Raises:
        EmbeddingError: for a zero vector, or if the m* of an encoder is missing.
    """
    vectors = {}
    for encoder, e in embedding.vectors.items():
        if encoder not in magnitudes:
            raise EmbeddingError(f"{embedding.token} has vectors for {encoder}, which the model does not have.")
        norm = e.double().norm(dim=-1, keepdim=True)
        if not norm.all():
            raise EmbeddingError(f"{embedding.token} has a vector of zeros for {encoder}: it has no direction.")
        vectors[encoder] = (magnitudes[encoder] * e.double() / norm).float()
    rescaled_to = ", ".join(f"{magnitudes[encoder]:.6g}" for encoder in vectors)
    return changed(embedding, vectors, **{"dti.rescaled_to": rescaled_to})


def check_fits(embedding: Embedding, widths: dict[str, int], source: Path | str, model: str) -> None:
    """Refuse an embedding whose family or widths differ from the model's. Raises EmbeddingError."""
    if set(embedding.vectors) != set(widths):
        mine = NAMES[embedding.family] + (", or half of SDXL's pair" if embedding.family == "sd" else "")
        models = "model with one text encoder" if len(widths) == 1 else NAMES["sdxl"]
        raise EmbeddingError(f"{source} is an embedding for {mine}, and --pretrained_model_name_or_path a {models}.")
    found = {encoder: rows.shape[-1] for encoder, rows in embedding.vectors.items()}
    if found != widths:
        mine, wanted = (" and ".join(map(str, x.values())) for x in (found, widths))
        raise EmbeddingError(f"{source} has vectors of width {mine}, but the text encoders of {model} need {wanted}.")


def print_table(found: dict[str, dict[str, float]]) -> None:
    print(f"{'norms':15}{'mean':>10}{'min':>10}{'max':>10}{'rows':>10}{'of zeros':>10}")
    for encoder, x in found.items():
        print(
            f"{encoder:15}{x['mean']:10.4f}{x['min']:10.4f}{x['max']:10.4f}{x['rows']:10d}{x['zero_rows']:10d}",
        )


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("input", type=Path, nargs="?", help="A run's output folder, or an embedding's file in any format.")
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Folder or Hub id of the model: SDXL, SANA, or Stable Diffusion 1 or 2.",
    )
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--variant", default=None, help="Variant of the model's weight files, such as fp16.")
    add("--magnitude", type=magnitude_rule, default="mean", metavar="{mean,min,NUMBER}", help="m*; paper: mean.")
    add("--output_dir", type=Path, default=None, help="Output folder.")
    add("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="Formats to write. Default: all.")
    add("--token", default=None, help="New word for the result.")
    add("--overwrite", action="store_true", help="Replace existing files with other content.")
    return parser


def main() -> None:
    args = command_line().parse_args()
    if args.input is not None and args.output_dir is None:
        raise UserError("--output_dir is missing: give a folder for the rescaled embedding.")
    if args.input is None and args.output_dir is not None:
        raise UserError("--output_dir needs an input: give an embedding to rescale before the options.")

    embedding = None if args.input is None else read_embedding(args.input)
    found = magnitudes(args.pretrained_model_name_or_path, args.revision, args.variant)
    print_table(found)
    if embedding is None:
        return
    widths = {encoder: statistics["width"] for encoder, statistics in found.items()}
    check_fits(embedding, widths, args.input, args.pretrained_model_name_or_path)
    result = rescale(embedding, chosen_magnitudes(found, args.magnitude))
    if args.token is not None:
        result = renamed(result, args.token)
    for encoder, rows in embedding.vectors.items():
        norms = zip(rows.norm(dim=-1), result.vectors[encoder].norm(dim=-1), strict=True)
        print(f"{encoder}: " + ", ".join(f"{before:.4f} -> {after:.4f}" for before, after in norms))
    for path in write_embedding(result, args.output_dir, args.format, args.overwrite):
        print(path)


if __name__ == "__main__":
    run(main)
