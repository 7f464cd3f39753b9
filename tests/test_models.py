"""Models as people have them: other noise schedules, variants, single files, and the Hub's cache without a network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import generate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import write_single_file

import train_dti_sana
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
    lines = re.sub(r"(pipe\(.*?)\)\.images", r"\1, num_inference_steps=2).images", lines)
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


def make_variant(
    folder: Path, parts: list[str], shift: float = 0.01, variant: str = "fp16", keep: bool = False
) -> Path:
    """Gives the parts weights of that variant, a little other than the plain ones, and takes those away unless `keep`."""
    for part in parts:
        (path,) = (folder / part).glob("*model.safetensors")
        state = {name: x + shift for name, x in load_file(path).items()}
        save_file(
            state, path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")), {"format": "pt"}
        )
        if not keep:
            path.unlink()
    return folder


def cache_on(tmp_path: Path, folder: Path, monkeypatch, revision: str = "main") -> str:
    """Puts the folder into a Hub's cache as `hf download` does, and returns the model's name there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--me--model", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    script.hub_snapshot.cache_clear()
    train_dti_sana.hub_snapshot.cache_clear()
    return "me/model"


def same_weights(model, pipe) -> bool:
    """Whether the pipeline's denoiser and VAE, and its text encoders but for the new words, are those of the training."""
    pairs = [(model.denoiser, getattr(pipe, model.denoiser_name)), (model.vae, pipe.vae)]
    same = [torch.equal(a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters(), strict=True)]
    for encoder, name in zip(model.text_encoders, model.text_encoder_names, strict=True):
        theirs = {k: x for k, x in getattr(pipe, name).state_dict().items() if "token_embedding" not in k}
        ours = encoder.state_dict()
        same += [torch.equal(x, ours[k]) for k, x in theirs.items() if "embed_tokens" not in k]
    return all(same)


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_printed_loads_the_variant_that_was_trained(
    offline, changed, train, tmp_path, models_seen, monkeypatch
):
    """Part by part, as a stock pipeline falls back; with the revision where the model is on the Hub."""
    folder = make_variant(make_variant(changed(), ["unet"], keep=True), ["text_encoder_2"])
    given = {"pretrained_model_name_or_path": folder, "variant": "fp16"}
    if offline:
        given |= {"pretrained_model_name_or_path": cache_on(tmp_path, folder, monkeypatch, "v1"), "revision": "v1"}
    out = train(max_train_steps=1, **given)
    (model,) = models_seen
    plain = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"]
    torch.testing.assert_close(model.denoiser.conv_in.bias, plain + 0.01)
    assert same_weights(model, run_printed(model, out, monkeypatch))
    saved = json.loads((out / "training_options.json").read_text())["options"]
    assert (saved["variant"], saved["revision"]) == ("fp16", given.get("revision"))
    card = model.loading_snippet(torch.device("cpu"), torch.float32, "me/word")
    assert 'variant="fp16"' in card and ('revision="v1"' in card) == offline


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_a_cached_model_trains_without_a_network(module, sharded, small, tmp_path, monkeypatch):
    """As `hf download` leaves it, also with weights in several files, and the printed lines load it too."""
    family = module.__name__.removeprefix("train_dti_")
    folder = shutil.copytree(small / family, tmp_path / "model")
    if sharded:
        denoiser = module.MODEL_CLASS.denoiser_class.from_pretrained(
            folder, subfolder=module.MODEL_CLASS.denoiser_name
        )
        path = folder / module.MODEL_CLASS.denoiser_name
        (path / "diffusion_pytorch_model.safetensors").unlink()
        denoiser.save_pretrained(path, max_shard_size="60KB")
        assert len(list(path.glob("*-of-*.safetensors"))) > 1
    name = cache_on(tmp_path, folder, monkeypatch)
    argv = f"--pretrained_model_name_or_path {name} --placeholder_token <my-pot> --initializer_token teapot --seed 0"
    argv += f" --instance_data_dir {small}/photos --output_dir {tmp_path}/out --resolution 64 --max_train_steps 1"
    seen, load = [], module.MODEL_CLASS.load
    monkeypatch.setattr(module.MODEL_CLASS, "load", lambda self, dtype: seen.append(self) or load(self, dtype))
    AcceleratorState._reset_state(reset_partial_state=True)
    module.main([*argv.split(), "--report_to", "none"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same_weights(seen[0], run_printed(seen[0], tmp_path / "out", monkeypatch))


def test_variants_are_read_from_the_names_as_the_hub_has_them():
    names = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model-00001-of-00002.bin"]
    names += ["text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/config.json", "unet/config.json"]
    names += ["vae/diffusion_pytorch_model-00002-of-00002.bf16.safetensors", "text_encoder/model.onnx"]
    found = {part: script.part_variants(names, part) for part in ("unet", "text_encoder", "vae", "tokenizer")}
    assert found == {"unet": {"fp16", None}, "text_encoder": {"fp16"}, "vae": {"bf16"}, "tokenizer": set()}


@pytest.mark.parametrize("marks", [(), ("v_pred", "ztsnr")])
def test_a_single_file_trains_as_its_folder_does(marks, small, train, tmp_path, models_seen, monkeypatch):
    """As the web tools have models. Two empty tensors say of some that they predict velocities, from noise alone."""
    path = write_single_file(small / "sdxl", tmp_path / "dog mix.safetensors", marks)
    out = train(pretrained_model_name_or_path=path, single_file_config=small / "sdxl", max_train_steps=1)
    (model,) = models_seen
    assert same_weights(model, StableDiffusionXLPipeline.from_pretrained(small / "sdxl"))
    pipe = run_printed(model, out, monkeypatch)
    assert same_weights(model, pipe)
    for scheduler in (model.noise_scheduler, pipe.scheduler):
        assert scheduler.config.prediction_type == ("v_prediction" if marks else "epsilon")
        assert bool(scheduler.config.get("rescale_betas_zero_snr")) == bool(marks)
    card = script.model_card(model, "me/word", [], {"steps": 1}, "lines")
    assert (
        "base_model: stabilityai/stable-diffusion-xl-base-1.0" in card and "`dog mix.safetensors`, a file of [" in card
    )
    shared = model.loading_snippet(torch.device("cpu"), torch.float32, "me/word")
    assert 'from_single_file("dog mix.safetensors", config="sdxl"' in shared
    if not marks:
        folder = train(max_train_steps=1, output_dir=tmp_path / "folder")
        name = "learned_embeds.safetensors"
        ours, theirs = (load_file(x / name)["<my-pot>"] for x in (out, folder))
        assert torch.equal(ours, theirs)


def test_a_single_file_is_configured_from_the_hubs_cache(small, train, tmp_path, models_seen, monkeypatch):
    """Without --single_file_config, as diffusers does it."""
    path = write_single_file(small / "sdxl", tmp_path / "mix.safetensors", metadata={"modelspec.prediction_type": "v"})
    bare = shutil.copytree(small / "sdxl", tmp_path / "bare", ignore=shutil.ignore_patterns("*model.safetensors"))
    monkeypatch.setattr(script.StableDiffusionXL, "single_file_base", cache_on(tmp_path, bare, monkeypatch))
    train(pretrained_model_name_or_path=path, max_train_steps=1)
    assert models_seen[0].noise_scheduler.config.prediction_type == "v_prediction"
    assert same_weights(models_seen[0], StableDiffusionXLPipeline.from_pretrained(small / "sdxl"))


def test_a_single_file_that_lacks_a_weight_is_refused(small, options, tmp_path):
    path = write_single_file(small / "sdxl", tmp_path / "mix.safetensors")
    state = load_file(path)
    del state["conditioner.embedders.1.model.ln_final.weight"]
    save_file(state, path, {"format": "pt"})
    argv = options(pretrained_model_name_or_path=path, single_file_config=small / "sdxl")
    model = script.MODEL_CLASS(script.parse_args(argv, script.MODEL_CLASS))
    model.load_tokenizers()
    with pytest.raises(script.UserError, match="lacks the weights .*final_layer_norm.weight"):
        model.load(torch.float32)


@pytest.mark.parametrize("kind", ["folder", "single file", "variant in the cache"])
def test_the_examples_draw_with_the_model_that_was_trained(kind, small, changed, tmp_path, monkeypatch):
    """generate.py's pipeline, which evaluate.py has too: its weights, and the noise schedule of the training."""
    options, folder = {}, small / "sdxl"
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    if kind == "folder":
        model, options = folder, schedule
    elif kind == "single file":
        model = write_single_file(folder, tmp_path / "mix.safetensors", ("v_pred", "ztsnr"))
        options = {"single_file_config": str(folder)}
    else:
        folder = make_variant(changed(**schedule), ["unet"], keep=True)
        model, options = cache_on(tmp_path, folder, monkeypatch), {"variant": "fp16"}
        check = generate.check_model_fits(model, None, [], [])
        assert check[0] == "sdxl" and len(check[1]) == 2
    pipe = generate.load_pipeline(str(model), **options)
    plain = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"]
    torch.testing.assert_close(pipe.unet.conv_in.bias.data, plain + 0.01 * (kind == "variant in the cache"))
    assert pipe.scheduler.alphas_cumprod[-1] == 0 and pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    (picture,) = generate.generate(pipe, ["a dog"], [0], steps=2, guidance_scale=5.0, resolution=64)
    assert np.asarray(picture[2]).std() > 1


def test_the_examples_refuse_other_noise(changed):
    folder = changed(_class_name="EDMEulerScheduler")
    with pytest.raises(generate.UserError, match="is sampled by EDMEulerScheduler"):
        generate.load_pipeline(str(folder))
    with pytest.raises(generate.UserError, match="--single_file_config x is for a single .safetensors file"):
        generate.load_pipeline(str(folder), single_file_config="x")


@pytest.mark.slow
def test_a_variant_on_the_hub_is_downloaded_part_by_part(changed, options, tmp_path):
    """Only what the stock pipeline would load is downloaded, and after the checks."""
    folder = make_variant(make_variant(changed(), ["unet"], keep=True), ["text_encoder_2"])
    with HubServer() as hub:
        hub.add_repository("someone/mix", folder)
        environment = hub.environment(None, tmp_path / "home")

        def run(**changes) -> subprocess.CompletedProcess:
            argv = options(pretrained_model_name_or_path="someone/mix", max_train_steps=1, **changes)
            return subprocess.run(
                [sys.executable, script.__file__, *argv], capture_output=True, text=True, env=environment
            )

        def downloaded() -> set[str]:
            files = (tmp_path / "home").rglob("snapshots/*/*/*.safetensors")
            return {f"{path.parent.name}/{path.name}" for path in files}

        refused = run()
        assert refused.returncode == 1 and "text_encoder_2 only as fp16: give --variant fp16" in refused.stderr
        assert not downloaded()
        result = run(variant="fp16")
        assert result.returncode == 0, result.stderr
        assert 'from_pretrained("someone/mix", variant="fp16", ' in result.stdout
        weights = {"unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"}
        assert downloaded() == weights | {"text_encoder/model.safetensors", "text_encoder_2/model.fp16.safetensors"}
