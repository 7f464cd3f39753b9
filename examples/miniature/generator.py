"""The miniature's generator in SDXL's format: autoencoder, text encoders, UNet. `train_models.py` runs the stages.

Stages: `train_vae`, `train_clip`, `train_encode`, `train_unet`, in this order; each writes its part of `sdxl/`.

Sections: 1 autoencoder, 2 text encoders, 3 latents and embeddings, 4 UNet, 5 the pipeline's folder.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from torch import nn
from training import (
    SPLITS,
    TEXT_LENGTH,
    AttributeHeads,
    PictureTower,
    accuracy,
    batch_of,
    caption_batch,
    captions_of,
    fit,
    fray,
    mixed_precision,
    new_tokenizer,
    pad_ids,
    pictures_of,
    psnr,
    rank,
    save_half,
    save_tokenizer,
    to_tensor,
    vocabulary_and_merges,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. Autoencoder

LATENT_CHANNELS, LATENT_SIDE = 8, world.SIZE // 4


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )


def crops(pictures, rng, side=world.SIZE // 2):
    """The more detailed of two random quarters of each picture: faster steps, with more detail per step."""
    chosen = []
    for picture in pictures:
        corners = 4 * rng.integers(0, (world.SIZE - side) // 4 + 1, (2, 2))
        pieces = [picture[:, i : i + side, j : j + side] for i, j in corners]
        chosen.append(max(pieces, key=lambda piece: float(piece.diff(dim=-1).abs().mean())))
    return torch.stack(chosen)


def train_vae(args):
    """Absolute and squared error, and a small KL term. Edges here are clean, so there is no discriminator.

    Four in five steps use quarters of pictures: in the same time this gains about six decibels over whole pictures.
    """
    torch.manual_seed(args.seed)
    vae = new_vae().to(args.device)

    def loss_of(step, rng):
        if step % 5:
            _, pictures = batch_of("generator", rng, 16, args)
            pictures = crops(pictures, rng)
        else:
            _, pictures = batch_of("generator", rng, 4, args)
        if rng.random() < 0.1:  # other tints, so that tones outside the training set work too
            pictures = pictures[:, torch.from_numpy(rng.permutation(3))]
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - pictures
        mse = error.pow(2).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * mse + 2e-4 * kl, {"psnr": psnr(mse), "kl": kl}

    fit("vae", vae, loss_of, args, lr=2e-3, ema=0.998, weight_decay=0.0)
    if rank() == 0:
        measure_latents(vae, args)
        save_half(vae, args.output_dir / "sdxl" / "vae")


@torch.no_grad()
def measure_latents(vae, args):
    """Set the scaling factor for latents of unit standard deviation, and print the error on another seed range."""
    _, pictures = batch_of("judges", world.generator(args.seed, "latents"), 256, args)
    latents = vae.encode(pictures).latent_dist.mode()
    error = vae.decode(latents).sample - pictures
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    print(f"vae: {psnr(error.pow(2).mean()):.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Text encoders

TEXT_WIDTHS, TEXT_LAYERS, POOLED = (96, 128), 7, 128


def new_text_encoders():
    """Like SDXL's encoders: quick_gelu and gelu, a projection in the second, and `eos_token_id: 2` in both, for which
    transformers pools at the highest token id."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for width, act, kind in zip(
        TEXT_WIDTHS, ("quick_gelu", "gelu"), (CLIPTextModel, CLIPTextModelWithProjection), strict=False
    ):
        config = CLIPTextConfig(
            vocab_size=len(vocabulary_and_merges()[0]), hidden_size=width, intermediate_size=4 * width,
            projection_dim=POOLED, num_hidden_layers=TEXT_LAYERS, num_attention_heads=width // 32, hidden_act=act,
            max_position_embeddings=TEXT_LENGTH, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        config._attn_implementation = "eager"  # in bf16 on a CPU, the backward pass of fused attention is far slower
        encoder = kind(config)
        for name, weight in encoder.named_parameters():
            # CLIP's embeddings have norms of about 0.4. The blocks' updates start at a similar size, so that a token's norm
            # matters in every layer; with transformers' own initialisation the first block would dominate the embedding.
            if "token_embedding" in name:
                nn.init.normal_(weight, std=0.4 * width**-0.5)
            elif "position_embedding" in name:
                nn.init.normal_(weight, std=0.1 * width**-0.5)
            elif "out_proj.weight" in name or "fc2.weight" in name:
                weight.data.mul_(0.15)
        encoders.append(encoder)
    return encoders


class ClipPretraining(nn.Module):
    """Both text encoders against one picture encoder, each with its own temperature.

    All three also learn to predict the scene's attributes. With the contrastive loss alone, texts stay bags of words for a
    long time: while one side does not distinguish "left of" from "right of", the other side gains nothing by doing so.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = new_text_encoders()
        self.project = nn.Linear(TEXT_WIDTHS[0], POOLED, bias=False)
        self.tower = PictureTower(32, 2 * POOLED)
        self.scales = nn.Parameter(torch.full((2,), math.log(10.0)))
        self.heads = nn.ModuleList(AttributeHeads(width) for width in (2 * POOLED, POOLED, POOLED))

    def forward(self, pictures, ids, same, shown, stated):
        look = self.tower(pictures).float()
        first, second = (encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second))
        texts = self.project(first.pooler_output), second.text_embeds
        growth = (update_size(first.hidden_states) + update_size(second.hidden_states)) / 2
        losses, hits = zip(
            *(contrast(*pair, same) for pair in zip(look.chunk(2, dim=1), texts, self.scales, strict=True)),
            strict=True,
        )
        named = naming(self.heads, (look, *texts), (shown, stated, stated))
        bound = accuracy(self.heads[2], texts[1], stated).get("relation", 0.0)
        figures = {"first": hits[0], "second": hits[1], "updates": growth, "relation": bound}
        return sum(losses) / 2 + named + 0.02 * growth, figures


def contrast(look, text, scale, same):
    """CLIP's loss (cross-entropy in both directions), and the share of pictures that match their caption best.

    There are more captions than pictures: the last ones describe similar scenes, and `same` marks those with identical
    wording.
    """
    logits = scale.clamp(max=math.log(100.0)).exp() * F.normalize(look, dim=1) @ F.normalize(text.float(), dim=1).T
    logits, target = logits.masked_fill(same, -1e4), torch.arange(len(look), device=look.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(look)].T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def naming(heads, features, labels):
    """The attribute loss, summed over the heads of pictures and texts."""
    weights = {"relation": 3.0}  # it is learned last, and few captions state it
    return sum(head.loss(x, y, weights) for head, x, y in zip(heads, features, labels, strict=True))


def update_size(states, norm=0.4):
    """Mean squared norm of the blocks' updates, relative to the embeddings' norm.

    Layer norms make a network invariant to its scale, so only this penalty keeps the updates from dominating.
    """
    updates = [(b.float() - a.float()).pow(2).sum(-1).mean() for a, b in zip(states, states[1:], strict=False)]
    return sum(updates) / len(updates) / norm**2


def train_clip(args):
    torch.manual_seed(args.seed)
    model, tokenizer = ClipPretraining().to(args.device), new_tokenizer()

    def loss_of(step, rng):
        pictures, texts, same, shown, stated = caption_batch("generator", rng, 96, args)
        rows = [fray(row, rng)[:TEXT_LENGTH] for row in tokenizer(texts).input_ids]
        ids = pad_ids(rows, tokenizer.pad_token_id).to(args.device)
        return model(pictures, ids, same, shown, stated)

    plain = [p for n, p in model.named_parameters() if "out_proj" not in n and "fc2" not in n]
    residual = [p for n, p in model.named_parameters() if "out_proj" in n or "fc2" in n]
    groups = [{"params": plain, "lr": 1e-3}, {"params": residual, "lr": 3e-4}]
    fit("clip", model, loss_of, args, lr=1e-3, ema=0.995, groups=groups)
    export_clip(model, args)


def export_clip(model, args):
    folder = args.output_dir / "sdxl"
    save_half(model.first, folder / "text_encoder")
    restore_names(folder / "text_encoder" / "model.safetensors")
    save_half(model.second, folder / "text_encoder_2")
    save_tokenizer(new_tokenizer(), folder / "tokenizer")
    save_tokenizer(new_tokenizer(pad="!"), folder / "tokenizer_2")
    ids = torch.tensor(new_tokenizer()(captions_of(range(64), world.generator(0, "norms"))[0], padding=True).input_ids)
    for name, encoder in (("text_encoder", model.first), ("text_encoder_2", model.second)):
        norms = encoder.get_input_embeddings().weight.norm(dim=1)
        with torch.no_grad():
            states = encoder.cpu()(ids, output_hidden_states=True).hidden_states
        updates = [f"{(b - a)[:, 1:12].norm(dim=-1).mean():.2f}" for a, b in zip(states, states[1:], strict=False)]
        print(f"{name}: vocabulary norm {norms.mean():.3f} ({norms.min():.3f} to {norms.max():.3f})", flush=True)
        print(f"  norms of the blocks' updates {' '.join(updates)}", flush=True)


def restore_names(path):
    """Rename CLIPTextModel's weights for transformers 4: version 5 saves them without their prefix."""
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def load_text_encoders(folder, device):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = [kind.from_pretrained(folder / name, torch_dtype=torch.float32) for name, kind in kinds.items()]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    return [e.to(device).eval().requires_grad_(False) for e in encoders], tokenizers


@torch.no_grad()
def embed_texts(texts, encoders, tokenizers):
    """Encode prompts like SDXL's pipeline: the concatenated penultimate states of both encoders, and the second's pooled
    embedding. An empty text is all zeros (`force_zeros_for_empty_prompt`)."""
    states = []
    for encoder, tokenizer in zip(encoders, tokenizers, strict=False):
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    full = torch.tensor([float(bool(t)) for t in texts], device=states[0].device)
    return torch.cat(states, dim=-1) * full[:, None, None], output.text_embeds * full[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Latents and embeddings

ENCODED, CAPTIONS = 60_000, 3  # the UNet's number of pictures (SANA uses all), and captions per picture


def train_encode(args):
    """Encode latents and texts once: encoding texts during training would take a quarter of its time."""
    if "latents" in args.encode:
        encode_pictures(args)
    if "things" in args.encode:
        encode_things(args)
    if "captions" in args.encode:
        encode_captions(args)


def shared_array(name, count, shape, args):
    """An array (count, *shape) on disk that several processes write in parts."""
    path = args.runs_dir / f"{name}.npy"
    if rank() == 0:
        np.lib.format.open_memmap(path, "w+", np.float16, (count, *shape)).flush()
    if dist.is_initialized():
        dist.barrier()
    return np.lib.format.open_memmap(path, "r+")


def parts(count, size=25):
    """This process's parts of `count` pictures, small enough for the processor's cache."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    for i in range(size * rank(), count, size * processes):
        if i % 4000 == 0:
            print(f"encoded {i}/{count}", flush=True)
        yield slice(i, min(i + size, count))
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def encode_pictures(args):
    """Mean and standard deviation of every picture's latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.output_dir / "sdxl" / "vae").to(args.device).eval()
    latents = shared_array("latents", ENCODED, (2, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), args)
    pictures = pictures_of("generator", args.runs_dir)
    for part in parts(ENCODED):
        with mixed_precision(args):
            posterior = vae.encode(to_tensor(pictures[part]).to(args.device)).latent_dist
        latents[part] = (torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor).float().cpu()


def encode_things(args):
    pictures = pictures_of("generator", args.runs_dir)
    things = shared_array("things", len(pictures), (LATENT_SIDE, LATENT_SIDE), args)
    for part in parts(len(pictures)):
        seeds = range(SPLITS["generator"][0] + part.start, SPLITS["generator"][0] + part.stop)
        things[part] = share_of_things(pictures[part], seeds)


def share_of_things(pictures, seeds):
    """The share of every latent position that shows an object instead of the place, from 0 to 1."""
    empty = np.stack([np.asarray(world.render(world.sample_scene(s), s, empty=True)) for s in seeds])
    changed = (np.abs(pictures.astype(int) - empty).max(-1) > 8).astype(np.float32)
    cells = F.avg_pool2d(torch.from_numpy(changed)[:, None], world.SIZE // LATENT_SIDE)
    return F.max_pool2d(cells, 3, 1, 1)[:, 0]  # one position more on every side, for outlines


@torch.no_grad()
def encode_captions(args):
    """The captions' embeddings as in the pipeline, at all positions."""
    encoders, tokenizers = load_text_encoders(args.output_dir / "sdxl", args.device)
    contexts = shared_array("contexts", ENCODED, (CAPTIONS, TEXT_LENGTH, sum(TEXT_WIDTHS)), args)
    pooled = shared_array("pooled", ENCODED, (CAPTIONS, POOLED), args)
    for part in parts(ENCODED):
        seeds = range(SPLITS["generator"][0] + part.start, SPLITS["generator"][0] + part.stop)
        texts = [world.caption(world.sample_scene(s), s * 1000 + k)[0] for s in seeds for k in range(CAPTIONS)]
        with mixed_precision(args):
            states, pool = embed_texts(texts, encoders, tokenizers)
        contexts[part] = states.float().cpu().unflatten(0, (-1, CAPTIONS))
        pooled[part] = pool.float().cpu().unflatten(0, (-1, CAPTIONS))


# ---------------------------------------------------------------------------------------------------------------------
# 4. UNet


def new_unet():
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(
        sample_size=LATENT_SIDE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 128, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(3, 4, 6), cross_attention_dim=sum(TEXT_WIDTHS), use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + POOLED,
    )  # fmt: skip
    unet.set_attn_processor(AttnProcessor())  # in bf16 on a CPU, the backward pass of fused attention is slow
    return unet


def fit_inputs(unet, context):
    """Scale the initial cross-attention weights for inputs of unit standard deviation, as the initialisation assumes."""
    deviation = float(context.std())
    for name, weight in unet.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            weight.data.div_(deviation)


def timesteps(count):
    """Timesteps: half uniform, half around the middle, where noise hides some details: the most informative ones."""
    middle = torch.sigmoid(torch.randn(count))
    return (torch.where(torch.rand(count) < 0.5, middle, torch.rand(count)) * 1000).long().clamp(0, 999)


def evenly(t):
    """Weights (batch,) that give every amount of noise the same influence.

    The error of the predicted noise falls by a factor of e every 250 timesteps, from 0.3 to 0.007. Without weights, the
    error at low noise, which no caption explains, dominates the error at high noise, where a caption decides objects,
    positions and colours.
    """
    return torch.exp((t.float() - 500) / 250)


def emphasis(things):
    """Weights (batch, 1, side, side) of mean 1. The place fills most of a picture and is learned quickly, so objects,
    `things` (batch, side, side), have five times its weight."""
    weights = 1 + 4 * things[:, None]
    return weights / weights.mean()


def train_unet(args):
    torch.manual_seed(args.seed)
    unet = new_unet().to(args.device)
    names = ("latents", "things", "contexts", "pooled")
    latents, things, contexts, pools = (np.load(args.runs_dir / f"{name}.npy", mmap_mode="r") for name in names)
    fit_inputs(unet, torch.from_numpy(contexts[:64].astype(np.float32)))
    noising = new_scheduler("DDPMScheduler")
    time_ids = torch.tensor([[world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]], device=args.device)

    def tensor(array):
        return torch.from_numpy(array.astype(np.float32)).to(args.device)

    def loss_of(step, rng):
        index, which = rng.integers(0, len(latents), args.batch), rng.integers(0, CAPTIONS, args.batch)
        mean, std = tensor(latents[index]).unbind(1)
        clean = mean + std * torch.randn_like(mean)
        # One in ten captions is dropped as in SDXL: zeros, also for the pooled embedding.
        kept = tensor(rng.random(args.batch) > 0.1)
        context, pooled = (
            tensor(contexts[index, which]) * kept[:, None, None],
            tensor(pools[index, which]) * kept[:, None],
        )
        noise, t = torch.randn_like(clean), timesteps(len(clean)).to(args.device)
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(clean), -1)}
        output = unet(noising.add_noise(clean, noise, t), t, context, added_cond_kwargs=added).sample
        weights = emphasis(tensor(things[index])) * evenly(t)[:, None, None, None]
        return ((output.float() - noise).square() * weights).mean(), {}

    fit("unet", unet, loss_of, args, lr=8e-4, ema=0.9985)
    if rank() == 0:
        export_pipeline(unet, args)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The pipeline's folder


def new_scheduler(kind="EulerDiscreteScheduler", **options):
    """SDXL's noise schedule."""
    import diffusers

    return getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", **options
    )


def export_pipeline(unet, args):
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    folder = args.output_dir / "sdxl"
    save_half(unet, folder / "unet")
    encoders, tokenizers = load_text_encoders(folder, "cpu")
    scheduler = new_scheduler(timestep_spacing="leading", steps_offset=1, interpolation_type="linear")
    scheduler.save_pretrained(folder / "scheduler")
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler,
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    ).save_config(folder)  # fmt: skip
