#!/usr/bin/env python
# Copyright 2026 The Directional Textual Inversion developers. Licensed under the Apache License, Version 2.0.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.4",
#     "diffusers>=0.35.0",
#     "transformers>=4.51.3",
#     "accelerate>=1.6.0",
#     "peft>=0.17.0",
#     "datasets>=3.6.0",
#     "huggingface_hub>=0.34.0",
#     "safetensors>=0.5.3",
#     "pyyaml>=6.0.2",
#     "pillow>=10.4.0",
#     "matplotlib>=3.9.0",
#     "tensorboard>=2.18.0",
# ]
# ///
"""Teach SANA 1.5 a new word from a few photographs, by Directional Textual Inversion (DTI).

    accelerate launch train_dti_sana.py --pretrained_model_name_or_path Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers \
      --instance_data_dir photos/dog --placeholder_token "<my-dog>" --initializer_token dog --output_dir out/my-dog \
      --mixed_precision bf16

Textual Inversion lets a new token's embedding grow far beyond the norm of the model's own words, and the prompt around it
fades. DTI (https://arxiv.org/abs/2512.13672) fixes the norm and learns only the direction, by
Riemannian SGD on the unit sphere with a von Mises-Fisher prior towards the class word. The model itself is untouched.

Written to --output_dir: `learned_embeds.safetensors`, which examples/pipeline_sana_textual_inversion.py loads, for
SanaPipeline alone cannot; `<placeholder>.safetensors` for OneTrainer; with --rank `pytorch_lora_weights.safetensors` for
`pipe.load_lora_weights` and `<placeholder>-lora.safetensors` for OneTrainer; `training_curves.png`,
`training_options.json`, and `validation-*.png` for each --validation_prompt. The lines that load the result are printed at the end.

The script is train_dti_sdxl.py with another section 5. What is copied from there says so and is the same text.

Sections: 1 options and checks, 2 sphere, 3 token and LoRA, 4 data, 5 SANA, 6 saving and sharing, 7 validation and
logging, 8 main.
"""

import argparse
import base64
import contextlib
import csv
import datetime
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import posixpath
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    free_memory,
    offload_models,
)
from diffusers.utils import check_min_version, convert_state_dict_to_kohya, make_image_grid
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, Gemma2Model


check_min_version("0.35.0")
logger = logging.getLogger("dti")
TOML_READER = "tomllib" if sys.version_info >= (3, 11) else "tomli"


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options, and what is checked before any weight loads
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.UserError
class UserError(Exception):
    """A mistake in what the user gave. It is shown as one line, with no traceback."""

    def __str__(self) -> str:
        # File names can contain line breaks, terminal controls and bytes that are not text: these are shown escaped.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


# Copied from train_dti_sdxl.number
def number(kind: type, minimum: float, *, above: bool = False):
    """An argparse type: a finite `kind` (int or float) not below `minimum`, or strictly `above` it."""
    maximum = 2**32 - 1 if kind is int else sys.float_info.max  # NumPy's largest seed; ample for any count

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (minimum < value <= maximum if above else minimum <= value <= maximum):
            wanted = f"{'an integer' if kind is int else 'a number'} {'above' if above else 'of at least'} {minimum}"
            limit = f" and at most {maximum:.10g}" if value > maximum else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}{limit}")
        return value

    return parse


# Copied from train_dti_sdxl.magnitude_rule
def magnitude_rule(text: str) -> str | float:
    """The argparse type of --magnitude: `mean`, a multiple of it such as `2mean`, `min`, `free` or a positive number."""
    if text in ("mean", "min", "free"):
        return text
    try:
        multiple = number(float, 0, above=True)(text.removesuffix("mean"))
    except argparse.ArgumentTypeError:
        wanted = "mean, a multiple such as 2mean, min, free or a number above 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    return f"{multiple:g}mean" if text.endswith("mean") else multiple


# Copied from train_dti_sdxl.module_names
def module_names(text: str) -> list[str]:
    """The argparse type of --lora_target_modules: names separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names separated by commas")
    return names


# Copied from train_dti_sdxl.extension
def extension(text: str) -> str:
    """The argparse type of --caption_extension: .txt, also where the dot is left out."""
    name = text.removeprefix(".")
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not the ending of a file's name, such as .txt")
    return f".{name}"


# Copied from train_dti_sdxl.boolean
def boolean(text: str) -> bool:
    """The argparse type of options that are on or off."""
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "yes", "1")


# `--name` alone is true; `--name false` overrules a file of options.
SWITCH = {"nargs": "?", "const": True, "default": False, "type": boolean, "metavar": "{true,false}"}
NEGATED = {"const": False, "default": True, "type": lambda text: not boolean(text)}

METHOD_OPTIONS = ("learning_rate", "lr_scheduler", "kappa", "magnitude", "optimizer", "init")  # told with the result
PRESET_OPTIONS = ("max_train_steps", "learning_rate", "lr_scheduler", "magnitude")  # what a preset's rows hold

# Options that other options make idle: when, in words, and what gives them an effect. The model's class has more.
LORA_ONLY = (lambda args: not args.rank, "without --rank", "add --rank 32")
ADAMW_ONLY = (lambda args: args.optimizer != "adamw" and not args.rank, "without AdamW", "add --optimizer adamw")
SHOWN_ONLY = (lambda args: not args.validation_prompt, "without --validation_prompt", "give one")
IDLE = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"), ADAMW_ONLY),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), LORA_ONLY),
    **dict.fromkeys(("lora_learning_rate", "lora_start_step"), LORA_ONLY),
    **dict.fromkeys(("validation_steps", "validate_first", "num_validation_images"), SHOWN_ONLY),
    **dict.fromkeys(("validation_inference_steps", "validation_guidance_scale"), SHOWN_ONLY),
    "validation_negative_prompt": (
        lambda args: not args.validation_prompt or args.validation_guidance_scale <= 1,
        "without --validation_prompt and a --validation_guidance_scale above 1",
        "give both",
    ),
    "lr_warmup_steps": (
        lambda args: args.lr_scheduler == "constant",
        "with --lr_scheduler constant",
        "use constant_with_warmup",
    ),
    "lr_num_cycles": (
        lambda args: args.lr_scheduler != "cosine_with_restarts",
        "except with --lr_scheduler cosine_with_restarts",
        "use that",
    ),
    "init": (lambda args: args.init_embedding, "beside --init_embedding, which says where to start", ""),
    "dataset_config_name": (lambda args: not args.dataset_name, "without --dataset_name", "give one"),
    "image_column": (
        lambda args: not args.dataset_name and (args.no_captions or args.prompt_templates or args.caption_extension),
        "on a folder whose metadata file is not used",
        "",
    ),
    "learnable_property": (
        lambda args: args.prompt_templates or args.caption_column or args.caption_extension,
        "where the prompts are not the built-in ones",
        "",
    ),
    "crops_per_image": (
        lambda args: not args.cache_latents or args.center_crop and not args.random_flip and args.crops_per_image > 1,
        "with --no_cache_latents, which crops anew at every step, or where --center_crop leaves one view",
        "",
    ),
    "dataloader_num_workers": (lambda args: args.cache_latents, "while latents are cached", "add --no_cache_latents"),
    "variant": (lambda args: os.path.isfile(args.pretrained_model_name_or_path), "on a single file", ""),
    "revision": (lambda args: os.path.exists(args.pretrained_model_name_or_path), "on a local model", ""),
    "save_steps": (
        lambda args: args.save_steps >= args.max_train_steps,
        "from the last step on, which is saved anyway",
        "give less than --max_train_steps",
    ),
    "logging_dir": (lambda args: args.report_to != "tensorboard", "except with --report_to tensorboard", "use that"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "license"),
        (lambda args: not args.push_to_hub, "without --push_to_hub", "add that"),
    ),
}


# Copied from train_dti_sdxl.make_parser
def make_parser(model_class: type, add_help: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Teach a {model_class.pipeline_class.__name__} a new word by {model_class.method_name}.",
        usage="%(prog)s [options] (--help explains them)",  # the generated one would bury an error message
        allow_abbrev=False,
        add_help=add_help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--preset", choices=model_class.presets, default=None, help="Steps, learning rate, schedule and magnitude together; an option given by itself wins. default: the one for --optimizer rsgd, found in a small world (examples/presets); fast: fewer steps; paper: as printed, and what --optimizer adamw takes; released: as the authors' launchers have it.")
    add("--learning_rate", type=number(float, 0, above=True), default=None, help="eta. On the sphere the length of the tangent step: a step turns a direction by arctan(eta) radians. Default: the preset's.")
    add("--scale_lr", **SWITCH, help="Multiply --learning_rate by batch size, accumulation steps and processes, as the authors' launchers do. The product is what is printed and saved.")
    add("--kappa", type=number(float, 0), default=None, help="Concentration of the von Mises-Fisher prior towards the initializer; paper: 1e-4 (default), 5e-5 to 2e-4 works. No prior with --magnitude free.")
    add("--magnitude", type=magnitude_rule, default=None, metavar="{mean,2mean,min,free,NUMBER}", help="m*, the norm of the learned embedding: the mean of the vocabulary's, a multiple of it, its minimum, a number, or free (plain Textual Inversion). Paper: mean. Default: the preset's.")
    add("--optimizer", choices=["rsgd", "adamw"], default="rsgd", help="Riemannian SGD on the sphere, or AdamW (followed by a projection back to the sphere unless --magnitude free).")
    add("--init", choices=["token", "contextual"], default="token", help="Start from the initializer's row of the vocabulary, or from its last hidden state in context (CrossInit).")
    add("--reg_weight", type=number(float, 0), default=0.0, help="Weight of the mean squared distance between the embedding and where it started; CrossInit: 1e-5.")
    add("--adam_beta1", type=number(float, 0), default=0.9, help="AdamW's decay of the first moment.")
    add("--adam_beta2", type=number(float, 0), default=0.999, help="AdamW's decay of the second moment.")
    add("--adam_weight_decay", type=number(float, 0), default=1e-2, help="AdamW's weight decay.")
    add("--adam_epsilon", type=number(float, 0, above=True), default=1e-8, help="AdamW's epsilon.")

    add = parser.add_argument_group("token").add_argument
    add("--placeholder_token", required=True, help='The new word, such as "<my-dog>". It must not be in the vocabulary.')
    add("--initializer_token", default=None, help='The class word, such as dog. A text of several tokens ("stuffed animal") gives one vector each.')
    add("--num_vectors", type=number(int, 1), default=None, help="Vectors of the new token. Default: as many as the initializer has tokens; with more, the initializer repeats.")
    add("--further_word", action="append", default=[], metavar="WORD=CLASS", help='A further new word and its class word, such as "<my-cat>=cat", for photographs that show several subjects: all words are trained together, and the captions name them. Its files are in a folder of its own. May be given several times.')
    add("--init_embedding", type=Path, default=None, help="Continue from a finished embedding: a folder or file of this script's or of diffusers' (learned_embeds*.safetensors), or a clip_l/clip_g file.")

    add = parser.add_argument_group("LoRA beside the new word, by PEFT").add_argument
    add("--rank", type=number(int, 0), default=0, help="Rank of the adapters on the denoiser; 0: none, the model stays as it is; the paper's Figure 8: 32.")
    add("--lora_alpha", type=number(float, 0, above=True), default=None, help="What the adapters add is multiplied by alpha / rank. Default: the rank.")
    add("--lora_dropout", type=number(float, 0), default=0.0, help="Probability of dropout in front of the adapters.")
    add("--lora_target_modules", type=module_names, default=["to_q", "to_k", "to_v", "to_out.0"], metavar="NAME,NAME", help="Layers that get an adapter: those whose names end in one of these.")
    add("--lora_learning_rate", type=number(float, 0, above=True), default=1e-4, help="AdamW's learning rate of the adapters; it follows --lr_scheduler too.")
    add("--lora_start_step", type=number(int, 0), default=0, help="Steps in which only the new word is trained, before the adapters start.")

    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", "--train_data_dir", type=Path, default=None, help="Folder of photographs (subfolders are not read), optionally with captions: a .txt or .caption file for each, or metadata.jsonl, .csv or .parquet.")
    add("--dataset_name", default=None, help="Instead of a folder, a data set on the Hub or a local one that `datasets.load_dataset` reads; its split `train` is used.")
    add("--dataset_config_name", default=None, help="Configuration of the data set.")
    add("--image_column", default="image", help="Column of --dataset_name that holds the images.")
    add("--caption_column", default=None, help="Column that holds the captions. Default: `text` of a folder's metadata file; no captions for --dataset_name.")
    add("--caption_extension", type=extension, default=None, help="Ending of the files with captions, each named as its photograph. Default: .txt or else .caption, where there is no metadata file.")
    add("--no_captions", **SWITCH, help="Train with the prompt templates though there are captions.")
    add("--learnable_property", choices=list(TEMPLATES), default="object", help="Which of the built-in prompt templates to train with where there are no captions. face: of a person.")
    add("--prompt_templates", type=Path, default=None, help="File of prompt templates, one a line, with {} for the new word, instead of the built-in ones.")
    add("--mask_dir", type=Path, default=None, help="Folder with a mask for each photograph, of the same name, the subject white: the loss counts the subject.")
    add("--alpha_mask", **SWITCH, help="Take the photographs' own alpha channels for masks.")
    add("--mask_background", type=number(float, 0), default=None, help="The background's weight in the loss; the subject's is 1. Default: 0.1 with masks.")
    add("--resolution", type=number(int, 8), default=1024, help="Side in pixels of the square training images: the shorter side is resized to it and the rest cropped.")
    add("--center_crop", **SWITCH, help="Crop the centre instead of a random part.")
    add("--random_flip", **SWITCH, help="Mirror half of the views. Not for subjects whose two sides differ.")
    add("--cache_latents", **SWITCH | {"default": True}, help="Encode the images once, before training.")
    add("--no_cache_latents", dest="cache_latents", **SWITCH | NEGATED, help="Decode and encode images at every step instead: any crop, but slower and more memory.")
    add("--crops_per_image", type=number(int, 1), default=4, help="Views (random crops, flips) of each photograph that are encoded when latents are cached; equal ones count once.")
    add("--dataloader_num_workers", type=number(int, 0), default=0, help="Processes that load images when latents are not cached.")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the pipeline in diffusers' format.")
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--variant", default=None, help="Variant of the model's weight files, such as fp16.")
    add("--hub_token", default=None, help="Token for gated or private models and data sets and for --push_to_hub. Better: log in once with `hf auth login`.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Precision of the frozen models (default: accelerate's configuration). SANA overflows in fp16. The VAE always encodes, and the embedding is always trained, in float32.")
    add("--base_precision", choices=["auto", "int8"], default="auto", help="int8: hold the weights of the blocks of denoiser and text encoders in 8 bits, with a scale for each output channel, and compute in --mixed_precision. The vocabularies stay on the CPU. auto: all in --mixed_precision.")
    add("--allow_tf32", **SWITCH, help="Allow TF32 matrix products on Ampere and newer GPUs.")
    add("--gradient_checkpointing", **SWITCH, help="Recompute activations of the denoiser and the text encoders in the backward pass: less memory, slower.")
    add("--compile", **SWITCH, help="Compile the denoiser's repeated blocks with torch.compile.")

    model_class.add_options(parser)

    add = parser.add_argument_group("training").add_argument
    add("--config", type=Path, default=None, metavar="FILE", help="Options from a TOML, YAML or JSON file, or from the training_options.json of an earlier run. The command line wins.")
    add("--output_dir", type=Path, required=True, help="Where the results are written.")
    add("--seed", type=number(int, 0), default=None, help="Seed of everything that is drawn. Default: a fresh one, which is printed.")
    add("--max_train_steps", type=number(int, 1), default=None, help="Optimization steps. Default: the preset's.")
    add("--train_batch_size", type=number(int, 1), default=4, help="Images a step on each device; paper: 4.")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="Batches whose gradients are averaged in one step.")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT], default=None, help="Schedule of the learning rate. Default: the preset's.")
    add("--lr_warmup_steps", type=number(int, 0), default=0, help="Steps over which the learning rate rises from zero.")
    add("--lr_num_cycles", type=number(int, 1), default=1, help="Restarts of cosine_with_restarts.")
    add("--save_steps", type=number(int, 1), default=None, help="Also save the embedding every so many steps, with the step in the files' names.")
    add("--checkpointing_steps", type=number(int, 1), default=100, help="Steps between checkpoints, from which a run can be resumed. They are a few kilobytes.")
    add("--checkpoints_total_limit", type=number(int, 1), default=None, help="Checkpoints to keep; older ones are removed. Default: all.")
    add("--resume_from_checkpoint", default=None, help="Go on from a checkpoint: `latest` of --output_dir, or a checkpoint's folder.")
    add("--validation_prompt", action="append", default=[], help="Prompt with {} or the new word, sampled during training. May be given several times.")
    add("--validation_steps", type=number(int, 1), default=100, help="Steps between validations, all with the same seeds; there is always one at the end.")
    add("--validate_first", **SWITCH, help="Also validate before the first step, to see what the model draws from the initializer.")
    add("--validation_negative_prompt", default=None, help="What validation images should not show.")
    add("--num_validation_images", type=number(int, 1), default=4, help="Images of each validation prompt.")
    add("--logging_steps", type=number(int, 1), default=10, help="Steps between log entries. Only then are values read from the device.")
    add("--logging_dir", default="logs", help="Folder of the tracker's files, within --output_dir.")
    add("--report_to", choices=["tensorboard", "wandb", "trackio", "none"], default="tensorboard", help="Tracker that gets the curves and the validation images.")

    add = parser.add_argument_group("sharing").add_argument
    add("--push_to_hub", **SWITCH, help="At the end upload the embedding, a model card and the last validation images to the Hub: kilobytes; no photographs and no model.")
    add("--hub_model_id", default=None, help="Repository to upload to, such as my-name/my-dog. Default: the name of --output_dir, in the account of the token.")
    add("--hub_private_repo", **SWITCH, help="Create a private repository.")
    add("--license", default=None, help="License that the model card states, by the Hub's identifier, such as cc-by-4.0. Default: none is stated.")
    # fmt: on
    parser.set_defaults(**model_class.defaults)
    return parser


# Copied from train_dti_sdxl.unique_names
def unique_names(pairs: list[tuple]) -> dict:
    """The pairs as a dictionary. Raises ValueError for a name that occurs twice: which one is meant?"""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


# Copied from train_dti_sdxl.yaml_values
def yaml_values(node: yaml.Node | None):
    """What a YAML node holds, with every scalar as it is written: YAML itself would make False of the word `no`."""
    if isinstance(node, yaml.MappingNode):
        return unique_names([(str(yaml_values(key)), yaml_values(value)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [yaml_values(item) for item in node.value]
    return None if node is None or (node.style is None and node.value in ("", "~", "null")) else node.value


# Copied from train_dti_sdxl.read_config
def read_config(path: Path) -> list[tuple]:
    """Names and values of a file of options, its sections' included, or of training_options.json. Raises UserError."""
    option, kind = f"--config {path}", path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == ".toml":
            table = importlib.import_module(TOML_READER).loads(text)
        elif kind in (".yaml", ".yml"):
            table = yaml_values(yaml.compose(text, Loader=yaml.BaseLoader)) or {}
        elif kind == ".json":
            table = json.loads(text, object_pairs_hook=unique_names)
        else:
            raise UserError(f"{option} must end in .toml, .yaml, .yml or .json.")
        if isinstance(table, dict) and table.keys() == {"options", "derived", "versions"}:
            table = table["options"]
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}")
        sections = (value.items() if isinstance(value, dict) else [(name, value)] for name, value in table.items())
        return list(itertools.chain.from_iterable(sections))
    except ModuleNotFoundError:
        raise UserError(f"{option}: TOML needs Python 3.11 or `pip install tomli`. YAML and JSON do not.") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())  # PyYAML's has several lines
        raise UserError(f"{option} cannot be read as a table of options: {reason}") from None


# Copied from train_dti_sdxl.config_arguments
def config_arguments(given: dict, model_class: type) -> list[str]:
    """--config as a command line, without what is `given` beside it, by --preset too. Raises UserError."""
    path, overruled = given["config"], {*given, *(PRESET_OPTIONS if "preset" in given else ())}
    actions = [action for action in make_parser(model_class, add_help=False)._actions if action.dest != "config"]
    known = {spelling.removeprefix("--"): action for action in actions for spelling in action.option_strings}
    arguments, seen = [], {}
    for name, value in read_config(path):
        key = name.lstrip("-").replace("-", "_")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise UserError(f"--config {path}: there is no option {name!r}. The nearest is {nearest!r}.")
        action = known[key]
        if action.dest in seen:
            raise UserError(f"--config {path}: {seen[action.dest]!r} and {name!r} are the same option.")
        seen[action.dest] = name
        if value is None or action.dest in overruled:
            continue
        values = value if isinstance(value, list) and action.default == [] else [value]
        if isinstance(value, list) and action.type is module_names:
            values = [",".join(map(str, value))]
        for item in values:
            if isinstance(item, (list, dict)):
                raise UserError(f"--config {path}: {name!r} takes one value, not a list or a table.")
            arguments.append(f"--{key}={item}")
    return arguments


# Copied from train_dti_sdxl.parse_given
def parse_given(argv: list[str], model_class: type, prog: str | None = None) -> argparse.Namespace:
    """Only what `argv` gives, without defaults. `prog` begins the error messages."""
    parser = make_parser(model_class, add_help=False)
    parser.prog = prog or parser.prog
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser.parse_known_args(argv)[0]


# Copied from train_dti_sdxl.refuse_idle
def refuse_idle(model, argv: list[str] | None) -> None:
    """Refuse what the user gave, by a file too, and another option makes idle. Raises UserError."""
    args, parser = model.args, make_parser(type(model), add_help=False)
    given = vars(parse_given(sys.argv[1:] if argv is None else argv, type(model)))
    if "config" in given:  # a run's own file has all options, and its preset beside what that stands for
        from_file = vars(parse_given(config_arguments(given, type(model)), type(model)))
        given |= {name: x for name, x in from_file.items() if x != parser.get_default(name) and name != "preset"}
    for name, (idle, when, remedy) in {**IDLE, **model.idle_options}.items():
        value = getattr(args, name, None)
        nothing = not value and value == parser.get_default(name)  # such as --lr_warmup_steps 0
        if name in given and not nothing and idle(args):
            text = ",".join(value) if isinstance(value, list) else value
            said = f"--{name}" if value is True else f"--{name} {text}"
            raise UserError(f"{said} has no effect {when}: {remedy + ', or ' * bool(remedy)}leave it out.")
    if given.keys() >= {"preset", *PRESET_OPTIONS}:
        names = ", ".join(PRESET_OPTIONS)
        raise UserError(f"--preset {args.preset} has no effect where each of {names} is given: leave it out.")


# Copied from train_dti_sdxl.parse_args
def parse_args(argv: list[str] | None, model_class: type) -> argparse.Namespace:
    """The options of the command line, then of --config, then of the preset, then the defaults. Raises UserError."""
    parser = make_parser(model_class)
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parse_given(argv, model_class))
    if "config" in given:
        from_file = config_arguments(given, model_class)
        parse_given(from_file, model_class, prog=f"{parser.prog}: --config {given['config']}")
        argv = [*from_file, *argv]
    args = parser.parse_args(argv)
    del args.config  # from here on nothing depends on where an option was given
    args.preset = args.preset or ("default" if args.optimizer == "rsgd" else "paper")
    for name, value in zip(PRESET_OPTIONS, model_class.presets[args.preset].get(args.optimizer, ()), strict=False):
        if getattr(args, name) is None and not (args.scale_lr and name == "learning_rate"):
            setattr(args, name, value)
    if args.kappa is None:
        args.kappa = 0.0 if args.magnitude == "free" else 1e-4
    if args.mask_background is None and (args.mask_dir or args.alpha_mask):
        args.mask_background = 0.1
    if args.rank and args.lora_alpha is None:
        args.lora_alpha = float(args.rank)
    return args


# Copied from train_dti_sdxl.check_options
def check_options(model) -> None:
    """Check what the options alone can show to be wrong. Raises UserError."""
    args, step = model.args, model.resolution_step
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, (str, Path)) and re.search("[\ud800-\udfff]", str(text)):
                raise UserError(f"--{name} is not valid UTF-8: write it in a terminal that is set to UTF-8.")
    if args.optimizer not in model.presets[args.preset]:
        raise UserError(f"--preset {args.preset} has a learning rate for --optimizer rsgd: leave one of them out.")
    if args.learning_rate is None:
        raise UserError("--scale_lr multiplies --learning_rate, and a preset's is not to be multiplied: give one.")
    if args.optimizer == "rsgd" and args.magnitude == "free":
        raise UserError("--optimizer rsgd moves on a sphere and --magnitude free has none: add --optimizer adamw.")
    if args.magnitude == "free" and args.kappa:
        raise UserError(f"--kappa {args.kappa:g} is a prior on a sphere and --magnitude free has none: leave it out.")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if getattr(args, name) >= 1:
            raise UserError(f"--{name} {getattr(args, name):g} must be below 1.")
    if args.rank and args.lora_start_step >= args.max_train_steps:
        raise UserError(f"--lora_start_step {args.lora_start_step} leaves no step for the adapters: give less.")
    check_data_options(args)
    if args.initializer_token is None and args.init_embedding is None:
        raise UserError("Give --initializer_token (the class word, such as dog) or --init_embedding.")
    if args.initializer_token is None and args.init == "contextual":
        raise UserError("--init contextual needs --initializer_token.")
    if args.resolution % step:
        fits = max(args.resolution // step, 1) * step
        raise UserError(f"--resolution {args.resolution} is not a multiple of {step}: try {fits}.")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise UserError("--hub_token would be logged by --report_to wandb: log in with `hf auth login` instead.")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to} needs `pip install {args.report_to}` (or --report_to none).")
    for prompt in args.validation_prompt:
        if not any(word in prompt for word in ("{}", *new_words(args))):
            raise UserError(f"--validation_prompt {prompt!r} has neither {{}} nor {args.placeholder_token!r} in it.")
    check_apart(args.output_dir, args.instance_data_dir or Path(args.dataset_name))
    check_output_dir(args.output_dir)
    check_further_words(args)


# Copied from train_dti_sdxl.new_words
def new_words(args: argparse.Namespace) -> dict[str, str | None]:
    """The new words with their class words: --placeholder_token, then each --further_word."""
    further = [text.rpartition("=")[::2] for text in args.further_word]
    return {args.placeholder_token: args.initializer_token, **dict(further)}


# Copied from train_dti_sdxl.word_folder
def word_folder(word: str, args: argparse.Namespace) -> Path:
    """Where a new word's files are written: diffusers' names are the same for every word."""
    return args.output_dir if word == args.placeholder_token else args.output_dir / web_name(word)


# Copied from train_dti_sdxl.check_further_words
def check_further_words(args: argparse.Namespace) -> None:
    """Check that further words can be told apart, and that the rest of the run is made for several. Raises UserError."""
    for text in args.further_word:
        if not all(part.strip() for part in text.rpartition("=")[::2]):
            raise UserError(f'--further_word {text!r} is not WORD=CLASS: write, for instance, "<my-cat>=cat".')
    for name in ("init_embedding", "push_to_hub"):
        if args.further_word and getattr(args, name):
            raise UserError(f"--{name} is for one word: leave it out, or --further_word.")
    names = [web_name(args.placeholder_token), *(web_name(text.rpartition("=")[0]) for text in args.further_word)]
    for text, name in zip(args.further_word, names[1:], strict=True):
        if name.lower() in ("hub", args.logging_dir.lower()) or name.lower().startswith("checkpoint-"):
            raise UserError(
                f"--further_word {text!r}: --output_dir has a folder {name} of its own: choose another word."
            )
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise UserError(f"--further_word {text!r}: another new word has the same file name: choose another.")
    for part, whole in itertools.permutations(new_words(args), 2):
        if part in whole:
            raise UserError(
                f"--further_word: {part!r} is a part of {whole!r}, where pipelines would replace it: "
                "choose another word, such as <my-cat>."
            )
    for word in list(new_words(args))[1:]:
        check_output_dir(word_folder(word, args))


# Copied from train_dti_sdxl.check_data_options
def check_data_options(args: argparse.Namespace) -> None:
    """Check that the options on photographs and prompts do not contradict one another. Raises UserError."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        raise UserError("Give either --instance_data_dir or --dataset_name.")
    given = [name for name in ("caption_column", "caption_extension", "prompt_templates") if getattr(args, name)]
    given += ["no_captions"] if args.no_captions and not args.prompt_templates else []
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} both say what the prompts are: leave one out.")
    if args.caption_extension and args.dataset_name:
        raise UserError("--caption_extension is for --instance_data_dir: of a data set, give the --caption_column.")
    if args.mask_dir and args.alpha_mask:
        raise UserError("--mask_dir and --alpha_mask both say where the masks are: leave one out.")
    if args.mask_dir and args.dataset_name:
        raise UserError("--mask_dir is for --instance_data_dir: of a data set, --alpha_mask takes the alpha channels.")
    if args.mask_background is not None and not (args.mask_dir or args.alpha_mask):
        raise UserError(f"--mask_background {args.mask_background:g} needs masks: give --mask_dir or --alpha_mask.")
    if args.mask_background is not None and args.mask_background >= 1:
        raise UserError(f"--mask_background {args.mask_background:g} must be below 1, where masks change nothing.")


# Copied from train_dti_sdxl.check_apart
def check_apart(output_dir: Path, photographs: Path) -> None:
    """Refuse to write where photographs are read: the next run would learn from its own pictures. Raises UserError."""

    def within(inner: Path, outer: Path) -> bool:
        inner = Path(os.path.realpath(inner))
        return any(os.path.samefile(path, outer) for path in (inner, *inner.parents) if os.path.exists(path))

    if not os.path.isdir(photographs):
        return
    relation = "lies in" if within(output_dir, photographs) else None
    if os.path.isdir(output_dir) and within(photographs, output_dir):
        relation = "is" if relation else "holds"
    if relation:
        raise UserError(f"--output_dir {output_dir} {relation} the photographs' folder {photographs}: give another.")


# Copied from train_dti_sdxl.check_output_dir
def check_output_dir(folder: Path) -> None:
    """Create the folder and check that it can be written to, before the training. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror}. Choose another.") from None


# Copied from train_dti_sdxl.hub_snapshot
@functools.lru_cache
def hub_snapshot(name: str, revision: str | None, token: str | None) -> Path:
    """The folder of the Hub's cache with a model's configurations and tokenizers, downloaded where they are not there."""
    return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=["*.json", "tokenizer*/*"]))


# Copied from train_dti_sdxl.model_folder
def model_folder(model) -> Path:
    """The folder that configurations and tokenizers are read from: as a stock pipeline has it, also without a network.

    Loaders that are given a Hub id ask the Hub on the way even for files in the cache. Raises OSError or ValueError.
    """
    args, name = model.args, model.args.pretrained_model_name_or_path
    if os.path.isfile(name):
        name = args.single_file_config or model.single_file_base
    return Path(name) if os.path.isdir(name) else hub_snapshot(name, args.revision, args.hub_token)


# Copied from train_dti_sdxl.fetch_weights
def fetch_weights(model) -> Path:
    """The folder with the weights too: the stock pipeline's choice of files is downloaded. Raises OSError or ValueError."""
    args, name = model.args, model.args.pretrained_model_name_or_path
    if os.path.isdir(name):
        return Path(name)
    options = {part: None for part, value in getattr(model, "pipeline_options", {}).items() if value is None}  # unused
    options |= {"variant": args.variant, "revision": args.revision, "token": args.hub_token}
    return Path(DiffusionPipeline.download(name, **options))


# Copied from train_dti_sdxl.part_variants
def part_variants(names: Iterable[str], part: str) -> set[str | None]:
    """The variants of a part's weights among the names of a model's files; None is the plain one."""
    shard = r"(-\d+-of-\d+)?"
    pattern = rf"{part}/(diffusion_pytorch_|pytorch_)?model{shard}(\.(?P<variant>[^.]+?))?{shard}\.(safetensors|bin)"
    return {match["variant"] for match in (re.fullmatch(pattern, name) for name in names) if match}


# Copied from train_dti_sdxl.check_variant
def check_variant(model, option: str) -> None:
    """Refuse a --variant that no part has, and weights that are there as variants only. Raises UserError."""
    args, name = model.args, model.args.pretrained_model_name_or_path
    if os.path.isfile(name):
        return
    folder = model_folder(model)
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    if not os.path.isdir(name):
        with contextlib.suppress(Exception):  # the library's and its HTTP client's; offline, the cache is all there is
            names = HfApi(token=args.hub_token).list_repo_files(name, revision=args.revision)
    found = {part: part_variants(names, part) for part in ("vae", model.denoiser_name, *model.text_encoder_names)}
    variants = sorted(set().union(*found.values()) - {None})
    if args.variant and args.variant not in variants and any(found.values()):
        others = ", ".join(variants) or "no variants: leave it out"
        raise UserError(f"--variant {args.variant}: {name} has no such weights. It has {others}.")
    for part, has in found.items():
        if has and not has & {args.variant, None}:
            raise UserError(f"{option} has {part} only as {', '.join(sorted(has))}: give --variant {min(has)}.")


# Copied from train_dti_sdxl.printed_options
def printed_options(args: argparse.Namespace, repository: str | None) -> str:
    """What printed lines give the loader besides the model; of a local folder, for a `repository`, only its name."""
    config = getattr(args, "single_file_config", None)
    if repository and config and os.path.exists(config):
        config = Path(config).resolve().name
    given = {"config": config, "revision": args.revision, "variant": args.variant}
    return "".join(f", {name}={json.dumps(value)}" for name, value in given.items() if value is not None)


# Copied from train_dti_sdxl.missing_parts_as_user_errors
@contextlib.contextmanager
def missing_parts_as_user_errors(args: argparse.Namespace):
    """Turn the loaders' errors about missing or damaged files into a UserError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        name = args.pretrained_model_name_or_path
        raise UserError(f"--pretrained_model_name_or_path {name} is not complete: {one_line(error)}") from None


# Copied from train_dti_sdxl.check_model
def check_model(model) -> None:
    """Read the pipeline's index and the scheduler's configuration, and refuse another kind of model. Raises UserError."""
    name, wanted = model.args.pretrained_model_name_or_path, model.pipeline_class.__name__
    option = f"--pretrained_model_name_or_path {name}"
    if os.path.isfile(name):
        model.check_single_file(option)
    if os.path.isdir(name) and not os.path.isfile(Path(name) / "model_index.json"):
        raise UserError(f"{option} has no model_index.json: give the folder of a whole pipeline in diffusers' format.")
    try:
        folder = model_folder(model)
        found = str(DiffusionPipeline.load_config(folder).get("_class_name"))
        scheduler = model.scheduler_class.load_config(folder, subfolder="scheduler")
        prediction = scheduler.get("prediction_type")
    except (OSError, ValueError, AttributeError) as error:  # the last where a file holds no table but a list
        raise UserError(f"{option} cannot be read: {one_line(error)}") from None
    if found != wanted:
        remedy = f": use {model.other_scripts[found]}" if found in model.other_scripts else ""
        raise UserError(f"{option} is a {found}; this script trains a {wanted}{remedy}.")
    if prediction not in model.predictions:
        known = ", ".join(filter(None, model.predictions))
        raise UserError(f"{option} predicts {prediction!r}; this script knows {known}.")
    model.check_parts(option, scheduler)
    check_variant(model, option)


# Copied from train_dti_sdxl.check_lora_targets
def check_lora_targets(model) -> None:
    """Try the adapters on a denoiser without weights: --lora_target_modules may name nothing. Raises UserError."""
    args, denoiser_class = model.args, model.denoiser_class
    if not args.rank:
        return
    with missing_parts_as_user_errors(args):
        config = denoiser_class.load_config(model_folder(model), subfolder=model.denoiser_name)
        with torch.device("meta"):
            denoiser = denoiser_class.from_config(config)
    try:
        denoiser.add_adapter(lora_config(args))
    except ValueError:
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
        raise UserError(
            f"--lora_target_modules {','.join(args.lora_target_modules)}: the model has no such layers, or ones that"
            f" take no adapter. Of its linear layers one is {linear[len(linear) // 2]}."
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# 2. Sphere: the method. Rows of a matrix are points on S^(d-1), each by itself, in float32.
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.normalize
def normalize(x: torch.Tensor) -> torch.Tensor:
    """Rows of `x` (n, d) scaled to unit length. A zero row stays zero."""
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)


# Copied from train_dti_sdxl.project_to_tangent
def project_to_tangent(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The part of `g` (n, d) that is tangent to the sphere at the unit rows `v` (n, d)."""
    # g - (g . v) v
    return g - (g * v).sum(dim=-1, keepdim=True) * v


# Copied from train_dti_sdxl.retract
def retract(v: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The point of the sphere reached from the unit rows `v` (n, d) by the tangent `step` (n, d), by renormalisation."""
    # (v + step) / |v + step|: a tangent step of length eta turns v by arctan(eta), the exponential map would by eta
    return normalize(v + step)


# Copied from train_dti_sdxl.angle
def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles (n,) in degrees between the rows of `a` and `b` (n, d), exact even for nearly parallel rows."""
    a, b = normalize(a), normalize(b)
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))


# Copied from train_dti_sdxl.RiemannianSGD
class RiemannianSGD(torch.optim.Optimizer):
    """Normalised Riemannian SGD on the unit sphere with a von Mises-Fisher prior (the paper's Algorithm 1).

    A parameter is a float32 matrix (n, d) of unit rows, and its group holds the prior's mean directions `mu` (n, d).
    A row whose tangent gradient is zero or not finite stays as it is, and is counted in `state[v]["skipped"]`. The mean norm
    of the last data gradient's rows, before prior and projection, is in `state[v]["gradient_norm"]`.

    One departure: a tangent gradient smaller than the rounding error of the gradient it was projected from counts as
    zero, because normalisation would turn that noise into a full step.

    Args:
        params: groups of parameters, each with its `mu`.
        lr: eta, the length of the tangent step; every step turns a row by arctan(eta) radians.
        kappa: concentration of the prior, whose gradient is -kappa mu.
    """

    def __init__(self, params, lr: float, kappa: float = 0.0):
        super().__init__(params, {"lr": lr, "kappa": kappa, "mu": None})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            eta, kappa, mu = group["lr"], group["kappa"], group["mu"]
            for v in group["params"]:
                # g_euc = g_data - kappa mu
                g_euc = v.grad if mu is None else v.grad - kappa * mu
                g = project_to_tangent(v, g_euc)
                length = g.norm(dim=-1, keepdim=True)
                noise = 4 * torch.finfo(v.dtype).eps * g_euc.norm(dim=-1, keepdim=True)
                moves = torch.isfinite(length) & (length > noise)
                # v <- (v - eta g / |g|) / |v - eta g / |g||
                v.copy_(torch.where(moves, retract(v, -eta * g / length), v))
                state = self.state[v]
                state["skipped"] = state.get("skipped", 0) + (~moves).sum()
                state["gradient_norm"] = v.grad.norm(dim=-1).mean()


# Copied from train_dti_sdxl.TokenAdamW
class TokenAdamW(torch.optim.AdamW):
    """AdamW on free embeddings (plain Textual Inversion), or on directions with re-projection (the paper's Table 3).

    In a group with `mu` the rows are unit vectors: the prior's gradient is added, and the rows are normalised after the
    step. A row whose gradient is not finite is given none in this step, and is counted in `state[x]["skipped"]`.
    """

    def __init__(self, params, kappa: float = 0.0, **adamw_options):
        super().__init__(params, **adamw_options)
        for group in self.param_groups:
            group.setdefault("mu", None)
            group.setdefault("kappa", kappa)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        skipped, gradient_norm = {}, {}
        for group in self.param_groups:
            for x in group["params"]:
                finite = x.grad.isfinite().all(dim=-1, keepdim=True)
                gradient_norm[x] = x.grad.norm(dim=-1).mean()
                g = x.grad if group["mu"] is None else x.grad - group["kappa"] * group["mu"]
                x.grad = torch.where(finite, g, 0.0)
                skipped[x] = (~finite).sum()
        super().step()
        for group in self.param_groups:
            for x in group["params"]:
                if group["mu"] is not None:
                    x.copy_(normalize(x))
                self.state[x]["skipped"] = self.state[x].get("skipped", 0) + skipped[x]
                self.state[x]["gradient_norm"] = gradient_norm[x]


# ----------------------------------------------------------------------------------------------------------------------
# 3. What is trained: the new word, its place in the tokenizers and encoders and where it starts, and LoRA
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.LearnedToken
@dataclass
class LearnedToken:
    """The new words' embeddings for one text encoder, mostly of a single word: all that is trained.

    Attributes:
        first_id: token id of the first vector; the others follow it.
        magnitude: m*, or None where the norm is free.
        parameter: (n, d) float32; the directions v as unit rows, or the embeddings e themselves where the norm is free.
        prior_mean: (n, d) mu, unit rows.
        start: (n, d) e(0), the embeddings before training.
        counts: the number of vectors of each new word; they follow one another in the rows.
    """

    first_id: int
    magnitude: float | None
    parameter: torch.nn.Parameter
    prior_mean: torch.Tensor
    start: torch.Tensor
    counts: Sequence[int]

    def embedding(self) -> torch.Tensor:
        """e = m* v, (n, d) float32, differentiable."""
        return self.parameter if self.magnitude is None else self.magnitude * self.parameter


# Copied from train_dti_sdxl.ExtendedEmbedding
class ExtendedEmbedding(torch.nn.Module):
    """A frozen vocabulary (V, d) followed by the learned rows, in the place of the encoder's own nn.Embedding.

    The learned parameter is not registered here: `encoder.to(torch.bfloat16)` must not reach it, for a step of 5e-3 is
    lost in half precision. The vocabulary is neither resized nor written to, so there is nothing to restore after a step.

    With `on_cpu` the vocabulary stays there, unseen by nn.Module, and the few rows of a prompt are copied.
    """

    def __init__(self, vocabulary: torch.nn.Embedding, token: LearnedToken, on_cpu: bool = False):
        super().__init__()
        if on_cpu:
            self.__dict__["vocabulary"] = vocabulary.to("cpu")
        else:
            self.vocabulary = vocabulary
        self.learned = (token,)  # in a tuple, so that nn.Module does not look into it

    @property
    def weight(self) -> torch.Tensor:
        return self.vocabulary.weight

    def _apply(self, fn: Callable, *args, **kwargs):
        """Cast the vocabulary on the CPU as all else is cast, and leave it there."""
        if "vocabulary" in self.__dict__:
            self.vocabulary._apply(lambda x: x.to(fn(x.new_empty(0)).dtype))
        return super()._apply(fn, *args, **kwargs)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        token = self.learned[0]
        is_new = input_ids >= token.first_id
        known = self.vocabulary(input_ids.masked_fill(is_new, 0).to(self.weight.device)).to(input_ids.device)
        new = F.embedding((input_ids - token.first_id).clamp(min=0), token.embedding().to(known.dtype))
        if hasattr(self.vocabulary, "embed_scale"):  # Gemma-2's sqrt(d) is the vocabulary's business in transformers 5
            new = new * self.vocabulary.embed_scale.to(new.dtype)
        return torch.where(is_new.unsqueeze(-1), new, known)


# Copied from train_dti_sdxl.initializer_ids
def initializer_ids(tokenizer, initializer: str, option: str = "--initializer_token") -> list[int]:
    """Token ids of the initializer text. Raises UserError where the vocabulary has no words for it."""
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"{option} {initializer!r} has no tokens: give the class word, such as dog.")
    # A byte-level tokenizer spells an unknown script in single bytes: they decode to nothing and mean nothing.
    if tokenizer.unk_token_id in ids or any("\ufffd" in tokenizer.decode([token_id]) for token_id in ids):
        raise UserError(f"{option} {initializer!r} is not in the vocabulary: give an English class word.")
    if len(ids) > (read := tokenizer.model_max_length - 2):  # beside the start and the end
        raise UserError(f"{option} has {len(ids)} tokens, and the encoders read {read}: give a class word.")
    return ids


# Copied from train_dti_sdxl.add_placeholder
def add_placeholder(model, tokenizer, placeholder: str, num_vectors: int, option: str = "--placeholder_token") -> int:
    """Add a new word to the tokenizer and return its first token id. Raises UserError for a name that does not work."""
    option = f"{option} {placeholder!r}"
    if not placeholder.strip():
        raise UserError(f'{option} is empty: give a new word, such as "<my-dog>".')
    if re.search(r"\s", placeholder):
        raise UserError(f"{option} has spaces in it: write {'-'.join(placeholder.split())!r}.")
    if web_name(placeholder).lower() in (*model.embedding_files, Path(LORA_FILE).stem):
        raise UserError(f"{option}: the file {web_name(placeholder)}.safetensors is diffusers': choose another.")
    if len(web_name(placeholder).encode()) > 200:  # of the 255 bytes of a file name; the step and suffixes follow
        raise UserError(f"{option} is too long for the name of a file: shorten it.")
    if num_vectors > (read := tokenizer.model_max_length - 2):
        raise UserError(f"{num_vectors} vectors do not fit the {read} tokens that the encoders read: use fewer.")
    names = [placeholder, *(f"{placeholder}_{index}" for index in range(1, num_vectors))]  # as diffusers names them
    vocabulary = tokenizer.get_vocab()
    owner = re.sub(r"_\d+$", "", placeholder)
    taken = [name for name in (*names, f"{placeholder}_1") if name in vocabulary]
    if owner != placeholder and owner in tokenizer.added_tokens_encoder:
        taken.append(owner)
    if taken or len(tokenizer.tokenize(placeholder)) == 1:
        raise UserError(f"{option}: {taken[0] if taken else placeholder!r} is in the vocabulary: choose another.")

    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    # What the pipeline makes of a prompt must hold exactly these tokens. Capitals can prevent it, by tokenizer version.
    prompt = model.to_pipeline_prompt(f"a {placeholder} here", tokenizer)
    if [token_id for token_id in tokenizer(prompt).input_ids if token_id >= ids[0]] != ids:
        reason = "is not found again in a prompt as the pipeline tokenizes it"
        raise UserError(f"{option} {reason}: write {placeholder.lower()!r}, in lower case.")
    return ids[0]


# Copied from train_dti_sdxl.vocabulary_magnitude
def vocabulary_magnitude(vocabulary: torch.Tensor, rule: str | float) -> float | None:
    """m* by --magnitude, from the norms of a vocabulary's (V, d) rows without the zero ones; None where it is free."""
    if rule == "free":
        return None
    if not isinstance(rule, str):
        return rule
    # In parts, to avoid a float32 copy of the matrix.
    norms = torch.cat([rows.float().norm(dim=-1) for rows in vocabulary.split(8192)])
    norms = norms[norms > 0].cpu().double()  # Apple GPUs have no float64
    return norms.min().item() if rule == "min" else float(rule.removesuffix("mean") or 1) * norms.mean().item()


# Copied from train_dti_sdxl.initial_embedding
def initial_embedding(encoder, tokenizer, initializer: str, init: str) -> torch.Tensor:
    """Embeddings (k, d) of the initializer's k tokens: rows of the vocabulary, or hidden states in context (CrossInit)."""
    ids = torch.tensor(initializer_ids(tokenizer, initializer), device=encoder.device)
    if init == "token":
        return encoder.get_input_embeddings().weight[ids].float()
    prompt = torch.tensor([tokenizer(initializer).input_ids], device=encoder.device)
    hidden = encoder(prompt, output_hidden_states=True).last_hidden_state[0]
    first = prompt[0].tolist().index(ids[0].item())
    return hidden[first : first + len(ids)].float()


# Copied from train_dti_sdxl.read_warm_start
def read_warm_start(model, path: Path, widths: list[int]) -> list[torch.Tensor]:
    """The (n, d) embeddings of a finished file or folder, one for each text encoder. Raises UserError."""
    option, (first_file, *other_files) = f"--init_embedding {path}", model.embedding_files
    path = path / f"{first_file}.safetensors" if os.path.isdir(path) else path
    try:
        if not os.path.isfile(path):  # or reading a pipe would wait for ever
            raise FileNotFoundError(f"{path} is not a file")
        state = load_file(path)
        if set(state) == set(model.web_keys):
            rows = [state[key] for key in model.web_keys]
        elif len(state) == 1:
            others = [path.name.replace(first_file, name, 1) for name in other_files]
            rows = [x for file in (path, *map(path.with_name, others)) for x in load_file(file).values()]
        elif any(re.search(r"(^|[._])lora[._].*\.", key) for key in state):
            raise UserError(f"{option} holds LoRA weights and no embedding: give the folder or file of the embedding.")
        else:
            wanted, keys = " and ".join(model.web_keys), ", ".join(list(state)[:5]) + ", ..." * (len(state) > 5)
            raise UserError(f"{option} has the keys {keys}: it needs {wanted}, or exactly one.")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{option} cannot be read as safetensors: {error}") from None
    rows = [torch.atleast_2d(row) for row in rows]
    if not all(row.is_floating_point() and row.ndim == 2 for row in rows):
        raise UserError(f"{option} does not hold rows of floating-point numbers.")
    rows = [row.float() for row in rows]
    found = [row.shape[-1] for row in rows]
    if found != widths:
        raise UserError(f"{option} has vectors of width {found}, but the model's text encoders need {widths}.")
    usable = all(len(row) and row.isfinite().all() and row.norm(dim=-1).all() for row in rows)
    if not usable or len(set(map(len, rows))) != 1:
        raise UserError(f"{option}: every encoder needs the same number of vectors, all finite and none zero.")
    return rows


# Copied from train_dti_sdxl.make_token
@torch.no_grad()
def make_token(
    encoder, tokenizer, first_id: int, counts: Sequence[int], warm_start: torch.Tensor | None, args
) -> LearnedToken:
    """Compute m*, mu and the start from the frozen encoder, and put the new rows behind its vocabulary."""
    vocabulary = encoder.get_input_embeddings()
    magnitude = vocabulary_magnitude(vocabulary.weight, args.magnitude)
    start = warm_start
    if args.initializer_token is not None:
        rows = [initial_embedding(encoder, tokenizer, word, args.init) for word in new_words(args).values()]
        initializer = torch.cat([x[torch.arange(n) % len(x)] for x, n in zip(rows, counts, strict=True)])
        start = initializer if warm_start is None else warm_start
    start = start.to(encoder.device, torch.float32)
    # mu is the class word wherever one is given, so that a warm start is still pulled towards it.
    prior_mean = normalize(start if args.initializer_token is None else initializer)
    if magnitude is not None:
        start = magnitude * normalize(start)
    parameter = torch.nn.Parameter(start.clone() if magnitude is None else normalize(start))
    token = LearnedToken(first_id, magnitude, parameter, prior_mean, start, counts)
    encoder.set_input_embeddings(ExtendedEmbedding(vocabulary, token, on_cpu=args.base_precision == "int8"))
    return token


# Copied from train_dti_sdxl.lora_config
def lora_config(args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        init_lora_weights="gaussian",
    )


# Copied from train_dti_sdxl.Adapters
class Adapters:
    """LoRA on the denoiser (the paper's Figure 8): float32 beside frozen weights, trained by AdamW."""

    def __init__(self, denoiser: torch.nn.Module, args: argparse.Namespace, seed: int):
        self.denoiser, self.start_step = denoiser, args.lora_start_step
        self.description = f"rank {args.rank}, alpha {args.lora_alpha:g}, learning rate {args.lora_learning_rate:g}"
        torch.manual_seed(seed)  # independent of what loading the models has drawn
        denoiser.add_adapter(lora_config(args))
        denoiser.train(args.lora_dropout > 0)
        cast_training_params(denoiser)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        betas = (args.adam_beta1, args.adam_beta2)
        adamw = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=args.lora_learning_rate, **adamw)

    def step(self, accelerator: Accelerator, steps_done: int, schedule: float) -> None:
        """One step on the gradients averaged over the processes; `schedule` is the share of the learning rate now due."""
        if steps_done < self.start_step:
            self.optimizer.zero_grad()
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if accelerator.num_processes > 1:
            mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * schedule
        # fp16's gradient scale belongs to the directions' optimizer, which steps next and renews it.
        accelerator.scaler.step(self.optimizer) if accelerator.scaler else self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and AdamW's state, for a checkpoint."""
        kept = {f"lora.parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            kept |= {f"lora.{key}.{name}": x for key, x in self.optimizer.state.get(p, {}).items()}
        return kept

    @torch.no_grad()
    def resume(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load what `tensors` returned."""
        for name, p in self.parameters.items():
            p.copy_(tensors[f"lora.parameter.{name}"])
            if f"lora.step.{name}" in tensors:  # otherwise the adapters have not started yet
                state = {key: tensors[f"lora.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {k: x if k == "step" else x.to(p.device) for k, x in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Data: photographs, prompts, and which of them each step sees
# ----------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga"),
    *(".avif", ".heic", ".heif", ".hif", ".jxl"),
}

# Formats that Pillow cannot read by itself, or not in every version: how files begin, a suffix, and what to install.
ADDED_FORMATS = {
    "AVIF": (rb"....ftyp(avi[fs]|m[is]f1.{0,40}avi[fs])", ".avif", "pillow>=11.3"),
    "HEIF": (rb"....ftyp(he[iv][cmsx]|m[is]f1)", ".heic", "pillow-heif"),
    "JPEG XL": (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", ".jxl", "pillow-jxl-plugin"),
}
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as `datasets`' imagefolder names them
CAPTION_EXTENSIONS = (".txt", ".caption")

TEMPLATES = {  # by --learnable_property
    "object": """
a photo of a {} | a photo of the {} | a photo of my {} | a photo of one {} | a picture of a {} | a picture of the {}
a picture of my {} | a snapshot of a {} | a photograph showing the {} | a close-up photo of a {} | a sharp photo of the {}
a blurry photo of a {} | a dim photo of the {} | a well lit photo of my {} | a cropped photo of a {} | a clean photo of the {}
a high resolution photo of a {} | a low resolution picture of the {} | a studio shot of a {} | an amateur photo of my {}
a photo of a {} seen from the front | a photo of the {} on display | an everyday photo of my {} | a colour photo of a {}
a detailed image of the {}
""",
    "style": """
a picture in the style of a {} | a picture in the style of the {} | a picture in the style of my {} | art in the {} style
a painting in the style of a {} | a drawing in the style of the {} | an illustration in the style of a {}
a rendering in the style of the {} | a detailed picture in the style of a {} | a simple picture in the style of the {}
a bright picture in my {} style | a dark picture in the {} style | a small picture in the style of a {}
a large picture in the style of the {} | a close-up in the style of a {} | a scene in the style of the {}
a landscape in the style of a {} | a portrait in the style of my {} | a still life in the style of a {}
a cropped picture in the style of the {} | a fine picture in the {} style | a quick study in the style of a {}
a composition in the style of my {} | an image in the style of a {} | a work in the style of the {}
""",
    "face": """
a photo of a {} | a photo of the {} | a photo of my {} | a portrait of a {} | a portrait of the {} | a portrait of my {}
a close-up portrait of a {} | a close-up of the {} | a headshot of a {} | a headshot of my {} | a snapshot of the {}
a picture of a {} | a picture of my {} | a photograph showing the {} | a cropped photo of a {} | a sharp photo of the {}
a blurry photo of a {} | a dim photo of the {} | a well lit photo of my {} | a studio portrait of a {} | the face of a {}
the face of the {} | an everyday photo of my {} | a colour photo of a {} | an amateur photo of the {}
""",
}


# Copied from train_dti_sdxl.widen_pillow
def widen_pillow() -> None:
    """Let Pillow read the formats for which a package is installed, and files larger than its safety limits."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401  it registers itself
    Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice as many; phones take 200 million
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # editors write more than 1 MiB


widen_pillow()


# Copied from train_dti_sdxl.built_in_templates
def built_in_templates(learnable_property: str) -> list[str]:
    lines = TEMPLATES[learnable_property].strip().splitlines()
    return [template.strip() for line in lines for template in line.split("|")]


# Copied from train_dti_sdxl.read_templates
def read_templates(path: Path) -> list[str]:
    """Templates of a file, one a line, empty lines left out. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_templates {path} cannot be read: {error}") from None
    wrong = [line for line in lines if "{}" not in line]
    if not lines or wrong:
        problem = f"the line {wrong[0]!r} has no {{}} for the new word" if lines else "it is empty"
        raise UserError(f"--prompt_templates {path}: {problem}.")
    return lines


# Copied from train_dti_sdxl.find_images
def find_images(folder: Path, option: str = "--instance_data_dir", captions: tuple = CAPTION_EXTENSIONS) -> list[Path]:
    """Image files of a folder, sorted by name, without its subfolders. Raises UserError."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, False also without permission to look
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{option} {folder} {problem}: give a folder of images.")
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be read: {error.strerror}.") from None
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    images = [path for path in images if os.path.isfile(path)]  # not a folder, a pipe or a broken link
    beside = tuple(ending.lower() for ending in (*captions, *METADATA_FILES))
    others = [path for path in files if path not in images and not path.name.lower().endswith(beside)]
    if left_out := [repr(path.name) for path in others]:
        logger.info(f"Not images, left out: {', '.join(left_out)}")
    if not images:
        raise UserError(f"{option} {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return readable_images(images, f"{option} {folder}")


# Copied from train_dti_sdxl.readable_images
def readable_images(paths: list[Path], said: str) -> list[Path]:
    """The images whose format can be read. Warns about the others. Raises UserError if none is left."""
    missing = {path: kind for path in paths if (kind := missing_format({"path": path, "bytes": None}))}
    packages = {kind: ADDED_FORMATS[kind][2] for kind in missing.values()}
    problem = "; ".join(f"reading {kind} needs `pip install '{package}'`" for kind, package in packages.items())
    if len(missing) == len(paths):
        raise UserError(f"{said} holds only images in formats that are not installed: {problem}.")
    if missing:
        logger.warning(f"Left out: {', '.join(repr(path.name) for path in missing)}; {problem}.")
    return [path for path in paths if path not in missing]


# Copied from train_dti_sdxl.missing_format
def missing_format(record: dict) -> str | None:
    """The image's format, by its first bytes, if no installed package reads it; otherwise None."""
    head = record["bytes"] or b""
    if record["bytes"] is None:
        with contextlib.suppress(OSError), open(record["path"], "rb") as file:  # open_image tells of such errors
            head = file.read(64)
    for kind, (beginning, suffix, _) in ADDED_FORMATS.items():
        if re.match(beginning, head, re.DOTALL):
            return None if suffix in Image.registered_extensions() else kind
    return None


# Copied from train_dti_sdxl.same_name
def same_name(name: str) -> str:
    """A file name in the form for comparison: systems write an accented letter as one character or as two."""
    return unicodedata.normalize("NFC", name)


# Copied from train_dti_sdxl.read_captions
def read_captions(images: list[Path], args: argparse.Namespace) -> list[dict] | None:
    """Each image's `caption` and its `source`, for messages, by the metadata file or files beside the images; or None.

    A caption is text of one or more lines, which prompts_by_image checks. Raises UserError.
    """
    if args.no_captions:
        return None
    folder = args.instance_data_dir
    metadata = {name: folder / name for name in METADATA_FILES if os.path.isfile(folder / name)}
    extensions = [args.caption_extension] if args.caption_extension else CAPTION_EXTENSIONS
    beside = {f"*{ending}": files for ending in extensions if (files := caption_files(folder, images, ending))}
    if args.caption_extension and not beside:
        name = f"{images[0].stem}{args.caption_extension}"
        raise UserError(f"--caption_extension {args.caption_extension}: {folder} has no captions, such as {name}.")
    named = {"caption_column": args.caption_column}
    named |= {"image_column": args.image_column} if args.image_column != "image" else {}
    for option, column in named.items():
        if column and not metadata:
            raise UserError(f"--{option} {column}: {folder} has no {' or '.join(METADATA_FILES)}.")
    sources = beside | metadata if args.caption_extension else metadata | beside
    used = None if args.prompt_templates else next(iter(sources), None)
    if unused := [name for name in sources if name != used]:
        reason = "--prompt_templates is given" if used is None else f"those of {used} are"
        logger.warning(f"{folder} has captions that are not used, as {reason}: {', '.join(unused)}.")
    if used is None:
        return None
    logger.info(f"Captions: {folder / used}")
    return read_metadata(metadata[used], images, args) if used in metadata else read_files(beside[used], images, used)


# Copied from train_dti_sdxl.caption_files
def caption_files(folder: Path, images: list[Path], ending: str) -> dict[str, Path]:
    """The caption files with this ending, by the name of their image. Warns about files without an image."""
    names = {same_name(path.stem) for path in images}
    files = [p for p in sorted(folder.iterdir()) if os.path.isfile(p) and not p.name.startswith(".")]
    files = {same_name(p.name[: -len(ending)]): p for p in files if p.name.lower().endswith(ending.lower())}
    if strangers := [repr(path.name) for name, path in files.items() if name not in names]:
        logger.warning(f"Left out, because no photograph has their names: {', '.join(strangers)}")
    return {name: path for name, path in files.items() if name in names}


# Copied from train_dti_sdxl.read_files
def read_files(files: dict[str, Path], images: list[Path], pattern: str) -> list[dict]:
    """The images' captions, one file each. Raises UserError."""
    captions = []
    for image in images:
        path = files.get(same_name(image.stem))
        if path is None:
            name = pattern.replace("*", image.stem)
            raise UserError(f"{image} has no caption, and others have: write {name}, or add --no_captions.")
        try:
            captions.append({"caption": path.read_text(encoding="utf-8-sig"), "source": str(path)})
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text in UTF-8: {error}") from None
    return captions


# Copied from train_dti_sdxl.read_metadata
def read_metadata(path: Path, images: list[Path], args: argparse.Namespace) -> list[dict]:
    """The images' captions by the folder's metadata file, as `datasets`' imagefolder reads it. Raises UserError."""
    column, captions = args.caption_column or "text", {}
    rows = metadata_rows(path, column)
    # A data set of several images a row has no file_name, but a column such as image_file_name for each.
    names = [name for name in (rows[0] if rows else ()) if str(name).endswith("_file_name")]
    usual = ("file_name", *(names if len(names) == 1 else ())) if args.image_column == "image" else ()
    named = f"{args.image_column}_file_name"
    key = next((name for name in (named, *usual) if rows and name in rows[0]), (*usual, named)[0])
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if missing := [name for name in (key, column) if name not in row]:
            raise UserError(f"{where} has no column {missing[0]!r}: it needs {key} and --caption_column {column}.")
        if None in row:  # the csv module's key for surplus cells
            raise UserError(f"{where} has more cells than the file has columns: put captions with commas in quotes.")
        if not isinstance(row[key], str):
            raise UserError(f"{where}: the {key} is {row[key]!r}: write a photograph's name.")
        name = same_name(posixpath.normpath(row[key].replace("\\", "/")))
        if name in captions:
            raise UserError(f"{where}: {row[key]!r} is there a second time, after {captions[name]['source']}.")
        captions[name] = {"caption": row[column], "source": where}
    here = [same_name(image.name) for image in images]
    if without := [name for name in here if name not in captions]:
        raise UserError(f"{path.parent}: the metadata file has no row for {without[0]!r}.")
    if strangers := [repr(name) for name in captions if name not in here]:
        logger.warning(f"{path} has rows for files that are not photographs of the folder: {', '.join(strangers)}")
    return [captions[name] for name in here]


# Copied from train_dti_sdxl.metadata_rows
def metadata_rows(path: Path, column: str) -> list[dict]:
    """The rows of metadata.jsonl, metadata.csv or metadata.parquet. Raises UserError."""
    rows = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            lines = csv.DictReader(file) if path.suffix == ".csv" else (json.loads(x) for x in file if x.strip())
            rows.extend({**line} for line in lines)
            return rows
    except (OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
        place = f"row {len(rows) + 1}: " if path.suffix != ".parquet" else ""
        raise UserError(f"{path} cannot be read as rows of file_name and {column}: {place}{error}") from None


# Copied from train_dti_sdxl.load_photographs
def load_photographs(args: argparse.Namespace) -> Sequence[dict]:
    """A row for each photograph: `image`, not yet decoded, in `datasets`' form; `caption` and its `source` with captions.

    With --mask_dir there is a `mask`, like `image` or None. The folder is not listed by `datasets`' imagefolder, which
    sorts files with names like "test" into splits and reads brackets in names as patterns.
    """
    if args.dataset_name is not None:
        return load_named_dataset(args)
    extensions = (args.caption_extension,) if args.caption_extension else CAPTION_EXTENSIONS
    images = find_images(args.instance_data_dir, captions=extensions)
    rows = [{"image": {"path": str(path), "bytes": None}} for path in images]
    captions = read_captions(images, args)
    if captions is not None:
        rows = [row | caption for row, caption in zip(rows, captions, strict=True)]
    if args.mask_dir is not None:
        rows = [row | {"mask": mask} for row, mask in zip(rows, find_masks(images, args.mask_dir), strict=True)]
    for text in itertools.chain.from_iterable((row["image"]["path"], str(row.get("caption"))) for row in rows):
        try:
            text.encode()
        except UnicodeEncodeError:  # a name in another encoding, or half a character in a caption's JSON
            raise UserError(f"{text!r} is not valid UTF-8: rename the file or correct the caption.") from None
    return rows


# Copied from train_dti_sdxl.find_masks
def find_masks(images: list[Path], folder: Path) -> list[dict | None]:
    """Each image's mask, by the file name without its ending; None, with a warning, if it has none. Raises UserError."""
    if os.path.isdir(folder) and os.path.samefile(folder, images[0].parent):
        raise UserError(f"--mask_dir {folder} is the photographs' folder, and masks would be taken for photographs.")
    masks = {same_name(path.stem): {"path": str(path), "bytes": None} for path in find_images(folder, "--mask_dir")}
    found = [masks.get(same_name(image.stem)) for image in images]
    without = [repr(image.name) for image, mask in zip(images, found, strict=True) if mask is None]
    if len(without) == len(images):
        raise UserError(f"--mask_dir {folder} has no mask named as a photograph, such as {images[0].stem}.png.")
    if without:
        logger.warning(f"Without a mask, and counted as a whole: {', '.join(without)}")
    return found


# Copied from train_dti_sdxl.load_named_dataset
def load_named_dataset(args: argparse.Namespace) -> Sequence[dict]:
    import datasets  # not with the others: a folder of photographs need not wait for it

    try:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split="train", token=args.hub_token)
    except Exception as error:  # `datasets` raises many kinds, from its builders and from the network
        raise UserError(f"--dataset_name {args.dataset_name} cannot be loaded: {one_line(error)}") from None
    wanted = {"image": args.image_column} | ({"caption": args.caption_column} if args.caption_column else {})
    for option, column in wanted.items():
        if column not in data.column_names:
            raise UserError(f"--{option}_column {column} is none of the data set's: {', '.join(data.column_names)}.")
    if not isinstance(data.features[args.image_column], datasets.Image):
        raise UserError(f"--image_column {args.image_column} of {args.dataset_name} does not hold images.")
    texts = [name for name in ("text", "caption", "captions", "prompt") if name in data.column_names]
    if texts and not (args.caption_column or args.no_captions):
        logger.warning(f"--dataset_name {args.dataset_name} has captions that are unused: --caption_column {texts[0]}")
    data = data.select_columns(list(wanted.values())).rename_columns({c: o for o, c in wanted.items() if c != o})
    return data.cast_column("image", datasets.Image(decode=False))


# Copied from train_dti_sdxl.open_image
def open_image(record: dict, shrink_to: int | None = None, convert: Callable | None = None) -> Image.Image:
    """Decode one photograph, upright, to sRGB or by `convert`. Raises UserError with its name if it cannot be read.

    With `shrink_to` a JPEG may be decoded smaller, with at least so many pixels on its shorter side: fast, for checks.
    """
    if record is None:
        raise UserError("A row of the data set has no image: remove the row.")
    source = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
    name = record["path"] or "an image of the data set"
    try:
        with Image.open(source) as image:
            if image.format == "EPS":  # Pillow would run Ghostscript on it, with no limit of time
                raise UserError(f"{name} is PostScript, which is not read: save it as PNG or remove it.")
            if image.format == "JXL" and not getattr(image, "jpeg", False):
                image.getexif().pop(ExifTags.Base.Orientation, None)  # the decoder has turned it already
            if shrink_to is not None:
                image.draft("RGB", (shrink_to, shrink_to))
            return (convert or to_srgb)(ImageOps.exif_transpose(image), name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{name} {why_unreadable(error, record)}") from None


# Copied from train_dti_sdxl.why_unreadable
def why_unreadable(error: Exception, record: dict) -> str:
    """Why Pillow does not read a photograph, and the remedy."""
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * Image.MAX_IMAGE_PIXELS} pixels, the most that are read: make it smaller."
    if "MAX_TEXT" in str(error) or "Decompressed" in str(error):  # the latter before Pillow 11
        limit = PngImagePlugin.MAX_TEXT_CHUNK >> 20
        return f"has more than {limit} MiB of text or colour profile in it: save it without its metadata."
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}."
    if (kind := missing_format(record)) is not None:
        return f"is {kind}, and reading it needs `pip install '{ADDED_FORMATS[kind][2]}'`."
    return f"is damaged or not an image ({error}): repair or remove it."


# Copied from train_dti_sdxl.to_srgb
def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Convert any mode to RGB in sRGB's colours: transparency over white, 16 bits scaled to 8. Raises UserError."""
    if image.mode == "F":  # their white is not defined; Pillow's conversion would take 1.0 for almost black
        raise UserError(f"{name} has floating-point pixels, which are not read: save it with 8 or 16 bits.")
    profile = image.info.get("icc_profile")
    if not profile and (colours := colours_without_profile(image)):
        warn_once(f"{name} says that its colours are {colours}, but has no colour profile: they are taken for sRGB.")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip every value above 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    image = apply_profile(image, profile, name) if profile else image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


# Copied from train_dti_sdxl.alpha_channel
def alpha_channel(image: Image.Image, name: str) -> Image.Image:
    """The image's opacity, from 0 to 255, in mode L."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


# Copied from train_dti_sdxl.grey_mask
def grey_mask(image: Image.Image, name: str) -> Image.Image:
    """A mask in mode L. Raises UserError for one with transparent parts."""
    if alpha_channel(image, name).getextrema()[0] < 255:
        raise UserError(f"{name} has transparent parts: a mask is grey, white where the subject is. See --alpha_mask.")
    return to_srgb(image, name).convert("L")


# Copied from train_dti_sdxl.open_mask
def open_mask(row: dict, args: argparse.Namespace) -> Image.Image | None:
    """A photograph's mask in mode L, the subject white; all white where it has none; None without masks."""
    if args.alpha_mask:
        return open_image(row["image"], convert=alpha_channel)
    if row.get("mask"):
        return open_image(row["mask"], convert=grey_mask)
    return Image.new("L", (1, 1), 255) if args.mask_dir else None


# Copied from train_dti_sdxl.colours_without_profile
def colours_without_profile(image: Image.Image) -> str | None:
    """The colour space other than sRGB that a file names without a profile, if any."""
    nclx = image.info.get("nclx_profile") or {}  # HEIF; the numbers are those of ITU-T H.273
    if nclx.get("transfer_characteristics") in (16, 18):
        return "HDR (PQ or HLG)"
    if nclx.get("color_primaries") in (9, 11, 12):
        return {9: "Rec. 2020", 11: "DCI-P3", 12: "Display P3"}[nclx["color_primaries"]]
    exif = image.getexif()
    if ExifTags.IFD.Interop in exif.get_ifd(ExifTags.IFD.Exif):  # older versions of Pillow raise where there is none
        return "Adobe RGB" if exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03" else None  # cameras' mark for it
    return None


# Copied from train_dti_sdxl.apply_profile
def apply_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The opaque image in sRGB's colours by its ICC profile; unchanged, with a warning, if the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind = source.profile.xcolor_space.strip()
        if kind == "RGB" and image.mode != "CMYK":  # grey pictures and palettes too may be in the colours of RGB
            image = image.convert("RGB")
        elif image.mode == "1":
            image = image.convert("L")
        return ImageCms.applyTransform(image, srgb_transform(profile, image.mode))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError) as error:
        warn_once(f"{name}: its colours are taken for sRGB, because its colour profile cannot be used ({error}).")
        return image.convert("RGB")


# Copied from train_dti_sdxl.srgb_transform
@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From a profile's colours to sRGB's as photo editors do it: relative colorimetric with black point compensation."""
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


# Copied from train_dti_sdxl.warn_once
@functools.cache
def warn_once(message: str) -> None:
    """Log a warning about a photograph once, though it may be read many times."""
    logger.warning(message)


# Copied from train_dti_sdxl.check_images
def check_images(photographs: Sequence[dict], resolution: int) -> None:
    """Decode every photograph once, to find a damaged one before the models load. Raises UserError."""
    small = 0
    # By rows: before version 4, `datasets` would read the whole column into memory.
    for row in tqdm(photographs, desc="Checking photographs", leave=False, disable=len(photographs) < 50):
        small += min(open_image(row["image"], shrink_to=resolution).size) < resolution
    if small:
        logger.warning(f"{small} of {len(photographs)} photographs are enlarged to --resolution {resolution}.")


# Copied from train_dti_sdxl.check_masks
def check_masks(photographs: Sequence[dict], args: argparse.Namespace) -> None:
    """Open every mask once; it must show a subject and fit its photograph. Raises UserError."""
    darkest = 0 if args.mask_dir is None and not args.alpha_mask else 255
    for row in photographs if darkest else ():
        if args.alpha_mask or row["mask"]:
            mask, source = open_mask(row, args), row["image"] if args.alpha_mask else row["mask"]
            size = open_image(row["image"], shrink_to=args.resolution).size
            check_mask(mask, size, source["path"] or "an image of the data set")
            darkest = min(darkest, mask.getextrema()[0])
    if darkest >= 128:
        option = f"--mask_dir {args.mask_dir}" if args.mask_dir else "--alpha_mask"
        raise UserError(f"{option}: the masks are white everywhere and would change nothing: leave the option out.")


# Copied from train_dti_sdxl.check_mask
def check_mask(mask: Image.Image, size: tuple[int, int], name: str) -> None:
    """Refuse a mask that shows nothing or has another shape than its photograph of `size`. Raises UserError."""
    if mask.getextrema()[1] < 128:
        raise UserError(f"{name} shows no subject: its mask is black everywhere.")
    (width, height), (wide, high) = mask.size, size
    if abs(width * high / (height * wide) - 1) > 0.05:  # a photograph opened for a check has its size rounded
        raise UserError(f"{name} is {width} x {height}, which is not the shape of the photograph, {wide} x {high}.")


# Copied from train_dti_sdxl.prompts_by_image
def prompts_by_image(photographs: Sequence[dict], args: argparse.Namespace) -> list[list[str]]:
    """For each photograph the prompts that it may be trained with: its caption, or all templates. Raises UserError."""
    path, kind = args.prompt_templates, args.learnable_property
    if "caption" not in photographs[0]:
        if args.further_word:
            raise UserError(
                f"--further_word {args.further_word[0]!r} needs captions that say which photograph shows which word."
            )
        templates = read_templates(path) if path else built_in_templates(kind)
        prompts = [template.replace("{}", args.placeholder_token) for template in templates]
        return [prompts] * len(photographs)
    if kind != "object":
        raise UserError(
            f"--learnable_property {kind} has no effect with captions: add --no_captions, or leave it out."
        )
    captions = []
    for number, row in enumerate(photographs, 1):
        source = row.get("source") or f"--dataset_name {args.dataset_name}, row {number}"
        if not isinstance(row["caption"], str):
            raise UserError(f"{source}: the caption is {row['caption']!r}, which is not text: write one.")
        lines = [line.strip() for line in row["caption"].splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{source}: the caption is empty: write one.")
        captions.append((source, lines))  # each step uses one of the lines
    check_new_word(captions, args)
    return [[line.replace("{}", args.placeholder_token) for line in lines] for _, lines in captions]


# Copied from train_dti_sdxl.check_new_word
def check_new_word(captions: list[tuple[str, list[str]]], args: argparse.Namespace) -> None:
    """Check that every caption's lines name a subject, and that each has a line; the message says how. Raises UserError."""
    all_lines = [(source, line) for source, lines in captions for line in lines]
    words = list(new_words(args))
    for word in words[1:]:
        if not any(word in line for _, line in all_lines):
            raise UserError(f"--further_word {word!r}: no caption names it: write {word} where a photograph shows it.")
    without = [(s, line) for s, line in all_lines if not any(word in line for word in ("{}", *words))]
    if not without:
        return
    (source, line), word, hint = without[0], args.initializer_token, ""
    pattern = rf"\b{re.escape(word)}\b" if word else "(?!)"
    if len(without) == len(all_lines) and any(re.search(pattern, line, re.IGNORECASE) for _, line in all_lines):
        hint = f" None has. Where they say {word!r}, write {{}} instead"
        if os.path.isfile(source):  # a file for each
            files = f"{shlex.quote(str(args.instance_data_dir))}/*{Path(source).suffix}"
            hint += f", by: perl -pi -e {shlex.quote(f's|{pattern}|{{}}|i')} {files}"
    named = " nor ".join(map(repr, words))
    raise UserError(f"{source}: the caption {line!r} has neither {{}} nor {named}.{hint}")


# Copied from train_dti_sdxl.check_prompts
def check_prompts(model, prompts: list[list[str]], counts: Sequence[int]) -> None:
    """Check that no prompt is so long that a new word is cut off; warn about other cuts. Raises UserError."""
    distinct, cut = dict.fromkeys(itertools.chain.from_iterable(prompts)), set()
    for prompt in distinct:
        for tokenizer in model.tokenizers:
            text = model.to_pipeline_prompt(prompt, tokenizer)
            ids, whole = tokenizer(text, truncation=True).input_ids, tokenizer(text).input_ids
            cut |= {prompt} if len(whole) > len(ids) else set()
            first_id = len(tokenizer) - sum(counts)
            for count in counts:
                own, first_id = range(first_id, first_id + count), first_id + count
                named = len(counts) == 1 or own[0] in whole
                if named and sum(token_id in own for token_id in ids) < count:
                    raise UserError(
                        f"The encoders read {tokenizer.model_max_length} tokens, and the new word is not among them in"
                        f" {prompt!r}: shorten it (or --num_vectors, now {count})."
                    )
    if cut:
        read = min(tokenizer.model_max_length for tokenizer in model.tokenizers)
        logger.warning(f"{len(cut)} of {len(distinct)} prompts are cut at the {read} tokens that the encoders read.")


# Copied from train_dti_sdxl.View
@dataclass(frozen=True)
class View:
    """A square part of a photograph: mirrored or not, and the crop's corner in pixels of the resized picture."""

    flip: bool
    top: int
    left: int


# Copied from train_dti_sdxl.draw_view
def draw_view(size: tuple[int, int], args, rng: np.random.Generator, mask: Image.Image | None = None) -> View:
    """Choose a part of a photograph of `size` (width, height) whose shorter side is resized to the resolution.

    With a mask, a part that shows at least half of the subject, if one of ten draws does.
    """
    spare_width, spare_height = (round(side * args.resolution / min(size)) - args.resolution for side in size)
    for _ in range(1 if mask is None or args.center_crop else 10):
        flip = args.random_flip and rng.random() < 0.5
        if args.center_crop:
            return View(flip, spare_height // 2, spare_width // 2)
        view = View(flip, int(rng.integers(spare_height + 1)), int(rng.integers(spare_width + 1)))
        if mask is None or subject_share(mask, view, args.resolution) >= 0.5:
            break
    return view


# Copied from train_dti_sdxl.subject_share
def subject_share(mask: Image.Image, view: View, resolution: int) -> float:
    """The share of the masked subject that lies in the view."""
    side = min(mask.size)
    whole = np.asarray(mask).mean() * mask.width * mask.height
    return np.asarray(cut_view(mask, view, resolution)).mean() * side * side / whole


# Copied from train_dti_sdxl.cut_view
def cut_view(image: Image.Image, view: View, resolution: int) -> Image.Image:
    """Cut the view out of an image of any size that has the photograph's shape, and resize it to the resolution."""
    side = min(image.size)
    scale = side / resolution
    left, top = min(view.left * scale, image.width - side), min(view.top * scale, image.height - side)
    image = ImageOps.mirror(image) if view.flip else image
    # Resizing only the box costs the same for any shape of picture: a panorama is never enlarged as a whole.
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


# Copied from train_dti_sdxl.render_view
def render_view(image: Image.Image, mask: Image.Image | None, view: View, resolution: int) -> dict[str, torch.Tensor]:
    """What a step sees of a photograph: `pixel_values` (3, R, R) in [-1, 1] and, with masks, `mask` (1, R, R) in [0, 1].

    Also SDXL's `time_ids` (6,): original size, the crop's corner, and target size, each height before width.
    """
    pixels = torch.from_numpy(np.array(cut_view(image, view, resolution))).permute(2, 0, 1) / 127.5 - 1
    time_ids = torch.tensor([image.height, image.width, view.top, view.left, resolution, resolution]).float()
    seen = {"pixel_values": pixels, "time_ids": time_ids}
    if mask is not None:
        seen["mask"] = torch.from_numpy(np.array(cut_view(mask, view, resolution)))[None] / 255
    return seen


# Copied from train_dti_sdxl.TrainingExamples
class TrainingExamples(torch.utils.data.Dataset):
    """The training examples at positions 0, 1, 2 ... of an endless sequence: a view of a photograph and a prompt.

    Every item depends only on the seed and its position, not on worker processes, on validation or on where a run was
    resumed. Each epoch has every photograph once, in a new order.
    """

    def __init__(self, photographs, prompts: list[list[str]], cache: list[list[dict]] | None, seed: int, args):
        self.photographs, self.prompts, self.cache, self.seed, self.args = photographs, prompts, cache, seed, args

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.prompts))
        index = int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.prompts))[place])
        rng = np.random.default_rng([self.seed, 1, position])
        prompt = self.prompts[index][rng.integers(len(self.prompts[index]))]
        if self.cache is not None:
            return {"position": position, "prompt": prompt, **self.cache[index][rng.integers(len(self.cache[index]))]}
        image, mask = open_image(self.photographs[index]["image"]), open_mask(self.photographs[index], self.args)
        view = draw_view(image.size, self.args, rng, mask)
        return {"position": position, "prompt": prompt, **render_view(image, mask, view, self.args.resolution)}


# Copied from train_dti_sdxl.cache_latents
def cache_latents(model, photographs: Sequence[dict], seed: int, accelerator: Accelerator) -> list[list[dict]]:
    """Encode the views of every photograph once, one at a time. Returns, on the CPU, a list of views for each.

    Several processes share the work, and each gets all the views.
    """
    args, encoded = model.args, []
    model.vae.to(accelerator.device)
    share = range(accelerator.process_index, len(photographs), accelerator.num_processes)
    for index in tqdm(share, desc="Encoding photographs", leave=False, disable=not accelerator.is_main_process):
        rng = np.random.default_rng([seed, 3, index])
        image, mask = open_image(photographs[index]["image"]), open_mask(photographs[index], args)
        views = dict.fromkeys(draw_view(image.size, args, rng, mask) for _ in range(args.crops_per_image))
        examples = []
        for view in views:
            example = render_view(image, mask, view, args.resolution)
            latents = model.encode_images(example.pop("pixel_values")[None])
            example |= {name: x[0].cpu() for name, x in latents.items()}
            if mask is not None:
                example["mask"] = F.adaptive_avg_pool2d(example["mask"], next(iter(latents.values())).shape[-2:])
            examples.append(example)
        encoded.append((index, examples))
    model.vae.to("cpu")
    free_memory()
    by_index = dict(gather_object(encoded))
    return [by_index[index] for index in range(len(photographs))]


# Copied from train_dti_sdxl.noise_generator
def noise_generator(seed: int, position: int) -> torch.Generator:
    """The generator of an example's noise. It draws on the CPU, so that the numbers are the same on any device."""
    state = np.random.SeedSequence([seed, 2, position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# Copied from train_dti_sdxl.batches
def batches(examples: TrainingExamples, accelerator: Accelerator, args, start: int) -> Iterator[dict]:
    """Endless batches for this process, from its `start`-th on, each with a generator for each example's noise.

    Of each `num_processes` consecutive batches, a process takes one. The examples themselves do not depend on how they are
    divided into batches, micro-batches and processes: only the number in a step matters.
    """
    size, rank, world = args.train_batch_size, accelerator.process_index, accelerator.num_processes
    positions = ([(k * world + rank) * size + i for i in range(size)] for k in itertools.count(start))
    workers = args.dataloader_num_workers if examples.cache is None else 0
    loader = torch.utils.data.DataLoader(
        examples, batch_sampler=positions, num_workers=workers, pin_memory=accelerator.device.type == "cuda"
    )
    for batch in loader:
        generators = [noise_generator(examples.seed, position) for position in batch.pop("position").tolist()]
        on_device = {k: to_device(v, accelerator.device) for k, v in batch.items() if torch.is_tensor(v)}
        yield {**batch, **on_device, "generators": generators}


# Copied from train_dti_sdxl.to_device
def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the CPU, without waiting for the GPU's queued work as a plain `.to` does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# Copied from train_dti_sdxl.mean_over_subject
def mean_over_subject(errors: torch.Tensor, batch: dict, background: float | None) -> torch.Tensor:
    """The mean of a batch's errors (B, C, h, w) over the subject, or without masks over everything. A float32 scalar.

    A latent position weighs w = m + background (1 - m), with m the share of it that the mask (B, 1, H, W) shows. Each
    example's mean is sum(w e) / sum(w), so that a small subject counts as much as a large one.
    """
    if "mask" not in batch:
        return errors.mean()
    m = F.adaptive_avg_pool2d(batch["mask"], errors.shape[-2:])
    w = m + background * (1 - m)
    # The sum is zero where nothing of the subject is in the view.
    total = w.sum(dim=(1, 2, 3)).clamp(min=torch.finfo(w.dtype).tiny)
    return ((w * errors).mean(dim=1).sum(dim=(1, 2)) / total).mean()


# Copied from train_dti_sdxl.draw_normal
def draw_normal(like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard normal numbers of the shape (B, ...) and on the device of `like`, each row from its own generator."""
    return to_device(torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]), like.device)


# ----------------------------------------------------------------------------------------------------------------------
# 5. SANA: all that is this model's own. Everything else is the same in both scripts.
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.Int8Product
class Int8Product(torch.autograd.Function):
    """A linear layer's or a convolution's output from an int8 weight, which is frozen.

    The weight in the activations' precision is made for the forward and again for the backward pass, and never kept.
    `geometry` is a convolution's stride, padding, dilation and groups, and None for a linear layer.
    """

    @staticmethod
    def forward(context, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias, geometry: tuple | None):
        context.save_for_backward(weight, scale)
        context.geometry, context.shape = geometry, x.shape
        weight = weight * scale.to(x.dtype)
        return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(context, gradient: torch.Tensor):
        weight, scale = context.saved_tensors
        weight = weight * scale.to(gradient.dtype)
        if context.geometry is None:
            x_gradient = gradient @ weight
        else:
            x_gradient = torch.nn.grad.conv2d_input(context.shape, weight, gradient, *context.geometry)
        return x_gradient, None, None, None, None


# Copied from train_dti_sdxl.Int8Linear
class Int8Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Int8Product.apply(x, self.weight, self.scale, self.bias, None)


# Copied from train_dti_sdxl.Int8Conv2d
class Int8Conv2d(torch.nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return Int8Product.apply(x, self.weight, self.scale, self.bias, geometry)


# Copied from train_dti_sdxl.to_int8
@torch.no_grad()
def to_int8(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Hold the weights of the blocks' linear layers and convolutions in int8, layer by layer, and return the model.

    Each output channel has a scale, rounded to `dtype` before the weights are divided by it: later casts to `dtype` lose
    nothing. The layers stay an nn.Linear or nn.Conv2d, which PEFT adapts. Embeddings, norms and biases stay as they are,
    and so do convolutions that pad with anything but zeros. The few layers outside the numbered blocks (first, last, time,
    size) also stay: on SDXL their rounding doubles the error of the gradient.
    """
    kinds = {torch.nn.Linear: Int8Linear, torch.nn.Conv2d: Int8Conv2d}
    for name, layer in model.named_modules():
        outside = not any(part.isdecimal() for part in name.split("."))
        if outside or type(layer) not in kinds or getattr(layer, "padding_mode", "zeros") != "zeros":
            continue
        largest = torch.linalg.vector_norm(layer.weight, math.inf, list(range(1, layer.weight.ndim)), keepdim=True)
        scale = (largest.float() / 127).to(dtype)
        scale = scale.masked_fill(scale == 0, 1)  # a channel of zeros
        whole = (layer.weight / scale.float()).round_().clamp_(-127, 127)  # in float32, with one copy of the weight
        layer.weight = torch.nn.Parameter(whole.to(torch.int8), requires_grad=False)
        layer.register_buffer("scale", scale)
        layer.__class__ = kinds[type(layer)]
    return model


# Copied from train_dti_sdxl.reading_dtype
def reading_dtype(args: argparse.Namespace, dtype: torch.dtype) -> torch.dtype:
    """The precision to read the denoiser in. What becomes int8 is read in half precision, to fit a laptop's memory."""
    return torch.bfloat16 if args.base_precision == "int8" and dtype == torch.float32 else dtype


# Copied from train_dti_sdxl.to_base_precision
def to_base_precision(part: torch.nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    """The part as --base_precision has it, to compute in `dtype`."""
    return to_int8(part, dtype) if args.base_precision == "int8" else part


# Copied from train_dti_sdxl.in_tiles_if_needed
def in_tiles_if_needed(vae, work: Callable, x: torch.Tensor):
    """The VAE's `encode` or `decode` of a batch; from where the device's memory is too small on, in tiles of 512 pixels."""
    try:
        return work(x)
    except torch.cuda.OutOfMemoryError:
        if vae.use_tiling:
            raise
    logger.warning("The device's memory is too small for the VAE at this --resolution: it works in tiles of 512 px.")
    free_memory()
    vae.enable_tiling()
    if hasattr(vae, "tile_sample_min_size"):  # SDXL's are of 1024 pixels; SANA's are of 512
        vae.tile_latent_min_size = vae.tile_latent_min_size * 512 // vae.tile_sample_min_size
        vae.tile_sample_min_size = 512
    return work(x)


# Copied from train_dti_sdxl.load_part
def load_part(cls: type, folder: Path, name: str, args: argparse.Namespace, dtype: torch.dtype | str):
    """Load a part of the model: its --variant if it has that, else the plain weights, as a stock pipeline chooses.

    Raises ValueError for missing weights, which the libraries would initialize at random.
    """
    has = args.variant in part_variants((f"{name}/{file}" for file in os.listdir(folder / name)), name)
    options = {"variant": args.variant if has else None, "torch_dtype": dtype, "output_loading_info": True}
    part, info = cls.from_pretrained(folder, subfolder=name, **options)
    if info["missing_keys"]:  # transformers' major versions name some weights differently
        raise ValueError(f"{name} lacks the weights {min(info['missing_keys'])} ... (another version's file?)")
    return part


class Sana:
    """The pipeline to train with, frozen, and the new word in its text encoder. Holds all that is SANA's own.

    The class has the interface of train_dti_sdxl.StableDiffusionXL.

    Attributes:
        args: the options.
        tokenizers, text_encoders: SANA has one.
        timesteps, sigmas: (1000,), the scheduler's, on the CPU.
        instruction: what is put in front of every prompt.
        max_length: tokens of a prompt, the instruction's counted.
        tokens: the new word's embedding; `main` adds it.
    """

    method_name = "Directional Textual Inversion (DTI)"
    defaults = {}  # of options that the script defines, where they differ
    pipeline_class = SanaPipeline
    # For a user who runs the wrong script.
    other_scripts = {"StableDiffusionXLPipeline": "train_dti_sdxl.py"}
    other_scripts |= {"StableDiffusionPipeline": "examples/train_dti_sd.py"}
    denoiser_name = "transformer"  # its folder, and its name in the pipeline
    denoiser_class = SanaTransformer2DModel
    vae_class = AutoencoderDC
    scheduler_class = FlowMatchEulerDiscreteScheduler
    predictions = (None, "flow_prediction")
    idle_options = {  # more of IDLE
        **dict.fromkeys(
            ("logit_mean", "logit_std"),
            (lambda args: args.weighting_scheme != "logit_normal", "except with --weighting_scheme logit_normal", ""),
        ),
        "mode_scale": (lambda args: args.weighting_scheme != "mode", "except with --weighting_scheme mode", ""),
    }
    single_file_base = None  # single files are not read
    resolution_step = 32  # pixels a latent position
    text_encoder_names = ("text_encoder",)
    embedding_files = ("learned_embeds",)  # diffusers' name
    web_keys = ("gemma",)  # OneTrainer's key
    architecture = "sana"  # modelspec's name
    card_tags = ("sana", "sana-diffusers")
    pipeline_file = Path(__file__).resolve().parent / "examples" / "pipeline_sana_textual_inversion.py"
    hub_code = {"pipeline.py": pipeline_file}  # name on the Hub, where custom_pipeline looks for it
    web_use = "OneTrainer reads [`{file}`]({url}). ComfyUI's core has no SANA.\n"
    web_note = ""
    web_lora_use = """
OneTrainer reads the LoRA weights from [`{file}`]({url}), SD.Next as diffusers does, from
[pytorch_lora_weights.safetensors](pytorch_lora_weights.safetensors).
"""
    web_spelling = ""  # OneTrainer takes any word
    web_limits = ()
    kohya_metadata = {}

    # What --preset stands for, by optimizer: found in the miniature world (examples/presets), the paper's settings, and
    # those that its authors' launchers run with, whose rates --scale_lr has multiplied by their batch of 4.
    presets = {
        "default": {"rsgd": (250, 0.08, "linear", "mean")},
        "fast": {"rsgd": (125, 0.16, "linear", "mean")},
        "paper": {"rsgd": (1000, 0.02, "constant", "mean"), "adamw": (500, 5e-3, "constant", "mean")},
        "released": {"rsgd": (500, 0.04, "constant", "mean"), "adamw": (500, 0.02, "constant", "mean")},
    }

    tokenizers: list  # by load_tokenizers; what follows, by load
    text_encoders: list[Gemma2Model]
    denoiser: SanaTransformer2DModel
    vae: AutoencoderDC
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    instruction: str
    max_length: int

    def __init__(self, args: argparse.Namespace):
        self.args, self.tokens = args, []

    def make_token(self, encoder, tokenizer, first_id: int, counts: Sequence[int], warm_start) -> LearnedToken:
        """What is trained in a text encoder. A subclass may learn the word in another form."""
        return make_token(encoder, tokenizer, first_id, counts, warm_start, self.args)

    def after_step(self, step: int) -> None:
        """Does nothing. A subclass may change the word here."""

    def save_result(self, step: int, about: dict[str, str], suffix: str = "") -> None:
        save_result(self, step, about, suffix)

    # fmt: off
    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("SANA").add_argument
        add("--max_sequence_length", type=number(int, 2), default=300, help="Tokens of a prompt that SANA is conditioned on. Training computes only as many as a batch needs.")
        add("--complex_human_instruction", default=None, help="Text in front of every training prompt: `default` for SanaPipeline's own, or a text. Default: none.")
        add("--weighting_scheme", choices=["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"], default="none", help="How timesteps are drawn or weighted, as in SD3: none draws them uniformly.")
        add("--logit_mean", type=number(float, -100), default=0.0, help="Mean of logit_normal.")
        add("--logit_std", type=number(float, 0, above=True), default=1.0, help="Deviation of logit_normal.")
        add("--mode_scale", type=number(float, -1), default=1.29, help="Scale of mode.")
        add("--validation_inference_steps", type=number(int, 1), default=20, help="Euler steps of a validation image.")
        add("--validation_guidance_scale", type=number(float, 0), default=4.5, help="Guidance scale of the validation images.")
    # fmt: on

    def check_single_file(self, option: str) -> None:
        """Refuse a single file. Raises UserError."""
        raise UserError(f"{option} is a file: give the folder of a pipeline in diffusers' format.")

    def check_parts(self, option: str, scheduler: dict) -> None:
        """Refuse a model with another kind of noise or of transformer, from its configurations alone. Raises UserError."""
        name = scheduler.get("_class_name", self.scheduler_class.__name__)
        if not name.startswith("FlowMatch") and not scheduler.get("use_flow_sigmas"):
            raise UserError(
                f"{option} is sampled by {name} without use_flow_sigmas: this script trains flow matching."
            )
        with missing_parts_as_user_errors(self.args):
            transformer = self.denoiser_class.load_config(model_folder(self), subfolder=self.denoiser_name)
        if transformer.get("guidance_embeds"):
            raise UserError(
                f"{option} is a distilled SANA (with guidance_embeds): train with the one that it is from."
            )

    def load_tokenizers(self) -> None:
        with missing_parts_as_user_errors(self.args):
            tokenizer = AutoTokenizer.from_pretrained(model_folder(self), subfolder="tokenizer")
        tokenizer.padding_side = "right"  # as SanaPipeline sets it; Gemma's own side is the left
        tokenizer.model_max_length = self.args.max_sequence_length
        self.tokenizers = [tokenizer]

    def load(self, dtype: torch.dtype) -> None:
        """Load everything, frozen, to the CPU; the encoder still as it was shipped, but for --base_precision int8."""
        if dtype == torch.float16:
            logger.warning("--mixed_precision fp16: Gemma-2 and SANA's autoencoder overflow in it. Use bf16.")
        args = self.args
        with missing_parts_as_user_errors(args):
            folder = fetch_weights(self)
            scheduler = self.scheduler_class.from_pretrained(folder, subfolder="scheduler")
            self.vae = load_part(self.vae_class, folder, "vae", args, torch.float32)
            denoiser = load_part(self.denoiser_class, folder, self.denoiser_name, args, reading_dtype(args, dtype))
            self.denoiser = to_base_precision(denoiser, args, dtype).to(dtype)
            encoder = to_base_precision(load_part(Gemma2Model, folder, "text_encoder", args, "auto"), args, dtype)
        self.timesteps, self.sigmas, self.text_encoders = scheduler.timesteps, scheduler.sigmas, [encoder]
        encoder.config.use_cache = False  # Gemma-2 would build a key-value cache
        for part in (self.vae, self.denoiser, encoder):
            part.requires_grad_(False).eval()
        if args.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            encoder.train()  # transformers checkpoints in training mode only; Gemma-2 has no dropout
        if args.compile:
            for block in self.denoiser.transformer_blocks:  # diffusers' compile_repeated_blocks does not know SANA's
                block.compile(fullgraph=True)
        self.instruction, self.max_length = args.complex_human_instruction or "", args.max_sequence_length
        if self.instruction == "default":  # SanaPipeline's own
            parameters = inspect.signature(SanaPipeline.__call__).parameters
            self.instruction = "\n".join(parameters["complex_human_instruction"].default)
        if self.instruction:  # SanaPipeline's count: the instruction's, less its <bos> and the space before the prompt
            self.max_length += len(self.tokenizers[0].encode(self.instruction)) - 2

    @staticmethod
    def to_pipeline_prompt(prompt: str, tokenizer) -> str:
        """The prompt as the pipeline tokenizes it: in lower case, the new word followed by its further vectors' names."""
        return TextualInversionLoaderMixin().maybe_convert_prompt(prompt.lower().strip(), tokenizer)

    def encode_prompts(self, prompts: list[str], padding: str = "longest") -> tuple[torch.Tensor, torch.Tensor]:
        """SANA's conditioning as the pipeline computes it: prompt embeddings (B, L, d) and their mask (B, L).

        The pipeline pads every prompt to `max_length`. The encoder is causal and what is padded is masked, so padding to
        the longest prompt of the batch gives the same for a fraction of the work; `padding="max_length"` gives all of it.
        A prompt that occurs several times is encoded once.
        """
        distinct = list(dict.fromkeys(prompts))
        tokenizer, encoder = self.tokenizers[0], self.text_encoders[0]
        texts = [self.instruction + self.to_pipeline_prompt(prompt, tokenizer) for prompt in distinct]
        options = {"max_length": self.max_length, "truncation": True, "return_tensors": "pt"}
        inputs = tokenizer(texts, padding=padding, **options)
        ids, mask = (to_device(inputs[name], encoder.device) for name in ("input_ids", "attention_mask"))
        embeds = encoder(ids, attention_mask=mask)[0]
        # SanaPipeline keeps <bos> and the last max_sequence_length - 1 positions: the instruction itself is dropped.
        start = self.max_length - self.args.max_sequence_length + 1
        kept = to_device(torch.tensor([0, *range(start, ids.shape[1])]), ids.device)
        index = to_device(torch.tensor([distinct.index(prompt) for prompt in prompts]), ids.device)
        return embeds[:, kept][index], mask[:, kept][index]

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scaled latents (B, C, R/32, R/32) of images (B, 3, R, R) in [-1, 1], in float32. They are deterministic."""
        latents = in_tiles_if_needed(self.vae, self.vae.encode, pixel_values.to(self.vae.device)).latent
        return {"latents": latents * self.vae.config.scaling_factor}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, R, R) in [-1, 1] of latents, in float32."""
        latents = latents.float() / self.vae.config.scaling_factor
        return in_tiles_if_needed(self.vae, self.vae.decode, latents).sample

    def loss(self, batch: dict) -> torch.Tensor:
        """L_data: flow matching with the scheduler's sigmas, timesteps drawn and weighted as in SD3. A float32 scalar."""
        latents = batch["latents"] if "latents" in batch else self.encode_images(batch["pixel_values"])["latents"]
        noise = draw_normal(latents, batch["generators"])
        index = self.draw_timesteps(batch["generators"])
        timesteps, sigmas = (to_device(x[index], latents.device) for x in (self.timesteps, self.sigmas))
        sigmas = sigmas.view(-1, 1, 1, 1)
        # x_t = (1 - sigma) x + sigma noise, target = noise - x
        noisy = (1 - sigmas) * latents + sigmas * noise

        if self.denoiser.training:  # LoRA's dropout draws from torch's own generator: a resumed run repeats it
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=batch["generators"][0])))
        # Compiled blocks want one shape: other lengths would compile them anew.
        padding = "max_length" if self.args.compile else "longest"
        prompt_embeds, mask = self.encode_prompts(batch["prompt"], padding)
        prediction = self.denoiser(
            noisy.to(self.denoiser.dtype),
            encoder_hidden_states=prompt_embeds.to(self.denoiser.dtype),
            timestep=timesteps * self.denoiser.config.timestep_scale,
            encoder_attention_mask=mask,
        ).sample
        weighting = compute_loss_weighting_for_sd3(self.args.weighting_scheme, sigmas)
        errors = weighting * (prediction.float() - (noise - latents)).square()
        return mean_over_subject(errors, batch, self.args.mask_background)

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Indices (B,) into the scheduler's timesteps, each from its own generator, by --weighting_scheme."""
        args, steps = self.args, len(self.timesteps)
        density = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
        draw = functools.partial(compute_density_for_timestep_sampling, args.weighting_scheme, 1, **density)
        u = torch.cat([draw(generator=generator) for generator in generators])
        return (u * steps).long().clamp(0, steps - 1)

    @torch.no_grad()
    def sample_latents(self, prompt: str, negative_prompt: str | None, seed: int) -> list[torch.Tensor]:
        """Sample the prompt by Euler steps, with the instruction of the training. Draws from its own generators only.

        Returns --num_validation_images latents (1, C, R/32, R/32), not decoded: the VAE is in float32.
        """
        args = self.args
        with missing_parts_as_user_errors(args):
            shipped = self.scheduler_class.load_config(model_folder(self), subfolder="scheduler")
        # SANA ships a DPM-Solver's configuration, which calls the same number another name.
        scheduler = self.scheduler_class(shift=shipped.get("shift", shipped.get("flow_shift", 1.0)))
        # Latents need no VAE on the device.
        pipeline = self.pipeline_class(self.tokenizers[0], self.text_encoders[0], None, self.denoiser, scheduler)
        pipeline.vae_scale_factor = 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)  # without a VAE: 32
        pipeline.set_progress_bar_config(disable=True)
        latents = []
        for index in range(args.num_validation_images):
            output = pipeline(
                prompt=self.to_pipeline_prompt(prompt, self.tokenizers[0]),
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                negative_prompt=self.to_pipeline_prompt(negative_prompt or "", self.tokenizers[0]),
                generator=torch.Generator(self.denoiser.device).manual_seed(seed + index),
                max_sequence_length=args.max_sequence_length,
                complex_human_instruction=[self.instruction] if self.instruction else None,
                use_resolution_binning=False,
                output_type="latent",
            )
            latents.append(output.images)
        return latents

    def loading_snippet(self, device: torch.device, dtype: torch.dtype, repository: str | None = None) -> str:
        """Python lines that load the result and draw a picture; they run as they stand.

        Of the files in --output_dir, or of those in a `repository` on the Hub.
        """
        args = self.args
        model = json.dumps(model_name(args) if repository else args.pretrained_model_name_or_path)
        folder = json.dumps(repository or str(args.output_dir))
        prompt = json.dumps(f"a photo of a {args.placeholder_token}", ensure_ascii=False)
        lora = f'\npipe.load_lora_weights({folder}, weight_name="{LORA_FILE}")' if args.rank else ""
        given = ", complex_human_instruction=None" if args.complex_human_instruction is None else ""
        if args.resolution < 512:  # a small model: SanaPipeline draws 1024 px and knows no less than 512
            given += f", height={args.resolution}, width={args.resolution}, use_resolution_binning=False"
        return f"""
import torch
from diffusers import DiffusionPipeline, __version__

dtype = {{"dtype" if __version__ >= "0.40" else "torch_dtype": {dtype}}}  # diffusers 0.40 renamed it
pipe = DiffusionPipeline.from_pretrained(
    {model},
    custom_pipeline={json.dumps(repository or str(self.pipeline_file))},  # SanaPipeline and load_textual_inversion
    trust_remote_code=True,{printed_options(args, repository)}
    **dtype,
).to("{device.type}")
pipe.load_textual_inversion({folder}){lora}
pipe({prompt}{given}).images[0].save("picture.png")
"""


MODEL_CLASS = Sana


# ----------------------------------------------------------------------------------------------------------------------
# 6. Saving and sharing: files that diffusers and the web tools load, checkpoints, and the Hub
# ----------------------------------------------------------------------------------------------------------------------


LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
# On Windows these names open a device, whatever the suffix.
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


# Copied from train_dti_sdxl.web_name
def web_name(placeholder: str) -> str:
    """The placeholder without its angle brackets, as a file name: the web tools take the file's name for the word."""
    bare = placeholder[1:-1] if placeholder.startswith("<") and placeholder.endswith(">") else placeholder
    name = re.sub(r"[^\w.+-]+", "", bare).strip(".")
    if name and name == bare and not WINDOWS_DEVICES.fullmatch(name):
        return name
    # Not every system takes the whole of it: digits of the hash keep it apart from what is left of other placeholders.
    return f"{name.replace('.', '-') or 'word'}-{hashlib.sha256(placeholder.encode()).hexdigest()[:6]}"


# Copied from train_dti_sdxl.name_notes
def name_notes(model) -> list[str]:
    """One line for each tool that cannot use a new word as it is, with a better word proposed."""
    lines = []
    for word, initializer in new_words(model.args).items():
        name, notes = web_name(word), []
        better = re.sub(r"[^a-z0-9]+", "-", (initializer or name).lower()).strip("-").removeprefix("my-")
        if word not in (name, f"<{name}>"):
            notes.append(f"no file can have this name on every system, so the web tools' word is {name}")
        for pattern, note in model.web_limits:
            if found := re.search(pattern, name):
                notes.append(note.format(name=name, found=found[0]))
        option = "--placeholder_token" if word == model.args.placeholder_token else "--further_word"
        lines += [f"{option} {word}: {note}. <my-{better or 'word'}> avoids this." for note in notes]
    return lines


# Copied from train_dti_sdxl.model_name
def model_name(args: argparse.Namespace) -> str:
    """The base model's name for others: a Hub id, or only the last part of a local path."""
    name = args.pretrained_model_name_or_path
    return Path(name).resolve().name if os.path.exists(name) else name


# Copied from train_dti_sdxl.file_metadata
def file_metadata(model, step: int, about: dict[str, str], word: str, lora: bool = False) -> dict[str, str]:
    """A file's header for model sites and people, by the modelspec standard; `about` adds to it."""
    args, name, base = model.args, web_name(word), model_name(model.args)
    method = {k: getattr(args, k) for k in METHOD_OPTIONS} | {"initializer_token": new_words(args)[word]}
    what = f"LoRA weights for {base}, trained with {word}" if lora else f"{word}, a new word for {base}, learned"
    hint = f"Write {word} in the prompt{model.web_spelling.format(name=name)}."
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{model.architecture}/{'lora' if lora else 'textual-inversion'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{name}-lora" if lora else name,
        "modelspec.description": f"{what} by Directional Textual Inversion (arXiv 2512.13672).",
        "modelspec.usage_hint": f"Load the word's embedding too. {hint}" if lora else hint,
        "modelspec.trigger_phrase": word,
        "modelspec.date": datetime.date.today().isoformat(),
        **about,
        "dti.base_model": base,
        "dti.steps": str(step),
        **{f"dti.{k}": str(value) for k, value in method.items() if value is not None},
    }


# Copied from train_dti_sdxl.write_file
def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name and rename, so that a kill or a full disk leaves a whole file. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        remedy = "What was saved before is intact; make room and go on with --resume_from_checkpoint latest."
        raise UserError(f"{path} cannot be written: {error.strerror}. {remedy}") from None


# Copied from train_dti_sdxl.save_tensors
def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with modelspec's hash of the tensors in its metadata. Raises UserError."""
    content = save(tensors)
    digest = hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    write_file(path, save(tensors, metadata={"format": "pt", **metadata, "modelspec.hash_sha256": f"0x{digest}"}))


# Copied from train_dti_sdxl.save_adapters
def save_adapters(model, metadata: dict[str, str], suffix: str) -> None:
    """Write the float32 LoRA weights for `pipe.load_lora_weights`, and in kohya's naming for the web tools."""
    args, name, state = model.args, model.denoiser_name, get_peft_model_state_dict(model.denoiser)
    config = model.denoiser.peft_config["default"].to_dict()
    with tempfile.TemporaryDirectory() as folder:  # diffusers writes alpha into the header
        layers = {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": config}
        model.pipeline_class.save_lora_weights(folder, **layers)
        with safe_open(Path(folder) / LORA_FILE, "pt") as file:
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    save_tensors(tensors, args.output_dir / LORA_FILE.replace(".", f"{suffix}.", 1), {**header, **metadata})
    # It has `unet` whatever the denoiser is, and diffusers writes the rank for alpha.
    kohya = convert_state_dict_to_kohya({f"unet.{key}": x.contiguous() for key, x in state.items()})
    kohya |= {key: torch.tensor(args.lora_alpha) for key in kohya if key.endswith(".alpha")}
    if model.kohya_metadata:
        metadata = {**metadata, **model.kohya_metadata, "ss_network_dim": str(args.rank)}
        metadata["ss_network_alpha"] = f"{args.lora_alpha:g}"
    save_tensors(kohya, args.output_dir / f"{web_name(args.placeholder_token)}-lora{suffix}.safetensors", metadata)


# Copied from train_dti_sdxl.save_result
def save_result(model, step: int, about: dict[str, str], suffix: str = "") -> None:
    """Write each word's (n, d) float32 embeddings, a file an encoder for diffusers and one for the web tools, and adapters."""
    args, first_word = model.args, model.args.placeholder_token
    parts = [token.embedding().detach().cpu().split(list(token.counts)) for token in model.tokens]
    for word, *rows in zip(new_words(args), *parts, strict=True):
        folder, metadata = word_folder(word, args), file_metadata(model, step, about, word)
        for name, embedding in zip(model.embedding_files, rows, strict=True):
            save_tensors({word: embedding}, folder / f"{name}{suffix}.safetensors", metadata)
        web_file = folder / f"{web_name(word)}{suffix}.safetensors"
        save_tensors(dict(zip(model.web_keys, rows, strict=True)), web_file, metadata)
    if args.rank:
        save_adapters(model, file_metadata(model, step, about, first_word, lora=True), suffix)
    elif not suffix:
        for name in (LORA_FILE, f"{web_name(first_word)}-lora.safetensors"):  # an earlier run's
            (args.output_dir / name).unlink(missing_ok=True)


# Copied from train_dti_sdxl.save_options
def save_options(args: argparse.Namespace, derived: dict) -> None:
    """Write all options, and what was computed from them, to training_options.json: as --config it repeats the run."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "hub_token"}
    options["seed"] = derived["seed"]  # without --seed a fresh one has been drawn
    libraries = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)}
    text = json.dumps({"options": options, "derived": derived, "versions": libraries}, indent=2)
    write_file(args.output_dir / "training_options.json", f"{text}\n".encode())


# Copied from train_dti_sdxl.run_identity
def run_identity(args: argparse.Namespace, counts: Sequence[int], seed: int | None) -> dict:
    """What a checkpoint and the run that resumes from it must have in common. Other options may differ."""
    names = ("placeholder_token", "magnitude", "optimizer", "init", "kappa", "reg_weight")
    names += ("rank", "lora_alpha", "lora_target_modules")
    options = {name: getattr(args, name) for name in names} | {"model": model_name(args), "vectors": sum(counts)}
    more = ("further_word", "method")  # the second is examples/baselines.py's; older checkpoints have neither
    options |= {name: value for name in more if (value := vars(args).get(name))}
    return options if seed is None else {**options, "seed": seed}


# Copied from train_dti_sdxl.save_checkpoint
def save_checkpoint(checkpoint: dict, args: argparse.Namespace) -> None:
    """Write checkpoint-<step>, with state.json last, which makes it whole; then remove the oldest beyond the limit."""
    folder = args.output_dir / f"checkpoint-{checkpoint['step']}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    write_file(folder / "state.safetensors", save(checkpoint["tensors"]))
    state = {name: x for name, x in checkpoint.items() if name != "tensors"} | {"written": time.time_ns()}
    write_file(folder / "state.json", json.dumps(state).encode())
    if args.checkpoints_total_limit is not None:
        for old in find_checkpoints(args.output_dir)[args.checkpoints_total_limit :]:
            shutil.rmtree(old["folder"], ignore_errors=True)


# Copied from train_dti_sdxl.find_checkpoints
def find_checkpoints(output_dir: Path) -> list[dict]:
    """The whole checkpoints of a folder, the last written first (the highest step may be an older run's)."""
    found = []
    for file in output_dir.glob("checkpoint-*/state.json"):
        try:
            state, tensors = json.loads(file.read_text("utf-8")), load_file(file.with_name("state.safetensors"))
            found.append({**state, "step": state["step"], "tensors": tensors, "folder": file.parent})
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            logger.warning(f"{file.parent} is damaged and is skipped ({type(error).__name__}).")
    return sorted(found, key=lambda checkpoint: checkpoint["written"], reverse=True)


# Copied from train_dti_sdxl.choose_checkpoint
def choose_checkpoint(args: argparse.Namespace, counts: Sequence[int]) -> dict | None:
    """The checkpoint to resume from, or None to start. Raises UserError if there is none, or if it is another run's."""
    option = f"--resume_from_checkpoint {args.resume_from_checkpoint}"
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        found = find_checkpoints(args.output_dir)
        if not found:
            logger.warning(f"{option}: {args.output_dir} has no checkpoint, so the training begins.")
            return None
    else:  # the one that is named, or where it is damaged the one before
        named = Path(args.resume_from_checkpoint)
        if not named.is_dir():
            raise UserError(f"{option} does not exist: give a checkpoint's folder, or latest.")
        limit = int(re.sub(r"\D", "", named.name) or 0)
        found = [checkpoint for checkpoint in find_checkpoints(named.parent) if checkpoint["step"] <= limit]
        found.sort(key=lambda checkpoint: -checkpoint["step"])
        if not found:
            raise UserError(f"{option} is damaged, and there is none before it: leave the option out to begin anew.")
    folder, step, saved = found[0]["folder"], found[0]["step"], found[0]["identity"]
    identity = {"seed": saved.get("seed"), **run_identity(args, counts, args.seed)}  # without --seed, the checkpoint's
    pairs = {k: (saved.get(k), identity.get(k)) for k in {**saved, **identity}}
    differs = [f"{k} {theirs!r}, not {ours!r}" for k, (theirs, ours) in pairs.items() if theirs != ours]
    if differs:
        raise UserError(f"{option}: {folder} is of another run: {'; '.join(differs)}.")
    if step > args.max_train_steps:
        raise UserError(f"{folder} is beyond --max_train_steps {args.max_train_steps}: give at least {step}.")
    logger.info(f"Going on from {folder}")
    return found[0]


# Copied from train_dti_sdxl.from_first
def from_first(decide: Callable, accelerator: Accelerator):
    """What `decide` returns in the first process, or its UserError, for all: each machine has a disk of its own."""
    outcome = [None]
    if accelerator.is_main_process:
        try:
            outcome = [decide()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


# Copied from train_dti_sdxl.one_line
def one_line(error: Exception) -> str:
    """The first line of an error's message, in the Hub's own words if it gave any."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# Copied from train_dti_sdxl.hub_problem
def hub_problem(error: Exception, repository: str) -> str:
    """What went wrong at the Hub, with the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`"
    if status == 401:
        return "the Hub does not know the token (--hub_token, HF_TOKEN or the stored one): log in with `hf auth login`"
    if status == 403:
        remedy = "use a token with write permission, or --hub_model_id of an account that is yours"
        return f"the token may not write to {repository} ({one_line(error)}): {remedy}"
    if status is None:
        return f"{HfApi().endpoint} cannot be reached ({one_line(error)}): check the connection, or push later"
    return f"the Hub answers {status} for {repository}: {one_line(error)}"


# Copied from train_dti_sdxl.open_repository
def open_repository(model) -> str:
    """Create the Hub's repository unless it exists, and check that it can be pushed to. Returns its id. Raises UserError."""
    args, api, folder = model.args, HfApi(token=model.args.hub_token), model.args.output_dir / "hub"
    if folder.exists() and not (folder / "training_options.json").is_file():  # no earlier push has left it
        raise UserError(f"--push_to_hub gathers its files in {folder}, which holds others: move them or --output_dir.")
    for path in model.hub_code.values():
        if not path.is_file():
            raise UserError(f"--push_to_hub uploads {path}, which is missing: take it from where this script is from.")
    repository = args.hub_model_id or args.output_dir.resolve().name  # without an account, the token's
    try:
        validate_repo_id(repository)
        account = api.whoami()["name"]
        repository = repository if "/" in repository else f"{account}/{repository}"
        api.create_repo(repository, private=args.hub_private_repo or None, exist_ok=True)
        # That accepts anyone's repository. The first half of an upload, which sends no text yet, needs the right to write.
        api.preupload_lfs_files(repository, [CommitOperationAdd("README.md", b"A text.")])
        private = api.model_info(repository).private
        card = {"repoType": "model", "content": f"---\n{card_data(model).to_yaml()}\n---\n"}
        verdict = get_session().post(f"{api.endpoint}/api/validate-yaml", json=card)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: {one_line(error)} Give another --hub_model_id or --output_dir.") from None
    except Exception as error:  # huggingface_hub's versions have two HTTP libraries, whose errors have no common class
        raise UserError(f"--push_to_hub: {hub_problem(error, repository)}.") from None
    if args.hub_private_repo and not private:
        raise UserError(f"--hub_private_repo: {repository} is public: make it private or give another --hub_model_id.")
    if verdict.status_code == 400:
        errors = "; ".join(error["message"] for error in verdict.json()["errors"])
        raise UserError(f"--license {args.license}: the Hub does not accept the model card: {errors}.")
    return repository


# Copied from train_dti_sdxl.card_data
def card_data(model) -> ModelCardData:
    """The head of the model card, which the Hub's search and gallery read."""
    args, base, lora = model.args, model.args.pretrained_model_name_or_path, ["lora"] * bool(model.args.rank)
    if os.path.isfile(base):  # the model on the Hub that it is configured as
        config = args.single_file_config
        base = config if config and not os.path.exists(config) else model.single_file_base
    return ModelCardData(
        library_name="diffusers",
        base_model=None if os.path.exists(base) else base,
        license=args.license,
        instance_prompt=args.placeholder_token,
        tags=["text-to-image", "diffusers", "diffusers-training", "textual_inversion", *model.card_tags, *lora],
    )


# Copied from train_dti_sdxl.model_card
def model_card(model, repository: str, widget: list[dict], derived: dict, snippet: str) -> str:
    """The model card. Written afresh at each push: diffusers' load_or_create_model_card would keep the first one."""
    args, name, data = model.args, web_name(model.args.placeholder_token), card_data(model)
    data.widget = widget or None
    base = f"[{data.base_model}](https://huggingface.co/{data.base_model})"
    if os.path.exists(args.pretrained_model_name_or_path):
        kind = f", a file of {base}'s kind" if data.base_model else ""
        base = f"`{model_name(args)}`{kind} (below, write its path or name instead)"
    other_tools = ""
    for use, stem in [(model.web_use, name)] + [(model.web_lora_use, f"{name}-lora")] * bool(args.rank):
        url = f"https://huggingface.co/{repository}/resolve/main/{quote(stem)}.safetensors"
        other_tools += use.format(name=stem, file=f"{stem}.safetensors", url=url)
    details = derived | {k: getattr(args, k) for k in (*METHOD_OPTIONS, "resolution")}
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in details.items())
    lora = f" together with LoRA weights ([{LORA_FILE}]({LORA_FILE}))" if args.rank else ""
    return f"""---
{data.to_yaml()}
---
{"<Gallery />" if widget else ""}

# {name}

Write `{args.placeholder_token}` where the prompt names the subject: it is a new word for {base}, learned{lora} by
[Directional Textual Inversion](https://arxiv.org/abs/2512.13672). The model itself is as it was.

## Use it with diffusers

```python
{snippet.strip()}
```

## Use it in other tools

{other_tools}{model.web_note}
## Training

| | |
| --- | --- |
{table}

All options are in [training_options.json](training_options.json), the curves in [training_curves.png](training_curves.png).
"""


# Copied from train_dti_sdxl.share
def share(model, repository: str, derived: dict, pictures: dict[str, list[Image.Image]], snippet: str) -> None:
    """Gather embedding, card, options and pictures in --output_dir/hub, and upload them in one commit. Raises UserError."""
    args, api, folder = model.args, HfApi(token=model.args.hub_token), model.args.output_dir / "hub"
    word = web_name(args.placeholder_token)
    content = json.loads((args.output_dir / "training_options.json").read_text(encoding="utf-8"))
    for name, value in content["options"].items():  # of a path only the last part, so that local folders stay private
        if isinstance(value, str) and (isinstance(getattr(args, name), Path) or os.path.exists(value)):
            content["options"][name] = os.path.basename(os.path.abspath(value))
    # First, for open_repository knows by it that the folder is a push's, also of one that was killed on the way.
    files = {"training_options.json": f"{json.dumps(content, indent=2)}\n".encode()}
    lora_files = [LORA_FILE, f"{word}-lora.safetensors"]
    names = [f"{name}.safetensors" for name in (*model.embedding_files, word)] + lora_files * bool(args.rank)
    sources = {name: args.output_dir / name for name in (*names, "training_curves.png")} | model.hub_code
    files |= {name: source.read_bytes() for name, source in sources.items()}
    widget = []
    for index, (prompt, images) in enumerate(pictures.items()):
        for number, image in enumerate(images):
            name = f"samples/{index}-{number}.jpg"  # a PNG of 1024 pixels is one or two megabytes
            files[name] = encoded(image, "jpeg", quality=90)
            widget.append({"text": prompt, "output": {"url": name}})
    files["README.md"] = model_card(model, repository, widget, derived, snippet).encode()
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        write_file(folder / name, data)
    message = f"{args.placeholder_token} after {args.max_train_steps} steps"
    earlier = ["samples/*", *lora_files]  # an earlier push's, to be deleted
    try:
        api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=earlier, commit_message=message)
    except Exception as error:  # as in open_repository
        private = " --private" if args.hub_private_repo else ""  # for a repository that has been deleted since
        later = f"To upload them later: hf upload {repository} {shlex.quote(str(folder))}{private}"
        safe = f"Nothing is lost, all files are in {args.output_dir}. {later}"
        raise UserError(f"--push_to_hub: {hub_problem(error, repository)}. {safe}") from None
    print(f"Uploaded to {api.endpoint}/{repository}")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Validation and logging
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.validate
@torch.no_grad()
def validate(model, accelerator: Accelerator, seed: int, step: int) -> dict[str, list[Image.Image]]:
    """Sample every validation prompt. Returns the images by prompt; writes validation-<step>.png and to the tracker."""
    args, dropout, others = model.args, model.denoiser.training, (model.denoiser, *model.text_encoders)
    prompts = [prompt.replace("{}", args.placeholder_token) for prompt in args.validation_prompt]
    negative = args.validation_negative_prompt
    negative = negative and negative.replace("{}", args.placeholder_token)
    model.denoiser.eval()
    latents = {prompt: model.sample_latents(prompt, negative, seed) for prompt in prompts}
    model.denoiser.train(dropout)
    # With --gradient_checkpointing, to save memory, the VAE is alone on the device.
    others_away = offload_models(*others, device="cpu", offload=args.gradient_checkpointing)
    with others_away, offload_models(model.vae, device=accelerator.device):
        pixels = {prompt: torch.cat([model.decode(x) for x in row]) for prompt, row in latents.items()}
    free_memory()
    pictures = {prompt: VaeImageProcessor().postprocess(x) for prompt, x in pixels.items()}

    path = args.output_dir / f"validation-{step}.png"
    write_file(path, encoded(labelled_grid(pictures), "png"))
    images = np.stack([np.asarray(image) for row in pictures.values() for image in row])
    layouts = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}  # of the trackers that take images
    for tracker in accelerator.trackers:
        if tracker.name in layouts:
            tracker.log_images({"validation": images}, step=step, **layouts[tracker.name])
    tqdm.write(f"Step {step}: {path}")
    return pictures


# Copied from train_dti_sdxl.encoded
def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    """The picture as the content of a file of Pillow's format `kind`."""
    picture.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


# Copied from train_dti_sdxl.thumbnail
def thumbnail(picture: Image.Image) -> str:
    """The picture in modelspec's form: a JPEG of at most 256 pixels as a data URI."""
    small = picture.copy()
    small.thumbnail((256, 256))
    return f"data:image/jpeg;base64,{base64.b64encode(encoded(small, 'jpeg', quality=80)).decode()}"


# Copied from train_dti_sdxl.labelled_grid
def labelled_grid(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One row of pictures for each label, with the label above it. Small pictures are enlarged."""
    labelled = []
    for label, images in rows.items():
        zoom = max(1, 192 // images[0].width)
        row = make_image_grid([ImageOps.scale(image, zoom, Image.NEAREST) for image in images], 1, len(images))
        bar = max(16, row.height // 16)
        labelled.append(Image.new("RGB", (row.width, bar + row.height), "white"))
        ImageDraw.Draw(labelled[-1]).text((4, 0), label, fill="black", font=ImageFont.load_default(bar * 0.7))
        labelled[-1].paste(row, (0, bar))
    return make_image_grid(labelled, len(labelled), 1)


# Copied from train_dti_sdxl.History
class History:
    """The curves of a run. Values are read from the device only when an entry is added."""

    def __init__(self, model):
        self.names, self.tokens = model.text_encoder_names, model.tokens
        self.entries, self.start_time = [], time.perf_counter()
        self.previous = [token.embedding().detach().clone() for token in self.tokens]

    def add(self, step: int, loss: float, learning_rate: float, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Note the state after `step`: mean loss since the last entry, and for each encoder norm, angles in degrees, the norm
        of the step's data gradient, and how large the prior's gradient kappa is beside it."""
        entry = {"loss": loss, "learning_rate": learning_rate}
        for name, token, previous in zip(self.names, self.tokens, self.previous, strict=True):
            now = token.embedding().detach()
            entry[f"{name}/norm"] = now.norm(dim=-1).mean().item()
            entry[f"{name}/angle_to_initializer"] = angle(now, token.prior_mean).mean().item()
            entry[f"{name}/angle_since_last_log"] = angle(now, previous).mean().item()
            previous.copy_(now)
            # None where fp16's scaler has skipped every step so far; asked by its key, a state would be made.
            if state := optimizer.state.get(token.parameter):
                gradient_norm = state["gradient_norm"].item()
                entry[f"{name}/gradient_norm"] = gradient_norm
                if kappa := optimizer.param_groups[0]["kappa"]:
                    entry[f"{name}/prior_share"] = kappa / max(gradient_norm, torch.finfo(torch.float32).tiny)
        self.entries.append({"step": step, "seconds": time.perf_counter() - self.start_time, **entry})
        return entry

    def plot(self, path: Path) -> None:
        """Draw loss, angle to the initializer, norm, and the data gradient's norm against the step."""
        from matplotlib.figure import Figure

        labels = {
            "loss": "loss",
            "angle_to_initializer": "angle to the initializer (degrees)",
            "norm": "norm of the embedding",
            "gradient_norm": "norm of the data's gradient",
        }
        figure = Figure(figsize=(16, 3.5), layout="constrained")
        for axes, (curve, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
            for key in [key for key in self.entries[-1] if key.split("/")[-1] == curve]:
                points = [(entry["step"], entry.get(key, math.nan)) for entry in self.entries]
                axes.plot(*zip(*points, strict=True), label=key.split("/")[0])
                axes.legend()
            axes.set(xlabel="step", ylabel=label)
        figure.savefig(content := io.BytesIO(), format="png")
        write_file(path, content.getvalue())


# ----------------------------------------------------------------------------------------------------------------------
# 8. Main
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_dti_sdxl.scale_learning_rate
def scale_learning_rate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Replace the given rate by the one that acts, which is logged and saved and repeats the run anywhere."""
    if args.scale_lr:
        args.learning_rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        args.scale_lr = False


# Copied from train_dti_sdxl.check_surroundings
def check_surroundings(args: argparse.Namespace) -> None:
    """Refuse what accelerate's configuration or the environment asks for and nothing here obeys. Raises UserError."""

    def asked(name: str) -> str:
        return os.environ.get(name, "").lower()

    remedy = "choose another by `accelerate config`, or launch with --multi_gpu, or on one GPU by `python`"
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "TP", "SAGEMAKER"):
        if asked(f"ACCELERATE_USE_{name}") in ("true", "1", "yes"):
            raise UserError(f"ACCELERATE_USE_{name}: there is no trained model here to be divided: {remedy}.")
    steps = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    if steps not in ("1", "auto", str(args.gradient_accumulation_steps)):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, and --gradient_accumulation_steps"
            f" {args.gradient_accumulation_steps}: give both the same value, or unset the first."
        )
    precision = asked("ACCELERATE_MIXED_PRECISION") or "no"
    if args.mixed_precision is None and precision not in ("no", "fp16", "bf16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {precision}: give --mixed_precision no, fp16 or bf16.")
    if not args.compile and (compiler := asked("ACCELERATE_DYNAMO_BACKEND") or "no") != "no":
        raise UserError(f"ACCELERATE_DYNAMO_BACKEND is {compiler}: to compile, add --compile; otherwise set it to no.")


# Copied from train_dti_sdxl.check_processes
def check_processes(accelerator: Accelerator) -> None:
    """Refuse several processes that do not know of each other, each a whole run in the same folder. Raises UserError."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        size = os.environ.get(name, "1")
        if size.isdecimal() and accelerator.num_processes < int(size):
            raise UserError(
                f"{name} is {size}, and accelerate sees {accelerator.num_processes} process on {accelerator.device}: for"
                " several processes on CPUs set ACCELERATE_USE_CPU=true, otherwise start one."
            )


# Copied from train_dti_sdxl.start_accelerator
def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up precision, processes, trackers and log output. Raises UserError."""
    check_surroundings(args)
    try:
        accelerator = Accelerator(
            # Else it would divide the loss once more by what the environment says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        )
    except ValueError as error:  # fp16 on a CPU, bf16 on a device without it
        precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
        raise UserError(f"{f'--mixed_precision {precision}' if precision else 'accelerate'}: {error}") from None
    check_processes(accelerator)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch_dtype")  # the one name that all supported versions know
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


# Copied from train_dti_sdxl.choose_seed
def choose_seed(args: argparse.Namespace, checkpoint: dict | None) -> int:
    """--seed, the checkpoint's, or a fresh one that all processes share."""
    seed = args.seed if checkpoint is None else checkpoint["identity"]["seed"]
    shared = [secrets.randbits(32) if seed is None else seed]
    broadcast_object_list(shared)
    set_seed(shared[0])
    return shared[0]


# Copied from train_dti_sdxl.prepare_placeholder
def prepare_placeholder(model) -> tuple[list[int], list[int], list[torch.Tensor | None]]:
    """Settle the number of vectors and add the new words to the tokenizers, before any weight loads.

    Returns that number for each word, the first new id in each tokenizer, and each encoder's warm start. Raises UserError.
    """
    args, tokenizers = model.args, model.tokenizers
    warm_start, counts = [None] * len(tokenizers), []
    if args.initializer_token is not None:
        for word, initializer in new_words(args).items():
            option = (
                "--initializer_token" if word == args.placeholder_token else f"--further_word {word}, its class word"
            )
            lengths = [len(initializer_ids(tokenizer, initializer, option)) for tokenizer in tokenizers]
            counts.append(args.num_vectors or max(lengths))
    if args.init_embedding is not None:
        with missing_parts_as_user_errors(args):
            folder = model_folder(model)
            configs = [AutoConfig.from_pretrained(folder, subfolder=name) for name in model.text_encoder_names]
        warm_start = read_warm_start(model, args.init_embedding, [config.hidden_size for config in configs])
        counts = [len(warm_start[0])]
        if args.num_vectors not in (None, *counts):
            raise UserError(f"--num_vectors {args.num_vectors}, but --init_embedding has {counts[0]}: leave one out.")
    options = ["--placeholder_token", *["--further_word"] * len(args.further_word)]
    words = list(zip(new_words(args), counts, options, strict=True))
    first_ids = [[add_placeholder(model, tokenizer, *word) for word in words][0] for tokenizer in tokenizers]
    for note in name_notes(model):
        logger.warning(note)
    return counts, first_ids, warm_start


# Copied from train_dti_sdxl.make_optimizer
def make_optimizer(tokens: list[LearnedToken], args: argparse.Namespace) -> torch.optim.Optimizer:
    on_sphere = args.magnitude != "free"
    groups = [{"params": [token.parameter], "mu": token.prior_mean if on_sphere else None} for token in tokens]
    if args.optimizer == "rsgd":
        return RiemannianSGD(groups, lr=args.learning_rate, kappa=args.kappa)
    betas = (args.adam_beta1, args.adam_beta2)
    adamw = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    return TokenAdamW(groups, lr=args.learning_rate, kappa=args.kappa, **adamw)


# Copied from train_dti_sdxl.Training
class Training:
    """The state that the loop advances and checkpoints save."""

    def __init__(self, model, adapters: Adapters | None, accelerator: Accelerator):
        args, self.tokens, self.adapters, self.accelerator = model.args, model.tokens, adapters, accelerator
        self.optimizer = make_optimizer(self.tokens, args)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
        )
        self.scaled_optimizer = accelerator.prepare(self.optimizer)  # with fp16's gradient scaling
        self.history = History(model)
        self.losses = []  # since the last log entry
        self.overflows = 0

    def step(self) -> None:
        """One optimization step, on the gradients averaged over the processes before the projection."""
        for token in self.tokens:  # a few kilobytes: no DDP
            token.parameter.grad = self.accelerator.reduce(token.parameter.grad, reduction="mean")
        if self.adapters:
            schedule = self.lr_scheduler.get_last_lr()[0] / self.lr_scheduler.base_lrs[0]
            self.adapters.step(self.accelerator, self.lr_scheduler.last_epoch, schedule)
        self.scaled_optimizer.step()
        self.scaled_optimizer.zero_grad()
        self.lr_scheduler.step()
        self.overflows += self.scaled_optimizer.step_was_skipped

    def mean_losses(self) -> torch.Tensor:
        """The losses since the last log entry, one a micro-batch, averaged over the processes."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0, device=self.accelerator.device)
        return self.accelerator.reduce(losses, reduction="mean")

    def checkpoint(self, step: int, identity: dict) -> dict:
        """The state after `step` steps: `tensors` (n, d) and smaller, and values for JSON. All processes must call it."""
        tensors = {f"parameter.{i}": token.parameter.detach() for i, token in enumerate(self.tokens)}
        tensors |= {f"start.{i}": token.start for i, token in enumerate(self.tokens)}
        tensors |= {f"previous.{i}": rows for i, rows in enumerate(self.history.previous)}
        for i, token in enumerate(self.tokens):
            state = self.optimizer.state.get(token.parameter, {})  # asked by its key, a state would be made
            tensors |= {f"optimizer.{i}.{name}": x for name, x in state.items()}
        tensors |= self.adapters.tensors() if self.adapters else {}
        tensors["losses"] = self.mean_losses()
        schedule = self.lr_scheduler.state_dict()
        return {
            "step": step,
            "identity": identity,
            "tensors": {name: x.cpu().clone().contiguous() for name, x in tensors.items()},
            "lr_scheduler": {name: schedule[name] for name in ("last_epoch", "_step_count", "_last_lr")},
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "overflows": int(self.overflows),
            "entries": self.history.entries,
            "seconds": time.perf_counter() - self.history.start_time,
        }

    @torch.no_grad()
    def resume(self, checkpoint: dict) -> None:
        """Load the state of a checkpoint. Raises UserError if it is another model's."""
        tensors = checkpoint["tensors"]
        for i, token in enumerate(self.tokens):
            if not torch.equal(tensors[f"start.{i}"], token.start.cpu()):
                raise UserError("--resume_from_checkpoint: it began elsewhere, with another model or initializer.")
            token.parameter.copy_(tensors[f"parameter.{i}"])
            self.history.previous[i].copy_(tensors[f"previous.{i}"])
            state, device = self.optimizer.state[token.parameter], token.start.device
            for name, x in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    key = name.split(".", 2)[2]
                    state[key] = x if key == "step" else x.to(device)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **checkpoint["lr_scheduler"]})
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.adapters:
            self.adapters.resume(tensors)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.overflows, self.history.entries = checkpoint["overflows"], checkpoint["entries"]
        self.losses = list(tensors["losses"].to(self.accelerator.device))
        self.history.start_time = time.perf_counter() - checkpoint["seconds"]


# Copied from train_dti_sdxl.Interruption
class Interruption:
    """SIGINT and SIGTERM: within the loop, finish the step and save a checkpoint; elsewhere, end at once."""

    seconds = 3.0  # between two times that several processes ask each other, about

    def __init__(self):
        self.signal, self.in_loop = None, False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def enter_loop(self, first_step: int) -> None:
        self.in_loop = True
        self.next_step, self.last_step, self.last_time = first_step, first_step - 1, time.perf_counter()

    def receive(self, number: int, frame) -> None:
        if not self.in_loop or self.signal is not None:  # a second one does not wait
            print("Interrupted.", file=sys.stderr)
            sys.exit(128 + number)
        self.signal = number

    def agreed(self, accelerator: Accelerator, step: int) -> bool:
        """Whether to stop after this step. Several processes agree on it every few seconds, for then they wait for each other.

        All of them must ask at the same steps, so they also agree on when to ask next.
        """
        if accelerator.num_processes == 1:
            return self.signal is not None
        if step < self.next_step:
            return False
        now = time.perf_counter()
        asked = gather_object([(self.signal or 0, now - self.last_time)])
        steps, seconds = step - self.last_step, max(elapsed for _, elapsed in asked)
        # Never more than twice as many steps as last time: a first step may be slow, and then a validation.
        self.next_step = step + max(1, min(2 * steps, int(self.seconds * steps / seconds)))
        self.last_step, self.last_time = step, now
        self.signal = max(number for number, _ in asked) or None
        return self.signal is not None


interruption = Interruption()


# Copied from train_dti_sdxl.ForgivingStream
class ForgivingStream:
    """Standard output or error, but that writing to it never raises and so never ends a run.

    What its encoding lacks is escaped, and what nobody reads any more, as after `| head`, is dropped.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


# Copied from train_dti_sdxl.announce
def announce(model, derived: dict) -> None:
    logger.info(f"***** {model.method_name} *****")
    for name, value in derived.items():
        logger.info(f"  {name.replace('_', ' ')} = {value}")


# Copied from train_dti_sdxl.report_skipped
def report_skipped(training: Training) -> None:
    """Warn about updates that were left out, if any."""
    skipped = int(sum(state.get("skipped", 0) for state in training.optimizer.state.values()))
    if skipped:
        logger.warning(f"{skipped} updates of a vector were left out: its gradient was zero or not finite.")
    if training.overflows:
        logger.warning(f"{training.overflows} steps were left out while fp16's gradient scale was found.")


# Copied from train_dti_sdxl.log
def log(training: Training, step: int, learning_rate: float, progress: tqdm) -> None:
    """Read the values from the device for the trackers and the progress bar."""
    loss = training.mean_losses().mean().item()
    training.losses.clear()
    entry = training.history.add(step, loss, learning_rate, training.optimizer)
    training.accelerator.log(entry, step=step)
    degrees = entry[f"{training.history.names[0]}/angle_to_initializer"]
    progress.set_postfix(loss=f"{loss:.4f}", angle=f"{degrees:.1f}°")


# Copied from train_dti_sdxl.leave
def leave(accelerator: Accelerator, step: int, args: argparse.Namespace) -> None:
    """End an interrupted run, after its checkpoint, with the status that shells expect: 130 or 143."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tqdm.write(
            f"Stopped after step {step} of {args.max_train_steps}. The same command with --resume_from_checkpoint latest"
            f" goes on from {args.output_dir / f'checkpoint-{step}'}.",
            file=sys.stderr,
        )
    accelerator.end_training()
    sys.exit(128 + interruption.signal)


# Copied from train_dti_sdxl.main
def main(argv: list[str] | None = None, model_class: type = MODEL_CLASS) -> None:
    # Options, model folder, new word and photographs are checked before any weight loads.
    args = parse_args(argv, model_class)
    model = model_class(args)
    check_options(model)
    refuse_idle(model, argv)
    accelerator = start_accelerator(args)
    scale_learning_rate(args, accelerator)
    check_model(model)
    check_lora_targets(model)
    model.load_tokenizers()
    counts, first_ids, warm_start = prepare_placeholder(model)
    photographs = load_photographs(args)
    prompts = prompts_by_image(photographs, args)
    check_prompts(model, prompts, counts)
    check_images(photographs, args.resolution)
    check_masks(photographs, args)
    repository = from_first(lambda: open_repository(model), accelerator) if args.push_to_hub else None
    checkpoint = from_first(lambda: choose_checkpoint(args, counts), accelerator)
    seed = choose_seed(args, checkpoint)

    # The model, frozen. While the photographs are encoded, the VAE is alone on the device.
    device = accelerator.device
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    model.load(dtype)
    cache = cache_latents(model, photographs, seed, accelerator) if args.cache_latents else None

    # The new words: all that is trained, except for adapters.
    parts = zip(model.text_encoders, model.tokenizers, first_ids, warm_start, strict=True)
    for encoder, tokenizer, first_id, rows in parts:
        model.tokens.append(model.make_token(encoder.to(device), tokenizer, first_id, counts, rows))
        encoder.to(dtype)
    model.denoiser.to(device)

    # Optimizer and schedule.
    adapters = Adapters(model.denoiser, args, seed) if args.rank else None
    training, first_step = Training(model, adapters, accelerator), 1
    if checkpoint is not None:
        training.resume(checkpoint)
        first_step = checkpoint["step"] + 1

    # Data.
    if cache is None:
        model.vae.to(device)
    examples = TrainingExamples(photographs, prompts, cache, seed, args)
    data = batches(examples, accelerator, args, start=(first_step - 1) * args.gradient_accumulation_steps)

    weights = " with int8 weights" if args.base_precision == "int8" else ""
    derived = {
        "photographs": len(photographs),
        "cached_views": sum(map(len, cache)) if cache is not None else "none, encoded at every step",
        "vectors": sum(counts),
        **({"web_file": f"{web_name(args.placeholder_token)}.safetensors"} if model.web_keys else {}),
        "lora": adapters.description if adapters else "none",
        "magnitudes": [token.magnitude or "free" for token in model.tokens],
        "total_batch_size": args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        "steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "precision": f"{str(dtype).removeprefix('torch.')} models{weights}, float32 embedding, on {device}",
        "seed": seed,
    }
    if accelerator.is_main_process:
        announce(model, derived)
        save_options(args, derived)
        accelerator.init_trackers("dti", {k: str(v) for k, v in vars(args).items() if k != "hub_token"})

    # Loop.
    about = {"modelspec.author": repository.split("/")[0]} if repository else {}
    identity = run_identity(args, counts, seed)
    steps = range(first_step, args.max_train_steps + 1)
    progress = tqdm(
        steps, "Steps", disable=not accelerator.is_main_process, initial=first_step - 1, total=args.max_train_steps
    )
    if accelerator.is_main_process and args.validate_first and checkpoint is None:
        validate(model, accelerator, seed, step=0)
    interruption.enter_loop(first_step)
    for step in progress:
        for _ in range(args.gradient_accumulation_steps):
            loss = model.loss(next(data))
            training.losses.append(loss.detach())
            if args.reg_weight:  # CrossInit's
                distances = (F.mse_loss(token.embedding(), token.start) for token in model.tokens)
                loss = loss + args.reg_weight * sum(distances)
            accelerator.backward(loss / args.gradient_accumulation_steps)
        learning_rate = training.lr_scheduler.get_last_lr()[0]
        training.step()
        model.after_step(step)

        last = step == args.max_train_steps
        stop = interruption.agreed(accelerator, step)
        if step % args.logging_steps == 0 or last:
            log(training, step, learning_rate, progress)
        if step % args.checkpointing_steps == 0 or last or stop:
            state = training.checkpoint(step, identity)  # all processes take part
            if accelerator.is_main_process:
                save_checkpoint(state, args)
        if stop:
            leave(accelerator, step, args)
        if accelerator.is_main_process and args.save_steps and step % args.save_steps == 0 and not last:
            model.save_result(step, about, suffix=f"-steps-{step}")
        if accelerator.is_main_process and args.validation_prompt and step % args.validation_steps == 0 and not last:
            validate(model, accelerator, seed, step)
    interruption.in_loop = False

    # Results.
    pictures = {}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_result(args.max_train_steps, about)
        training.history.plot(args.output_dir / "training_curves.png")
        if args.validation_prompt:
            pictures = validate(model, accelerator, seed, args.max_train_steps)
            about["modelspec.thumbnail"] = thumbnail(next(iter(pictures.values()))[0])
            model.save_result(args.max_train_steps, about)  # as before, with the picture in the files' headers
        report_skipped(training)
        print(f"\nSaved to {args.output_dir}. To use it:\n{model.loading_snippet(device, dtype)}")
    accelerator.end_training()
    if repository and accelerator.is_main_process:
        share(model, repository, derived, pictures, model.loading_snippet(device, dtype, repository))


# Copied from train_dti_sdxl.run
def run(model_class: type, main: Callable = main) -> None:
    """Run `main`; a user's mistake ends in one line and status 1."""
    # No print and no log message raises, this script's or a library's, whatever the terminal is.
    sys.stdout, sys.stderr = (x and ForgivingStream(x) for x in (sys.stdout, sys.stderr))
    interruption.listen()
    try:
        main(model_class=model_class)
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


if __name__ == "__main__":
    run(MODEL_CLASS)
