#!/usr/bin/env python
"""Make a small random SANA pipeline and a few rendered photographs, to try the training script without downloads.

    python examples/make_small_sana.py --output_dir small

writes `small/sana`, a folder that `SanaPipeline.from_pretrained` loads, and `small/photos`, five pictures of one
subject. Every part is a stock class in SANA 1.5's layout, with SANA's peculiarities (Gemma's byte-fallback tokenizer, which
pads left and has ordinary text among its added tokens; a deterministic autoencoder that reduces 32 times; a DPM-Solver
scheduler for a flow model), but small and untrained. It shows that everything runs; it learns nothing useful.
Keep its pictures small: `pipe(prompt, height=64, width=64, use_resolution_binning=False)`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from make_small_sdxl import WORDS, learn_merges, make_photographs
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast


TEXT_WIDTH = 32  # SANA: 2304
LATENT_CHANNELS = 8  # SANA: 32
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]  # also special
# Gemma-2 has some 240 more added tokens that are not special. Code that removes every added token would remove these.
ORDINARY = ["<mask>", "<unused0>", "\n", "\n\n", "▁▁", "▁▁▁"]


def make_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> GemmaTokenizerFast:
    """Write a Gemma tokenizer with all bytes and the words, and load it."""
    spelled = [[*word] for word in words] + [
        ["▁", *word] for word in words
    ]  # at the start of the text, and after a space
    merges = [("▁", "▁"), ("▁▁", "▁"), *learn_merges(spelled)]
    pieces = [*SPECIAL, *ORDINARY[:2], *TURNS, *ORDINARY[2:], *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["".join(merge) for merge in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # no space is added before the text
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL + TURNS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{token[1:-1]}_token": token for token in SPECIAL}
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **special}
    config |= {"additional_special_tokens": TURNS, "model_max_length": 2**63, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return GemmaTokenizerFast.from_pretrained(folder)


def make_text_encoder(vocabulary: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
        )
    )


def make_autoencoder() -> AutoencoderDC:
    """SANA's autoencoder: six stages, so latents are 32 times smaller, with attention in the last three."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths = (8, 8, 8, 8, 16, 16)
    scales = ((),) * 3 + ((5,),) * 3
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def make_pipeline(folder: Path, seed: int = 0) -> SanaPipeline:
    """Build the pipeline with random weights from `seed`, save it to `folder`, and return it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,  # heads x width per head, for both attentions
        caption_channels=TEXT_WIDTH,
        sample_size=32,
        qk_norm="rms_norm_across_heads",  # as in SANA 1.5; SANA 1.0 has none
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = SanaPipeline(tokenizer, make_text_encoder(len(tokenizer)), make_autoencoder(), transformer, scheduler)
    pipeline.save_pretrained(folder)

    # transformers 5 names the class GemmaTokenizer. In transformers 4 this name is a class that needs sentencepiece.
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    make_tokenizer(
        folder / "tokenizer"
    )  # again: save_pretrained rewrites it, differently in each version of transformers
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("small"), help="where `sana` and `photos` are written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_pipeline(args.output_dir / "sana", args.seed)
    make_photographs(args.output_dir / "photos", seed=args.seed)
    print(f"wrote {args.output_dir / 'sana'} and {args.output_dir / 'photos'}")


if __name__ == "__main__":
    main()
