"""SANA end to end: conditioning true to SanaPipeline, no wasted positions, flow matching, and files that load and work."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from pipeline_sana_textual_inversion import SanaTextualInversionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import train_dti_sana as script
import train_dti_sdxl


PROMPTS = ["A photo of <my-pot> on the Grass", "<my-pot>, painting", "a <my-pot> beside another toy teapot"]


@pytest.fixture
def trainer():
    return script


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def embedding(folder: Path, name: str = "learned_embeds") -> torch.Tensor:
    return load_file(folder / f"{name}.safetensors")["<my-pot>"]


def pipeline(small: Path, folder: Path) -> SanaTextualInversionPipeline:
    """The pipeline as a user loads it, with the learned file."""
    pipe = SanaTextualInversionPipeline.from_pretrained(small / "sana")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(folder))
    return pipe


def vocabulary(small: Path) -> torch.Tensor:
    return SanaPipeline.from_pretrained(small / "sana").text_encoder.get_input_embeddings().weight.detach()


def norms(small: Path) -> torch.Tensor:
    """Of the vocabulary's rows, without Gemma's padding token, whose row is zero."""
    found = vocabulary(small).double().norm(dim=-1)
    assert (found == 0).sum() == 1
    return found[found > 0]


def start_row(small: Path, word: str = "teapot") -> torch.Tensor:
    pipe = SanaPipeline.from_pretrained(small / "sana")
    return vocabulary(small)[pipe.tokenizer(word, add_special_tokens=False).input_ids]


# The command of the README, in a process of its own.


def test_the_main_job_as_a_user_runs_it(launch, small, tmp_path):
    result = launch(max_train_steps=12, validation_prompt="a photo of {} on grass", report_to="tensorboard")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    rows, m_star = embedding(out), norms(small).mean().item()
    assert rows.dtype == torch.float32 and rows.norm().item() == pytest.approx(m_star, rel=1e-6)
    moved = script.angle(rows, start_row(small)).item()
    assert 0.2 < moved <= 12 * math.degrees(math.atan(0.02)) + 1e-3  # the preset is the paper's
    assert Image.open(out / "validation-12.png").size == (4 * 192, 192 + 16)
    assert Image.open(out / "training_curves.png").width > 500

    # The printed lines draw it.
    snippet = re.search(r"^import torch\n.*?picture\.png\"\)$", result.stdout, re.S | re.M).group()
    run = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    warned = re.sub(r"Keyword arguments \{'trust_remote_code': True\} are .* ignored\.", "", run.stderr)  # before 0.36
    assert not re.search("dtype|deprecated|ignored", warned), warned  # diffusers has renamed torch_dtype
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (64, 64) and np.asarray(picture).std() > 0


# What is learned, and what is left alone.


def test_one_step_turns_by_arctan_eta(train, small):
    out = train(max_train_steps=1, learning_rate=0.02)
    assert script.angle(embedding(out), start_row(small)).item() == pytest.approx(
        math.degrees(math.atan(0.02)), rel=1e-4
    )


def test_everything_else_is_bit_identical_and_frozen(train, small, models_seen):
    train()
    model, stock = models_seen[0], SanaPipeline.from_pretrained(small / "sana")
    state = {k.replace("vocabulary.", ""): v for k, v in model.text_encoders[0].state_dict().items()}
    assert all(torch.equal(state[k], v) for k, v in stock.text_encoder.state_dict().items())
    for part, original in ((model.denoiser, stock.transformer), (model.vae, stock.vae)):
        state = part.state_dict()
        assert all(torch.equal(state[k], v) for k, v in original.state_dict().items())
    parts = (model.denoiser, model.vae, *model.text_encoders)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    "flags, norm",
    [
        ("--magnitude free --optimizer adamw", None),
        ("--magnitude free --optimizer adamw --init contextual --reg_weight 1e-5", None),
        ("--optimizer adamw", "mean"),
        ("--magnitude min", "min"),
        ("--magnitude 5.0 --kappa 0", 5.0),
    ],
)
def test_the_rows_of_the_papers_tables(train, small, flags, norm):
    rows = embedding(train(*flags.split()))
    expected = {"mean": norms(small).mean().item(), "min": norms(small).min().item()}.get(norm, norm)
    if expected is None:
        assert rows.norm().item() != pytest.approx(norms(small).mean().item(), rel=1e-3)
    else:
        assert rows.norm().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", ["fast", "released", None])
def test_every_preset_keeps_the_mean_norm(train, small, preset):
    """SDXL's default and fast take twice the mean, of which the small SANA learned no more."""
    rows = embedding(train(preset=preset, max_train_steps=1))
    assert rows.norm().item() == pytest.approx(norms(small).mean().item(), rel=1e-6)


def test_the_seed_decides_everything(train, tmp_path):
    first, again, other = (embedding(train(seed=seed, output_dir=tmp_path / str(i))) for i, seed in enumerate("005"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bf16_models_train_a_float32_direction(train, small, models_seen):
    out = train(mixed_precision="bf16", max_train_steps=6)
    model = models_seen[0]
    assert {model.denoiser.dtype, model.text_encoders[0].dtype} == {torch.bfloat16}
    assert model.vae.dtype == model.tokens[0].parameter.dtype == torch.float32
    m_star = norms(small).mean().item()
    assert embedding(out).norm().item() == pytest.approx(m_star, rel=1e-6)
    assert script.angle(embedding(out), start_row(small)).item() > 0.2


def test_fp16_is_warned_of(train, caplog):
    with caplog.at_level("WARNING", logger="dti"):
        train(mixed_precision="fp16", max_train_steps=1)
    assert "Use bf16" in caplog.text


def test_gradient_checkpointing_changes_memory_not_the_result(train, tmp_path, models_seen):
    plain, saving = embedding(train(output_dir=tmp_path / "plain")), embedding(train("--gradient_checkpointing"))
    assert models_seen[1].denoiser.is_gradient_checkpointing and models_seen[1].text_encoders[0].training
    assert script.angle(plain, saving).max() < 1e-3


def test_cached_latents_are_the_encoded_ones(train, tmp_path):
    cached = embedding(train("--center_crop", output_dir=tmp_path / "cached"))
    fresh = embedding(train("--center_crop", "--no_cache_latents"))
    assert script.angle(cached, fresh).max() < 1e-3


# Conditioning true to SanaPipeline.


@pytest.mark.parametrize("initializer", ["teapot", "stuffed animal"])
@pytest.mark.parametrize("instruction", [None, "default"])
def test_conditioning_is_the_pipelines(train, small, models_seen, initializer, instruction):
    """Padded like the pipeline: to the bit, masks too. Padded to the longest prompt: the same wherever the mask lets through."""
    out = train(initializer_token=initializer, complex_human_instruction=instruction)
    model, pipe = models_seen[0], pipeline(small, out)
    texts = None if instruction is None else model.instruction.split("\n")
    with torch.no_grad():
        expected, mask, *_ = pipe.encode_prompt(PROMPTS, False, device="cpu", complex_human_instruction=texts)
        ours, our_mask = model.encode_prompts(PROMPTS, padding="max_length")
        short, short_mask = model.encode_prompts(PROMPTS)
    assert len(embedding(out)) == len(initializer.split())
    assert torch.equal(ours, expected) and torch.equal(our_mask, mask)
    length = short.shape[1]
    assert length < 60 and short_mask.sum() == mask.sum() and torch.equal(short_mask, mask[:, :length])
    visible = short_mask.bool()
    torch.testing.assert_close(short[visible], expected[:, :length][visible], rtol=1e-4, atol=1e-5)


def test_the_pipelines_own_instruction_is_selectable(loaded):
    given = {option: loaded(complex_human_instruction=option).instruction for option in (None, "Draw: ", "default")}
    assert given[None] == "" and given["Draw: "] == "Draw: " and "User Prompt" in given["default"]


def test_the_space_before_the_new_word_is_a_token_of_its_own_in_training_as_in_the_pipeline(train, small, models_seen):
    pipe = pipeline(small, train())
    ours = script.Sana.to_pipeline_prompt("a <my-pot> here", models_seen[0].tokenizers[0])
    pieces = models_seen[0].tokenizers[0].tokenize(ours)
    assert pieces[pieces.index("<my-pot>") - 1] == "▁"
    assert pieces == pipe.tokenizer.tokenize(pipe._text_preprocessing("a <my-pot> here")[0])


def test_capitals_are_refused_with_the_reason(train):
    with pytest.raises(script.UserError, match="'<My-Pot>' .* as the pipeline tokenizes it: .*lower case"):
        train(placeholder_token="<My-Pot>")


# No wasted positions.


@pytest.mark.parametrize("instruction", [None, pytest.param("default", marks=pytest.mark.slow)])
def test_short_padding_gives_the_loss_and_gradient_of_all_positions(loaded, monkeypatch, instruction):
    model = loaded(complex_human_instruction=instruction)
    latents = torch.randn(3, model.vae.config.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    encode, positions = model.encode_prompts, []

    def loss_and_gradient(padding):
        def watched(prompts, _):
            embeds, mask = encode(prompts, padding=padding)
            positions.append(embeds.shape[1])
            return embeds, mask

        monkeypatch.setattr(model, "encode_prompts", watched)
        batch = {"latents": latents, "prompt": PROMPTS, "generators": generators(1, 2, 3)}
        loss = model.loss(batch)
        model.tokens[0].parameter.grad = None
        loss.backward()
        return loss.detach(), model.tokens[0].parameter.grad

    short, full = loss_and_gradient("longest"), loss_and_gradient("max_length")
    assert positions[0] < 60 and positions[1] == 300
    torch.testing.assert_close(short[0], full[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(short[1], full[1], rtol=1e-3, atol=1e-7)


def test_a_repeated_prompt_is_encoded_once_and_no_key_value_cache_is_built(loaded):
    model = loaded()
    outputs = []
    hook = model.text_encoders[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    embeds, mask = model.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]])
    hook.remove()
    assert outputs[0].last_hidden_state.shape[0] == 2 and outputs[0].past_key_values is None
    assert len(embeds) == 4 and torch.equal(embeds[0], embeds[2]) and torch.equal(mask[0], mask[3])


# Flow matching.


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_the_loss_is_flow_matching_at_the_schedulers_sigmas(loaded, small, scheme):
    """Against the formulas written out: x_t = (1 - sigma) x + sigma noise, target noise - x, SD3's weights."""
    model = loaded(weighting_scheme=scheme)
    latents = torch.randn(2, model.vae.config.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = {}

    def forward(module, inputs, kwargs, output):
        seen.update(noisy=inputs[0], timestep=kwargs["timestep"], prediction=output.sample)

    hook = model.denoiser.register_forward_hook(forward, with_kwargs=True)
    loss = model.loss({"latents": latents, "prompt": PROMPTS[:2], "generators": generators(1, 2)})
    hook.remove()

    again = generators(1, 2)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in again])
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(small / "sana", subfolder="scheduler")
    sigma = seen["timestep"].view(-1, 1, 1, 1) / scheduler.config.num_train_timesteps
    torch.testing.assert_close(seen["noisy"], (1 - sigma) * latents + sigma * noise)
    weight = {"cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)), "sigma_sqrt": sigma**-2}.get(scheme, 1.0)
    expected = (weight * (seen["prediction"] - (noise - latents)) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    if scheme == "none":
        u = torch.cat([torch.rand(1, generator=generator) for generator in again])
        torch.testing.assert_close(seen["timestep"], scheduler.timesteps[(u * 1000).long()])


def test_validation_draws_what_the_pipeline_draws(train, small):
    few = {"num_validation_images": 1, "validation_inference_steps": 5}
    out = train(validation_prompt="A photo of {} on grass", validation_negative_prompt="A {}, Blurred", **few)
    pipe = pipeline(small, out)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    image = pipe(
        "A photo of <my-pot> on grass",
        negative_prompt="A <my-pot>, Blurred",
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(0),
        complex_human_instruction=None,
        use_resolution_binning=False,
    ).images[0]
    grid = np.asarray(Image.open(out / "validation-4.png")).astype(int)
    assert np.abs(grid[-192::3, :192:3] - np.asarray(image).astype(int)).max() <= 1


# Files.


def test_the_gemma_file_holds_the_same_and_loads_under_a_name(train, small):
    out = train()
    web = load_file(out / "my-pot.safetensors")
    assert list(web) == ["gemma"] and torch.equal(web["gemma"], embedding(out))
    with safe_open(out / "my-pot.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "<my-pot>"
    pipe = SanaTextualInversionPipeline.from_pretrained(small / "sana")
    pipe.load_textual_inversion(str(out / "my-pot.safetensors"), token="<my-pot>")
    row = pipe.tokenizer.convert_tokens_to_ids("<my-pot>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[row], embedding(out)[0])


FILES = ("out/learned_embeds.safetensors", "out/my-pot.safetensors")


@pytest.mark.parametrize("start", ["out", *(pytest.param(file, marks=pytest.mark.slow) for file in FILES)])
def test_a_warm_start_goes_on_from_any_of_the_files(train, tmp_path, start):
    first, once = embedding(train()), {"max_train_steps": 1, "learning_rate": 5e-3}
    second = train(initializer_token=None, init_embedding=tmp_path / start, output_dir=tmp_path / "second", **once)
    assert script.angle(first, embedding(second)).item() == pytest.approx(math.degrees(math.atan(5e-3)), rel=1e-3)


@pytest.mark.parametrize("module, folder, other", [(script, "sdxl", "sdxl"), (train_dti_sdxl, "sana", "sana")])
def test_the_other_models_folder_names_the_other_script(small, options, module, folder, other):
    args = module.parse_args(options(pretrained_model_name_or_path=small / folder), module.MODEL_CLASS)
    with pytest.raises(module.UserError, match=f"use train_dti_{other}.py"):
        module.check_model(module.MODEL_CLASS(args))
