"""Writes an SDXL as one .safetensors file in the layout of its first publication, which the web tools' files have."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)}
UNET |= {f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1)}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP |= {"self_attn.out_proj": "attn.out_proj"}


def unet_name(name: str, layers: int, attends: set[str]) -> str:
    """The name that a weight of the UNet has there. `attends` are the up blocks with attention."""
    head, _, weight = name.rpartition(".")
    if head in UNET:
        return f"{UNET[head]}.{weight}"
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if block is None:
        kind, index, rest = re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", name).groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        side, number, kind, index, rest = block.groups()
        first, index = int(number) * (layers + 1), int(index)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{weight}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if number in attends else 1}.conv.{weight}"
        place = f"input_blocks.{first + index + 1}" if side == "down" else f"output_blocks.{first + index}"
        place += ".1" if kind == "attentions" else ".0"
    if kind == "resnets":
        layer, _, weight = rest.partition(".")
        rest = f"{RESNET[layer]}.{weight}"
    return f"{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if "mid_block.attentions.0." in name:
        layer, _, weight = name.partition("mid_block.attentions.0.")[2].rpartition(".")
        name = f"{name.partition('mid_block')[0]}mid.attn_1.{ATTENTION[layer]}.{weight}"
    return name


def open_clip_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder's weights as OpenCLIP has them: queries, keys and values in one matrix."""
    made = {}
    for name, x in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            made["text_projection"] = x.T.contiguous()
        elif name.startswith("embeddings.position_embedding"):
            made["positional_embedding"] = x
        elif name.startswith("embeddings.token_embedding"):
            made["token_embedding.weight"] = x
        elif name.startswith("final_layer_norm"):
            made[name.replace("final_layer_norm", "ln_final")] = x
        elif ".q_proj." in name:
            parts = [state[k] for k in (f"text_model.{name}".replace("q_proj", f"{p}_proj") for p in "qkv")]
            place = re.sub(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", r"resblocks.\1.attn.in_proj_\2", name)
            made[f"transformer.{place}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name and "position_ids" not in name:
            for ours, theirs in OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            made[f"transformer.{name.replace('encoder.layers', 'resblocks')}"] = x
    return made


def write_single_file(folder: Path, path: Path, marks: tuple[str, ...] = (), metadata: dict | None = None) -> Path:
    """Write the pipeline of a folder to one file. `marks` are names of empty tensors, by which some files say what they are."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    config, state = pipe.unet.config, {}
    attends = {str(i) for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    for name, x in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_name(name, config.layers_per_block, attends)}"] = x
    for name, x in pipe.vae.state_dict().items():
        name = vae_name(name, len(pipe.vae.config.up_block_types))
        square = "mid.attn_1" in name and x.ndim == 2  # a convolution of one pixel there
        state[f"first_stage_model.{name}"] = x[:, :, None, None] if square else x
    for name, x in pipe.text_encoder.state_dict().items():
        state[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = x
    for name, x in open_clip_state(pipe.text_encoder_2.state_dict()).items():
        state[f"conditioner.embedders.1.model.{name}"] = x
    state |= {mark: torch.zeros(0) for mark in marks}
    save_file({name: x.contiguous() for name, x in state.items()}, path, {"format": "pt", **(metadata or {})})
    return path
