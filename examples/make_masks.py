#!/usr/bin/env python
"""Make the masks for --mask_dir: white where the subject is, one for each photograph.

    pip install 'rembg[cpu]' && python examples/make_masks.py --instance_data_dir photos/dog --output_dir photos/dog-masks
    python examples/make_masks.py --instance_data_dir photos/dog --output_dir photos/dog-masks \\
      --model facebook/mask2former-swin-tiny-coco-instance --label dog

The first line cuts out whatever stands in front, by rembg. The second takes what a model of transformers' image-segmentation
pipeline labels so. Masks that are there stay as they are. Look at them before the training: a wrong mask is worse than none.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import transformers
from export import UserError, check_output_dir, make_parser, run, write_files
from generate import choose_device, one_line
from pictures import check_apart, open_picture, pictures_in, png
from PIL import Image, ImageChops


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--instance_data_dir", type=Path, required=True, help="Folder of photographs.")
    add("--output_dir", type=Path, required=True, help="Where the masks are written, for --mask_dir: another folder.")
    add("--model", default=None, help="Folder or Hub id of a segmentation model. Default: rembg's.")
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--label", nargs="+", default=None, help="The model's labels of the subject. Default: all of them.")
    add("--overwrite", action="store_true", help="Replace masks that are there.")
    add("--device", default=None, help="Device of --model. Default: the GPU where there is one.")
    return parser
# fmt: on


def load_rembg() -> Callable[[Image.Image], Image.Image]:
    """A function that finds what stands in front. Raises UserError."""
    try:
        rembg = importlib.import_module("rembg")
    except (ImportError, SystemExit):  # without onnxruntime it ends the program
        raise UserError("Masks need `pip install 'rembg[cpu]'` (or [gpu]), or a --model of transformers.") from None
    session = rembg.new_session()
    return lambda picture: rembg.remove(picture, session=session, only_mask=True)


def load_model(args: argparse.Namespace) -> Callable[[Image.Image], Image.Image]:
    """A function that finds what --model calls --label. Raises UserError."""
    device = choose_device(args)
    try:
        pipe = transformers.pipeline("image-segmentation", model=args.model, revision=args.revision, device=device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {one_line(error)}") from None
    known = sorted(set(pipe.model.config.id2label.values()))
    if unknown := [label for label in args.label or () if label not in known]:
        raise UserError(f"--label {unknown[0]} is none of the model's: {', '.join(known)}.")

    def find(picture: Image.Image) -> Image.Image:
        mask = Image.new("L", picture.size)
        for part in pipe(picture):
            if args.label is None or part["label"] in args.label:
                mask = ImageChops.lighter(mask, part["mask"].convert("L").resize(picture.size))
        return mask

    return find


def main() -> None:
    args = command_line().parse_args()
    transformers.utils.logging.set_verbosity_error()
    pictures = pictures_in(args.instance_data_dir, "--instance_data_dir")
    check_apart(args.output_dir, args.instance_data_dir)
    if args.label and args.model is None:
        raise UserError(
            f"--label {args.label[0]} is of a --model, and rembg has no labels: give one, or leave it out."
        )
    check_output_dir(args.output_dir)
    masks = {path: args.output_dir / f"{path.stem}.png" for path in pictures}
    missing = [path for path in pictures if args.overwrite or not masks[path].exists()]
    if not missing:
        print(f"{len(pictures)} masks were there: --overwrite replaces them.")
        return
    find = load_rembg() if args.model is None else load_model(args)
    without = []
    for path in missing:
        mask = find(open_picture(path)).convert("L")
        if mask.getextrema()[1] < 128:  # the training scripts take it for no mask
            without.append(path.name)
            continue
        write_files({masks[path]: png(mask)})
        print(f"{masks[path]}: {np.asarray(mask).mean() / 255:.0%} of the picture", flush=True)
    if len(without) == len(pictures):
        raise UserError("No subject was found in any photograph: try another --model or --label.")
    if without:
        print(f"Note: no subject was found in {', '.join(without)}, which will count as a whole.")
    print(f"Train with --mask_dir {args.output_dir}")


if __name__ == "__main__":
    run(main)
