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
    return argparse.Namespace(
        magnitude="mean", init="token", placeholder_token="<new>", initializer_token="teapot", further_word=[],
        optimizer="rsgd", kappa=1e-4,
    )  # fmt: skip


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


def check_a_step(script, model, widths, latent_shape):
    """Add the new word, encode an image, take one step; every direction must have turned by arctan of the rate."""
    model.load_tokenizers()
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        first_id = script.add_placeholder(model, tokenizer, "<new>", 1)
        model.tokens.append(script.make_token(encoder, tokenizer, first_id, [1], None, model.args))
    assert [tuple(token.parameter.shape) for token in model.tokens] == [(1, width) for width in widths]
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    batch = {"pixel_values": pixels, "prompt": ["a photo of <new> on grass"]}
    batch["time_ids"] = torch.tensor([[64, 64, 0, 0, 64, 64]]).float()
    latents = model.encode_images(pixels)
    assert all(x.shape == latent_shape and x.isfinite().all() for x in latents.values())

    before = [token.parameter.detach().clone() for token in model.tokens]
    optimizer = script.make_optimizer(model.tokens, argparse.Namespace(**vars(model.args) | {"learning_rate": 0.1}))
    loss = model.loss({**batch, "generators": [torch.Generator().manual_seed(0)]})
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for token, v in zip(model.tokens, before, strict=True):
        assert script.angle(token.parameter.detach(), v).item() == pytest.approx(5.7106, abs=1e-3)


def shallow(script, small, name: str, parts: dict[str, torch.nn.Module]):
    """The script's model with these parts, and the small pipeline's tokenizers."""
    argv = f"--pretrained_model_name_or_path {small / name} --placeholder_token <new> --initializer_token teapot"
    model = script.MODEL_CLASS(script.parse_args(f"{argv} --output_dir unused".split(), script.MODEL_CLASS))
    model.text_encoders = [parts[encoder] for encoder in model.text_encoder_names]
    model.denoiser, model.vae = parts[model.denoiser_name], parts["vae"]
    return model


def test_sdxl(small):
    model = shallow(train_dti_sdxl, small, "sdxl", shallow_models("sdxl"))
    model.noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    check_a_step(train_dti_sdxl, model, (768, 1280), (1, 4, 8, 8))


def test_sana(small):
    model = shallow(train_dti_sana, small, "sana", shallow_models("sana-1.6b"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    model.timesteps, model.sigmas, model.instruction, model.max_length = scheduler.timesteps, scheduler.sigmas, "", 300
    check_a_step(train_dti_sana, model, (2304,), (1, 32, 2, 2))
