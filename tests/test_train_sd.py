"""examples/train_dti_sd.py: Stable Diffusion 1 and 2 as a subclass of StableDiffusionXL, on the small random pipeline."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import generate
import numpy as np
import pytest
import torch
import train_dti_sd
import train_many
from diffusers import DDIMScheduler, StableDiffusionPipeline
from export import read_embedding
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_sdxl import check_velocity

import train_dti_sana
import train_dti_sdxl as script


PROMPTS = ["a photo of <my-pot> on the grass", "<my-pot>, painting", "a <my-pot> and a <my-pot>"]


@pytest.fixture
def trainer():
    return train_dti_sd


def stock_pipeline(small, out=None) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(small / "sd", safety_checker=None)
    if out is not None:
        pipe.load_textual_inversion(str(out))
    return pipe


def model_of(options, **changes) -> train_dti_sd.StableDiffusion:
    argv = options(**changes)
    model = train_dti_sd.StableDiffusion(script.parse_args(argv, train_dti_sd.StableDiffusion))
    model.load_tokenizers()
    model.load(torch.float32)
    return model


def test_as_a_user_runs_it(launch, small, tmp_path):
    """Trained on the sphere, and a stock pipeline draws with the files what the validation drew."""
    run = {"max_train_steps": 12, "learning_rate": 0.02, "initializer_token": "stuffed animal"}
    result = launch(**run, validation_prompt="a {} on grass", num_validation_images=1, validation_inference_steps=3)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    embedding = load_file(out / "learned_embeds.safetensors")["<my-pot>"]
    pipe = stock_pipeline(small, out)
    vocabulary = pipe.text_encoder.get_input_embeddings().weight.detach()
    norms = vocabulary[:-2].norm(dim=-1)
    assert torch.allclose(embedding.norm(dim=-1), norms[norms > 0].mean(), rtol=1e-5) and len(embedding) == 2
    start = vocabulary[pipe.tokenizer("stuffed animal", add_special_tokens=False).input_ids]
    assert script.angle(embedding, start).max() <= 12 * math.degrees(math.atan(0.02)) + 1e-3
    assert script.angle(embedding, start).min() > 0.2

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    sampling = {"num_inference_steps": 3, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(0)}
    image = pipe("a <my-pot> on grass", height=64, width=64, **sampling).images[0]
    grid = np.asarray(Image.open(out / "validation-12.png")).astype(int)
    assert np.abs(grid[-192::3, :192:3] - np.asarray(image).astype(int)).max() <= 1
    exec(result.stdout[result.stdout.index("import torch\n") :].replace("picture.png", str(tmp_path / "a.png")), {})
    assert (tmp_path / "a.png").is_file()


def test_conditioning_is_the_stock_pipelines_bit_for_bit(train, small, models_seen):
    pipe = stock_pipeline(small, train(num_vectors=2))
    with torch.no_grad():
        (ours,) = models_seen[0].encode_prompts(PROMPTS)
        stock, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(ours, stock)


def test_the_web_file_is_the_web_tools_of_stable_diffusion(train):
    out = train()
    web, ours = load_file(out / "my-pot.safetensors"), load_file(out / "learned_embeds.safetensors")
    assert list(web) == ["emb_params"] and torch.equal(web["emb_params"], ours["<my-pot>"])
    with safe_open(out / "my-pot.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert read_embedding(out / "my-pot.safetensors").family == "sd"
    # Any of the files starts another run.
    second = train(init_embedding=out / "my-pot.safetensors", initializer_token=None, max_train_steps=1, seed=1)
    turned = script.angle(load_file(second / "learned_embeds.safetensors")["<my-pot>"], ours["<my-pot>"])
    assert 0 < turned.item() < 1


@pytest.mark.parametrize(
    "width, prediction, name",
    [(768, "epsilon", "v1"), (1024, "epsilon", "v2-512"), (1024, "v_prediction", "v2-768-v")],
)
def test_the_architecture_is_told_by_width_and_prediction(width, prediction, name):
    model = train_dti_sd.StableDiffusion(None)
    model.text_encoders = [SimpleNamespace(config=SimpleNamespace(hidden_size=width))]
    model.noise_scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type=prediction))
    assert model.architecture == f"stable-diffusion-{name}"


def test_v_prediction_learns_the_velocity(options, small, tmp_path, monkeypatch):
    folder = tmp_path / "velocity"
    shutil.copytree(small / "sd", folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    model = model_of(options, pretrained_model_name_or_path=folder)
    check_velocity(model, {"prompt": ["a teapot"]}, monkeypatch)


def test_a_stock_pipeline_reads_the_lora_weights(train, small, models_seen):
    out = train(rank=4, lora_learning_rate=0.02, max_train_steps=3)
    pipe = stock_pipeline(small, out)
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        plain = pipe.unet(noise, 500, text).sample
        pipe.load_lora_weights(str(out), weight_name=script.LORA_FILE)
        adapted, trained = pipe.unet(noise, 500, text).sample, models_seen[0].denoiser(noise, 500, text).sample
    assert (adapted - plain).norm() > 0.01 * plain.norm() and torch.allclose(adapted, trained, atol=1e-5)


@pytest.mark.parametrize(
    "module, folder, named",
    [
        (script, "sd", "examples/train_dti_sd.py"),
        (train_dti_sana, "sd", "examples/train_dti_sd.py"),
        (train_dti_sd, "sdxl", "train_dti_sdxl.py"),
        (train_dti_sd, "sana", "train_dti_sana.py"),
    ],
)
def test_the_wrong_script_names_the_right_one(small, options, module, folder, named):
    checks = train_dti_sana if module is train_dti_sana else script
    args = checks.parse_args(options(pretrained_model_name_or_path=small / folder), module.MODEL_CLASS)
    with pytest.raises(checks.UserError, match=f"use {named}"):
        checks.check_model(module.MODEL_CLASS(args))


def test_the_default_resolution_is_stable_diffusions(options):
    assert script.parse_args(options(resolution=None), train_dti_sd.StableDiffusion).resolution == 512


def test_many_subjects(train, options, tmp_path, monkeypatch):
    """As examples/train_many.py trains them, the model loaded once."""
    alone = load_file(train() / "learned_embeds.safetensors")["<my-pot>"]
    monkeypatch.setitem(sys.modules, "train_dti_sd", None)
    module = train_many.load_script(Path(train_dti_sd.__file__))
    once = train_many.loading_once(module.MODEL_CLASS)
    for name in ("one", "two"):
        assert train_many.train_subject(module, once, {"name": name}, tmp_path, options(output_dir=None)) == "trained"
        assert torch.equal(load_file(tmp_path / name / "learned_embeds.safetensors")["<my-pot>"], alone)


def test_generate_draws_what_a_stock_pipeline_draws(train, small):
    out = train()
    pipe = stock_pipeline(small, out)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    prompt, sampling = "a <my-pot> on grass", {"guidance_scale": 7.5}
    stock = pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(3), **sampling).images[0]
    ours = generate.load_pipeline(str(small / "sd"))
    generate.load_embedding(ours, read_embedding(out))
    image = next(generate.generate(ours, [prompt], [3], steps=2, **sampling))[2]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(stock).astype(int)).max() <= 1  # of 255: rounding
