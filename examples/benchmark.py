#!/usr/bin/env python
"""Measure the speed and memory of the training scripts on this machine, without downloads.

    python examples/benchmark.py --work_dir benchmark
    python examples/benchmark.py --work_dir benchmark --model sana-1.6b --resolution 512 1024 --train_batch_size 1 4 \
      --gradient_checkpointing off on --compile off on --rank 0 32
    python examples/benchmark.py --work_dir benchmark --size small --against "python other_script.py --steps {steps}"

The model has the published configuration and random weights, which cost as much as trained ones. The photographs are
rendered. Options with several values are combined, one row per combination. Options that are not listed here are passed to
the script.

A row is one run of the script's own `main`, unchanged, in a separate process. Its steps have three phases:

    warm-up    not measured
    timed      from the end of one step to the end of the next, by events on the device, without waiting for the device.
               Logging and saving are included.
    broken up  more steps, with a wait for the device at every boundary: slower if the device was kept busy

PyTorch's counter counts FLOPs after the run, on one more batch. "Needed" FLOPs are those of a step with frozen weights that
recomputes nothing: a forward pass, and the gradient from the loss back to the new word. They are counted on tensors without
storage. The matrix rate is measured with large square products in the run's precision. The time of a whole run is estimated
from the phases, and measured with --repeats.

If a row does not fit into memory, the table says so and the next rows run. If a row fails, it is reported and the exit status
is 1. "-" means not measured. Device memory has two peaks: of the set-up and of the timed steps. Written to --work_dir:
`benchmark.md` and `benchmark.json`; `runs/` has the runs' files, with their output in `log.txt`.

Sections: 1 options, 2 model and photographs, 3 measurements inside a run, 4 FLOPs and the matrix rate, 5 one row,
6 whole runs as processes, 7 tables, 8 main.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import make_small_sana
import make_small_sdxl
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from export import UserError, make_parser, markdown_table, run, write_files
from generate import number as at_least
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from train_many import load_script
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model


ROOT = Path(__file__).resolve().parents[1]
MODELS = ("sdxl", "sana-1.6b", "sana-4.8b")
# Options that the benchmark itself passes to the script.
RESERVED = ("pretrained_model_name_or_path", "instance_data_dir", "train_data_dir", "dataset_name", "output_dir")
RESERVED += ("placeholder_token", "initializer_token", "resume_from_checkpoint", "push_to_hub")


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("benchmark"), help="Folder for model, photographs, runs and results. Default: benchmark.")
    add("--model", choices=MODELS, default="sdxl", help="The model, which also decides the script. Default: sdxl.")
    add("--size", choices=["full", "small"], default="full", help="The published size, or a small model that trains on a CPU in seconds.")
    add("--weights", choices=["memory", "disk"], default=None, help="Make the weights on the device, or save them once (gigabytes) for the script to load. Default: disk for small, else memory.")
    add("--script", type=Path, default=None, help="Path of another version of the training script.")
    switch = {"nargs": "+", "choices": ["off", "on"], "default": ["off"]}
    grid = parser.add_argument_group("options of the script, with one or several values").add_argument
    grid("--resolution", type=at_least(int, 8), nargs="+", default=None, help="Pixels. Default: 1024, small: 64.")
    grid("--train_batch_size", type=at_least(int, 1), nargs="+", default=[4], help="Default: 4.")
    grid("--mixed_precision", choices=["no", "fp16", "bf16"], nargs="+", default=None, help="Default: bf16 on a GPU, otherwise no.")
    grid("--gradient_checkpointing", **switch, help="Default: off.")
    grid("--compile", **switch, help="Default: off.")
    grid("--rank", type=at_least(int, 0), nargs="+", default=[0], help="LoRA rank. Default: 0, no LoRA.")
    grid("--seed", type=at_least(int, 0), default=0, help="One seed. Default: 0.")
    steps = parser.add_argument_group("steps").add_argument
    steps("--warmup", type=at_least(int, 1), default=5, help="Steps before the timed ones. Default: 5.")
    steps("--steps", type=at_least(int, 2), default=20, help="Timed steps. A multiple of --logging_steps gives logging its true share. Default: 20.")
    steps("--breakdown_steps", type=at_least(int, 0), default=10, help="Steps that are broken up into parts. Default: 10.")
    whole = parser.add_argument_group("whole runs").add_argument
    whole("--max_train_steps", type=at_least(int, 1), default=500, help="Steps of a whole run. Default: 500.")
    whole("--repeats", type=at_least(int, 0), default=None, help="Number of whole runs, as separate processes without instrumentation. Default: 0; with --against 3.")
    whole("--against", default=None, metavar="CMD", help="A command to run alternately with the whole runs. {model}, {photos}, {output} and {steps} are filled in.")
    add("--job", type=Path, default=None, help=argparse.SUPPRESS)  # for the processes of the rows
    return parser
# fmt: on


@dataclasses.dataclass
class Job:
    """One row: the input of its process.

    Attributes:
        argv: the script's options without steps and output.
        phases: number of steps in each phase: warm-up, timed, broken up.
        steps: steps of a whole run.
        weights: "memory" or "disk".
        plain: run the script without measuring.
        spawned: wall-clock time at which the process was started; None in this process.
    """

    script: str
    argv: list[str]
    output: str
    phases: tuple[int, int, int]
    steps: int
    weights: str
    plain: bool = False
    spawned: float | None = None

    def arguments(self) -> list[str]:
        steps = self.steps if self.plain else sum(self.phases)
        return [*self.argv, "--output_dir", self.output, "--max_train_steps", str(steps)]


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's options, with defaults, and the script's. Raises UserError."""
    args, others = command_line().parse_known_args(argv)
    for text in others:
        if text.split("=")[0].removeprefix("--") in RESERVED:
            raise UserError(f"{text.split('=')[0]} is set by the benchmark itself: leave it out.")
    small = args.size == "small"
    args.weights = args.weights or ("disk" if small else "memory")
    args.resolution = args.resolution or [64 if small else 1024]
    args.mixed_precision = args.mixed_precision or ["bf16" if torch.cuda.is_available() else "no"]
    args.repeats = args.repeats if args.repeats is not None else 3 if args.against else 0
    args.script = args.script or ROOT / f"train_dti_{args.model.partition('-')[0]}.py"
    if not args.script.is_file():
        raise UserError(f"--script {args.script} is not a file.")
    if args.against is not None:
        check_against(args)
    return args, others


def check_against(args: argparse.Namespace) -> None:
    if len(configurations(args)) > 1:
        raise UserError("--against needs one configuration: give each option one value.")
    if not args.repeats:
        raise UserError("--against with --repeats 0 runs nothing: give --repeats 1 or more.")
    try:
        words = shlex.split(args.against)
    except ValueError as error:
        raise UserError(f"--against cannot be read as a command: {error}.") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--against: there is no program {words[0] if words else ''!r}.")
    if "{model}" in args.against and args.weights == "memory":
        raise UserError("--against: {model} is a folder without weights: add --weights disk.")


GRID = ("resolution", "train_batch_size", "mixed_precision", "gradient_checkpointing", "compile", "rank")


def configurations(args: argparse.Namespace) -> list[dict]:
    """Every combination of the options with several values."""
    values = [dict.fromkeys(getattr(args, name)) for name in GRID]
    return [dict(zip(GRID, combination, strict=True)) for combination in itertools.product(*values)]


def script_options(configuration: dict, model: Path, photos: Path, seed: int, others: list[str]) -> list[str]:
    """The script's command line for a configuration. The user's own options come last and take precedence."""
    options = ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photos)]
    options += ["--placeholder_token", "<my-pot>", "--initializer_token", "teapot", "--seed", str(seed)]
    options += ["--report_to", "none"]
    for name, value in configuration.items():
        options += [f"--{name}"] * (value == "on") if value in ("off", "on") else [f"--{name}", str(value)]
    return [*options, *others]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Model and photographs
# ----------------------------------------------------------------------------------------------------------------------


def sdxl_parts() -> dict[str, tuple[type, object]]:
    """Class and configuration of every part of SDXL base 1.0."""
    clip = {"vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    small = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    unet = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    vae = {
        "sample_size": 1024,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }
    return {
        "text_encoder": (CLIPTextModel, CLIPTextConfig(**clip, **small, projection_dim=768, hidden_act="quick_gelu")),
        "text_encoder_2": (
            CLIPTextModelWithProjection,
            CLIPTextConfig(**clip, **large, projection_dim=1280, hidden_act="gelu"),
        ),
        "unet": (UNet2DConditionModel, unet),
        "vae": (AutoencoderKL, vae),
    }


def sana_parts(layers: int) -> dict[str, tuple[type, object]]:
    """Class and configuration of every part of SANA 1.5: the 1.6B model has 20 layers, the 4.8B one 60."""
    gemma = Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
    )
    transformer = {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": layers,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
        "qk_norm": "rms_norm_across_heads",
    }
    stages = {
        "block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    }
    vae = {
        "latent_channels": 32,
        "attention_head_dim": 32,
        **{f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in stages.items()},
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "scaling_factor": 0.41407,
    }
    return {
        "text_encoder": (Gemma2Model, gemma),
        "transformer": (SanaTransformer2DModel, transformer),
        "vae": (AutoencoderDC, vae),
    }


def parts_of(model: str) -> dict[str, tuple[type, object]]:
    return sdxl_parts() if model == "sdxl" else sana_parts({"sana-1.6b": 20, "sana-4.8b": 60}[model])


def construct(cls: type, config, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """Make a model with random weights directly on the device in `dtype`, without a float32 copy on the CPU."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            # In transformers 5 the configuration's dtype overrides the default.
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config).to(dtype)
            return model.eval()
    finally:
        torch.set_default_dtype(default)


def write_tokenizers(folder: Path, model: str, templates: list[str]) -> dict[str, str]:
    """Write tokenizers with all bytes and the prompts' words, so that a prompt has its published number of tokens."""
    words = sorted({*make_small_sdxl.WORDS, *re.findall(r"[a-z]+", " ".join(templates).lower())})
    if model == "sdxl":
        make_small_sdxl.make_tokenizer(folder / "tokenizer", "<|endoftext|>", words)
        make_small_sdxl.make_tokenizer(folder / "tokenizer_2", "!", words)
        return dict.fromkeys(("tokenizer", "tokenizer_2"), "CLIPTokenizer")
    make_small_sana.make_tokenizer(folder / "tokenizer", words)
    return {"tokenizer": "GemmaTokenizerFast"}


def write_full_model(folder: Path, model: str, templates: list[str], weights: str, dtype: torch.dtype) -> None:
    """A pipeline's folder: configurations, tokenizers and, with `weights` "disk", gigabytes of random weights."""
    if model == "sdxl":
        pipeline = "StableDiffusionXLPipeline"
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    else:
        pipeline = "SanaPipeline"
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    index |= {part: ["transformers", cls] for part, cls in write_tokenizers(folder, model, templates).items()}
    for part, (cls, config) in parts_of(model).items():
        index[part] = [cls.__module__.partition(".")[0], cls.__name__]
        if weights == "disk":
            construct(cls, config, "cpu", torch.float32 if part == "vae" else dtype).save_pretrained(folder / part)
        elif isinstance(config, dict):
            construct(cls, config, "meta", dtype).save_config(folder / part)
        else:
            config.save_pretrained(folder / part)
    write_files({folder / "model_index.json": json.dumps(index, indent=2).encode()})


def prepare_model(args: argparse.Namespace, templates: list[str]) -> Path:
    """The pipeline's folder, made if it does not exist. Raises UserError."""
    family = args.model.partition("-")[0]
    name = f"{family}-small" if args.size == "small" else f"{args.model}-{args.weights}"
    folder = args.work_dir / "models" / name
    if (folder / "model_index.json").is_file():
        return folder
    temporary = folder.with_name(f".{name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if args.size == "small":
            (make_small_sdxl if family == "sdxl" else make_small_sana).make_pipeline(temporary)
        else:
            write_full_model(temporary, args.model, templates, args.weights, torch.bfloat16)
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"--work_dir {args.work_dir} cannot be written to: {error.strerror or error}.") from None
    return folder


def prepare_photographs(args: argparse.Namespace) -> Path:
    """Five rendered pictures. For a full-size model they have a phone camera's size, since the script decodes and scales them."""
    folder = args.work_dir / f"photos-{args.size}"
    if not (folder / "04.png").is_file() and not (folder / "04.jpg").is_file():
        make_small_sdxl.make_photographs(folder)
        for path in sorted(folder.glob("*.png")) if args.size == "full" else []:
            with Image.open(path) as image:
                image.resize([24 * side for side in image.size], Image.Resampling.BICUBIC).save(
                    path.with_suffix(".jpg"), quality=90
                )
            path.unlink()
    return folder


@contextlib.contextmanager
def random_weights(script, device: torch.device | None = None) -> Iterator[None]:
    """In this context the script's model gets random weights from the configurations instead of reading files."""

    def load_part(cls: type, folder: Path, name: str, _, dtype) -> torch.nn.Module:
        in_diffusers = hasattr(cls, "load_config")
        config = (cls.load_config if in_diffusers else cls.config_class.from_pretrained)(folder, subfolder=name)
        place = "cpu" if cls is script.MODEL_CLASS.vae_class else device
        part = construct(cls, config, place, torch.bfloat16 if dtype == "auto" else dtype)
        return part.to("cpu") if device.type == "cuda" else part  # where the script's loaders put them

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with mock.patch.object(script, "load_part", load_part):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# 3. Measurements inside a run
# ----------------------------------------------------------------------------------------------------------------------

PARTS = ("data", "tokenizing", "text encoders forward", "latents and loss", "denoiser forward", "denoiser backward")
PARTS += ("text encoders backward", "optimizer", "logging", "saving", "rest")


class Ledger:
    """Divides a growing quantity (seconds or FLOPs) among named parts. An inner part's share is not in the outer one."""

    def __init__(self):
        self.read, self.amounts, self.open, self.last = None, {}, [], 0

    def start(self, read: Callable[[], float]) -> None:
        self.read, self.amounts, self.open, self.last = read, dict.fromkeys(PARTS, 0), ["rest"], read()

    def stop(self) -> dict[str, float]:
        self.charge()
        self.read = None
        return self.amounts

    def charge(self) -> None:
        now = self.read()
        self.amounts[self.open[-1]] += now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        if self.read:
            self.charge()
            self.open.append(part)

    def turn(self, part: str) -> None:
        """Change the innermost open part to another part."""
        if self.read and self.open[-1] != part:
            self.charge()
            self.open[-1] = part

    def leave(self) -> None:
        if self.read:
            self.charge()
            self.open.pop()

    def wrap(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def measured(*args, **kwargs):
            self.enter(part)
            result = function(*args, **kwargs)
            self.leave()
            return result

        return measured

    def watch(self, module: torch.nn.Module, part: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.enter(part))
        module.register_forward_hook(lambda *_: self.leave())


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_now() -> float:
    """The time when all work on the device is done."""
    wait_for_device()
    return time.perf_counter()


def device_peaks(device: torch.device) -> dict[str, int] | None:
    """Peak bytes on the device since the last reset: in tensors, and reserved by PyTorch. None for a CPU."""
    if device.type != "cuda":
        return None
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def host_peak() -> int | None:
    """The peak of this process's memory in bytes. None where the system does not report it.

    Not from getrusage: on Linux a process starts there with the memory of its parent.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


class Observer:
    """Instruments the script's functions while its `main` runs, without changing what they do."""

    def __init__(self, script, phases: tuple[int, int, int]):
        self.script, self.phases, self.ledger = script, phases, Ledger()
        self.step_count, self.marks, self.found = 0, [], {}
        self.set_up = {"models": 0.0, "latents": 0.0}
        self.model = self.device = self.dtype = self.batch = None

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        script, model_class, training, ledger = self.script, self.script.MODEL_CLASS, self.script.Training, self.ledger
        replaced = {
            (model_class, "load"): self.with_model(self.part_of_set_up(model_class.load, "models")),
            (script, "cache_latents"): self.part_of_set_up(script.cache_latents, "latents"),
            (script, "start_accelerator"): self.with_backward(script.start_accelerator),
            (script, "batches"): self.with_next(script.batches),
            (model_class, "loss"): self.first_of(ledger.wrap(model_class.loss, "latents and loss")),
            (model_class, "encode_prompts"): ledger.wrap(
                self.with_gradient_hooks(model_class.encode_prompts), "tokenizing"
            ),
            (training, "step"): self.with_count(training.step),
            (script, "log"): ledger.wrap(script.log, "logging"),
            (training, "checkpoint"): ledger.wrap(training.checkpoint, "saving"),
            (script, "save_checkpoint"): ledger.wrap(script.save_checkpoint, "saving"),
            (script, "save_result"): ledger.wrap(script.save_result, "saving"),
        }
        with contextlib.ExitStack() as stack:
            for (owner, name), function in replaced.items():
                stack.enter_context(mock.patch.object(owner, name, function))
            self.start = time.perf_counter()
            yield

    def part_of_set_up(self, function: Callable, name: str) -> Callable:
        def measured(*args, **kwargs):
            before = seconds_now()
            result = function(*args, **kwargs)
            self.set_up[name] = seconds_now() - before
            return result

        return measured

    def with_model(self, load: Callable) -> Callable:
        def loaded(model, dtype):
            load(model, dtype)
            self.model, self.dtype = model, model.denoiser.dtype
            self.watch_model(model)
            if self.device.type == "cuda":  # the memory for making the weights does not count
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

        return loaded

    def watch_model(self, model) -> None:
        self.ledger.watch(model.denoiser, "denoiser forward")
        for encoder in model.text_encoders:
            self.ledger.watch(encoder, "text encoders forward")

    def with_backward(self, start_accelerator: Callable) -> Callable:
        def start(args):
            accelerator = start_accelerator(args)
            self.device = accelerator.device
            accelerator.backward = self.ledger.wrap(accelerator.backward, "denoiser backward")
            return accelerator

        return start

    def with_gradient_hooks(self, encode_prompts: Callable) -> Callable:
        def encode(*args, **kwargs):
            outputs = encode_prompts(*args, **kwargs)
            for tensor in outputs:
                # Autograd runs backwards: when it reaches the encoders' output, the denoiser is done.
                if self.ledger.read and tensor.requires_grad:
                    tensor.register_hook(lambda _: self.ledger.turn("text encoders backward"))
            return outputs

        return encode

    def with_next(self, batches: Callable) -> Callable:
        def generate(*args, **kwargs):
            fetch = self.ledger.wrap(functools.partial(next, batches(*args, **kwargs)), "data")
            while True:
                batch = fetch()
                if self.step_count == sum(self.phases) - 1:  # only the last one is kept, to save memory
                    self.batch = batch
                yield batch

        return generate

    def first_of(self, loss: Callable) -> Callable:
        def timed_loss(model, batch):
            if "total" not in self.set_up:  # the first step begins
                self.set_up["total"] = seconds_now() - self.start
                self.set_up["device_peak"] = device_peaks(self.device)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            return loss(model, batch)

        return timed_loss

    def with_count(self, step: Callable) -> Callable:
        watched = self.ledger.wrap(step, "optimizer")

        def counted(training):
            watched(training)
            self.step_count += 1
            self.after_step()

        return counted

    def after_step(self) -> None:
        """Advance from phase to phase. In the timed phase only the time is recorded."""
        warmup, timed, broken_up = itertools.accumulate(self.phases)
        if warmup <= self.step_count <= timed:
            if self.step_count == warmup:
                self.found["warmup_seconds"] = seconds_now() - self.start - self.set_up["total"]
            self.mark()
        if self.step_count == timed:
            self.found["step_seconds"] = self.step_seconds()
            self.found["device_peak"], self.found["host_peak"] = device_peaks(self.device), host_peak()
            if broken_up > timed:
                self.ledger.start(seconds_now)
        elif self.step_count == broken_up:
            amounts = self.ledger.stop()
            self.found["breakdown"] = {part: x / (broken_up - timed) for part, x in amounts.items()}
        if self.step_count == broken_up:
            self.last_step = seconds_now()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        wait_for_device()
        cuda = self.device.type == "cuda"
        return [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in itertools.pairwise(self.marks)]


# ----------------------------------------------------------------------------------------------------------------------
# 4. FLOPs and the matrix rate
# ----------------------------------------------------------------------------------------------------------------------


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_, out_shape=None, **__) -> int:
    """Two products (q k' and p v) of 2 FLOPs per multiplication. Counts the query heads: Gemma-2 has fewer key heads."""
    *heads, length, width = q
    return 2 * torch.Size(heads).numel() * length * k[-2] * (width + v[-1])


def attention_backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """Five products, against two in the forward pass: fused kernels recompute q k'."""
    *heads, length, width = q
    return 2 * torch.Size(heads).numel() * length * k[-2] * (3 * width + 2 * v[-1])


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of matrix products, convolutions and attention, extended for CPUs and Gemma-2."""
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    formulas = {f"_scaled_dot_product_{kind}": attention_flops for kind in kinds}
    formulas |= {f"_scaled_dot_product_{kind}_backward": attention_backward_flops for kind in kinds}
    aten = torch.ops.aten
    known = {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def weightless(script, observer: Observer, args: argparse.Namespace):
    """A copy of the model on the meta device, without recomputation and not compiled."""

    def like(part: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        return construct(type(part), copy.deepcopy(part.config), "meta", dtype).requires_grad_(False)

    model = copy.copy(observer.model)
    model.denoiser, model.vae = like(model.denoiser, observer.dtype), like(model.vae, torch.float32)
    if args.rank:
        model.denoiser.add_adapter(script.lora_config(args))
    model.text_encoders, model.tokens = [like(encoder, observer.dtype) for encoder in model.text_encoders], []
    for encoder, token in zip(model.text_encoders, observer.model.tokens, strict=True):
        parameter = torch.nn.Parameter(torch.empty_like(token.parameter, device="meta"))
        model.tokens.append(dataclasses.replace(token, parameter=parameter))
        encoder.set_input_embeddings(script.ExtendedEmbedding(encoder.get_input_embeddings(), model.tokens[-1]))
    return model


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text


def count_flops(observer: Observer, model, device: torch.device | str) -> dict[str, float] | None:
    """FLOPs by part for the last batch's loss and gradient. None if memory is short or "meta" lacks an operation."""
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in observer.batch.items()}
    batch["generators"] = [torch.Generator().manual_seed(0) for _ in batch["generators"]]
    counter = flop_counter()
    try:
        with counter:
            observer.ledger.start(counter.get_total_flops)
            loss = model.loss(batch)
            observer.ledger.enter("denoiser backward")
            loss.backward()
            observer.ledger.leave()
            return observer.ledger.stop()
    except (RuntimeError, MemoryError) as error:  # NotImplementedError is a RuntimeError
        if device != "meta" and not out_of_memory(error):
            raise
        observer.ledger.read = None
        return None


def step_flops(observer: Observer, args: argparse.Namespace) -> dict[str, dict | None]:
    """FLOPs of a step as run, and as needed."""
    for module in observer.model.denoiser.modules():
        module._compiled_call_impl = None  # the counter does not see into compiled code
    found = {"flops": count_flops(observer, observer.model, observer.device)}
    bare = weightless(observer.script, observer, args)
    observer.watch_model(bare)
    found["needed_flops"] = count_flops(observer, bare, "meta")
    batches = args.gradient_accumulation_steps
    return {name: parts and {part: batches * x for part, x in parts.items()} for name, parts in found.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 20) -> float:
    """FLOP/s of square matrix products: the median of `repeats`."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = []
    for _ in range(repeats):
        before = seconds_now()
        a @ b
        seconds.append(seconds_now() - before)
    return 2 * side**3 / statistics.median(seconds)


# ----------------------------------------------------------------------------------------------------------------------
# 5. One row
# ----------------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> dict:
    """Run the script's `main` and return the measurements."""
    begin = time.perf_counter()
    script = load_script(Path(job.script))
    imports = time.time() - job.spawned if job.spawned else time.perf_counter() - begin
    observer = Observer(script, job.phases)
    weights = random_weights(script) if job.weights == "memory" else contextlib.nullcontext()
    if is_first_process():
        shutil.rmtree(job.output, ignore_errors=True)
    row = {"status": "measured", "imports_seconds": imports}
    try:
        with weights, observer.looking():
            script.main(job.arguments())
            observer.found["finish_seconds"] = seconds_now() - observer.last_step
            observer.found |= step_flops(observer, script.parse_args(job.arguments(), script.MODEL_CLASS))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        row["status"] = "out of memory" + (" after the timed steps" if "step_seconds" in observer.found else "")
    row |= {**observer.found, "set_up": observer.set_up, "device": device_name(observer.device)}
    if row["status"] == "measured":
        row["precision"] = str(observer.dtype).removeprefix("torch.")
        device, dtype, observer.model, observer.batch = observer.device, observer.dtype, None, None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row["matrix_rate"] = matrix_rate(device, dtype)
        checkpoint = Path(job.output) / f"checkpoint-{sum(job.phases)}"
        row["checkpoint_bytes"] = sum(path.stat().st_size for path in checkpoint.iterdir())
    return row


def summarise(row: dict, steps: int, warmup: int) -> dict:
    """Derive median and quartiles of a step, rates, and the estimated time of a whole run."""
    seconds = row.get("step_seconds")
    if not seconds:
        return row
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    mean = statistics.fmean(seconds)
    row["step"] = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "mean": mean}
    row["step"] |= {"min": min(seconds), "max": max(seconds)}
    if "finish_seconds" in row and steps >= warmup:
        fixed = row["imports_seconds"] + row["set_up"]["total"] + row["warmup_seconds"] + row["finish_seconds"]
        row["estimated_run_seconds"] = {"steps": steps, "seconds": fixed + (steps - warmup) * mean}
    for name in ("flops", "needed_flops"):
        if row.get(name) and row.get("matrix_rate"):
            row[f"{name}_of_matrix_rate"] = sum(row[name].values()) / quartiles[1] / row["matrix_rate"]
    return row


def run_job(path: Path) -> None:
    """The entry point of a row's process: read the job, run it, write the result beside it."""
    job = Job(**json.loads(path.read_text()))
    if job.plain:
        script = load_script(Path(job.script))
        with random_weights(script) if job.weights == "memory" else contextlib.nullcontext():
            script.main(job.arguments())
        return
    row = measure(job)
    if is_first_process():
        write_files({path.with_name("result.json"): json.dumps(row).encode()})


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started for one row."""
    return os.environ.get("RANK", "0") == "0"


# ----------------------------------------------------------------------------------------------------------------------
# 6. Whole runs as processes
# ----------------------------------------------------------------------------------------------------------------------


def run_process(command: list[str], log: Path) -> dict:
    """Run a command to its end. Returns wall time and exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        begin = time.perf_counter()
        process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    return {"seconds": time.perf_counter() - begin, "status": process.returncode}


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "no output"


def job_command(job: Job, folder: Path) -> list[str]:
    write_files({folder / "job.json": json.dumps(dataclasses.asdict(job)).encode()})
    return [sys.executable, str(Path(__file__).resolve()), "--job", str(folder / "job.json")]


def run_row(job: Job, folder: Path) -> dict:
    """Measure a row in a separate process, so that its memory and its failure do not affect other rows."""
    (folder / "result.json").unlink(missing_ok=True)
    job.spawned = time.time()
    process = run_process(job_command(job, folder), folder / "log.txt")
    if process["status"] == 0:
        return json.loads((folder / "result.json").read_text())
    if process["status"] == -9:  # by the system, when the host's memory runs out
        return {"status": "killed, probably out of memory"}
    return {"status": f"failed: {last_line(folder / 'log.txt')}"}


def run_in_turns(commands: dict[str, Callable[[], list[str]]], folder: Path, repeats: int) -> dict[str, list[dict]]:
    """Run the commands alternately, `repeats` times each, so that a temporary slowdown affects all of them.

    Raises UserError if one fails.
    """
    results = {name: [] for name in commands}
    for number, (name, command) in itertools.product(range(repeats), commands.items()):
        log = folder / f"{name}-{number}.txt"
        result = run_process(command(), log)
        if result["status"]:
            raise UserError(f"{name}: exit status {result['status']}: {last_line(log)}")
        print(f"  {name}: {result['seconds']:.1f} s", flush=True)
        results[name].append(result)
    return results


def whole_runs(job: Job, args: argparse.Namespace, model: Path, photos: Path, folder: Path) -> dict:
    """Wall times of whole runs of the script, in turns with --against. Raises UserError."""
    plain = dataclasses.replace(job, plain=True, output=str(folder / "plain"))

    def own() -> list[str]:
        shutil.rmtree(plain.output, ignore_errors=True)
        if job.weights == "memory":
            return job_command(plain, folder / "plain-job")
        return [sys.executable, job.script, *plain.arguments()]

    def other() -> list[str]:
        output = folder / "against"
        shutil.rmtree(output, ignore_errors=True)
        filled = {"{model}": model, "{photos}": photos, "{output}": output, "{steps}": args.max_train_steps}
        words = shlex.split(args.against)
        for place, value in filled.items():
            words = [word.replace(place, str(value)) for word in words]
        return words

    commands = {"the script": own} | ({"--against": other} if args.against else {})
    results = {"steps": args.max_train_steps, "runs": run_in_turns(commands, folder, args.repeats)}
    return results | ({"command": args.against} if args.against else {})


# ----------------------------------------------------------------------------------------------------------------------
# 7. Tables
# ----------------------------------------------------------------------------------------------------------------------


def amount(value: float | None, unit: float = 1, digits: int = 2) -> str:
    """A measured number in a unit, or "-"."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def columns_of(rows: list[dict]) -> list[str]:
    """The options that differ between rows, and always resolution and batch."""
    varied = [name for name in GRID if len({row["options"][name] for row in rows}) > 1]
    return [name for name in GRID if name in varied or name in ("resolution", "train_batch_size")]


def total(parts: dict | None) -> float | None:
    return sum(parts.values()) if parts else None


def main_table(rows: list[dict]) -> str:
    names = columns_of(rows)
    head = [*names, "s per step", "quartiles", "set-up s", "run s, estimated", "set-up GB", "device GB", "host GB"]
    head += ["TFLOP per step", "of the matrix rate", "needed TFLOP", "of the matrix rate", "checkpoint kB", ""]
    lines = []
    for row in rows:
        step, peak = row.get("step", {}), row.get("device_peak") or {}
        quartiles = " to ".join(f"{x:.4f}" for x in step["quartiles"]) if step else "-"
        line = [amount(step.get("median"), digits=4), quartiles, amount(row.get("set_up", {}).get("total"), digits=1)]
        line += [amount(row.get("estimated_run_seconds", {}).get("seconds"), digits=0)]
        line += [amount((row.get("set_up", {}).get("device_peak") or {}).get("allocated"), 1e9)]
        line += [amount(peak.get("allocated"), 1e9), amount(row.get("host_peak"), 1e9)]
        for name in ("flops", "needed_flops"):
            flops = total(row.get(name))
            line += ["-" if flops is None else f"{flops / 1e12:.3g}", percent(row.get(f"{name}_of_matrix_rate"))]
        line += [amount(row.get("checkpoint_bytes"), 1e3, 0), "" if row["status"] == "measured" else row["status"]]
        lines.append([*(str(row["options"][name]) for name in names), *line])
    return markdown_table(head, lines)


def parts_table(rows: list[dict], key: str, unit: float, digits: int, last: str) -> str | None:
    """One column for each part that occurs in any row, and the sum."""
    rows = [row for row in rows if row.get(key)]
    if not rows:
        return None
    names = columns_of(rows)
    parts = [part for part in PARTS if any(row[key][part] for row in rows)]
    lines = []
    for row in rows:
        whole = total(row[key])
        cells = [f"{amount(row[key][part], unit, digits)} ({percent(row[key][part] / whole)})" for part in parts]
        lines.append([*(str(row["options"][name]) for name in names), *cells, amount(whole, unit, digits)])
    return markdown_table([*names, *parts, last], lines)


def whole_run_table(rows: list[dict]) -> str | None:
    lines = []
    names = columns_of(rows)
    for row in (row for row in rows if row.get("whole_runs")):
        for name, runs in row["whole_runs"]["runs"].items():
            seconds = [x["seconds"] for x in runs]
            spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
            name = f"`{row['whole_runs']['command']}`" if name == "--against" else name
            counts = [str(row["whole_runs"]["steps"]), str(len(seconds))]
            line = [name, *counts, amount(statistics.median(seconds)), spread]
            lines.append([*(str(row["options"][name]) for name in names), *line])
    head = [*names, "whole run", "steps", "runs", "median s", "from to"]
    return markdown_table(head, lines) if lines else None


def to_markdown(report: dict) -> str:
    rows, about = report["rows"], report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    device = next((row["device"] for row in rows if row.get("device")), "-")
    rates = {row["matrix_rate"] for row in rows if row.get("matrix_rate")}
    rate = f" Square matrix products reach {max(rates) / 1e12:.3g} TFLOP/s." if rates else ""
    where = {"memory": "made on the device, so set-up does not include reading them", "disk": "read from disk"}
    same = [f"{name} {rows[0]['options'][name]}" for name in GRID if len({row["options"][name] for row in rows}) == 1]
    text = [
        f"{report['model']}, {report['size']}; weights random, {where[report['weights']]}. {', '.join(same)}"
        f"{', ' + ' '.join(report['script_options']) if report['script_options'] else ''}.",
        f"{device}; {about['threads']} threads; {versions}; {report['date']}.{rate}",
        main_table(rows),
    ]
    sections = {
        "Milliseconds per step, with a wait for the device at every boundary": (
            parts_table(rows, "breakdown", 1e-3, 2, "sum")
        ),
        "GFLOP per step, as run": parts_table(rows, "flops", 1e9, 2, "sum"),
        "GFLOP per step, as needed": parts_table(rows, "needed_flops", 1e9, 2, "sum"),
        "Whole runs as processes": whole_run_table(rows),
    }
    text += [f"{title}:\n\n{table}" for title, table in sections.items() if table]
    return "\n\n".join(text) + "\n"


def about_machine() -> dict:
    """Threads and versions. The GPU is not queried here, because a CUDA context would take memory from the rows."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    return {"threads": torch.get_num_threads(), "versions": versions, "cuda": torch.version.cuda}


def device_name(device: torch.device | None) -> str | None:
    """The name of the GPU or processor. None if a run ended before it had a device."""
    if device is None or device.type == "cuda":
        return device and torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Main
# ----------------------------------------------------------------------------------------------------------------------


def check_configurations(script, wanted: list[list[str]]) -> None:
    """Let the script check every row's options before anything runs. Raises UserError."""
    with tempfile.TemporaryDirectory() as scratch:
        for options in wanted:
            try:
                given = script.parse_args([*options, "--output_dir", scratch], script.MODEL_CLASS)
                script.check_options(script.MODEL_CLASS(given))
            except script.UserError as error:
                raise UserError(str(error)) from None


def run_grid(args: argparse.Namespace, others: list[str]) -> Iterator[dict]:
    """Yield the rows. Raises UserError before the first one."""
    script = load_script(args.script)
    runs, nowhere = args.work_dir / "runs", args.work_dir / "unused"
    wanted = configurations(args)
    check_configurations(script, [script_options(c, nowhere, nowhere, args.seed, others) for c in wanted])
    model = prepare_model(args, script.built_in_templates("object"))
    photos = prepare_photographs(args)
    phases = (args.warmup, args.steps, args.breakdown_steps)
    for number, configuration in enumerate(wanted):
        folder = runs / f"{number:02d}"
        argv = script_options(configuration, model, photos, args.seed, others)
        job = Job(str(args.script), argv, str(folder / "out"), phases, args.max_train_steps, args.weights)
        print(", ".join(f"{k} {v}" for k, v in configuration.items()), flush=True)
        row = {"options": configuration, **summarise(run_row(job, folder), args.max_train_steps, args.warmup)}
        step = row.get("step")
        print(f"  {row['status']}" + (f": {step['median']:.4f} s per step" if step else ""), flush=True)
        if args.repeats and row["status"] == "measured":
            try:
                row["whole_runs"] = whole_runs(job, args, model, photos, folder)
            except UserError as error:
                row["status"] = f"failed: {error}"
                print(f"  {row['status']}", flush=True)
        yield row


def main() -> None:
    args, others = parse_args()
    if args.job is not None:
        run_job(args.job)
        return
    report = {"date": datetime.datetime.now().isoformat(timespec="minutes"), "machine": about_machine()}
    report |= {"model": args.model if args.size == "full" else args.model.partition("-")[0], "size": args.size}
    report |= {"weights": args.weights, "script": args.script.name, "script_options": others, "rows": []}
    for row in run_grid(args, others):  # written after each row: a grid may be stopped
        report["rows"].append(row)
        text = to_markdown(report)
        files = {"benchmark.json": json.dumps(report, indent=2) + "\n", "benchmark.md": text}
        write_files({args.work_dir / name: content.encode() for name, content in files.items()})
    print(f"\n{text}\nWritten to {args.work_dir}: benchmark.md, benchmark.json")
    failed = [row["status"] for row in report["rows"] if row["status"].startswith("failed")]
    if failed:
        raise UserError(f"{len(failed)} of {len(report['rows'])} rows: {failed[0]}")


if __name__ == "__main__":
    run(main)
