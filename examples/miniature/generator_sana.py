"""The miniature's generator in SANA's format: autoencoder, Gemma-2 text encoder, linear transformer.

Stages: `train_autoencoder`, `train_gemma`, `train_encode`, `train_transformer`, in this order; each writes its part of
`sana/`, which SanaPipeline loads. Pictures and captions are the same as for the SDXL-format generator.

Sections: 1 autoencoder, 2 text encoder, 3 latents and embeddings, 4 transformer, 5 the pipeline's folder.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
import world
from generator import CAPTIONS, TEXT_LENGTH, contrast, crops, naming, parts, shared_array, update_size
from torch import nn
from training import (
    SPLITS,
    AttributeHeads,
    PictureTower,
    accuracy,
    batch_of,
    caption_batch,
    fit,
    mixed_precision,
    pictures_of,
    psnr,
    rank,
    save_half,
    to_tensor,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. Autoencoder

LATENT_CHANNELS, LATENT_SIDE = 32, world.SIZE // 8


def new_autoencoder():
    """Like SANA's: residual blocks, then a linear-attention block, deterministic. It reduces 8 times instead of 32."""
    from diffusers import AutoencoderDC

    blocks, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",), (32, 64, 128, 128)
    scales = ((), (), (), (5,))
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def train_autoencoder(args):
    """Absolute and squared error. Noise on the latents and a small penalty on their size replace the KL term."""
    torch.manual_seed(args.seed)
    autoencoder = new_autoencoder().to(args.device)

    def loss_of(step, rng):
        _, pictures = batch_of("generator", rng, 16 if step % 5 else 4, args)
        pictures = crops(pictures, rng) if step % 5 else pictures
        latents = autoencoder.encode(pictures).latent
        error = autoencoder.decode(latents + 0.05 * torch.randn_like(latents)).sample.float() - pictures
        mse = error.pow(2).mean()
        return error.abs().mean() + 2 * mse + 1e-3 * latents.float().pow(2).mean(), {"psnr": psnr(mse)}

    fit("sana_vae", autoencoder, loss_of, args, lr=2e-3, ema=0.998, weight_decay=0.0)
    if rank() == 0:
        with torch.no_grad():
            _, pictures = batch_of("judges", world.generator(args.seed, "latents"), 256, args)
            latents = autoencoder.encode(pictures).latent
            error = autoencoder.decode(latents).sample - pictures
        autoencoder.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
        scale = autoencoder.config.scaling_factor
        print(f"sana_vae: {psnr(error.pow(2).mean()):.2f} dB, scaling factor {scale}", flush=True)
        save_half(autoencoder, args.output_dir / "sana" / "vae")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Text encoder

TEXT_WIDTH, TEXT_LAYERS = 128, 6


def new_tokenizer(folder):
    """Gemma's tokenizer, with one token for every word of the captions."""
    from make_small_sana import make_tokenizer

    return make_tokenizer(folder, sorted(world.vocabulary()))


def new_gemma(vocabulary):
    from transformers import Gemma2Config, Gemma2Model

    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            query_pre_attn_scalar=32, max_position_embeddings=512, attn_implementation="eager",
        )
    )  # fmt: skip
    for name, weight in gemma.named_parameters():
        # Gemma multiplies the embeddings by sqrt(d), so rows of norm 1 have unit standard deviation. Its second norms, of
        # weight 1 + w, set the size of a block's update: a fifth of that, so that no block dominates the embedding.
        if "embed_tokens" in name:
            nn.init.normal_(weight, std=TEXT_WIDTH**-0.5)
        elif "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            nn.init.constant_(weight, -0.8)
    return gemma


class GemmaPretraining(nn.Module):
    """The text encoder against a picture encoder. A caption's feature is the mean over the causal model's positions."""

    def __init__(self, vocabulary):
        super().__init__()
        self.gemma, self.project = new_gemma(vocabulary), nn.Linear(TEXT_WIDTH, 128, bias=False)
        self.tower, self.scale = PictureTower(32, 128), nn.Parameter(torch.tensor(math.log(10.0)))
        self.heads = nn.ModuleList((AttributeHeads(128), AttributeHeads(128)))  # as in the SDXL-format generator

    def forward(self, pictures, ids, mask, same, shown, stated):
        output = self.gemma(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        weights = mask[..., None].float()
        text = self.project((output.last_hidden_state.float() * weights).sum(1) / weights.sum(1))
        # The last state comes after the final norm, so it is not a block's update.
        growth = update_size(output.hidden_states[:-1], norm=TEXT_WIDTH**0.5)
        look = self.tower(pictures).float()
        loss, hits = contrast(look, text, self.scale, same)
        named = naming(self.heads, (look, text), (shown, stated))
        bound = accuracy(self.heads[1], text, stated).get("relation", 0.0)
        return loss + named + 0.02 * growth, {"hits": hits, "updates": growth, "relation": bound}


def train_gemma(args):
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer(args.output_dir / "sana" / "tokenizer")
    tokenizer.padding_side = "right"  # as in SanaPipeline
    model = GemmaPretraining(len(tokenizer)).to(args.device)

    def loss_of(step, rng):
        pictures, texts, same, shown, stated = caption_batch("generator", rng, 96, args)
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(args.device)
        return model(pictures, inputs.input_ids, inputs.attention_mask, same, shown, stated)

    fit("gemma", model, loss_of, args, lr=1e-3, ema=0.995)
    folder = args.output_dir / "sana" / "text_encoder"
    save_half(model.gemma, folder)
    norms = model.gemma.get_input_embeddings().weight.norm(dim=1)
    print(f"gemma: vocabulary norm {norms.mean():.3f} ({norms.min():.3f} to {norms.max():.3f})", flush=True)


def load_gemma(args):
    from transformers import Gemma2Model, GemmaTokenizerFast

    folder = args.output_dir / "sana"
    gemma = Gemma2Model.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).to(args.device)
    tokenizer = GemmaTokenizerFast.from_pretrained(folder / "tokenizer", padding_side="right")
    return gemma.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def embed_texts(texts, gemma, tokenizer):
    """Encode prompts of at most TEXT_LENGTH tokens like SanaPipeline: states, and the mask of the text."""
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    inputs = inputs.to(gemma.device)
    return gemma(**inputs).last_hidden_state, inputs.attention_mask


# ---------------------------------------------------------------------------------------------------------------------
# 3. Latents and embeddings


@torch.no_grad()
def train_encode(args):
    """Encode once: latents of all pictures with their objects' positions, and embeddings and lengths of all captions."""
    from diffusers import AutoencoderDC

    autoencoder = AutoencoderDC.from_pretrained(args.output_dir / "sana" / "vae").to(args.device).eval()
    gemma, tokenizer = load_gemma(args)
    pictures = pictures_of("generator", args.runs_dir)
    latents = shared_array("sana_latents", len(pictures), (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), args)
    contexts = shared_array("sana_contexts", len(pictures), (CAPTIONS, TEXT_LENGTH, TEXT_WIDTH), args)
    lengths = shared_array("sana_lengths", len(pictures), (CAPTIONS,), args)
    squares = shared_array("sana_squares", len(pictures), (LATENT_SIDE, LATENT_SIDE), args)
    for part in parts(len(pictures)):
        seeds = range(SPLITS["generator"][0] + part.start, SPLITS["generator"][0] + part.stop)
        texts = [world.caption(world.sample_scene(s), s * 1000 + k)[0] for s in seeds for k in range(CAPTIONS)]
        with mixed_precision(args):
            encoded = autoencoder.encode(to_tensor(pictures[part]).to(args.device)).latent
            states, mask = embed_texts(texts, gemma, tokenizer)
        latents[part] = (encoded.float() * autoencoder.config.scaling_factor).cpu()
        contexts[part] = states.float().cpu().unflatten(0, (-1, CAPTIONS))
        lengths[part] = mask.sum(1).cpu().unflatten(0, (-1, CAPTIONS))
        squares[part] = np.stack([squares_of(world.standing(world.sample_scene(s), s)) for s in seeds])


def squares_of(standing):
    """Squares (side, side) around the subject and the second object, with a larger weight for smaller objects: a mean of 1
    for a large subject, 1.5 for a small one, 2.1 for a second object."""
    edges = np.arange(LATENT_SIDE + 1) * (world.SIZE // LATENT_SIDE)
    squares = np.zeros((LATENT_SIDE, LATENT_SIDE), np.float32)
    for x, y, radius in standing:
        reach = radius + 2  # includes the outline
        rows, columns = (np.diff(np.clip(edges, centre - reach, centre + reach)) for centre in (y, x))
        square = np.outer(rows, columns)
        squares += world.SIZES["large"] / radius * square / square.mean()
    return squares


# ---------------------------------------------------------------------------------------------------------------------
# 4. Transformer


def new_transformer():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, sample_size=LATENT_SIDE, patch_size=1,
        num_layers=6, num_attention_heads=7, attention_head_dim=32,
        num_cross_attention_heads=7, cross_attention_head_dim=32, cross_attention_dim=7 * 32,
        caption_channels=TEXT_WIDTH, qk_norm="rms_norm_across_heads",
        interpolation_scale=1,  # sine and cosine of the position, as in SANA for 2048 pixels
    )  # fmt: skip


def train_transformer(args):
    """Flow matching: x_t = (1 - t) x + t noise, the target noise - x.

    The times are logit-normal around 0.69, not 0.5: the caption's shapes and colours are decided between 0.5 and 0.9. The
    subject and the second object each have one to two times the weight of the whole picture, since they have few latents.
    """
    torch.manual_seed(args.seed)
    transformer = new_transformer().to(args.device)
    predict = torch.compile(transformer, dynamic=False) if args.compile else transformer
    names = ("sana_latents", "things", "sana_squares", "sana_contexts", "sana_lengths")
    arrays = (np.load(args.runs_dir / f"{name}.npy", mmap_mode="r") for name in names)
    latents, things, squares, contexts, lengths = arrays
    empty, _ = embed_texts([""], *load_gemma(args))
    positions = torch.arange(TEXT_LENGTH, device=args.device)

    def tensor(array):
        return torch.from_numpy(array.astype(np.float32)).to(args.device)

    def loss_of(step, rng):
        index, which = rng.integers(0, len(latents), args.batch), rng.integers(0, CAPTIONS, args.batch)
        clean, context, length = tensor(latents[index]), tensor(contexts[index, which]), tensor(lengths[index, which])
        # One in ten captions is dropped as in SanaPipeline: the empty prompt, which is only its first token.
        dropped = tensor(rng.random(args.batch)) < 0.1
        context = torch.where(dropped[:, None, None], empty.float(), context)
        mask = (positions < torch.where(dropped, 1.0, length)[:, None]).float()
        noise, t = torch.randn_like(clean), torch.sigmoid(0.8 + torch.randn(len(clean), device=args.device))
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        output = predict(noisy, context, timestep=1000 * t, encoder_attention_mask=mask).sample
        weights = 1 + 2 * F.avg_pool2d(tensor(things[index]), 2) + tensor(squares[index])
        weights = (weights / weights.mean())[:, None]
        return ((output.float() - (noise - clean)).square() * weights).mean(), {}

    fit("transformer", transformer, loss_of, args, lr=8e-4, ema=0.9985)
    if rank() == 0:
        export_pipeline(transformer, args)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The pipeline's folder


def export_pipeline(transformer, args):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

    folder = args.output_dir / "sana"
    save_half(transformer, folder / "transformer")
    gemma, tokenizer = load_gemma(args)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    autoencoder = AutoencoderDC.from_pretrained(folder / "vae")
    SanaPipeline(tokenizer, gemma, autoencoder, transformer, scheduler).save_config(folder)
    # transformers 5 names the class GemmaTokenizer. In transformers 4 this name is a class that needs sentencepiece.
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
