"""The main job end to end: what is learned, what is left alone, and that a stock pipeline does with the files what training did."""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dti_sdxl as script


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")


def embeddings(folder: Path, placeholder: str = "<my-pot>", suffix: str = "") -> list[torch.Tensor]:
    return [load_file(folder / name.replace(".s", f"{suffix}.s"))[placeholder] for name in FILES]


def stock_pipeline(small: Path, folder: Path | None = None) -> StableDiffusionXLPipeline:
    """A pipeline as a user loads it, with the learned files by the public calls."""
    pipe = StableDiffusionXLPipeline.from_pretrained(small / "sdxl", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.load_textual_inversion(str(folder))
        second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(str(folder), weight_name=FILES[1], **second)
    return pipe


def vocabulary(small: Path) -> list[torch.Tensor]:
    pipe = stock_pipeline(small)
    return [e.get_input_embeddings().weight.detach() for e in (pipe.text_encoder, pipe.text_encoder_2)]


def test_a_log_before_the_first_step_that_fp16_lets_pass(loaded, tmp_path):
    model = loaded()
    optimizer = script.RiemannianSGD([{"params": [token.parameter]} for token in model.tokens], lr=0.1, kappa=0.1)
    history = script.History(model)
    assert not any("gradient" in name for name in history.add(1, 1.0, 0.1, optimizer))
    assert not optimizer.state  # the report on skipped updates reads each that is there
    for token in model.tokens:
        token.parameter.grad = torch.ones_like(token.parameter)
    optimizer.step()
    assert history.add(2, 1.0, 0.1, optimizer)[f"{model.text_encoder_names[0]}/gradient_norm"] > 0
    history.plot(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500


def test_a_run_of_which_fp16_has_skipped_every_step_is_saved_and_goes_on(train, monkeypatch):
    step = script.RiemannianSGD.step
    monkeypatch.setattr(script.RiemannianSGD, "step", lambda self, closure=None: None)
    out = train(max_train_steps=2, checkpointing_steps=1)  # with a checkpoint before each entry of the log
    before = embeddings(out)[0]
    monkeypatch.setattr(script.RiemannianSGD, "step", step)
    train(max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert not torch.equal(before, embeddings(out)[0])


# The command of the README, in processes of its own.


def test_the_main_job_as_a_user_runs_it(launch, small, tmp_path):
    result = launch(max_train_steps=12, validation_prompt="a photo of {} on grass", report_to="tensorboard")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    for rows, matrix in zip(embeddings(out), vocabulary(small), strict=True):
        m_star = matrix.double().norm(dim=-1).mean().item()
        assert rows.dtype == torch.float32 and rows.norm().item() == pytest.approx(m_star, rel=1e-6)
        start = matrix[script.CLIPTokenizer.from_pretrained(small / "sdxl" / "tokenizer")("teapot").input_ids[1:2]]
        moved = script.angle(rows, start).item()
        assert 0.2 < moved <= 12 * math.degrees(math.atan(5e-3)) + 1e-3
    assert Image.open(out / "validation-12.png").size == (4 * 192, 192 + 16)
    assert Image.open(out / "training_curves.png").width > 500
    assert list((out / "logs").rglob("events.out.tfevents*"))

    # The printed lines, unedited, draw a picture.
    snippet = re.search(r"^import torch\n.*?picture\.png\"\)$", result.stdout, re.S | re.M).group()
    run = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert not re.search("dtype|deprecated|ignored", run.stderr), run.stderr  # diffusers has renamed torch_dtype
    assert np.asarray(Image.open(tmp_path / "picture.png")).std() > 0


# What is learned, and what is left alone.


def test_one_step_turns_by_arctan_eta(train, small):
    out = train(max_train_steps=1, learning_rate=0.02)
    start = script.CLIPTokenizer.from_pretrained(small / "sdxl" / "tokenizer")("teapot").input_ids[1]
    for rows, matrix in zip(embeddings(out), vocabulary(small), strict=True):
        assert script.angle(rows, matrix[[start]]).item() == pytest.approx(math.degrees(math.atan(0.02)), rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--magnitude", "free", "--optimizer", "adamw")])
def test_everything_else_is_bit_identical_and_frozen(train, small, models_seen, flags):
    train(*flags)
    model, stock = models_seen[0], stock_pipeline(small)
    for encoder, original in zip(model.text_encoders, (stock.text_encoder, stock.text_encoder_2), strict=True):
        state = {k.replace("vocabulary.", ""): v for k, v in encoder.state_dict().items()}
        assert state.keys() == original.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in original.state_dict().items())
    for part, original in ((model.denoiser, stock.unet), (model.vae, stock.vae)):
        state = part.state_dict()
        assert all(torch.equal(state[k], v) for k, v in original.state_dict().items())
    parts = (model.denoiser, model.vae, *model.text_encoders)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert all(token.parameter.requires_grad for token in model.tokens)


def test_a_fixed_batch_is_overfitted(loaded):
    """Where the noise is the same every time, the direction can learn it: the loss falls further than by any chance."""
    model = loaded()
    with torch.no_grad():  # a random UNet hardly listens to its text: make it
        for name, weight in model.denoiser.named_parameters():
            if "attn2.to_" in name or "add_embedding" in name:
                weight.mul_(4)
    optimizer = script.make_optimizer(model.tokens, model.args)
    generator = torch.Generator().manual_seed(0)
    latents = {"mean": torch.randn(2, 4, 8, 8, generator=generator), "std": torch.zeros(2, 4, 8, 8)}
    batch = {**latents, "time_ids": torch.full((2, 6), 64.0), "prompt": ["a photo of <my-pot>", "my <my-pot>"]}

    def loss():
        return model.loss({**batch, "generators": generators(1, 2)})

    losses = []
    for _ in range(150):
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        by_chance = []
        for seed in range(30):
            for token in model.tokens:
                random = torch.randn(token.parameter.shape, generator=torch.Generator().manual_seed(seed))
                token.parameter.copy_(script.normalize(random))
            by_chance.append(loss().item())
    assert losses[-1] < min(by_chance)
    assert losses[-1] < losses[0] - 2 * np.std(by_chance)


@pytest.mark.parametrize(
    "row, flags, norm",
    [
        ("TI", "--magnitude free --optimizer adamw", None),
        ("CrossInit", "--magnitude free --optimizer adamw --init contextual --reg_weight 1e-5", None),
        ("AdamW on the sphere", "--optimizer adamw", "mean"),
        ("smallest magnitude", "--magnitude min", "min"),
        ("magnitude 5", "--magnitude 5.0", 5.0),
        ("twice the mean", "--magnitude 2mean", "2mean"),
        ("no prior", "--kappa 0", "mean"),
        ("strong prior", "--kappa 5e-4", "mean"),
    ],
)
def test_every_row_of_the_papers_tables_is_one_command(train, small, row, flags, norm):
    out = train(*flags.split())
    for rows, matrix in zip(embeddings(out), vocabulary(small), strict=True):
        norms = matrix.double().norm(dim=-1)
        mean = norms.mean().item()
        expected = {"mean": mean, "2mean": 2 * mean, "min": norms.min().item()}.get(norm, norm)
        if expected is None:  # free: the norm is wherever AdamW took it
            assert rows.norm().item() != pytest.approx(norms.mean().item(), rel=1e-3)
        else:
            assert rows.norm().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", ["fast", "released", None])
def test_a_preset_is_its_options_and_what_is_given_wins(train, options, tmp_path, preset):
    values = script.MODEL_CLASS.presets[preset or "default"]["rsgd"]
    settings = dict(zip(script.PRESET_OPTIONS, values, strict=True))
    rest = {name: value for name, value in settings.items() if name != "max_train_steps"}
    chosen = embeddings(train(preset=preset, max_train_steps=3, output_dir=tmp_path / "preset"))
    written = embeddings(train(preset=None, max_train_steps=3, output_dir=tmp_path / "written", **rest))
    assert all(torch.equal(a, b) for a, b in zip(chosen, written, strict=True))
    assert not torch.equal(chosen[0], embeddings(train(max_train_steps=3))[0])
    args = script.parse_args(options(preset=preset, max_train_steps=None, learning_rate=0.003), script.MODEL_CLASS)
    assert (args.max_train_steps, args.learning_rate) == (settings["max_train_steps"], 0.003)


def test_the_papers_and_the_authors_settings(options):
    def settings(*flags, **changes):
        args = script.parse_args(options(*flags, max_train_steps=None, **changes), script.MODEL_CLASS)
        return args.max_train_steps, args.learning_rate, args.lr_scheduler, args.magnitude

    baseline = ("--magnitude", "free", "--optimizer", "adamw")
    assert settings() == (500, 5e-3, "constant", "mean")
    assert settings(preset="released") == (400, 0.04, "constant", "mean")
    assert settings(*baseline, preset="released") == (400, 0.02, "constant", "free")
    assert settings(*baseline, preset=None) == settings(*baseline) == (500, 5e-3, "constant", "free")


def test_scale_lr_wants_a_rate_of_its_own(train):
    with pytest.raises(script.UserError, match="--scale_lr multiplies --learning_rate"):
        train("--scale_lr")


def test_scale_lr_multiplies_the_rate_and_what_is_saved_repeats_the_run(train, tmp_path):
    scaled = train("--scale_lr", learning_rate=0.01, gradient_accumulation_steps=2)  # with a batch of 2
    saved = json.loads((scaled / "training_options.json").read_text())
    assert saved["options"]["learning_rate"] == saved["derived"]["learning_rate"] == 0.04
    assert (
        safe_open(scaled / FILES[0], "pt").metadata()["dti.learning_rate"] == "0.04"
        and saved["options"]["scale_lr"] is False
    )
    plain = train(learning_rate=0.04, gradient_accumulation_steps=2, output_dir=tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(embeddings(scaled), embeddings(plain), strict=True))


def test_the_regularisation_holds_the_embedding_back(train, small):
    start = train("--init", "contextual", output_dir=small / "start", max_train_steps=1, learning_rate=1e-9)
    free = ("--magnitude", "free", "--optimizer", "adamw", "--init", "contextual", "--learning_rate", "0.05")
    moved = [
        (a - b / b.norm() * a.norm()).norm().item()
        for weight in (0.0, 1e3)
        for a, b in [
            (embeddings(train(*free, reg_weight=weight, max_train_steps=20))[0], embeddings(start)[0]),
        ]
    ]
    assert moved[1] < 0.5 * moved[0]


# A stock pipeline does with the files what training did.


@pytest.mark.parametrize("initializer", ["teapot", "stuffed animal"])
def test_conditioning_is_the_stock_pipelines_bit_for_bit(train, small, models_seen, initializer):
    out = train(initializer_token=initializer)
    pipe = stock_pipeline(small, out)
    prompts = ["a photo of <my-pot> on the grass", "<my-pot>, painting", "a <my-pot> and a <my-pot>"]
    with torch.no_grad():
        ours = models_seen[0].encode_prompts(prompts)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    assert len(embeddings(out)[0]) == len(initializer.split())
    assert torch.equal(ours[0], embeds) and torch.equal(ours[1], pooled)


def test_the_web_file_holds_the_same_and_says_what_it_is(train):
    out = train()
    web = load_file(out / "my-pot.safetensors")
    assert torch.equal(web["clip_l"], embeddings(out)[0]) and torch.equal(web["clip_g"], embeddings(out)[1])
    with safe_open(out / "my-pot.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert metadata["modelspec.trigger_phrase"] == "<my-pot>"
    assert metadata["dti.base_model"] == "sdxl"  # a local folder's path is nobody else's business
    assert metadata["dti.kappa"] == "0.0001" and metadata["dti.steps"] == "4"
    assert metadata["dti.learning_rate"] == "0.005" and metadata["dti.lr_scheduler"] == "constant"


def test_pooling_at_the_highest_id_is_blind_to_the_rest_of_the_prompt(train, small, options, tmp_path):
    """SDXL's defect and its remedy, on a stock pipeline (transformers pools at the new word where the config says 2)."""
    pipe = stock_pipeline(small, train())
    assert pipe.text_encoder_2.config.eos_token_id == 2

    def pooled(prompt, pipe=pipe):
        with torch.no_grad():
            return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")[2]

    on_grass, in_a_vase = "a photo of <my-pot> on the grass", "a photo of <my-pot> in a vase"
    assert torch.equal(pooled(on_grass), pooled(in_a_vase))
    model = script.MODEL_CLASS(script.parse_args(options(), script.MODEL_CLASS))
    printed = model.loading_snippet(torch.device("cpu"), torch.float32).splitlines()
    exec(next(line for line in printed if "eos_token_id" in line), {"pipe": pipe})
    assert not torch.allclose(pooled(on_grass), pooled(in_a_vase), atol=1e-3)
    # A pipeline that is saved keeps it, with the new word.
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    assert torch.allclose(pooled(on_grass, again), pooled(on_grass), atol=1e-6)
    assert not torch.allclose(pooled(on_grass, again), pooled(in_a_vase, again), atol=1e-3)


def test_training_pools_as_told_and_validation_at_the_end_token(train, small, monkeypatch):
    pooled_at = {"training": set(), "validation": set()}

    def watch(place, name, owner, encoder):
        original = getattr(owner, name)

        def watched(first, *args, **kwargs):
            pooled_at[place].add(encoder(first).text_model.eos_token_id)
            return original(first, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch("training", "encode_prompts", script.MODEL_CLASS, lambda model: model.text_encoders[1])
    watch("validation", "encode_prompt", StableDiffusionXLPipeline, lambda pipeline: pipeline.text_encoder_2)
    end = stock_pipeline(small).tokenizer_2.eos_token_id
    stock = embeddings(train(validation_prompt="a {}", validation_steps=2, num_validation_images=1))
    assert pooled_at == {"training": {2}, "validation": {end}}
    pooled_at["training"].clear()
    eos = embeddings(train(pooling="eos"))
    assert pooled_at["training"] == {end}
    assert not torch.equal(stock[1], eos[1])


# A run repeats to the bit, and nothing beside the training disturbs it.


def test_the_seed_decides_everything(train, tmp_path):
    first, again, other = (embeddings(train(seed=seed, output_dir=tmp_path / str(i))) for i, seed in enumerate("005"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_seed_of_its_own_is_noted_and_repeats_the_run(train, tmp_path):
    first = train(seed=None)
    seed = json.loads((first / "training_options.json").read_text())["derived"]["seed"]
    again = train(seed=seed, output_dir=tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(embeddings(first), embeddings(again), strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        "--validation_prompt {} --validation_steps 1 --num_validation_images 1 --validate_first",
        "--save_steps 1 --logging_steps 1 --report_to tensorboard",
    ],
)
def test_what_only_watches_changes_nothing(train, tmp_path, flags):
    plain = embeddings(train(output_dir=tmp_path / "plain"))
    watched = embeddings(train(*flags.split()))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_worker_processes_change_nothing(train, tmp_path):
    alone = embeddings(train("--no_cache_latents", output_dir=tmp_path / "alone"))
    workers = embeddings(train("--no_cache_latents", dataloader_num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))


def test_cached_latents_are_the_encoded_ones(train, tmp_path):
    """With one possible view of each photograph, caching is only a matter of when the encoding happens."""
    cached = embeddings(train("--center_crop", output_dir=tmp_path / "cached"))
    fresh = embeddings(train("--center_crop", "--no_cache_latents"))
    for a, b in zip(cached, fresh, strict=True):
        assert script.angle(a, b).max() < 1e-3


def test_the_cache_keeps_the_posterior_and_the_vae_leaves(small, options):
    model = script.MODEL_CLASS(script.parse_args(options(crops_per_image=6), script.MODEL_CLASS))
    photographs = script.load_photographs(model.args)
    model.load(torch.float32)
    cache = script.cache_latents(model, photographs, 0, Accelerator(cpu=True))
    assert len(cache) == 5 and 1 < max(map(len, cache)) <= 6
    view = cache[0][0]
    top, left = (int(n) for n in view["time_ids"][2:4])
    image = script.open_image(photographs[0]["image"])
    pixels = script.render_view(image, None, script.View(False, top, left), 64)["pixel_values"]
    with torch.no_grad():
        posterior = model.vae.encode(pixels[None]).latent_dist
    torch.testing.assert_close(view["mean"], posterior.mean[0] * 0.13025)
    torch.testing.assert_close(view["std"], posterior.std[0] * 0.13025)


@pytest.mark.parametrize("split", ["--train_batch_size 2 --gradient_accumulation_steps 2", "two processes"])
def test_only_the_total_batch_matters(train, launch, tmp_path, split):
    """The gradient is averaged before it is normalised, and noise belongs to the example: four are four, however divided."""
    whole = embeddings(train(train_batch_size=4, output_dir=tmp_path / "whole"))
    if split == "two processes":  # `accelerate launch` starts several CPU processes only through MPI
        result = launch(launcher="torch.distributed.run --standalone --nproc_per_node 2", train_batch_size=2)
        assert result.returncode == 0, result.stderr
        assert "total batch size = 4" in result.stderr and result.stdout.count("Saved to") == 1
    else:
        train(*split.split())
    for a, b in zip(whole, embeddings(tmp_path / "out"), strict=True):
        assert script.angle(a, b).max() < 0.01  # of 4 x 0.29 degrees


# Precision, memory switches, schedule.


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_models_train_a_float32_direction(train, small, models_seen, precision):
    steps, eta = 6, 5e-3
    out = train(mixed_precision=precision, max_train_steps=steps, learning_rate=eta)
    model = models_seen[0]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {model.denoiser.dtype, *(e.dtype for e in model.text_encoders)} == {dtype}
    assert model.vae.dtype == torch.float32
    assert {token.parameter.dtype for token in model.tokens} == {torch.float32}
    start = script.CLIPTokenizer.from_pretrained(small / "sdxl" / "tokenizer")("teapot").input_ids[1]
    for rows, matrix in zip(embeddings(out), vocabulary(small), strict=True):
        m_star = matrix.double().norm(dim=-1).mean().item()  # of the vocabulary as shipped, not rounded to half
        assert rows.norm().item() == pytest.approx(m_star, rel=1e-6)
        assert 0.2 < script.angle(rows, matrix[[start]]).item() <= steps * math.degrees(math.atan(eta)) + 1e-3


def test_gradient_checkpointing_changes_memory_not_the_result(train, tmp_path, models_seen):
    plain = embeddings(train(output_dir=tmp_path / "plain"))
    saving = embeddings(train("--gradient_checkpointing"))
    assert models_seen[1].denoiser.is_gradient_checkpointing
    assert all(encoder.is_gradient_checkpointing and encoder.training for encoder in models_seen[1].text_encoders)
    for a, b in zip(plain, saving, strict=True):
        assert script.angle(a, b).max() < 1e-3


@pytest.mark.slow
def test_compiled_blocks_give_the_same_result(train, tmp_path):
    plain = embeddings(train(output_dir=tmp_path / "plain"))
    compiled = embeddings(train("--compile"))
    for a, b in zip(plain, compiled, strict=True):
        assert script.angle(a, b).max() < 1e-2


def test_the_logged_learning_rate_is_the_one_used(train, monkeypatch, small):
    entries = []
    add = script.History.add
    monkeypatch.setattr(script.History, "add", lambda self, *args: entries.append(add(self, *args)) or entries[-1])
    train(max_train_steps=4, lr_scheduler="linear", logging_steps=1, learning_rate=0.04, lr_warmup_steps=1, kappa=0)
    for entry in entries:
        turned = math.degrees(math.atan(entry["learning_rate"]))
        assert entry["text_encoder/angle_since_last_log"] == pytest.approx(turned, rel=1e-3, abs=1e-4)
    assert [round(entry["learning_rate"], 6) for entry in entries] == [0.0, 0.04, 0.026667, 0.013333]


def test_saved_on_the_way(train):
    out = train(save_steps=2, max_train_steps=5)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert [n for n in names if "steps" in n] == sorted(
        f"{stem}-steps-{step}.safetensors"
        for step in (2, 4)
        for stem in ("learned_embeds", "learned_embeds_2", "my-pot")
    )
    half_way, end = embeddings(out, suffix="-steps-2")[0], embeddings(out)[0]
    assert 0 < script.angle(half_way, end).item() <= 3 * math.degrees(math.atan(5e-3)) + 1e-3


def test_a_warm_start_goes_on_from_where_it_was(train, tmp_path):
    first = train(output_dir=tmp_path / "first")
    second = train(initializer_token=None, init_embedding=first, max_train_steps=1)
    turned = script.angle(embeddings(first)[0], embeddings(second)[0]).item()
    assert turned == pytest.approx(math.degrees(math.atan(5e-3)), rel=1e-3)


def check_velocity(model, batch: dict, monkeypatch) -> None:
    """The loss is the mean squared error to the velocity: alpha noise - sigma x at the timestep drawn."""
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    seen, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda *args: seen.append(predict(*args)) or seen[-1])
    latents = {"mean": clean, "std": torch.zeros_like(clean)}
    loss = model.loss({**latents, **batch, "generators": generators(1)})
    generator = torch.Generator().manual_seed(1)
    torch.randn(clean.shape[1:], generator=generator)  # the posterior's sample, of deviation zero
    noise = torch.randn(clean.shape[1:], generator=generator)
    alpha = model.noise_scheduler.alphas_cumprod[torch.randint(1000, (1,), generator=generator)]
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(loss, (seen[0] - velocity).square().mean())


def test_v_prediction_has_the_velocity_for_target(loaded, monkeypatch):
    model = loaded()
    model.noise_scheduler.register_to_config(prediction_type="v_prediction")
    check_velocity(model, {"time_ids": torch.full((1, 6), 64.0), "prompt": ["a <my-pot>"]}, monkeypatch)


@pytest.mark.parametrize("negative, drawn_without", [(None, None), ("", ""), ("a {}, blurred", "a <my-pot>, blurred")])
def test_validation_draws_what_a_stock_pipeline_draws(train, small, negative, drawn_without):
    """The grid's first picture is a stock pipeline's: DDIM as the paper samples, pooled at the end token, same seed."""
    few = {"num_validation_images": 1, "validation_inference_steps": 5, "max_train_steps": 2}
    out = train(validation_prompt="a photo of {} on grass", validation_negative_prompt=negative, **few)
    pipe = stock_pipeline(small, out)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    image = pipe(
        "a photo of <my-pot> on grass",
        negative_prompt=drawn_without,
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    grid = np.asarray(Image.open(out / "validation-2.png")).astype(int)
    assert np.abs(grid[-192::3, :192:3] - np.asarray(image).astype(int)).max() <= 1


def test_validation_starts_at_step_0_when_asked_and_keeps_its_seeds(train, monkeypatch, tmp_path):
    """Every sheet is drawn from the same noise, so that sheets of different steps and prompts compare."""
    drawn = []
    call = StableDiffusionXLPipeline.__call__

    def watched(self, **options):
        drawn.append((options["prompt"], options["generator"].initial_seed(), options["negative_prompt"]))
        return call(self, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", watched)
    few = {"num_validation_images": 2, "validation_inference_steps": 1, "max_train_steps": 2, "validation_steps": 1}
    prompts = ["--validation_prompt", "a {}", "--validation_prompt", "my {}"]
    out = train(*prompts, "--validate_first", **few, seed=7)
    assert [step for step in range(3) if (out / f"validation-{step}.png").is_file()] == [0, 1, 2]
    assert (
        drawn
        == [("a <my-pot>", 7, None), ("a <my-pot>", 8, None), ("my <my-pot>", 7, None), ("my <my-pot>", 8, None)] * 3
    )
    drawn.clear()
    train(*prompts, **few, output_dir=tmp_path / "without")
    assert not (tmp_path / "without" / "validation-0.png").exists() and len(drawn) == 8


def test_step_0_shows_the_initializer(train, small):
    """Before a step the new word is the class word at the vocabulary's mean norm: its picture is one of the class."""
    out = train("--validate_first", "--validation_prompt", "a {}", num_validation_images=1, magnitude=5)
    pipe = stock_pipeline(small)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        with torch.no_grad():
            row = encoder.get_input_embeddings().weight[pipe.tokenizer("teapot").input_ids[1]]
            row.mul_(5 / row.norm())
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    image = pipe("a teapot", height=64, width=64, num_inference_steps=25, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(Image.open(out / "validation-0.png")).astype(int)
    assert np.abs(grid[-192::3, ::3] - np.asarray(image.images[0]).astype(int)).max() <= 1


def test_two_transformers_generations_name_weights_differently(small, options, tmp_path, monkeypatch):
    """A file whose names do not fit leaves random weights behind a mere warning: refuse it."""
    broken = tmp_path / "broken"
    shutil.copytree(small / "sdxl", broken)
    path = broken / "text_encoder" / "model.safetensors"
    save_file({f"other.{k}": v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    args = script.parse_args(options(pretrained_model_name_or_path=broken), script.MODEL_CLASS)
    with pytest.raises(script.UserError, match="text_encoder lacks the weights"):
        script.MODEL_CLASS(args).load(torch.float32)


def test_reports_what_it_left_out(train, monkeypatch, caplog):
    def loss(model, batch):
        return sum(token.embedding().sum() * math.nan for token in model.tokens)

    monkeypatch.setattr(script.MODEL_CLASS, "loss", loss)
    with caplog.at_level("WARNING", logger="dti"):
        out = train(max_train_steps=3)
    assert "6 updates of a vector were left out" in caplog.text
    assert all(rows.isfinite().all() for rows in embeddings(out))


class OnDevice:
    """A part of the model that only knows where it is."""

    config = SimpleNamespace(scaling_factor=1.0)
    training = False

    def __init__(self, device: str):
        self.device = torch.device(device)

    def to(self, device) -> None:
        self.device = torch.device(device)

    def parameters(self):
        yield self

    def train(self, mode: bool = True) -> None:
        pass

    eval = train


@pytest.mark.parametrize("saving", [True, False])
def test_with_gradient_checkpointing_the_vae_decodes_alone(saving, tmp_path):
    where = {}

    def places(moment: str) -> None:
        where[moment] = [part.device.type for part in (model.vae, model.denoiser, *model.text_encoders)]

    class Vae(OnDevice):
        def decode(self, latents):
            places("decoding")
            return SimpleNamespace(sample=torch.zeros(1, 3, 16, 16))

    def sample_latents(prompt, negative_prompt, seed):
        places("sampling")
        return [torch.zeros(1, 4, 2, 2)]

    model = SimpleNamespace(vae=Vae("cpu"), denoiser=OnDevice("cuda"), text_encoders=[OnDevice("cuda")])
    model.sample_latents, model.decode = sample_latents, lambda latents: model.vae.decode(latents).sample
    model.args = argparse.Namespace(gradient_checkpointing=saving, output_dir=tmp_path, validation_prompt=["a {}"])
    model.args.placeholder_token, model.args.validation_negative_prompt = "<x>", None
    script.validate(model, SimpleNamespace(device=torch.device("cuda"), trackers=[]), seed=0, step=1)
    places("afterwards")
    assert where["sampling"] == ["cpu", "cuda", "cuda"] and where["afterwards"] == ["cpu", "cuda", "cuda"]
    assert where["decoding"] == (["cuda", "cpu", "cpu"] if saving else ["cuda", "cuda", "cuda"])
