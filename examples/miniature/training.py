"""Shared by all trainings of the miniature: the loop, the pictures, the tokenizer and contrasting captions.

`fit` is the loop for every model: seeded and resumable, with averaged weights, and gradients averaged over processes.

Sections: 1 the training loop, 2 checkpoints and progress, 3 pictures, 4 tokenizer, 5 captions, 6 attributes, 7 a
picture net.
"""

import copy
import json
import math
import os
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the other examples


# ---------------------------------------------------------------------------------------------------------------------
# 1. The training loop, one for all models


def fit(name, model, loss_of, args, lr, ema=0.0, weight_decay=0.01, groups=None):
    """Train `model` with `loss_of(step, rng)` from the last checkpoint. Returns it, with averaged weights if there are any.

    A step's batch depends only on (seed, name, step, rank), so a resumed run sees the same data as an uninterrupted one.
    """
    steps, path = args.steps[name], args.runs_dir / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        groups or model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    averaged = {k: v.detach().clone() for k, v in model.named_parameters()} if ema else {}
    start = load_checkpoint(path, model, optimizer, averaged, args.device)
    if args.export_only:
        steps = start
    model.train()
    log = Log(name, start, steps)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step, steps)
        rng = world.generator(args.seed, name, step, rank())
        torch.manual_seed(int(rng.integers(2**62)))
        with mixed_precision(args):
            loss, figures = loss_of(step, rng)
        loss.backward()
        average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema, (step + 1) / (step + 10))
        for key, value in model.named_parameters() if ema else ():
            averaged[key].lerp_(value.detach(), 1 - decay)
        log.step(step, {"loss": loss, **figures, "norm": norm})
        if (log.due(step) or step + 1 == steps) and rank() == 0:
            save_checkpoint(path, model, optimizer, averaged, step + 1)
    for key, value in model.named_parameters() if ema else ():
        value.data.copy_(averaged[key])
    return model.eval()


def mixed_precision(args):
    """PyTorch's mixed precision, off with `--precision fp32`."""
    return torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.precision == "bf16")


def schedule(step, steps, warmup=100):
    """Linear warm-up, then half a cosine down to 1/50."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(model):
    """Average the gradients over all processes, sent as one flat vector."""
    if not dist.is_initialized():
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=False):
        p.grad.copy_(piece.view_as(p))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Checkpoints and progress


def save_checkpoint(path, model, optimizer, averaged, step):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged, "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)  # a checkpoint is never half-written


def load_checkpoint(path, model, optimizer, averaged, device):
    """Restore everything. Returns the step to continue from; 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    averaged.update(state["averaged"])
    return state["step"]


class Log:
    """Prints one line every fifteen seconds and saves a checkpoint every two minutes."""

    def __init__(self, name, start, steps):
        self.name, self.first, self.steps = name, start, steps
        self.began = self.printed = self.saved = time.time()

    def step(self, step, figures):
        if rank() or (time.time() - self.printed < 15 and step + 1 < self.steps):
            return
        self.printed = time.time()
        seconds = self.printed - self.began
        left = seconds / (step + 1 - self.first) * (self.steps - step - 1)
        line = " ".join(f"{k} {float(torch.as_tensor(v).detach()):.4f}" for k, v in figures.items())
        print(f"{self.name} {step + 1}/{self.steps} {line} {seconds:.0f} s, {left:.0f} s left", flush=True)

    def due(self, step):
        if time.time() - self.saved < 120:
            return False
        self.saved = time.time()
        return True


def save_half(model, folder, quarter=()):
    """Save the weights in fp16, without changing the model in training; the matrices of the parts named in `quarter` in
    fp8. Stock classes load both in float32."""
    stored = copy.deepcopy(model).to(torch.float16)
    for name, p in stored.named_parameters():
        if p.dim() > 1 and name.split(".")[0] in quarter:
            p.data = p.data.to(torch.float8_e4m3fn)
    stored.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # a folder of this computer
    for key in {"dtype", "torch_dtype"} & set(config):
        # transformers loads in the dtype given here; half precision is only for storage.
        config[key] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"wrote {folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pictures

# First seed and number of pictures. The autoencoded ones are some of the classifiers' pictures, as a generator draws them.
RENDERED = {"generator": (0, 180_000), "judges": (10_000_000, 30_000), "classifiers": (20_000_000, 300_000)}
SPLITS = RENDERED | {"autoencoded": (20_000_000, 40_000), "autoencoded_sana": (20_040_000, 40_000)}


def render_split(split, args):
    """The pictures of a seed range, in one array on disk."""
    first, count = SPLITS[split]
    path = args.runs_dir / f"{split}.npy"
    if on_disk(path, count):
        return
    print(f"rendering {count} pictures for {split}", flush=True)
    pictures = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.uint8, (count, world.SIZE, world.SIZE, 3))
    for i in range(count):
        pictures[i] = world.picture_array(first + i)[1]
    pictures.flush()
    os.replace(path.with_suffix(".tmp"), path)


def on_disk(path, count):
    """Whether the split exists with this number of pictures; a split of another size is rendered again."""
    return path.exists() and len(np.load(path, mmap_mode="r")) == count


def render_all(args):
    for split in RENDERED:
        render_split(split, args)


@cache
def pictures_of(split, runs_dir):
    return np.load(runs_dir / f"{split}.npy", mmap_mode="r")


def batch_of(split, rng, size, args):
    """A random batch: seeds, and pictures as floats from -1 to 1, channels first."""
    pictures = pictures_of(split, args.runs_dir)
    index = np.sort(rng.choice(len(pictures), size, replace=False))
    return index + SPLITS[split][0], to_tensor(pictures[index]).to(args.device)


def to_tensor(pictures):
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def psnr(mse):
    """Decibels against a signal range of 2 (-1 to 1)."""
    return 10 * math.log10(4 / max(float(torch.as_tensor(mse).detach()), 1e-9))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Tokenizer


@cache
def vocabulary_and_merges():
    """The vocabulary in CLIP's order: bytes, bytes at a word's end, merges, start, end. The end token has the highest id,
    because transformers pools at the highest id."""
    from make_small_sdxl import byte_symbols, learn_merges

    symbols = byte_symbols()
    merges = learn_merges([[*word[:-1], word[-1] + "</w>"] for word in world.vocabulary()])
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokens = list(dict.fromkeys(tokens))
    return {token: i for i, token in enumerate(tokens)}, merges


TEXT_LENGTH = 48  # positions; the longest caption has 41 tokens, and a shorter context is cheaper than CLIP's 77


def new_tokenizer(pad="<|endoftext|>", length=TEXT_LENGTH):
    from transformers import CLIPTokenizer

    vocabulary, merges = vocabulary_and_merges()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=pad, model_max_length=length)


def save_tokenizer(tokenizer, folder):
    """Save the tokenizer, also as vocab.json and merges.txt: transformers 4 reads them, but version 5 does not write them."""
    tokenizer.save_pretrained(folder)
    vocabulary, merges = vocabulary_and_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Captions


def confused(scene, rng):
    """A similar scene: the same words in another order, or one other word, describe it."""
    s = scene.subject
    options = [world.replace(scene, subject=world.replace(s, shape=world.pick(rng, world.SHAPES)))]
    options.append(
        world.replace(scene, subject=world.replace(s, pattern=world.pick(rng, world.PATTERNS[1:])))
    ) if s.colour2 else 0
    options.append(
        world.replace(scene, subject=world.replace(s, colour=s.colour2, colour2=s.colour))
    ) if s.colour2 else 0
    if scene.prop and scene.prop_colour != s.colour2:
        options.append(world.replace(scene, prop_colour=s.colour, subject=world.replace(s, colour=scene.prop_colour)))
    if scene.other:
        shape, colour = scene.other
        options.append(world.replace(scene, relation=world.OPPOSITE[scene.relation]))
        options.append(world.replace(scene, other=(s.shape, colour), subject=world.replace(s, shape=shape)))
        if colour != s.colour2:
            options.append(world.replace(scene, other=(shape, s.colour), subject=world.replace(s, colour=colour)))
    options = [o for o in options if not world.held_out(o.subject)]
    return world.pick(rng, options) if options else scene


def captions_of(seeds, rng, hard=0):
    """A caption for each seed and, for the first `hard` seeds, one of a similar scene in the same wording.

    Returns the texts and their labels (texts, attributes), UNSTATED if a text leaves an attribute out.
    """
    wordings = [int(s) * 1000 + int(v) for s, v in zip(seeds, rng.integers(0, 1000, len(seeds)), strict=True)]
    scenes = [world.sample_scene(int(s)) for s in seeds]
    scenes += [confused(scene, rng) for scene in scenes[:hard]]
    captions = [world.caption(*pair) for pair in zip(scenes, wordings + wordings[:hard], strict=True)]
    texts, stated = zip(*captions, strict=True)
    return list(texts), label_ids(scenes, "cpu", stated)


def caption_batch(split, rng, size, args, hard=32):
    """A shuffled batch with captions; those of `hard` similar scenes come last, as negatives.

    Returns pictures, texts, a mask (pictures x texts) of negatives with identical wording, and the labels of the pictures
    (pictures x attributes) and of the texts (texts x attributes).
    """
    seeds, pictures = batch_of(split, rng, size, args)
    order = rng.permutation(size)
    seeds, pictures = seeds[order], pictures[order]
    texts, stated = captions_of(seeds, rng, hard=hard)
    shown = label_ids([world.sample_scene(int(s)) for s in seeds], args.device)
    same = torch.zeros(size, len(texts), dtype=torch.bool, device=args.device)
    for i, text in enumerate(texts[size:]):
        same[i, size + i] = text == texts[i]
    return pictures, texts, same, shown, stated.to(args.device)


def fray(ids, rng):
    """Occasionally split a word into pieces or add a random token, so that every row of the vocabulary is trained."""
    vocabulary, merges = vocabulary_and_merges()
    parts = {vocabulary[a + b]: (vocabulary[a], vocabulary[b]) for a, b in merges}
    out = []
    for token in ids:
        if token in parts and rng.random() < 0.03:
            left, right = parts[token]
            out += [*parts.get(left, (left,)), *parts.get(right, (right,))]
        else:
            out.append(token)
    if rng.random() < 0.1:
        out.insert(int(rng.integers(1, len(out))), int(rng.integers(0, len(vocabulary) - 2)))
    return out


def pad_ids(rows, pad, length=None):
    length = length or max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# 6. Attributes

UNSTATED = -100  # the label of an attribute that a caption does not state; cross_entropy ignores it


class AttributeHeads(nn.Module):
    """One linear layer for all attributes. `loss` averages the cross-entropies of the stated ones."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, sum(len(v) for v in world.LABELS.values()))

    def split(self, features):
        sizes = [len(v) for v in world.LABELS.values()]
        return dict(zip(world.LABELS, self.linear(features).float().split(sizes, dim=-1), strict=True))

    def loss(self, features, targets, weights=None):
        total = 0.0
        for (key, part), target in zip(self.split(features).items(), targets.T, strict=True):
            error = F.cross_entropy(part, target, ignore_index=UNSTATED, reduction="sum")
            total = total + (weights or {}).get(key, 1.0) * error / (target != UNSTATED).sum().clamp(min=1)
        return total / len(world.LABELS)


def label_ids(scenes, device, stated=None):
    """Every scene's attributes as classes (scenes, attributes); with `stated`, only those in its caption."""
    rows = [[world.LABELS[k].index(v) for k, v in world.attributes(s).items()] for s in scenes]
    if stated is not None:
        rows = [
            [i if k in said else UNSTATED for k, i in zip(world.LABELS, row, strict=True)]
            for row, said in zip(rows, stated, strict=True)
        ]
    return torch.tensor(rows, device=device)


def accuracy(heads, features, targets):
    """{attribute: share of correct predictions among the stated}, without attributes that are never stated."""
    parts = heads.split(features)
    right = {k: (parts[k].argmax(-1) == targets[:, i])[targets[:, i] != UNSTATED] for i, k in enumerate(world.LABELS)}
    return {k: float(v.float().mean()) for k, v in right.items() if len(v)}


# ---------------------------------------------------------------------------------------------------------------------
# 7. A picture net


class PictureTower(nn.Module):
    """A small convolutional network with one output vector. It preserves positions, which relations need."""

    def __init__(self, width, outputs):
        super().__init__()
        layers = []
        for i, o in zip((3, width, 2 * width, 4 * width), (width, 2 * width, 4 * width, 4 * width), strict=False):
            layers += [nn.Conv2d(i, o, 3, 2 if i > 3 else 1, 1), nn.GroupNorm(8, o), nn.SiLU()]
            layers += [nn.Conv2d(o, o, 3, 1, 1, groups=o // 8), nn.Conv2d(o, o, 1), nn.GroupNorm(8, o), nn.SiLU()]
        layers[0] = nn.Conv2d(3, width, 4, 2, 1)
        self.body = nn.Sequential(*layers)  # 64 -> 32 -> 16 -> 8 -> 4
        self.squeeze = nn.Conv2d(4 * width, 2 * width, 1)
        self.head = nn.Sequential(nn.Linear(2 * width * 16, 8 * width), nn.SiLU(), nn.Linear(8 * width, outputs))

    def forward(self, pictures):
        return self.head(self.squeeze(self.body(pictures)).flatten(1))
