#!/usr/bin/env python
"""Draw pictures with one or several learned tokens per prompt, with SDXL, SANA and Stable Diffusion 1 and 2.

    python examples/generate.py out/my-dog --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --prompt "a photo of a {} on the beach" "a painting of a {} in the rain" --seeds 0 1 2 3 --output_dir pictures

"{}" stands for the learned token. "My subject in my style" takes two embeddings in one prompt, "{0}" and "{1}":

    python examples/generate.py out/my-dog out/my-style --prompt "a picture of {0} in the style of {1}" \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --output_dir pictures

An embedding is a run's output folder (also of baselines.py), or a file in any format that export.py reads. LoRA weights in
the folder (pytorch_lora_weights.safetensors) are loaded too. The model's model_index.json decides the pipeline.

Sampling follows the paper: 50 DDIM steps for Stable Diffusion, 20 Euler steps at the model's flow shift for SANA. SDXL's
second text encoder pools at the end token. As published it pools at the learned token, and the pooled embedding ignores the
text after it; `--pooling stock` shows the effect.

Written to --output_dir: a PNG for each prompt and seed, with prompt, seed and settings in its text metadata, and `grid.png`
with all pictures. A repeated command keeps existing pictures, so an interrupted one can continue. A picture's noise depends
only on its seed, not on --batch_size, device or precision.

Sections: 1 prompts, 2 pipeline, 3 pictures, 4 files, 5 checks, 6 command line. Import `load_pipeline`, `load_embedding` and
`generate` to use them elsewhere.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from baselines import Word, check_layers, install, read_word
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from export import (
    ENCODERS,
    NAMES,
    Embedding,
    EmbeddingError,
    UserError,
    check_output_dir,
    make_parser,
    renamed,
    run,
    write_files,
)
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pipeline_sana_textual_inversion import SanaTextualInversionPipeline
from rescale import check_fits, model_family, model_folder, model_index, one_line, part_variant, weights_folder
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_dti_sdxl import StableDiffusionXL  # noqa: E402
from train_dti_sdxl import UserError as TrainingError  # noqa: E402


STEPS = {"sdxl": 50, "sana": 20, "sd": 50}  # the paper's
GUIDANCE_SCALE = {"sdxl": 5.0, "sana": 4.5, "sd": 7.5}  # the pipelines' own
RESOLUTION_STEP = {"sdxl": 8, "sana": 32, "sd": 8}  # pixels a latent position
LORA_FILE = "pytorch_lora_weights.safetensors"
SOFTWARE = "Directional Textual Inversion, examples/generate.py"
CELL = 384  # maximum length of a picture's longer side in the contact sheet, in pixels


# ----------------------------------------------------------------------------------------------------------------------
# 1. Prompts
# ----------------------------------------------------------------------------------------------------------------------


def fill_prompt(prompt: str, tokens: list[str]) -> str:
    """Replace "{}" by the first token, and "{0}", "{1}" ... by the tokens in order. Raises UserError if one is missing."""

    def token(match: re.Match) -> str:
        index = int(match[1] or 0)
        if index >= len(tokens):
            raise UserError(f"--prompt {prompt!r} has {match[0]}, but only {len(tokens)} embeddings are given.")
        return tokens[index]

    return re.sub(r"\{(\d*)\}", token, prompt)


def read_prompts(path: Path) -> list[str]:
    """Read the prompts from a file, one per line, without empty lines. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"--prompts {path} is empty: write one prompt per line.")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# 2. Pipeline
# ----------------------------------------------------------------------------------------------------------------------


def pipeline_family(pipe) -> str:
    return "sdxl" if hasattr(pipe, "text_encoder_2") else "sd" if hasattr(pipe, "unet") else "sana"


def denoiser_of(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def noise_schedule(
    family: str,
    model: str,
    folder: Path,
    scheduler: str,
    single_file_config: str | None,
    prediction: str | None,
    rescale: bool,
) -> dict:
    """What is to change in the scheduler's configuration, by the options or by a single file's marks.

    For the paper's sampler it refuses what train_dti_sdxl.py refuses: noise by other than betas. Raises UserError.
    """
    if family == "sana":
        if prediction or rescale:
            raise UserError("--prediction_type and --rescale_betas_zero_snr are for Stable Diffusion: leave them out.")
        return {}
    given = {"pretrained_model_name_or_path": model if Path(model).is_file() else str(folder), "hub_token": None}
    given |= {"revision": None, "variant": None, "single_file_config": single_file_config}
    args = argparse.Namespace(**given, prediction_type=prediction, rescale_betas_zero_snr=rescale)
    trained, option = StableDiffusionXL(args), f"--pretrained_model_name_or_path {model}"
    try:
        if Path(model).is_file():
            trained.check_single_file(option)
        if scheduler == "paper":
            trained.check_parts(option, DDIMScheduler.load_config(folder, subfolder="scheduler"))
        return trained.schedule_options()
    except TrainingError as error:
        raise UserError(str(error)) from None


def paper_scheduler(family: str, config: dict, schedule: dict):
    """The paper's sampler, on the noise schedule or flow shift of the model's own, but for what `schedule` changes."""
    if family == "sana":
        # SANA's configuration is a DPM-Solver's, which has another name for the shift.
        return FlowMatchEulerDiscreteScheduler(shift=config.get("shift", config.get("flow_shift", 1.0)))
    # By default DDIM clips the sample, which destroys latents.
    if config.get("rescale_betas_zero_snr"):
        schedule = {"timestep_spacing": "trailing", **schedule}  # from noise alone, as in training
    return DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, **schedule)


def load_text_encoder(model: str | Path, name: str, class_name: str, options: dict):
    """Load a text encoder. Raises ValueError if weights are missing: transformers would use random ones."""
    cls = getattr(transformers, class_name)
    encoder, info = cls.from_pretrained(model, subfolder=name, output_loading_info=True, **options)
    if info["missing_keys"]:  # some weights have other names in another major version of transformers
        raise ValueError(f"{name} lacks the weights {sorted(info['missing_keys'])[0]} ... (another version's file?)")
    return encoder


DENOISERS = {"sdxl": "unet", "sd": "unet", "sana": "transformer"}


def load_part(folder: Path, name: str, class_name: str, options: dict, base_precision: str) -> torch.nn.Module:
    """A text encoder or the denoiser; for int8 read in half precision, so that memory never holds all of it in float32."""
    dtype = options["torch_dtype"]
    if base_precision == "int8" and dtype == torch.float32:
        options = options | {"torch_dtype": torch.bfloat16}
    if name in DENOISERS.values():
        part = getattr(diffusers, class_name).from_pretrained(folder, subfolder=name, **options)
    else:
        part = load_text_encoder(folder, name, class_name, options)
    if base_precision == "int8":
        from pictures import training  # with all that training imports

        part = training.to_int8(part, dtype).to(dtype)
    return part


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    scheduler: str = "paper",
    base_precision: str = "auto",
    single_file_config: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool = False,
):
    """Load the pipeline of a folder or Hub id. For SANA it is a SanaTextualInversionPipeline.

    A .safetensors file is an SDXL with the configurations of `single_file_config`, by default SDXL 1.0's. `prediction_type`,
    `rescale_betas_zero_snr` and `base_precision` are as in the training. `scheduler` is "paper" (DDIM, flow-matching Euler)
    or "model" (what the model ships with). Raises UserError if the model is of another kind, or its files are missing or
    damaged.
    """
    configured = configured_as(model, single_file_config)
    family = model_family(configured, revision)
    index = model_index(configured, revision)
    options = {"torch_dtype": dtype}
    try:
        given = (scheduler, single_file_config, prediction_type, rescale_betas_zero_snr)
        schedule = noise_schedule(family, model, model_folder(configured, revision), *given)
        warnings.filterwarnings("ignore", message=".*torch_dtype")  # the one name that all supported versions know
        if Path(model).is_file():
            options |= {"config": str(model_folder(configured)), "add_watermarker": False}
            pipe = StableDiffusionXLPipeline.from_single_file(model, **options)
            if base_precision == "int8":
                from pictures import training

                for name in ("unet", *ENCODERS[family]):
                    training.to_int8(getattr(pipe, name), dtype)
        else:
            unused = {"safety_checker": None, "feature_extractor": None} if family == "sd" else {}
            folder = weights_folder(model, revision, variant, **unused)
            parts = {}
            in_int8 = (DENOISERS[family],) if base_precision == "int8" else ()
            for name in (*in_int8, *ENCODERS[family]):
                part = {"variant": part_variant(folder, name, variant), **options}
                parts[name] = load_part(folder, name, index[name][1], part, base_precision)
            options |= {"variant": variant}
            if family == "sdxl":
                pipe = StableDiffusionXLPipeline.from_pretrained(folder, **parts, **options, add_watermarker=False)
            elif family == "sd":
                options |= {**unused, "requires_safety_checker": False}
                pipe = StableDiffusionPipeline.from_pretrained(folder, **parts, **options)
            else:
                pipe = SanaTextualInversionPipeline.from_pretrained(folder, **parts, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(f"--pretrained_model_name_or_path {model} cannot be loaded: {one_line(error)}") from None
    if scheduler == "paper":
        pipe.scheduler = paper_scheduler(family, pipe.scheduler.config, schedule)
    elif schedule:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **schedule)
    pipe.set_progress_bar_config(disable=True)
    if family != "sana":  # faster convolutions, also on a CPU (1.25 times as many pictures)
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(device)


def load_embeddings(pipe, embeddings: list[Embedding]) -> None:
    """Load learned tokens into the pipeline, each under its own name. Raises EmbeddingError if they do not fit."""
    encoders = {name: getattr(pipe, name) for name in ENCODERS[pipeline_family(pipe)]}
    widths = {name: x.get_input_embeddings().weight.shape[-1] for name, x in encoders.items()}
    for embedding in embeddings:
        check_fits(embedding, widths, embedding.token, type(pipe).__name__)
    try:
        for name, encoder in encoders.items():
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            states = [{e.token: e.vectors[name]} for e in embeddings if not isinstance(e, Word)]
            if states:
                pipe.load_textual_inversion(states, text_encoder=encoder, tokenizer=tokenizer)
    except ValueError as error:
        raise EmbeddingError(one_line(error)) from None
    install(pipe, [embedding for embedding in embeddings if isinstance(embedding, Word)])


def load_embedding(pipe, embedding: Embedding) -> None:
    """Load one learned token into the pipeline. Raises EmbeddingError if it does not fit."""
    load_embeddings(pipe, [embedding])


def load_loras(pipe, files: list[Path]) -> None:
    """Load each file of LoRA weights as an adapter, all active with weight 1. Raises UserError."""
    names = [f"lora_{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{file} cannot be loaded as LoRA weights: {one_line(error)}") from None
    if names:
        pipe.set_adapters(names)


def native_resolution(pipe) -> int:
    """The side in pixels of the square pictures that the model is trained for."""
    return denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor


@contextlib.contextmanager
def pooled_at(pipe, pooling: str):
    """In this context SDXL's second encoder pools at the end token (`eos`) or as published (`stock`). Others do not pool."""
    if pipeline_family(pipe) != "sdxl" or pooling == "stock":
        yield
        return
    # SDXL's config has eos_token_id 2, for which transformers pools at the highest token id: that of the new word.
    text_model = getattr(pipe.text_encoder_2, "text_model", pipe.text_encoder_2)
    shipped, text_model.eos_token_id = text_model.eos_token_id, pipe.tokenizer_2.eos_token_id
    try:
        yield
    finally:
        text_model.eos_token_id = shipped


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pictures
# ----------------------------------------------------------------------------------------------------------------------


def sana_instruction() -> list[str]:
    """The instruction that SanaPipeline puts before every prompt by default."""
    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def draw_noise(pipe, generators: list[torch.Generator], side: int) -> torch.Tensor:
    """Noise (B, C, side/s, side/s) on the pipeline's device, one generator per picture.

    It is drawn in float32 on the CPU, as a stock float32 pipeline does, so that a seed gives the same noise on every
    device. A UNet's pipeline expects it in the UNet's precision, SANA's always in float32.
    """
    denoiser = denoiser_of(pipe)
    shape = (1, denoiser.config.in_channels, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(pipe._execution_device, torch.float32 if pipeline_family(pipe) == "sana" else denoiser.dtype)


def generate_pairs(
    pipe,
    pairs: list[tuple[str, int]],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int = 1,
    pooling: str = "eos",
    resolution: int | None = None,
    negative_prompt: str | None = None,
    instruction: list[str] | None = None,
) -> Iterator[tuple[str, int, Image.Image]]:
    """Like `generate`, for given pairs of prompt and seed."""
    side = resolution or native_resolution(pipe)
    options = {"height": side, "width": side, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    if pipeline_family(pipe) == "sana":
        options |= {"complex_human_instruction": instruction, "use_resolution_binning": False}
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        if negative_prompt is not None:
            options["negative_prompt"] = [negative_prompt] * len(batch)
        with pooled_at(pipe, pooling), torch.no_grad():
            images = pipe(
                prompt=[prompt for prompt, _ in batch],
                latents=draw_noise(pipe, generators, side),
                generator=generators,  # for schedulers that draw noise at every step
                **options,
            ).images
        yield from ((prompt, seed, image) for (prompt, seed), image in zip(batch, images, strict=True))


def generate(
    pipe,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int = 1,
    pooling: str = "eos",
    **options,
) -> Iterator[tuple[str, int, Image.Image]]:
    """Draw every prompt with every seed. Yields (prompt, seed, picture) in the order of the prompts, then of the seeds.

    Args:
        prompts: with learned tokens by name; `fill_prompt` replaces "{}" by them.
        batch_size: pictures drawn at once. It affects a picture only by the rounding of matrix products.
        pooling: "eos", or "stock" to let SDXL pool at the learned token, as diffusers does.
        options: resolution (side in pixels; None: the model's), negative_prompt, and for SANA instruction (lines before
            the prompt; None: no instruction, as in training).
    """
    pairs = list(itertools.product(prompts, seeds))
    common = {"steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size, "pooling": pooling}
    yield from generate_pairs(pipe, pairs, **common, **options)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Files: pictures with their settings, and the contact sheet
# ----------------------------------------------------------------------------------------------------------------------


def picture_name(prompt: str, seed: int) -> str:
    """A readable file name that is unique to the prompt and seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{slug}-{zlib.crc32(prompt.encode()):08x}-seed-{seed}.png"


def digest(embedding: Embedding) -> str:
    """A short fingerprint of the vectors."""
    content = b"".join(rows.contiguous().numpy().tobytes() for rows in embedding.vectors.values())
    return hashlib.sha256(content).hexdigest()[:16]


def model_fingerprint(model: str, revision: str | None) -> str:
    """The Hub id, or a folder's name (without its path, which is private) and a hash of its files' sizes and times."""
    if not Path(model).exists():
        return f"{model}@{revision}" if revision else model
    files = (
        [Path(model)]
        if Path(model).is_file()
        else sorted(p for p in Path(model).glob("*/*") if p.suffix in (".json", ".safetensors", ".bin"))
    )
    state = [(p.relative_to(model).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{Path(model).resolve().name} ({hashlib.sha256(repr(state).encode()).hexdigest()[:8]})"


def to_png(image: Image.Image, text: dict[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in {**text, "Software": SOFTWARE}.items():
        info.add_text(key, value)
    image.save(content := io.BytesIO(), format="png", pnginfo=info)
    return content.getvalue()


def picture_text(prompt: str, seed: int, settings: dict) -> dict[str, str]:
    """A picture's metadata, by which a repeated command recognises it."""
    return {"prompt": prompt, "seed": str(seed), "settings": json.dumps(settings)}


def is_finished(path: Path, text: dict[str, str], overwrite: bool) -> bool:
    """Whether the picture exists with this metadata. Raises UserError if another one is there, unless `overwrite`."""
    if not os.path.lexists(path):
        return False
    try:
        with Image.open(path) as image:
            image.load()  # not only the header
            if all(image.text.get(key) == value for key, value in text.items()):
                return True
    except (OSError, AttributeError, SyntaxError, ValueError):
        pass
    if overwrite:
        return False
    raise UserError(f"{path} exists with other settings: choose another --output_dir, or add --overwrite.")


def check_ours(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file that these scripts did not write, unless `overwrite`. Raises UserError."""
    ours = overwrite or not os.path.lexists(path)
    with contextlib.suppress(OSError, AttributeError, SyntaxError, ValueError):
        if not ours:
            with Image.open(path) as image:
                marks = [image.info.get(name) for name in ("Software", "comment", "xmp")]  # PNG, GIF, WebP
                ours = SOFTWARE in marks or SOFTWARE.encode() in marks
    if not ours:
        raise UserError(f"{path} exists and is not from this script: choose another --output_dir, or add --overwrite.")


def thumbnail(image: Image.Image) -> Image.Image:
    """The picture in RGB, reduced to the size of a contact sheet's cell if it is larger."""
    image = image.convert("RGB")
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def contact_sheet(
    rows: list[list[Image.Image]],
    row_labels: list[str],
    column_labels: list[str],
    captions: list[list[str]] | None = None,
) -> Image.Image:
    """Pictures of one size in rows, a label above each row and column, and optionally a caption below each picture."""
    width, height = rows[0][0].size
    size = max(11, min(20, width // 16))
    font, gap = ImageFont.load_default(size), 4
    line = math.ceil(size * 1.3)
    captions = captions or [[] for _ in rows]
    words = [*column_labels, *itertools.chain.from_iterable(captions)]
    wide = max(width, *(math.ceil(font.getlength(text)) + gap for text in words))  # a column
    total = max(gap + (wide + gap) * len(column_labels), 24 * size)  # room for a few words
    per_line = max(8, int((total - 2 * gap) / font.getlength("a photo of the dog") * len("a photo of the dog")))
    wrapped = [textwrap.wrap(label, per_line) or [""] for label in row_labels]
    heights = [
        len(lines) * line + height + 2 * gap + line * bool(below)
        for lines, below in zip(wrapped, captions, strict=True)
    ]
    tops = list(itertools.accumulate(heights, initial=line + gap))
    sheet = Image.new("RGB", (total, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [gap + column * (wide + gap) for column in range(len(column_labels))]
    for left, label in zip(lefts, column_labels, strict=True):
        draw.text((left, gap // 2), label, fill="black", font=font)
    for top, lines, images, below in zip(tops[:-1], wrapped, rows, captions, strict=True):
        for number, text in enumerate(lines):
            draw.text((gap, top + number * line), text, fill="black", font=font)
        top += len(lines) * line + gap
        for left, image in zip(lefts, images, strict=False):
            sheet.paste(image, (left, top))
        for left, text in zip(lefts, below, strict=False):
            draw.text((left, top + height), text, fill="black", font=font)
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# 5. Checks, before any weight loads
# ----------------------------------------------------------------------------------------------------------------------


def configured_as(model: str, single_file_config: str | None = None) -> str:
    """Where a model's configurations and tokenizers are: with it, but for a single file. Raises UserError."""
    if Path(model).is_file() and Path(model).suffix == ".safetensors":
        return single_file_config or StableDiffusionXL.single_file_base
    if single_file_config:
        raise UserError(f"--single_file_config {single_file_config} is for a single .safetensors file: leave it out.")
    return model


def load_tokenizers(model: str | Path, family: str) -> list:
    cls = AutoTokenizer if family == "sana" else CLIPTokenizer
    names = [name.replace("text_encoder", "tokenizer") for name in ENCODERS[family]]
    return [cls.from_pretrained(model, subfolder=name) for name in names]


def check_tokens(embeddings: list[Embedding], tokenizers: list, family: str) -> None:
    """Refuse tokens that are already words, that collide, or that a prompt cannot contain. Raises EmbeddingError."""
    remedy = "give another word by --token"
    for tokenizer in tokenizers:
        for embedding in embeddings:
            token = embedding.token
            names = [token, *(f"{token}_{index}" for index in range(1, len(embedding)))]
            taken = [name for name in (*names, f"{token}_1") if name in tokenizer.get_vocab()]
            if taken or len(tokenizer.tokenize(token)) == 1:  # CLIP's vocabulary has "dog" as "dog</w>"
                word = taken[0] if taken else token
                raise EmbeddingError(f"The token {token!r}: {word!r} is already a word; {remedy}.")
            if family == "sana" and token != token.lower():
                raise EmbeddingError(f"The token {token!r} has capitals, and SANA lowercases prompts: {remedy}.")
            tokenizer.add_tokens(names)
            ids = tokenizer.convert_tokens_to_ids(names)
            prompt = tokenizer(f"a {' '.join(names)} here", add_special_tokens=False).input_ids
            if [index for index in prompt if index in ids] != ids:
                raise EmbeddingError(f"The tokenizer does not find the token {token!r} in a prompt: {remedy}.")


def check_model_fits(
    model: str, revision: str | None, sources: list, embeddings: list[Embedding], words: list[Embedding] | None = None
) -> tuple[str, list]:
    """Check that the embeddings fit the model. Returns the model's family, and its tokenizers with the new words.

    `words` are the embeddings whose tokens are added; by default all. Reads only configurations and tokenizers. Raises
    UserError.
    """
    family = model_family(model, revision)
    try:
        folder = model_folder(model, revision)
        configs = {x: AutoConfig.from_pretrained(folder, subfolder=x) for x in ENCODERS[family]}
        tokenizers = load_tokenizers(folder, family)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--pretrained_model_name_or_path {model} is not complete: {one_line(error)}") from None
    widths = {name: config.hidden_size for name, config in configs.items()}
    for source, embedding in zip(sources, embeddings, strict=True):
        check_fits(embedding, widths, source, model)
        check_layers(embedding, folder, source, model)
    check_tokens(embeddings if words is None else words, tokenizers, family)
    return family, tokenizers


def note_long_prompts(prompts: list[str], tokenizers: list, family: str) -> None:
    """Report prompts that are longer than the text encoders' limit: their end is cut off, maybe with a learned token."""
    tokenizer, limit = tokenizers[0], 300 if family == "sana" else 77
    for prompt in prompts:
        length = len(tokenizer(TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)).input_ids)
        if length > limit:
            print(f"Note: only {limit} of the {length} tokens of {prompt!r} are read.", file=sys.stderr)


def read_embeddings(sources: list[Path], tokens: list[str] | None) -> list[Embedding]:
    """Read the embeddings, renamed if --token is given. Raises UserError."""
    embeddings = [read_word(source) for source in sources]
    if tokens is not None:
        if len(tokens) != len(embeddings):
            raise UserError(f"--token has {len(tokens)} words for {len(embeddings)} embeddings: give one for each.")
        embeddings = [renamed(*pair) for pair in zip(embeddings, tokens, strict=True)]
    words = [embedding.token for embedding in embeddings]
    twice = {word for word in words if words.count(word) > 1}
    if twice:
        raise EmbeddingError(f"Two embeddings have the token {min(twice)!r}: rename them by --token, one word each.")
    return embeddings


def find_loras(sources: list[Path], family: str) -> list[Path]:
    """Find LoRA weights in the embeddings' folders. Raises UserError if they cannot be used."""
    files = [source / LORA_FILE for source in sources if os.path.isfile(source / LORA_FILE)]
    if files and importlib.util.find_spec("peft") is None:
        raise UserError(f"{files[0]} needs `pip install peft`; or ignore it by --no_lora.")
    part = "transformer." if family == "sana" else "unet."
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                fits = any(key.startswith((part, "text_encoder")) for key in opened.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}; ignore it by --no_lora.") from None
        if not fits:
            raise UserError(f"{file} has no weights for {part[:-1]}: it is for another model; ignore it by --no_lora.")
    return files


def choose_device(args: argparse.Namespace) -> str:
    """The device: --device, or the GPU if there is one. Raises UserError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the kind depends on the device
        raise UserError(f"--device {device} cannot be used: {one_line(error)}") from None
    for option in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        if getattr(args, option, False) and torch.device(device).type == "cpu":
            raise UserError(
                f"--{option} moves weights between a GPU and the CPU, and the device is the CPU: leave it out."
            )
    if getattr(args, "enable_model_cpu_offload", False) and args.enable_sequential_cpu_offload:
        raise UserError("--enable_model_cpu_offload and --enable_sequential_cpu_offload: choose one of the two.")
    return device


def choose_dtype(option: str, family: str, device: str) -> torch.dtype:
    """The precision. "auto" is float32 on a CPU; on a GPU fp16, but bf16 for SANA: its text encoder overflows in fp16."""
    automatic = "fp32" if device == "cpu" else "bf16" if family == "sana" else "fp16"
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return names[automatic if option == "auto" else option]


# ----------------------------------------------------------------------------------------------------------------------
# 6. Command line
# ----------------------------------------------------------------------------------------------------------------------


def number(kind: type, minimum: float) -> Callable:
    """Make an argparse type: a finite int or float of at least `minimum`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= (2**63 - 1 if kind is int else sys.float_info.max):
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} of at least {minimum}")
        return value

    return parse


def add_model_options(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """Add the options of model, sampling and memory, shared with evaluate.py and interpolate.py."""
    add = parser.add_argument
    # fmt: off
    add("--pretrained_model_name_or_path", required=model_required, help="Folder or Hub id of the model: SDXL, SANA, or Stable Diffusion 1 or 2.")
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--variant", default=None, help="Variant of the model's weight files, such as fp16.")
    add("--single_file_config", default=None, help="For an SDXL in one .safetensors file: folder or Hub id with its configurations and tokenizers. Default: SDXL 1.0's.")
    add("--prediction_type", choices=["epsilon", "v_prediction"], default=None, help="What the UNet predicts, where the model's file does not say. As in the training.")
    add("--rescale_betas_zero_snr", action="store_true", help="Rescale the noise schedule. As in the training.")
    add("--batch_size", type=number(int, 1), default=1, help="Pictures drawn at once.")
    add("--resolution", type=number(int, 8), default=None, help="Side of the pictures in pixels. Default: the model's.")
    add("--num_inference_steps", type=number(int, 1), default=None, help="Sampling steps. Default, as in the paper: SANA 20, others 50.")
    add("--guidance_scale", type=number(float, 0), default=None, help="Classifier-free guidance. Default: SDXL 5, SANA 4.5, Stable Diffusion 1 and 2 7.5.")
    add("--pooling", choices=["eos", "stock"], default="eos", help="Where SDXL's pooled text embedding is read: at the end token, or at the learned token as in diffusers.")
    add("--complex_human_instruction", choices=["none", "default"], default="none", help="SANA's instruction before every prompt: none, or SanaPipeline's own. Choose as in training.")
    add("--dtype", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="Precision of the models. Default: float32 on a CPU; on a GPU fp16, for SANA bf16.")
    add("--base_precision", choices=["auto", "int8"], default="auto", help="int8: hold the weights of denoiser and text encoders in 8 bits, as the training scripts do, and compute in --dtype. auto: all in --dtype.")
    add("--device", default=None, help="Device, such as cuda:1 or cpu. Default: the GPU if there is one.")
    add("--enable_model_cpu_offload", action="store_true", help="Keep each model on the CPU until it is needed: less GPU memory, slightly slower.")
    add("--enable_sequential_cpu_offload", action="store_true", help="Keep each layer on the CPU until it is needed: least GPU memory, much slower.")
    add("--enable_vae_tiling", action="store_true", help="Decode pictures in tiles: less memory at high resolutions.")
    add("--enable_vae_slicing", action="store_true", help="Decode the pictures of a batch one by one.")
    # fmt: on


def add_sampling_options(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """Add the options of model, prompts and output, shared with interpolate.py."""
    add_model_options(parser, model_required)
    add = parser.add_argument
    # fmt: off
    add("--prompt", action="extend", nargs="+", default=[], help='Prompts, with "{}" for the learned token ("{0}", "{1}" ... for several).')
    add("--prompts", type=Path, default=None, help="File with one prompt per line, in addition to --prompt.")
    add("--negative_prompt", default=None, help="What the pictures must not show. Default: nothing.")
    add("--seeds", type=number(int, 0), action="extend", nargs="+", default=None, help="Seeds: one picture per prompt and seed. Default: 0.")
    add("--scheduler", choices=["paper", "model"], default="paper", help="The paper's sampler (DDIM, for SANA Euler), or the model's own.")
    add("--output_dir", type=Path, required=True, help="Output folder.")
    add("--overwrite", action="store_true", help="Replace existing files with other settings or content.")
    # fmt: on


def settle_options(args: argparse.Namespace, family: str) -> None:
    """Fill in the family's defaults, and refuse options that do not apply to it. Raises UserError."""
    args.num_inference_steps = args.num_inference_steps or STEPS[family]
    args.guidance_scale = GUIDANCE_SCALE[family] if args.guidance_scale is None else args.guidance_scale
    args.seeds = [0] if args.seeds is None else list(dict.fromkeys(args.seeds))
    step = RESOLUTION_STEP[family]
    if args.resolution is not None and args.resolution % step:
        fits = max(args.resolution // step, 1) * step
        raise UserError(f"--resolution {args.resolution} is not a multiple of {step}: try {fits}.")
    if family != "sana" and args.complex_human_instruction != "none":
        raise UserError(f"--complex_human_instruction is SANA's, and the model is {NAMES[family]}: leave it out.")
    if family != "sdxl" and args.pooling != "eos":
        raise UserError(
            f"--pooling is Stable Diffusion XL's, and the model is {NAMES[family]}, which pools nothing: leave it out."
        )


def all_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and --prompts without duplicates. Raises UserError."""
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts is not None else [])
    for prompt in prompts:
        if re.search("[\ud800-\udfff]", prompt):
            raise UserError("--prompt is not valid UTF-8: use a terminal that is set to UTF-8.")
        if not prompt.strip():
            raise UserError("--prompt is empty: describe the picture.")
    return list(dict.fromkeys(prompts))


def sampling(args: argparse.Namespace) -> dict:
    """The arguments of `generate_pairs` from the options."""
    return {
        "steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "batch_size": args.batch_size,
        "pooling": args.pooling,
        "resolution": args.resolution,
        "instruction": sana_instruction() if args.complex_human_instruction == "default" else None,
    }


def model_settings(args: argparse.Namespace) -> dict:
    """The options on the model besides its name and revision; those that are not given are not told."""
    names = ("single_file_config", "prediction_type", "rescale_betas_zero_snr")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    given |= {"base_precision": "int8"} if args.base_precision == "int8" else {}
    return {"variant": args.variant} | given


def sampling_settings(args: argparse.Namespace, dtype: torch.dtype, loras: list[Path]) -> dict:
    """The settings that a picture depends on besides prompt, seed and embeddings, for its metadata."""
    names = ("num_inference_steps", "guidance_scale", "scheduler", "resolution", "negative_prompt", "pooling")
    return {
        "model": model_fingerprint(args.pretrained_model_name_or_path, args.revision),
        **model_settings(args),
        **{name: getattr(args, name) for name in (*names, "complex_human_instruction", "enable_vae_tiling")},
        "dtype": str(dtype).removeprefix("torch."),
        "loras": [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in loras],
    }


def start_pipeline(args: argparse.Namespace, dtype: torch.dtype, device: str, embeddings: list, loras: list):
    """Load the pipeline with the embeddings, the LoRA weights and the memory options. Raises UserError."""
    offload = args.enable_model_cpu_offload or args.enable_sequential_cpu_offload
    model, place = args.pretrained_model_name_or_path, "cpu" if offload else device
    pipe = load_pipeline(model, dtype, place, args.revision, scheduler=args.scheduler, **model_settings(args))
    load_embeddings(pipe, embeddings)
    load_loras(pipe, loras)
    if args.enable_vae_tiling:
        pipe.vae.enable_tiling()
    if args.enable_vae_slicing:
        pipe.vae.enable_slicing()
    if args.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    if args.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe


def draw_missing(
    start: Callable,
    jobs: dict[Path, tuple[str, int, dict]],
    args: argparse.Namespace,
    told: dict[Path, str] | None = None,
) -> int:
    """Draw and save the pictures that are missing. `start` loads the pipeline, and is called only if there are any.

    Args:
        jobs: prompt, seed and settings of each file.
        told: the prompt for the pipeline of each file, if the pipeline has the token under another name.

    Returns the number of pictures drawn. Raises UserError.
    """
    missing = {path: job for path, job in jobs.items() if not is_finished(path, picture_text(*job), args.overwrite)}
    if not missing:
        return 0
    try:
        pipe = start()
        pairs = [(told[path] if told else prompt, seed) for path, (prompt, seed, _) in missing.items()]
        images = generate_pairs(pipe, pairs, negative_prompt=args.negative_prompt, **sampling(args))
        for path, (_, _, image) in tqdm(zip(missing, images, strict=True), "Pictures", total=len(missing)):
            write_files({path: to_png(image, picture_text(*missing[path]))})
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "The GPU's memory is too small. Try a smaller --batch_size, --base_precision int8, --enable_model_cpu_offload or"
            " --enable_vae_tiling; finished pictures are kept."
        ) from None
    return len(missing)


def write_sheet(path: Path, rows: Iterable[Iterable[Path]], row_labels: list[str], column_labels: list[str]) -> None:
    """Write a contact sheet of saved pictures."""
    images = []
    for row in rows:
        images.append([])
        for file in row:
            with Image.open(file) as image:
                images[-1].append(thumbnail(image))
    write_files({path: to_png(contact_sheet(images, row_labels, column_labels), {})})


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("embeddings", type=Path, nargs="*", help="Output folders or files, before the options.")
    parser.add_argument("--token", nargs="+", default=None, help="Other words for the embeddings, one each.")
    parser.add_argument("--no_lora", dest="lora", action="store_false", help=f"Ignore {LORA_FILE} in their folders.")
    add_sampling_options(parser)
    return parser


def main() -> None:
    args = command_line().parse_args()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()

    # Everything is checked before any weight loads.
    embeddings = read_embeddings(args.embeddings, args.token)
    templates, tokens = all_prompts(args), [embedding.token for embedding in embeddings]
    if not templates:
        raise UserError("Give --prompt or --prompts: they describe the pictures.")
    prompts = [fill_prompt(template, tokens) for template in templates]
    model = configured_as(args.pretrained_model_name_or_path, args.single_file_config)
    family, tokenizers = check_model_fits(model, args.revision, args.embeddings, embeddings)
    settle_options(args, family)
    device = choose_device(args)
    dtype = choose_dtype(args.dtype, family, device)
    loras = find_loras(args.embeddings, family) if args.lora else []
    note_long_prompts(prompts, tokenizers, family)
    for prompt in prompts:
        if tokens and not any(token in prompt for token in tokens):
            print(f"Note: {prompt!r} has no learned token.", file=sys.stderr)

    settings = sampling_settings(args, dtype, loras)
    settings["embeddings"] = {embedding.token: digest(embedding) for embedding in embeddings}
    pairs = itertools.product(prompts, args.seeds)
    jobs = {args.output_dir / picture_name(*pair): (*pair, settings) for pair in pairs}
    grid = args.output_dir / "grid.png"
    check_ours(grid, args.overwrite)
    check_output_dir(args.output_dir)
    drawn = draw_missing(lambda: start_pipeline(args, dtype, device, embeddings, loras), jobs, args)

    rows = [[args.output_dir / picture_name(prompt, seed) for seed in args.seeds] for prompt in prompts]
    write_sheet(grid, rows, prompts, [f"seed {seed}" for seed in args.seeds])
    print(f"{drawn} pictures drawn, {len(jobs) - drawn} kept. All of them: {grid}")


if __name__ == "__main__":
    run(main)
