"""The miniature's generator in Stable Diffusion's format: `sdxl/` with one text encoder, distilled. Written to `sd/`.

Stages: `train_encode` and `train_text_encoder`, which need `sdxl/` alone, and `train_unet`.

What SDXL has and Stable Diffusion has not: a second text encoder, a pooled embedding, the picture's size and zeros for an
empty prompt. Everything else is kept: the autoencoder, the tokenizer and most of the UNet. Both networks start as close to
SDXL's as linear algebra brings them, and then learn to give SDXL's answers.

Sections: 1 latents and embeddings, 2 text encoder, 3 UNet, 4 the pipeline's folder.
"""

import shutil

import numpy as np
import torch
import torch.distributed as dist
import world
from generator import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    POOLED,
    TEXT_LENGTH,
    TEXT_WIDTHS,
    embed_texts,
    emphasis,
    evenly,
    load_text_encoders,
    new_scheduler,
    parts,
    restore_names,
    share_of_things,
    shared_array,
    timesteps,
    update_size,
)
from torch import nn
from training import (
    SPLITS,
    captions_of,
    fit,
    fray,
    mixed_precision,
    new_tokenizer,
    pad_ids,
    rank,
    save_half,
    save_tokenizer,
    to_tensor,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. Latents and embeddings

PICTURES = 6000  # the teacher's answers differ with the noise, so far fewer pictures than it was trained on are enough


@torch.no_grad()
def train_encode(args):
    """Once: pictures' latents and objects, and their captions' token ids and embeddings for the teacher."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.output_dir / "sdxl" / "vae").to(args.device).eval()
    encoders, tokenizers = load_text_encoders(args.output_dir / "sdxl", args.device)
    latents = shared_array("sd_latents", PICTURES, (2, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), args)
    things = shared_array("sd_things", PICTURES, (LATENT_SIDE, LATENT_SIDE), args)
    contexts = shared_array("sd_contexts", PICTURES, (TEXT_LENGTH, sum(TEXT_WIDTHS)), args)
    pooled = shared_array("sd_pooled", PICTURES, (POOLED,), args)
    ids = shared_array("sd_ids", PICTURES, (TEXT_LENGTH,), args)  # below 2048, so exact in half precision
    for part in parts(PICTURES):
        seeds = range(SPLITS["generator"][0] + part.start, SPLITS["generator"][0] + part.stop)
        pictures = np.stack([world.picture_array(s)[1] for s in seeds])
        texts = [world.caption(world.sample_scene(s), s * 1000)[0] for s in seeds]
        with mixed_precision(args):
            posterior = vae.encode(to_tensor(pictures).to(args.device)).latent_dist
            states, pool = embed_texts(texts, encoders, tokenizers)
        latents[part] = (torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor).float().cpu()
        things[part] = share_of_things(pictures, seeds)
        contexts[part], pooled[part] = states.float().cpu(), pool.float().cpu()
        ids[part] = padded(tokenizers[1], texts)


def padded(tokenizer, texts):
    """Token ids as in the pipelines."""
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH}
    return tokenizer(texts, return_tensors="pt", **options).input_ids


# ---------------------------------------------------------------------------------------------------------------------
# 2. Text encoder

TEXT_BATCH = 32


def load_teacher(args):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(args.output_dir / "sdxl" / "unet").to(args.device)
    return unet.eval().requires_grad_(False)


class TextDistillation(nn.Module):
    """SDXL's second encoder without its last block, and a linear map from its states to both encoders' states.

    SDXL's UNet does not see the last blocks either. Stable Diffusion 2 drops the same block, and keeps the final norm.
    """

    def __init__(self, args):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        folder = args.output_dir / "sdxl" / "text_encoder_2"
        config = CLIPTextConfig.from_pretrained(folder)
        config.num_hidden_layers -= 1
        self.encoder = CLIPTextModel.from_pretrained(folder, config=config, torch_dtype=torch.float32)
        self.project = nn.Linear(config.hidden_size, sum(TEXT_WIDTHS))

    def forward(self, ids):
        output = self.encoder(ids, output_hidden_states=True)
        return self.project(output.last_hidden_state), update_size(output.hidden_states)


def attention_inputs(unet):
    """The matrices by which the cross-attentions make keys and values of the text's states."""
    return {n: p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}


def metric_of(unet, states):
    """A square matrix A. The squared length of (difference of states) A is the mean over all keys and values of their
    squared difference, as a share of their variance."""
    x = states.flatten(0, 1)
    x = x - x.mean(0)
    matrices = [w / (x @ w.T).square().sum(-1).mean().sqrt() for w in attention_inputs(unet).values()]
    w = torch.cat(matrices)
    return torch.linalg.cholesky(w.T @ w / len(matrices))


@torch.no_grad()
def states_of(rows, encoders, device):
    """The token ids, padded for the student, and both encoders' states as SDXL's UNet sees them. Row 0 is the empty
    prompt, whose states are zeros."""
    ends, other = (new_tokenizer(pad).pad_token_id for pad in ("<|endoftext|>", "!"))
    ids = [pad_ids(rows, pad, TEXT_LENGTH).to(device) for pad in (ends, other)]
    outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    states[0] = 0
    return ids[1], states


def rows_of(seeds, rng):
    """Token ids of the empty prompt and of captions, some of them frayed as in `train_clip`."""
    rows = new_tokenizer()(["", *captions_of(seeds, rng)[0]]).input_ids
    return [rows[0], *(fray(row, rng)[:TEXT_LENGTH] for row in rows[1:])]


@torch.no_grad()
def solve_projection(model, ids, states):
    """The best linear map, by least squares. The empty prompt counts as a tenth of the captions."""
    inputs = model.encoder(ids).last_hidden_state
    weights = torch.ones(ids.shape, device=ids.device)
    weights[0] = len(ids) / 10
    weights[0, 0] = 0  # the first state is the same for every prompt
    x = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1).flatten(0, 1).double()
    weighted = x * weights.flatten()[:, None]
    ridge = 1e-3 * torch.eye(x.shape[1], device=x.device)
    solution = torch.linalg.solve(weighted.T @ x + ridge, weighted.T @ states.flatten(0, 1).double())
    model.project.weight.copy_(solution[:-1].T)
    model.project.bias.copy_(solution[-1])


def train_text_encoder(args):
    torch.manual_seed(args.seed)
    model = TextDistillation(args).to(args.device)
    encoders, _ = load_text_encoders(args.output_dir / "sdxl", args.device)
    first, count = SPLITS["generator"]
    rows = rows_of(range(first, first + 256), world.generator(args.seed, "metric"))
    ids, states = states_of(rows, encoders, args.device)
    metric = metric_of(load_teacher(args), states[1:])
    solve_projection(model, ids, states)

    def loss_of(step, rng):
        seeds = first + rng.integers(0, count, TEXT_BATCH - 1)
        ids, states = states_of(rows_of(seeds, rng), encoders, args.device)
        guess, growth = model(ids)
        error = ((guess.float() - states) @ metric).square().sum(-1)
        unexplained = error[1:].mean()
        return unexplained + 0.1 * error[0, 1:].mean() + 0.02 * growth, {"unexplained": unexplained, "updates": growth}

    fit("sd_text", model, loss_of, args, lr=6e-4, ema=0.99)
    if dist.is_initialized():
        dist.barrier()  # the next stage reads the checkpoint


def load_text_encoder(args):
    """The text encoder, and the map from its states to SDXL's."""
    model = TextDistillation(args)
    model.load_state_dict(torch.load(args.runs_dir / "sd_text.pt", map_location="cpu")["averaged"])
    return model.encoder.to(args.device), model.project.to(args.device)


# ---------------------------------------------------------------------------------------------------------------------
# 3. UNet

# Without them SDXL's predictions change little: by a 40th of what a wrong caption changes without the middle block, by a
# 60th more without the deepest level's attention on the way down. Stable Diffusion has no attention there either.
DROPPED = ("mid_block.", "down_blocks.2.attentions.", "add_embedding.")


@torch.no_grad()
def convert_unet(teacher, project, pooled, time_ids):
    """SDXL's UNet for the new text encoder: its states times `project` are SDXL's.

    A constant key changes no attention, and a constant value goes into the output's bias. The pooled embedding and the
    size become their mean over captions.
    """
    from diffusers import UNet2DConditionModel

    config = dict(teacher.config) | {"cross_attention_dim": project.in_features, "mid_block_type": None}
    config |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
    config |= {"addition_embed_type": None, "addition_time_embed_dim": None}
    config |= {"projection_class_embeddings_input_dim": None}
    unet = UNet2DConditionModel.from_config(config)
    weights = {name: w for name, w in teacher.state_dict().items() if not name.startswith(DROPPED)}
    for name in attention_inputs(unet):
        if "to_v" in name:
            out = name.replace("to_v.weight", "to_out.0.")
            weights[f"{out}bias"] = weights[f"{out}bias"] + weights[f"{out}weight"] @ weights[name] @ project.bias
        weights[name] = weights[name] @ project.weight
    size = teacher.add_time_proj(time_ids.flatten()).flatten().expand(len(pooled), -1)
    bias = "time_embedding.linear_2.bias"
    weights[bias] = weights[bias] + teacher.add_embedding(torch.cat([pooled, size], dim=1)).mean(0)
    unet.load_state_dict(weights)
    return unet


class Student(nn.Module):
    """Both parts, trained together: the text encoder then serves the UNet's predictions, instead of all states alike."""

    def __init__(self, unet, encoder):
        super().__init__()
        self.unet, self.encoder = unet, encoder

    def forward(self, noisy, t, ids):
        return self.unet(noisy, t, self.encoder(ids).last_hidden_state).sample


def train_unet(args):
    """The teacher's predictions are the targets, with the weights of `generator.train_unet`.

    A fifth of the captions is dropped, twice as many as in training from data: the states of the empty prompt are new, and
    guidance multiplies errors in what it predicts.
    """
    torch.manual_seed(args.seed)
    teacher, (encoder, project) = load_teacher(args), load_text_encoder(args)
    empty = padded(new_tokenizer(pad="!"), [""]).to(args.device)
    names = ("sd_latents", "sd_things", "sd_contexts", "sd_pooled", "sd_ids")
    arrays = (np.load(args.runs_dir / f"{name}.npy", mmap_mode="r") for name in names)
    latents, things, contexts, pools, ids = arrays
    noising = new_scheduler("DDPMScheduler")
    time_ids = torch.tensor([[world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]], device=args.device)

    def tensor(array):
        return torch.from_numpy(array.astype(np.float32)).to(args.device)

    unet = convert_unet(teacher, project, tensor(pools[:1000]), time_ids).to(args.device)
    student = Student(unet, encoder)

    def loss_of(step, rng):
        index = rng.integers(0, len(latents), args.batch)
        mean, std = tensor(latents[index]).unbind(1)
        clean = mean + std * torch.randn_like(mean)
        kept = tensor(rng.random(args.batch) > 0.2)
        noise, t = torch.randn_like(clean), timesteps(len(clean)).to(args.device)
        noisy = noising.add_noise(clean, noise, t)
        added = {"text_embeds": tensor(pools[index]) * kept[:, None], "time_ids": time_ids.expand(len(clean), -1)}
        with torch.no_grad():
            target = teacher(noisy, t, tensor(contexts[index]) * kept[:, None, None], added_cond_kwargs=added).sample
        output = student(noisy, t, torch.where(kept[:, None] > 0, tensor(ids[index]).long(), empty))
        importance = emphasis(tensor(things[index])) * evenly(t)[:, None, None, None]
        errors = ((output.float() - target.float()).square() * importance).mean((1, 2, 3))
        named = {"captions": (errors * kept).sum() / kept.sum().clamp(min=1)}
        return errors.mean(), named | {"empty": (errors * (1 - kept)).sum() / (1 - kept).sum().clamp(min=1)}

    groups = [{"params": unet.parameters(), "lr": 4e-4}, {"params": encoder.parameters(), "lr": 1e-4}]
    fit("sd_unet", student, loss_of, args, lr=4e-4, ema=0.99, groups=groups)
    if rank() == 0:
        export_pipeline(unet, encoder, args)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The pipeline's folder


def export_pipeline(unet, encoder, args):
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline

    folder, source = args.output_dir / "sd", args.output_dir / "sdxl"
    # Rounding the blocks to fp8 changes predictions by a 400th of what a wrong caption changes, rounding the rest by a 75th.
    save_half(unet, folder / "unet", quarter=("down_blocks", "up_blocks"))
    save_half(encoder, folder / "text_encoder")
    restore_names(folder / "text_encoder" / "model.safetensors")
    tokenizer = new_tokenizer(pad="!")
    save_tokenizer(tokenizer, folder / "tokenizer")
    for name in ("vae", "scheduler"):
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=encoder, tokenizer=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_config(folder)  # fmt: skip
    norms = encoder.get_input_embeddings().weight.norm(dim=1)
    print(f"sd: vocabulary norm {norms.mean():.3f} ({norms.min():.3f} to {norms.max():.3f})", flush=True)
