"""The miniature's judges: SigLIP (does a picture match a text), DINOv2 (same subject or not), attribute classifiers.

Each is trained on its own seed range, separate from the generator's and the other judges'.

    classifiers = judges.load_classifiers()
    classifiers.read(pictures)      # {attribute: word} for each PIL picture

Sections: 1 disturbed pictures, 2 SigLIP, 3 DINOv2, 4 classifiers.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from torch import nn
from training import (
    SPLITS,
    AttributeHeads,
    PictureTower,
    accuracy,
    batch_of,
    caption_batch,
    fit,
    fray,
    label_ids,
    mixed_precision,
    new_tokenizer,
    on_disk,
    pad_ids,
    pictures_of,
    psnr,
    save_half,
    save_tokenizer,
    to_tensor,
    vocabulary_and_merges,
)  # fmt: skip


HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# 1. Pictures with a generator's imperfections


def disturb(pictures, rng):
    """Slightly blurred, noisy, lighter or darker pictures."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
    blur, grain, light = torch.rand(3, len(pictures), 1, 1, 1, generator=draw).to(pictures.device)
    noise = torch.randn(pictures.shape, generator=draw).to(pictures.device)
    pictures = torch.lerp(pictures, blurred, 0.7 * blur) + 0.06 * grain * noise
    return (pictures * (0.92 + 0.16 * light)).clamp(-1, 1)


def shift(pictures, rng, most=3):
    """Shift each picture by up to `most` pixels in any direction; the edge is repeated."""
    side = pictures.shape[-1]
    padded = F.pad(pictures, (most,) * 4, mode="replicate")
    corners = rng.integers(0, 2 * most + 1, (len(pictures), 2))
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# 2. SigLIP


class SiglipTraining(nn.Module):
    """SigLIP's sigmoid loss. Attribute heads on the picture side train a small ViT within minutes."""

    def __init__(self):
        super().__init__()
        from transformers import SiglipConfig, SiglipModel

        size = len(vocabulary_and_merges()[0])
        text = {
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
            "projection_size": 160, "vocab_size": size, "max_position_embeddings": 64,
            "pad_token_id": size - 1, "bos_token_id": size - 2, "eos_token_id": size - 1,
        }  # fmt: skip
        vision = {
            "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 5,
            "image_size": world.SIZE, "patch_size": 8,
        }  # fmt: skip
        self.model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision, attn_implementation="eager"))
        with torch.no_grad():  # SigLIP's initial values: nearly all pairs are negatives
            self.model.logit_scale.fill_(math.log(10))
            self.model.logit_bias.fill_(-10)
        self.heads = AttributeHeads(160)

    def forward(self, pictures, ids, same, targets):
        output = self.model(input_ids=ids, pixel_values=pictures)
        logits = output.logits_per_image.float()
        sign = 2 * torch.eye(*logits.shape, device=logits.device) - 1
        pairs = -F.logsigmoid(sign * logits).masked_fill(same, 0).sum() / len(logits)
        seen = self.model.vision_model(pixel_values=pictures).pooler_output if self.training else output.image_embeds
        hits = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        return pairs + self.heads.loss(seen, targets), hits


def train_siglip(args):
    torch.manual_seed(args.seed)
    training, tokenizer = SiglipTraining().to(args.device), new_tokenizer(length=64)

    def loss_of(step, rng):
        pictures, texts, same, targets, _ = caption_batch("judges", rng, 64, args)
        rows = [fray(row, rng) if rng.random() < 0.3 else row for row in tokenizer(texts).input_ids]
        ids = pad_ids([row[:64] for row in rows], tokenizer.pad_token_id, 64).to(args.device)
        loss, hits = training(disturb(pictures, rng), ids, same, targets)
        return loss, {"hits": hits}

    fit("siglip", training, loss_of, args, lr=1e-3, ema=0.995)
    export_siglip(training.model, tokenizer, args)


def export_siglip(model, tokenizer, args):
    from transformers import SiglipImageProcessorPil, SiglipProcessor

    folder = args.output_dir / "siglip"
    save_half(model, folder)
    tokenizer.model_input_names = ["input_ids"]  # SigLIP reads its padding, so there is no mask
    images = SiglipImageProcessorPil(size={"height": world.SIZE, "width": world.SIZE})
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)  # preprocessor_config.json, for transformers 4
    save_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------------------------------------------------------------
# 3. DINOv2

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]


class Dinov2Training(nn.Module):
    """Class features in which two pictures of one subject, in different places and sizes, are closest."""

    def __init__(self):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=160, num_hidden_layers=5, num_attention_heads=5, mlp_ratio=4, image_size=64, patch_size=8
        )
        config._attn_implementation = "eager"
        self.model, self.heads = Dinov2Model(config), AttributeHeads(160)
        nn.init.normal_(self.model.embeddings.position_embeddings, std=0.02)

    def forward(self, pictures, targets):
        features = self.model(pixel_values=pictures).last_hidden_state[:, 0].float()
        a, b = F.normalize(features, dim=1).chunk(2)
        logits, same = 10 * a @ b.T, torch.arange(len(a), device=a.device)
        subject = {"shape": 1.0, "colour": 1.0, "pattern": 1.0, "colour2": 1.0, "eyes": 1.0}
        weights = {k: subject.get(k, 0.0) * 2 for k in world.LABELS}
        hits = (logits.argmax(1) == same).float().mean()
        pairs = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        return pairs + self.heads.loss(features, targets, weights), hits


def train_dinov2(args):
    torch.manual_seed(args.seed)
    training = Dinov2Training().to(args.device)
    mean, std = IMAGENET.to(args.device)

    def loss_of(step, rng):
        seeds, pictures = batch_of("judges", rng, 40, args)
        scenes = [world.sample_scene(int(s)) for s in seeds]
        again = [world.sample_scene(int(s) + 2_000_000) for s in seeds]  # the same subjects in other places
        again = [
            world.replace(o, subject=world.replace(s.subject, size=o.subject.size))
            for s, o in zip(scenes, again, strict=False)
        ]
        others = np.stack([np.asarray(world.render(o, int(s))) for s, o in zip(seeds, again, strict=False)])
        both = disturb(torch.cat([pictures, to_tensor(others).to(args.device)]), rng)
        loss, hits = training(((both + 1) / 2 - mean) / std, label_ids(scenes + again, args.device))
        return loss, {"hits": hits}

    fit("dinov2", training, loss_of, args, lr=1e-3, ema=0.995)
    from transformers import BitImageProcessorPil

    save_half(training.model, args.output_dir / "dinov2")
    BitImageProcessorPil(
        size={"shortest_edge": world.SIZE}, crop_size={"height": world.SIZE, "width": world.SIZE},
        image_mean=IMAGENET[0].flatten().tolist(), image_std=IMAGENET[1].flatten().tolist(),
    ).save_pretrained(args.output_dir / "dinov2")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 4. Classifiers


class Classifiers(nn.Module):
    """One convolutional network that predicts every attribute."""

    def __init__(self):
        super().__init__()
        self.tower, self.heads = PictureTower(32, 256), AttributeHeads(256)

    def features(self, pictures):
        return F.silu(self.tower(pictures))

    @torch.no_grad()
    def read(self, pictures):
        """Labels of PIL pictures: a list of {attribute: word}."""
        arrays = np.stack([np.asarray(p.convert("RGB").resize((world.SIZE, world.SIZE))) for p in pictures])
        parts = self.heads.split(self.features(to_tensor(arrays).to(next(self.parameters()).device)))
        picks = {k: v.argmax(-1).tolist() for k, v in parts.items()}
        return [{k: world.LABELS[k][picks[k][i]] for k in picks} for i in range(len(pictures))]


def load_classifiers(folder=HERE / "classifiers"):
    from safetensors.torch import load_file

    model = Classifiers()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval()


def load_autoencoders(args):
    """Both generators' autoencoders, by the split that holds their reconstructions."""
    from diffusers import AutoencoderDC, AutoencoderKL

    folders = {
        "autoencoded": (AutoencoderKL, args.output_dir / "sdxl" / "vae"),
        "autoencoded_sana": (AutoencoderDC, args.output_dir / "sana" / "vae"),
    }
    return {k: cls.from_pretrained(folder).to(args.device).eval() for k, (cls, folder) in folders.items()}


@torch.no_grad()
def autoencode_pictures(args):
    """Reconstruct some of the classifiers' pictures with each autoencoder, on disk. They have a generator's blur. Noise on
    the latents (up to half their standard deviation) adds the uneven edges and blotches of an imperfect generator."""
    rendered = pictures_of("classifiers", args.runs_dir)
    torch.manual_seed(args.seed)
    for split, autoencoder in load_autoencoders(args).items():
        path, (first, count) = args.runs_dir / f"{split}.npy", SPLITS[split]
        if on_disk(path, count):
            continue
        start, decoded = first - SPLITS["classifiers"][0], []
        for i in range(start, start + count, 25):
            pictures = to_tensor(rendered[i : i + 25]).to(args.device)
            noise = 0.5 * torch.rand(len(pictures), 1, 1, 1, device=args.device)
            with mixed_precision(args):
                decoded.append((autoencode(autoencoder, pictures, noise) + 1).mul(127.5).round().byte().cpu())
        np.save(path, torch.cat(decoded)[:count].permute(0, 2, 3, 1).numpy())


def autoencode(autoencoder, pictures, noise=0.0):
    """Reconstruct pictures (batch, 3, side, side), with noise of this share of the latents' standard deviation."""
    encoded = autoencoder.encode(pictures)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    latents = latents + noise / autoencoder.config.scaling_factor * torch.randn_like(latents)
    return autoencoder.decode(latents).sample.float().clamp(-1, 1)


def train_classifiers(args):
    torch.manual_seed(args.seed)
    model = Classifiers().to(args.device)

    autoencode_pictures(args)

    def loss_of(step, rng):
        kinds = {"classifiers": 22, "autoencoded": 21, "autoencoded_sana": 21}
        parts = [batch_of(split, rng, size, args) for split, size in kinds.items()]
        seeds, pictures = np.concatenate([s for s, _ in parts]), torch.cat([p for _, p in parts])
        targets = label_ids([world.sample_scene(int(s)) for s in seeds], args.device)
        features = model.features(disturb(shift(pictures, rng), rng))
        right = accuracy(model.heads, features, targets)
        return model.heads.loss(features, targets), {k: right[k] for k in ("shape", "colour", "pattern")}

    fit("classifiers", model, loss_of, args, lr=2e-3, ema=0.995)
    from safetensors.torch import save_file

    folder = args.output_dir / "classifiers"
    folder.mkdir(exist_ok=True)
    save_file(
        {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    check_classifiers(model, args)


@torch.no_grad()
def check_classifiers(model, args):
    """Accuracy on the judges' seeds, rendered and after each autoencoder: the score of a perfect generator."""
    seeds, pictures = batch_of("judges", world.generator(1, "check"), 600, args)
    targets = label_ids([world.sample_scene(int(s)) for s in seeds], args.device)
    report = {"rendered": accuracy(model.heads, model.features(pictures), targets)}
    for split, autoencoder in load_autoencoders(args).items():
        decoded = torch.cat([autoencode(autoencoder, part) for part in pictures.split(25)])
        report[split] = accuracy(model.heads, model.features(decoded), targets)
        report[split]["psnr"] = round(psnr((decoded - pictures).pow(2).mean()), 2)
    (args.output_dir / "classifiers" / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report), flush=True)
