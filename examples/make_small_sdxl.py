#!/usr/bin/env python
"""Make a small random SDXL pipeline and a few rendered photographs, to try the training script without downloads.

    python examples/make_small_sdxl.py --output_dir small

writes `small/sdxl`, a folder that `StableDiffusionXLPipeline.from_pretrained` loads, and `small/photos`, five pictures of
one subject. Every part is a stock class in SDXL's layout, with SDXL's peculiarities (the second encoder's `eos_token_id: 2`,
its padding with "!", zeros for the empty prompt), but small and untrained. It shows that everything runs; it learns nothing
useful. `--model sd` makes `small/sd` instead, a Stable Diffusion 1 for train_dti_sd.py.
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


# Words of one token each. Any other text is encoded byte by byte.
WORDS = (
    "a an the of in on with and my photo picture dog cat teapot vase toy stuffed animal clock painting style".split()
)
TEXT_WIDTHS = (32, 48)  # SDXL: 768 and 1280


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the 256 bytes in CLIP's byte-level BPE, in vocabulary order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = range(256, 256 + 256 - len(printable))  # the unprintable bytes move above the first 256 code points
    return [chr(code) for code in (*printable, *moved)]


def learn_merges(spelled: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges, most common pair first, that turn each word (given in pieces) into one token."""
    merges = []
    while any(len(pieces) > 1 for pieces in spelled):
        pairs = Counter(pair for pieces in spelled for pair in itertools.pairwise(pieces))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [merge_pair(pieces, best) for pieces in spelled]
    return merges


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def make_tokenizer(folder: Path, pad_token: str, words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """Write a CLIP tokenizer with all bytes and the words, and load it."""
    symbols = byte_symbols()
    merges = learn_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols]
    vocabulary += dict.fromkeys("".join(merge) for merge in merges)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the end token has the highest id, as in CLIP

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(width: int, vocabulary: int, cls: type, eos_token_id: int):
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu" if cls is CLIPTextModelWithProjection else "quick_gelu",
        bos_token_id=0,
        eos_token_id=eos_token_id,
        pad_token_id=1,
    )
    return cls(config)


def make_unet(cross_attention_dim: int, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=cross_attention_dim,
        **options,
    )


def make_autoencoder(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
    )


def make_sd_pipeline(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1 with random weights from `seed`, saved to `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", "<|endoftext|>")
    text_encoder = make_text_encoder(TEXT_WIDTHS[0], len(tokenizer), CLIPTextModel, eos_token_id=2)
    unet, vae = make_unet(TEXT_WIDTHS[0]), make_autoencoder(0.18215)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1)
    no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, **no_checker)
    pipeline.save_pretrained(folder)
    return pipeline


def make_pipeline(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """Build the pipeline with random weights from `seed`, save it to `folder`, and return it."""
    torch.manual_seed(seed)
    tokenizers = [make_tokenizer(folder / "tokenizer", "<|endoftext|>"), make_tokenizer(folder / "tokenizer_2", "!")]
    vocabulary = len(tokenizers[0])
    # Both of SDXL's text encoders have eos_token_id 2 instead of the end token's: transformers pools at the highest id.
    text_encoder = make_text_encoder(TEXT_WIDTHS[0], vocabulary, CLIPTextModel, eos_token_id=2)
    text_encoder_2 = make_text_encoder(TEXT_WIDTHS[1], vocabulary, CLIPTextModelWithProjection, eos_token_id=2)
    unet = make_unet(
        sum(TEXT_WIDTHS),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 8,  # pooled text and six size numbers
    )
    vae = make_autoencoder(0.13025)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = StableDiffusionXLPipeline(
        vae, text_encoder, text_encoder_2, *tokenizers, unet, scheduler, add_watermarker=False
    )
    pipeline.save_pretrained(folder)
    return pipeline


def make_photographs(folder: Path, count: int = 5, seed: int = 0) -> None:
    """Render `count` PNG pictures of one subject, a striped teapot, on different grounds and in different places."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        width, height = (int(side) for side in random.integers(96, 160, 2))
        image = Image.new("RGB", (width, height), tuple(int(c) for c in random.integers(120, 256, 3)))
        draw = ImageDraw.Draw(image)
        x, y, r = (int(v) for v in (width * random.uniform(0.4, 0.6), height * random.uniform(0.45, 0.6), 28))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(200, 60, 40))
        for stripe in (-12, 0, 12):
            draw.rectangle((x - r + 4, y + stripe - 2, x + r - 4, y + stripe + 2), fill=(240, 220, 120))
        draw.polygon([(x + r - 4, y), (x + r + 16, y - 16), (x + r + 4, y + 8)], fill=(200, 60, 40))
        draw.arc((x - r - 16, y - 14, x - r + 10, y + 14), 60, 300, fill=(120, 30, 20), width=5)
        draw.ellipse((x - 5, y - r - 9, x + 5, y - r + 1), fill=(120, 30, 20))
        image.save(folder / f"{index:02d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("small"), help="where the model and `photos` are written"
    )
    parser.add_argument("--model", choices=["sdxl", "sd"], default="sdxl", help="Stable Diffusion XL, or 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make = {"sdxl": make_pipeline, "sd": make_sd_pipeline}[args.model]
    make(args.output_dir / args.model, args.seed)
    make_photographs(args.output_dir / "photos", seed=args.seed)
    print(f"wrote {args.output_dir / args.model} and {args.output_dir / 'photos'}")


if __name__ == "__main__":
    main()
