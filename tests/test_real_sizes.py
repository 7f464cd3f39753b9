"""The scripts' model code on the real models' widths, so that no shape error hides behind the small ones.

Every module has the published configuration's widths, heads and channels, with random weights; only the depth (layers a
block) and the vocabulary's unused rows are cut. One forward and backward pass each, on one small latent.
"""

import argparse

import benchmark
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import train_dti_sana
import train_dti_sdxl


pytestmark = pytest.mark.slow


def token_options() -> argparse.Namespace:
    return argparse.Namespace(magnitude="mean", init="token", initializer_token="teapot", optimizer="rsgd", kappa=1e-4)


# One layer a block, or two where fewer would leave a kind of layer out.
SHALLOW = {
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
    "unet": {"layers_per_block": 1, "transformer_layers_per_block": 1},
    "transformer": {"num_layers": 2},
}
SHALLOW_VAE = {
    "sdxl": {"layers_per_block": 1},
    "sana-1.6b": {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6},
}


def shallow_models(model: str) -> dict[str, torch.nn.Module]:
    """Every part at its published width, frozen; in bfloat16 but for the VAE."""
    models = {}
    for name, (cls, config) in benchmark.parts_of(model).items():
        fewer = SHALLOW_VAE[model] if name == "vae" else SHALLOW[name]
        if isinstance(config, dict):
            config = config | fewer
        else:
            config.update(fewer)
        dtype = torch.float32 if name == "vae" else torch.bfloat16
        models[name] = benchmark.construct(cls, config, "cpu", dtype).requires_grad_(False)
    return models


def check_a_step(script, models, args, widths, latent_shape):
    """Add the new word, encode an image, take one step; every direction must have turned by arctan of the rate."""
    for encoder, tokenizer in zip(models.text_encoders, models.tokenizers, strict=True):
        first_id = script.add_placeholder(tokenizer, "<new>", 1)
        models.tokens.append(script.make_token(encoder, tokenizer, first_id, 1, None, args))
    assert [tuple(token.parameter.shape) for token in models.tokens] == [(1, width) for width in widths]
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    batch = {"pixel_values": pixels, "prompt": ["a photo of <new> on grass"]}
    batch |= {k: v[None] for k, v in script.size_conditioning((64, 64), script.View(False, 0, 0), 64).items()}
    latents = script.encode_images(models.vae, pixels)
    assert all(x.shape == latent_shape and x.isfinite().all() for x in latents.values())

    before = [token.parameter.detach().clone() for token in models.tokens]
    optimizer = script.make_optimizer(models.tokens, argparse.Namespace(**vars(args), learning_rate=0.1))
    loss = script.diffusion_loss(models, {**batch, "generators": [torch.Generator().manual_seed(0)]})
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for token, v in zip(models.tokens, before, strict=True):
        assert script.angle(token.parameter.detach(), v).item() == pytest.approx(5.7106, abs=1e-3)


def test_sdxl(small):
    script = train_dti_sdxl
    args = argparse.Namespace(pretrained_model_name_or_path=str(small / "sdxl"), revision=None, hub_token=None)
    parts = shallow_models("sdxl")
    models = script.Models(
        tokenizers=script.load_tokenizers(args),
        text_encoders=[parts["text_encoder"], parts["text_encoder_2"]],
        unet=parts["unet"],
        vae=parts["vae"],
        noise_scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        tokens=[],
    )
    check_a_step(script, models, token_options(), (768, 1280), (1, 4, 8, 8))


def test_sana(small):
    script = train_dti_sana
    args = script.parse_args(
        f"--pretrained_model_name_or_path {small / 'sana'} --placeholder_token <new> --initializer_token teapot"
        " --output_dir unused".split()
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = shallow_models("sana-1.6b")
    models = script.Models(
        tokenizers=script.load_tokenizers(args),
        text_encoders=[parts["text_encoder"]],
        transformer=parts["transformer"],
        vae=parts["vae"],
        timesteps=scheduler.timesteps,
        sigmas=scheduler.sigmas,
        instruction="",
        max_length=300,
        args=args,
        tokens=[],
    )
    check_a_step(script, models, token_options(), (2304,), (1, 32, 2, 2))
