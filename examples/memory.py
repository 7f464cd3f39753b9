#!/usr/bin/env python
"""Compute what memory the training scripts need on a GPU, with none at hand and nothing to download.

    python examples/memory.py
    python examples/memory.py --model sana-1.6b --resolution 512 1024 --train_batch_size 1 4 --gradient_checkpointing on

The script's own functions run on tensors without storage, and every tensor that they make is counted as long as it lives:
weights, what is kept for the gradient, and what comes and goes. Each phase of a run has its own peak:

    encoding   one photograph's latents, before the other models are on the device
    step       loss and gradient of one batch
    sampling   validation: a step with guidance
    decoding   validation: one picture

Not in it: CUDA's own context, what PyTorch's allocator holds in reserve, and its kernels' workspaces, together about a
gigabyte. Attention is counted as a fused kernel's. These figures are computed; examples/benchmark.py measures.

Sections: 1 options, 2 counting, 3 a run's phases, 4 main.
"""

import argparse
import itertools
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
from benchmark import MODELS, ROOT, random_weights, write_full_model
from export import make_parser, markdown_table, run
from generate import number as at_least
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from train_many import load_script


META = torch.device("meta")


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="sdxl", help="Which model, and with it which script. Default: sdxl.")
    add("--resolution", type=at_least(int, 64), nargs="+", default=[512, 768, 1024], help="Pixels. Default: 512 768 1024.")
    add("--train_batch_size", type=at_least(int, 1), nargs="+", default=[1, 4], help="Default: 1 4.")
    add("--gradient_checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"], help="Default: off on.")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16", help="Default: bf16.")
    add("--base_precision", nargs="+", choices=["auto", "int8"], default=["auto", "int8"], help="Default: auto int8.")
    return parser
# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# 2. Counting
# ----------------------------------------------------------------------------------------------------------------------


class MemoryCounter(TorchDispatchMode):
    """Bytes of all tensors without storage that are made within it and live, and their peak.

    `weights` are those that were there before: without them a view of one would be taken for a new tensor.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(weight.untyped_storage() for weight in weights)

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device != META or (storage := tensor.untyped_storage()) in self.known:
            return
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for the gradient: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(context, q, k, v):
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        context.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(context, gradient):
        q, k, v, *_ = context.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def fused_attention(query, key, value, *_, **__):
    return FusedAttention.apply(query, key, value)


def weights_of(*models: torch.nn.Module) -> list[torch.Tensor]:
    return list(itertools.chain.from_iterable((*model.parameters(), *model.buffers()) for model in models))


# ----------------------------------------------------------------------------------------------------------------------
# 3. A run's phases
# ----------------------------------------------------------------------------------------------------------------------


def load(script, args: argparse.Namespace):
    """The script's model without storage, with a new word in it, as it is in the loop."""
    model = script.MODEL_CLASS(args)
    model.load_tokenizers()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    with random_weights(script, META):
        model.load(dtype)
    model.vae.to(META)
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        first_id = script.add_placeholder(model, tokenizer, args.placeholder_token, 1)
        vocabulary = encoder.get_input_embeddings()
        rows = torch.empty(1, vocabulary.weight.shape[1], device=META)
        model.tokens.append(script.LearnedToken(first_id, 1.0, torch.nn.Parameter(rows), rows, rows, [1]))
        encoder.set_input_embeddings(script.ExtendedEmbedding(vocabulary, model.tokens[-1]))
        encoder.to(dtype)
    return model


def encode(model) -> dict[str, torch.Tensor]:
    return model.encode_images(torch.empty(1, 3, model.args.resolution, model.args.resolution, device=META))


def make_batch(script, latents: dict[str, torch.Tensor], args: argparse.Namespace, size: int) -> dict:
    """A batch of `size` examples as the script's loop has it, each with a prompt of its own."""
    one = {**latents, "time_ids": torch.zeros(6)}
    batch = {name: x.to(META).expand(size, *x.shape[-3:] if name in latents else x.shape) for name, x in one.items()}
    batch["prompt"] = [f"a photo of {args.placeholder_token}, number {index}" for index in range(size)]
    batch["generators"] = [torch.Generator().manual_seed(index) for index in range(size)]
    return batch


def train_a_step(model, batch: dict) -> None:
    model.loss(batch).backward()


@torch.no_grad()
def sample_a_step(model, batch: dict) -> None:
    """A step of `sample_latents` with guidance: the loss is that and little else."""
    model.loss(batch)


@torch.no_grad()
def decode(model, latents: dict[str, torch.Tensor]) -> None:
    model.vae.decode(next(iter(latents.values())))


def peak(function, model, *args) -> int:
    """Bytes at the most of what `function` makes, beyond the model."""
    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    weights = weights_of(model.denoiser, model.vae, *model.text_encoders)
    with attention, MemoryCounter(weights) as counter:
        function(model, *args)
    return counter.peak


def compute(script, folder: Path, configuration: dict) -> dict[str, int]:
    """Bytes of the weights and, weights included, of each phase at its peak."""
    options = [word for name, value in configuration.items() for word in (f"--{name}", str(value)) if value != "off"]
    options = [word for word in options if word != "on"]
    common = [
        "--pretrained_model_name_or_path",
        str(folder),
        "--placeholder_token",
        "<new>",
        "--output_dir",
        str(folder),
    ]
    args = script.parse_args([*common, "--initializer_token", "teapot", *options], script.MODEL_CLASS)
    model = load(script, args)
    vocabularies = [encoder.get_input_embeddings().vocabulary for encoder in model.text_encoders]
    elsewhere = sum(x.nbytes for x in weights_of(*vocabularies)) if args.base_precision == "int8" else 0  # on the CPU
    weights = sum(x.nbytes for x in weights_of(model.denoiser, *model.text_encoders)) - elsewhere
    vae = sum(x.nbytes for x in weights_of(model.vae))
    latents = encode(model)
    batch, pair = (make_batch(script, latents, args, size) for size in (args.train_batch_size, 2))
    beside_decoding = 0 if args.gradient_checkpointing else weights  # as script.validate does
    return {
        "weights": weights,
        "encoding": vae + peak(encode, model),
        "step": weights + peak(train_a_step, model, batch),
        "sampling": weights + peak(sample_a_step, model, pair),
        "decoding": beside_decoding + vae + peak(decode, model, latents),
    }


# ----------------------------------------------------------------------------------------------------------------------
# 4. Main
# ----------------------------------------------------------------------------------------------------------------------

GRID = ("resolution", "train_batch_size", "gradient_checkpointing", "mixed_precision", "base_precision")


def main(argv: list[str] | None = None) -> None:
    args = command_line().parse_args(argv)
    args.mixed_precision = [args.mixed_precision]
    script = load_script(ROOT / f"train_dti_{args.model.partition('-')[0]}.py")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        templates = script.built_in_templates("object")
        write_full_model(Path(folder), args.model, templates, "memory", torch.bfloat16)
        for values in itertools.product(*(getattr(args, name) for name in GRID)):
            found = compute(script, Path(folder), dict(zip(GRID, values, strict=True)))
            rows.append([*map(str, values), *(f"{size / 2**30:.1f}" for size in found.values())])
            print(" ".join(rows[-1]), flush=True)
    header = [name.replace("_", " ") for name in GRID] + ["weights, GiB", "encoding", "step", "sampling", "decoding"]
    print(f"\n{args.model}, computed:\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    run(main)
