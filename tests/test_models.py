"""Models as people have them: SDXL's derivatives with other noise schedules."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image

import train_dti_sdxl as script


DRAW = {"validation_prompt": "a {}", "num_validation_images": 1, "max_train_steps": 1}
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def changed(small, tmp_path):
    """Copies the small SDXL with some values of a part's configuration changed."""

    def copy(file: str = SCHEDULER, family: str = "sdxl", **values) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(small / family, folder, dirs_exist_ok=True)
        config = folder / file
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
        return folder

    return copy


def check_picture(out: Path, pipe: StableDiffusionXLPipeline, steps: int, **options) -> None:
    """The validation's picture after step 1 is the one that the pipeline draws, by DDIM and pooled at the end token."""
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a <my-pot>", height=64, width=64, num_inference_steps=steps, generator=generator, **options).images[
        0
    ]
    grid = np.asarray(Image.open(out / "validation-1.png")).astype(int)
    assert np.asarray(image).std() > 1  # a picture, and not the black of what is no number
    assert np.abs(grid[-192::3, :192:3] - np.asarray(image).astype(int)).max() <= 1


def run_printed(model, out: Path, monkeypatch) -> StableDiffusionXLPipeline:
    """Runs the printed lines, and returns the pipeline that they have loaded."""
    monkeypatch.chdir(out)
    lines = model.loading_snippet(torch.device("cpu"), torch.float32)
    lines = lines.replace('").images[0]', '", num_inference_steps=2, height=64, width=64).images[0]')
    exec(lines, names := {})
    return names["pipe"]


# As the files of each say it.
DERIVATIVES = {
    "Pony, Illustrious": ({}, {}),
    "Illustrious by Euler a": ({"_class_name": "EulerAncestralDiscreteScheduler"}, {}),
    "NoobAI v-prediction": ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
    "NoobAI, where the file does not say": (
        {},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "Turbo": (
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        {"validation_inference_steps": 4, "validation_guidance_scale": 0},
    ),
    "Lightning": (
        {"timestep_spacing": "trailing"},
        {"validation_inference_steps": 4, "validation_guidance_scale": 0},
    ),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_derivatives_train_and_draw_as_a_stock_pipeline_does(name, changed, train, models_seen, monkeypatch):
    config, options = DERIVATIVES[name]
    folder = changed(**config)
    options = {"validation_inference_steps": 4, "validation_guidance_scale": 5} | options
    out = train(pretrained_model_name_or_path=folder, **DRAW, **options)
    (model,) = models_seen
    velocity = "NoobAI" in name
    assert model.noise_scheduler.config.prediction_type == ("v_prediction" if velocity else "epsilon")
    assert (model.noise_scheduler.alphas_cumprod[-1] == 0) == velocity
    pipe = run_printed(model, out, monkeypatch)
    assert pipe.scheduler.config.prediction_type == model.noise_scheduler.config.prediction_type
    assert pipe.scheduler.config.get("rescale_betas_zero_snr", False) == velocity
    if velocity:  # the printed lines leave the spacing to the file where the file says all else
        pipe.scheduler.register_to_config(timestep_spacing="trailing")
    check_picture(out, pipe, steps=4, guidance_scale=options["validation_guidance_scale"])


def test_options_on_the_schedule_are_in_the_printed_lines(loaded, small):
    model = loaded("--rescale_betas_zero_snr", prediction_type="v_prediction")
    lines = model.loading_snippet(torch.device("cpu"), torch.float32)
    line = next(line for line in lines.splitlines() if "Scheduler.from_config" in line)
    pipe = StableDiffusionXLPipeline.from_pretrained(small / "sdxl")
    exec(line, {"pipe": pipe, "EulerDiscreteScheduler": EulerDiscreteScheduler})
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    # Euler's last alpha is as small as it can be and not zero, for it divides by it.
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, model.noise_scheduler.alphas_cumprod)
    assert "Scheduler" not in loaded().loading_snippet(torch.device("cpu"), torch.float32)


def test_betas_that_a_file_leaves_out_are_its_own_schedulers(changed, loaded):
    folder = changed()
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": "LCMScheduler"}))
    model = loaded(pretrained_model_name_or_path=folder)
    torch.testing.assert_close(model.noise_scheduler.alphas_cumprod, LCMScheduler().alphas_cumprod)


def test_latents_are_normalized_as_the_pipeline_has_them(changed, train, models_seen):
    """A VAE's latents_mean and latents_std: what is trained on is what the pipeline decodes, and validation decodes so."""
    folder = changed("vae/config.json", latents_mean=[-1.6, 0.2, 0.6, 2.3], latents_std=[8.4, 5.0, 4.1, 6.2])
    out = train(pretrained_model_name_or_path=folder, validation_inference_steps=4, **DRAW)
    (model,) = models_seen
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    encoded, posterior = model.encode_images(pixels), model.vae.encode(pixels).latent_dist
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    decoded = []
    pipe.vae.decode = lambda latents, return_dict: decoded.append(latents) or (pixels,)
    pipe.scheduler.step = lambda noise, t, latents, **_: (encoded["mean"],)  # a sampler that ends at what was encoded
    pipe("", height=64, width=64, num_inference_steps=1, guidance_scale=0, output_type="pt")
    torch.testing.assert_close(decoded[-1], posterior.mean, atol=1e-5, rtol=1e-5)
    std = torch.tensor([8.4, 5.0, 4.1, 6.2]).view(1, 4, 1, 1)
    torch.testing.assert_close(encoded["std"], posterior.std * model.vae.config.scaling_factor / std)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    for part in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        name = script.StableDiffusionXL.embedding_files[part[0] == "text_encoder_2"]
        encoder, tokenizer = (getattr(pipe, x) for x in part)
        pipe.load_textual_inversion(
            str(out), weight_name=f"{name}.safetensors", text_encoder=encoder, tokenizer=tokenizer
        )
    check_picture(out, pipe, steps=4, guidance_scale=5.0)
