"""Train the miniature's models from scratch: generators in SDXL's, Stable Diffusion's and SANA's formats, judges, classifiers.

    python train_models.py                                    # every stage in order
    python train_models.py --stages clip unet                 # some of them
    torchrun --nproc_per_node 2 train_models.py --stages unet # one stage with several processes

Every model has a stock class and is written in the stock format, fp16 safetensors, beside this file: `sdxl/`
(StableDiffusionXLPipeline), `sd/` (StableDiffusionPipeline, its UNet mostly in fp8), `sana/`, `siglip/`, `dinov2/` and
`classifiers/`. Runs are seeded and resumable at any time; `--runs_dir` holds data and checkpoints. They need only a CPU and
can use a GPU.

The stages:
    data        pictures of three separate seed ranges: for the generator, the judges and the classifiers
    vae         AutoencoderKL, 64x64 pixels to 16x16 latents of 8 channels
    clip        two CLIP text encoders and their tokenizers, trained contrastively against pictures, then frozen
    encode      latents and text embeddings of the generator's pictures and captions, and the objects' positions
    unet        UNet2DConditionModel with SDXL's added conditions, trained to predict noise
    sd_encode, sd_text, sd_unet
                a generator in Stable Diffusion's format, `sd/`, distilled from `sdxl/`; they need no earlier stage's data
    sana_vae    AutoencoderDC, 64x64 pixels to 8x8 latents of 32 channels
    classifiers one small convolutional network that reads every attribute of a picture, also after either autoencoder
    dinov2      Dinov2Model: its class feature distinguishes subjects
    siglip      SiglipModel: pictures against captions
    gemma, sana_encode, transformer
                the rest of a generator in SANA's format, `sana/` (SanaPipeline), on the same pictures

`world.py` draws the pictures, `training.py` holds the loop, `generator*.py` and `judges.py` the models.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import generator
import generator_sana
import generator_sd
import judges
import torch
import torch.distributed as dist
import training
from torch.nn.attention import SDPBackend, sdpa_kernel


HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# 1. Options

STAGES = {
    "data": training.render_all,
    "vae": generator.train_vae,
    "clip": generator.train_clip,
    "encode": generator.train_encode,
    "unet": generator.train_unet,
    "sd_encode": generator_sd.train_encode,
    "sd_text": generator_sd.train_text_encoder,
    "sd_unet": generator_sd.train_unet,
    "sana_vae": generator_sana.train_autoencoder,
    "classifiers": judges.train_classifiers,
    "dinov2": judges.train_dinov2,
    "siglip": judges.train_siglip,
    "gemma": generator_sana.train_gemma,
    "sana_encode": generator_sana.train_encode,
    "transformer": generator_sana.train_transformer,
}

STEPS = {"vae": 7000, "clip": 1500, "unet": 13_200, "classifiers": 26_000, "dinov2": 2500, "siglip": 1400}
STEPS |= {"sd_text": 400, "sd_unet": 850}
STEPS |= {"sana_vae": 7000, "gemma": 1500, "transformer": 61_500}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        nargs="+",
        default=list(STAGES),
        choices=STAGES,
        metavar="STAGE",
        help=f"stages to run: {', '.join(STAGES)}",
    )
    parser.add_argument("--runs_dir", type=Path, default=HERE / "runs", help="data and checkpoints (several GB)")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="folder for the model folders")
    parser.add_argument(
        "--steps", type=json.loads, default={}, metavar="JSON", help=f"numbers of steps other than {json.dumps(STEPS)}"
    )
    parser.add_argument(
        "--encode", nargs="+", default=["latents", "things", "captions"], help="outputs of the encode stage"
    )
    parser.add_argument("--batch", type=int, default=64, help="the UNet's batch, per process")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile SANA's transformer: a third faster on a CPU with a C++ compiler",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="fp32 is faster on a CPU without bf16 instructions",
    )
    parser.add_argument("--export_only", action="store_true", help="write the folders from the current checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = set(args.steps) - set(STEPS)
    if unknown:
        parser.error(f"--steps: no model {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    args.steps = STEPS | args.steps
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# 2. Stages


def main(argv=None):
    args = parse_args(argv)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    # On a CPU flash attention's backward pass is slow in bf16.
    with sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else contextlib.nullcontext():
        for stage in STAGES:
            if stage in args.stages:
                began = time.time()
                STAGES[stage](args)
                print(f"stage {stage}: {(time.time() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
