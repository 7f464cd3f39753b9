#!/usr/bin/env python
"""Interpolate between two learned tokens on the sphere, and draw the path as a strip of pictures.

    python examples/interpolate.py out/my-dog out/my-cat --output_dir out/dog-to-cat \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --prompt "a photo of a {} on the beach"

Embeddings of the same norm lie on a sphere. Spherical linear interpolation gives the embeddings between two of them
(https://arxiv.org/abs/2512.13672, "Interpolation"), separately for each text encoder and each vector:

    v(t) = [sin((1 - t) theta) v1 + sin(t theta) v2] / sin theta,   e(t) = m* v(t),   theta = angle(v1, v2)

m* is the norm of the two ends. If their norms differ, as with Textual Inversion, a note says so, and e(t) has the norm
(1 - t) |e1| + t |e2|, which keeps both ends unchanged. --magnitude sets another norm, such as the model's mean.

Written to --output_dir: one folder per t, such as `t-0.350`, with the embedding in every format and, with --prompt, its
pictures; then `strip.png`, and with --animation also `animation.gif` or `.webp`. The ratios are the paper's, or `--num`
evenly spaced ones. --linear adds linear interpolation of the embeddings for comparison: it leaves the sphere, and the norm
falls between the ends. Without --prompt no model is needed.
"""

import argparse
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from export import (
    FORMATS,
    Embedding,
    EmbeddingError,
    UserError,
    changed,
    check_output_dir,
    make_parser,
    read_embedding,
    renamed,
    run,
    web_name,
    write_embedding,
    write_files,
)
from generate import (
    LORA_FILE,
    SOFTWARE,
    add_sampling_options,
    all_prompts,
    check_model_fits,
    check_ours,
    choose_device,
    choose_dtype,
    digest,
    draw_missing,
    fill_prompt,
    note_long_prompts,
    number,
    picture_name,
    sampling_settings,
    settle_options,
    start_pipeline,
    thumbnail,
    write_sheet,
)
from PIL import Image
from rescale import chosen_magnitudes, magnitude_rule, magnitudes


PAPER_RATIOS = (0.0, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 1.0)
PARALLEL = 1e-4  # radians; directions at a smaller angle count as equal
ANTIPODAL = 1e-3  # radians; so close to opposite, no path between the directions is the shortest
EQUAL_NORMS = 1e-3  # relative; a smaller difference between norms is rounding


# ----------------------------------------------------------------------------------------------------------------------
# 1. Interpolation
# ----------------------------------------------------------------------------------------------------------------------


def directions(e: torch.Tensor) -> torch.Tensor:
    """Rows of `e` (..., d) in float64 at unit length. Raises ValueError for a row of zeros."""
    norm = e.double().norm(dim=-1, keepdim=True)
    if not norm.all():
        raise ValueError("a vector of zeros has no direction")
    return e.double() / norm


def angle(v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """Angles (...,) in radians between unit rows (..., d), accurate also for nearly parallel or opposite rows."""
    return 2 * torch.atan2((v1 - v2).norm(dim=-1), (v1 + v2).norm(dim=-1))


def slerp(v1: torch.Tensor, v2: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical linear interpolation: at `t` the direction has turned by t theta from `v1` towards `v2`.

    Args:
        v1, v2: (..., d), of any norm but zero; they are normalised here.
        t: 0 is `v1`, 1 is `v2`.

    Returns unit rows (..., d) in the dtype of `v1`; the arithmetic is float64. If theta is below 1e-4 radians, v1 and v2
    are interpolated linearly and normalised.

    Raises:
        ValueError: if two rows are opposite (then no path is the shortest) or one is zero.
    """
    first, second = directions(v1), directions(v2)
    theta = angle(first, second).unsqueeze(-1)
    if (theta > math.pi - ANTIPODAL).any():
        raise ValueError("the vectors point in opposite directions, and no path between them is the shortest")
    # v(t) = [sin((1 - t) theta) v1 + sin(t theta) v2] / sin theta; `directions` does the division
    near = theta < PARALLEL
    weight_1 = torch.where(near, 1 - t, torch.sin((1 - t) * theta))
    weight_2 = torch.where(near, t, torch.sin(t * theta))
    return directions(weight_1 * first + weight_2 * second).to(v1.dtype)


def check_ends(first: Embedding, second: Embedding) -> None:
    """Refuse two embeddings that cannot be interpolated. Raises EmbeddingError."""
    if first.family != second.family:
        raise EmbeddingError(
            f"{first.token} is for {first.family} and {second.token} for {second.family}: give two for the same model."
        )
    for encoder, e1 in first.vectors.items():
        e2 = second.vectors[encoder]
        if len(e1) != len(e2):
            raise EmbeddingError(
                f"{first.token} has {len(e1)} vectors and {second.token} has {len(e2)}: train both with the same"
                " --num_vectors."
            )
        if e1.shape != e2.shape:
            widths = f"{e1.shape[-1]} and {e2.shape[-1]}"
            raise EmbeddingError(
                f"{first.token} and {second.token} have the widths {widths}: they are for two different models."
            )
        opposite = angle(directions(e1), directions(e2)) > math.pi - ANTIPODAL
        if opposite.any():
            raise EmbeddingError(
                f"{first.token} and {second.token} point in opposite directions (vector {opposite.int().argmax() + 1} of"
                f" {encoder}, antipodal): no path between them is the shortest. Go through a third embedding."
            )


def interpolate(first: Embedding, second: Embedding, t: float, m: dict[str, float] | None = None) -> Embedding:
    """The embedding at `t` between two, e(t) = m* v(t), with the name and metadata of the first.

    Args:
        m: m* by text encoder. None: (1 - t) |e1| + t |e2| for each vector, which is m* if both have it; then the ends are
            bit-identical to the two embeddings.

    Raises EmbeddingError if they cannot be interpolated.
    """
    check_ends(first, second)
    if m is None and t in (0, 1):
        return replace(first, vectors=dict((second if t else first).vectors))
    vectors = {}
    for encoder, e1 in first.vectors.items():
        e1, e2 = e1.double(), second.vectors[encoder].double()
        norm = (1 - t) * e1.norm(dim=-1, keepdim=True) + t * e2.norm(dim=-1, keepdim=True)
        vectors[encoder] = ((norm if m is None else m[encoder]) * slerp(e1, e2, t)).float()
    return replace(first, vectors=vectors)


def interpolate_linearly(first: Embedding, second: Embedding, t: float) -> Embedding:
    """(1 - t) e1 + t e2, linear interpolation without the sphere."""
    vectors = {x: ((1 - t) * e.double() + t * second.vectors[x].double()).float() for x, e in first.vectors.items()}
    return replace(first, vectors=vectors)


def describe(first: Embedding, second: Embedding, free: bool) -> None:
    """Print the angle and the norms of the two ends, and a note if the norms differ and --magnitude is not given."""
    for encoder, e1 in first.vectors.items():
        e2 = second.vectors[encoder]
        degrees = ", ".join(f"{x:.2f}" for x in torch.rad2deg(angle(directions(e1), directions(e2))))
        norms = [", ".join(f"{x:.4f}" for x in e.norm(dim=-1)) for e in (e1, e2)]
        print(f"{encoder}: theta {degrees} degrees; norms {norms[0]} and {norms[1]}")
        if free and not torch.allclose(e1.norm(dim=-1), e2.norm(dim=-1), rtol=EQUAL_NORMS, atol=0):
            print(
                f"Note: the norms of {encoder} differ, so each t has a norm in between; --magnitude sets one m*.",
                file=sys.stderr,
            )


# ----------------------------------------------------------------------------------------------------------------------
# 2. Pictures
# ----------------------------------------------------------------------------------------------------------------------


def write_animation(path: Path, rows: list[list[Path]]) -> None:
    """Animate the columns forwards and backwards, with all rows side by side and a pause at both ends."""
    frames = []
    for column in zip(*rows, strict=True):
        images = []
        for file in column:
            with Image.open(file) as image:
                images.append(thumbnail(image))
        width, height = images[0].size
        frames.append(Image.new("RGB", (width * len(images), height)))
        for index, image in enumerate(images):
            frames[-1].paste(image, (index * width, 0))
    frames += frames[-2:0:-1]
    durations = [200] * len(frames)  # milliseconds
    durations[0] = durations[len(rows[0]) - 1] = 800
    mark = {"comment": SOFTWARE.encode()} if path.suffix == ".gif" else {"xmp": SOFTWARE.encode(), "quality": 90}
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, **mark}
    frames[0].save(content := io.BytesIO(), format=path.suffix[1:], **options)
    write_files({path: content.getvalue()})


def draw(args: argparse.Namespace, points: dict[str, list[Embedding]], family: str, prompts: list[str]) -> None:
    """Draw every prompt and seed at every point of each path ("slerp", "linear"), and write the strip."""
    device = choose_device(args)
    dtype = choose_dtype(args.dtype, family, device)
    settings = sampling_settings(args, dtype, [])
    strip = args.output_dir / "strip.png"
    animation = args.output_dir / f"animation.{args.animation}"
    for path in (strip, animation) if args.animation else (strip,):
        check_ours(path, args.overwrite)

    # All points are loaded at once, each under its own word; the pictures' metadata have the word of the files.
    aliases, jobs, told, rows, labels = [], {}, {}, [], []
    for way, embeddings in points.items():
        aliases += [replace(x, token=f"<{way}-{index}>") for index, x in enumerate(embeddings)]
    for template in prompts:
        for seed in args.seeds:
            for way, embeddings in points.items():
                rows.append([])
                labels.append(f"{template}, seed {seed}" + (f", {way}" if len(points) > 1 else ""))
                for index, (t, embedding) in enumerate(zip(args.ratios, embeddings, strict=True)):
                    prompt = fill_prompt(template, [embedding.token])
                    folder = args.output_dir / ("" if way == "slerp" else way) / t_name(t)
                    path = folder / picture_name(prompt, seed)
                    jobs[path] = (
                        prompt,
                        seed,
                        {**settings, "t": t, "embeddings": {embedding.token: digest(embedding)}},
                    )
                    told[path] = fill_prompt(template, [f"<{way}-{index}>"])
                    rows[-1].append(path)
    drawn = draw_missing(lambda: start_pipeline(args, dtype, device, aliases, []), jobs, args, told)
    write_sheet(strip, rows, labels, [f"t = {t:.3g}" for t in args.ratios])
    print(f"{drawn} pictures drawn, {len(jobs) - drawn} kept. All of them: {strip}")
    if args.animation:
        write_animation(animation, rows)
        print(animation)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Command line
# ----------------------------------------------------------------------------------------------------------------------


def t_name(t: float) -> str:
    return f"t-{t:.3f}"


def end_or_rule(text: str) -> str | float:
    """The argparse type of --magnitude: `ends`, `mean`, `min` or a positive number."""
    try:
        return text if text == "ends" else magnitude_rule(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ends, mean, min or a number above 0") from None


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("first", type=Path, help="The embedding at t = 0: a run's output folder, or a file in any format.")
    add("second", type=Path, help="The embedding at t = 1.")
    add("--num", type=number(int, 2), default=None, help="Number of evenly spaced ratios from 0 to 1. Default: the paper's ratios.")
    add("--magnitude", type=end_or_rule, default="ends", metavar="{ends,mean,min,NUMBER}", help="m*: the norm of the ends (default), the mean or minimum of the model's vocabulary, or a number.")
    add("--token", default=None, help="The word of the results. Default: both names, as in <my-dog-my-cat>.")
    add("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="Embedding files to write. Default: all.")
    add("--linear", action="store_true", help="Also draw linear interpolation of the embeddings, in a second row.")
    add("--animation", choices=["gif", "webp"], default=None, help="Also write the strip as an animation.")
    # fmt: on
    add_sampling_options(parser, model_required=False)
    return parser


def parse_args() -> argparse.Namespace:
    args = command_line().parse_args()
    count = args.num or 2
    if count > 101:
        raise UserError(f"--num {count} is more than 101 ratios: the folders are named by thousandths.")
    args.ratios = list(PAPER_RATIOS) if args.num is None else [i / (count - 1) for i in range(count)]
    return args


def main() -> None:
    args = parse_args()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()

    # Everything is checked before any weight loads.
    first, second = read_embedding(args.first), read_embedding(args.second)
    check_ends(first, second)
    result = renamed(first, args.token or f"<{web_name(first.token)}-{web_name(second.token)}>")
    prompts = all_prompts(args)
    for prompt in prompts:
        if fill_prompt(prompt, [result.token]) == prompt:
            raise UserError(f'--prompt {prompt!r} has no "{{}}": its picture would be the same at every t.')
    for option in ("linear", "animation"):
        if getattr(args, option) and not prompts:
            raise UserError(f"--{option} needs pictures: add --prompt.")
    model, family = args.pretrained_model_name_or_path, first.family
    if model is None and (prompts or args.magnitude in ("mean", "min")):
        what = "--prompt" if prompts else f"--magnitude {args.magnitude}"
        raise UserError(f"{what} needs a model: add --pretrained_model_name_or_path.")
    if model is not None:
        sources, ends = [args.first, args.second], [first, second]
        family, tokenizers = check_model_fits(model, args.revision, sources, ends, words=[result])
        note_long_prompts([fill_prompt(prompt, [result.token]) for prompt in prompts], tokenizers, family)
        settle_options(args, family)
    if any((source / LORA_FILE).is_file() for source in (args.first, args.second)):
        print(f"Note: {LORA_FILE} is ignored: only embeddings are interpolated.", file=sys.stderr)

    m = None
    if args.magnitude != "ends":
        found = dict.fromkeys(first.vectors, {})
        if not isinstance(args.magnitude, float):
            found = magnitudes(model, args.revision, args.variant)
        m = chosen_magnitudes(found, args.magnitude)
    check_output_dir(args.output_dir)
    describe(first, second, free=m is None)
    between = f"{first.token} to {second.token}"
    points = {"slerp": []}
    for t in args.ratios:
        point = interpolate(first, second, t, m)
        told = {"dti.interpolated": between, "dti.interpolated_at": f"{t:.6g}"}
        points["slerp"].append(changed(result, point.vectors, **told))
        write_embedding(points["slerp"][-1], args.output_dir / t_name(t), args.format, args.overwrite)
    print(f"{len(args.ratios)} embeddings of {result.token}: {args.output_dir / t_name(args.ratios[0])} and so on")
    if args.linear:
        points["linear"] = [replace(interpolate_linearly(first, second, t), token=result.token) for t in args.ratios]
    if prompts:
        draw(args, points, family, prompts)


if __name__ == "__main__":
    run(main)
