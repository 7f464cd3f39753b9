"""LoRA beside the new word: what stock pipelines read does what training did, the base model stays, and nothing is lost."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import SanaPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import train_dti_sana
import train_dti_sdxl


FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(
    params=[pytest.param(train_dti_sdxl, id="sdxl"), pytest.param(train_dti_sana, id="sana", marks=pytest.mark.slow)]
)
def trainer(request):
    return request.param


def stock_pipeline(trainer, small):
    cls = StableDiffusionXLPipeline if trainer is train_dti_sdxl else SanaPipeline
    return cls.from_pretrained(small / trainer.__name__.removeprefix("train_dti_"), torch_dtype=torch.float32)


def prediction(trainer, denoiser) -> torch.Tensor:
    """What the denoiser makes of some noise and some context."""
    generator = torch.Generator().manual_seed(0)
    config = denoiser.config
    width = config.cross_attention_dim if trainer is train_dti_sdxl else config.caption_channels
    side = 8 if trainer is train_dti_sdxl else config.sample_size
    noise = torch.randn(1, config.in_channels, side, side, generator=generator)
    context = torch.randn(1, 5, width, generator=generator)
    if trainer is train_dti_sdxl:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.ones(1, pooled), "time_ids": torch.full((1, 6), 64.0)}
        call = {"timestep": torch.tensor([500]), "added_cond_kwargs": added}
    else:
        call = {"timestep": torch.tensor([500.0]), "encoder_attention_mask": torch.ones(1, 5)}
    with torch.no_grad():
        return denoiser(noise, encoder_hidden_states=context, **call).sample


def test_a_stock_pipeline_reads_what_was_trained_and_can_take_it_off_again(train, trainer, small, models_seen):
    # Strong enough to be seen, and with another alpha than the rank, which the file must tell.
    out = train(rank=4, lora_alpha=12, lora_learning_rate=0.02, max_train_steps=5)
    pipe = stock_pipeline(trainer, small)
    denoiser = getattr(pipe, trainer.MODEL_CLASS.denoiser_name)
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    plain = prediction(trainer, denoiser)
    pipe.load_lora_weights(str(out), weight_name=FILE)  # diffusers 0.35 wants the name while offline
    adapted = prediction(trainer, denoiser)
    trained = prediction(trainer, models_seen[0].denoiser)
    assert (adapted - plain).norm() > 0.02 * plain.norm()  # the adapters alone, no new word, change the picture
    assert torch.allclose(adapted, trained, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(prediction(trainer, denoiser), plain)

    # Beneath the adapters the model is, to the bit, what it was.
    state = models_seen[0].denoiser.state_dict()
    state = {k.replace("base_layer.", ""): v for k, v in state.items() if "lora_" not in k}
    assert state.keys() == before.keys() and all(torch.equal(state[k], v) for k, v in before.items())


def test_the_first_step_is_adamws(train, small):
    """From B = 0, AdamW moves B by the learning rate (in the gradient's sign) and A by its weight decay alone."""
    rate, decay = 0.003, 0.1
    run = {"rank": 2, "lora_learning_rate": rate, "adam_weight_decay": decay, "lora_target_modules": "to_q"}
    once = load_file(train(**run, max_train_steps=1) / FILE)
    b = torch.cat([rows.flatten() for name, rows in once.items() if name.endswith("lora_B.weight")])
    assert (b.abs() > 0.9 * rate).float().mean() > 0.8 and b.abs().max() <= 1.001 * rate

    # The schedule is the adapters' too: while the rate is zero nothing moves, neither A nor B.
    still = load_file(train(**run, max_train_steps=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=1) / FILE)
    for name, rows in still.items():
        if name.endswith("lora_B.weight"):
            assert not rows.any()
        else:
            assert torch.allclose(once[name], (1 - rate * decay) * rows, rtol=1e-5, atol=1e-9)


def test_directions_first_then_jointly(train, small):
    run = {"rank": 2, "max_train_steps": 4, "lora_start_step": 2, "save_steps": 1}
    out = train(**run)

    def moved(suffix: str) -> bool:
        state = load_file(out / FILE.replace(".", f"{suffix}.", 1))
        return any(rows.any() for name, rows in state.items() if name.endswith("lora_B.weight"))

    assert [moved(suffix) for suffix in ("-steps-1", "-steps-2", "-steps-3", "")] == [False, False, True, True]
    # Until then the word has learned just what it learns without adapters.
    alone = train(max_train_steps=2, output_dir=out.with_name("alone"))
    name = "learned_embeds.safetensors"
    assert torch.equal(*(load_file(path)["<my-pot>"] for path in (alone / name, out / name.replace(".", "-steps-2."))))


def test_in_half_precision_the_adapters_are_float32(train, trainer, models_seen):
    out = train(rank=2, mixed_precision="bf16")
    denoiser = models_seen[0].denoiser
    kinds = {"lora_" in name: p.dtype for name, p in denoiser.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert {rows.dtype for rows in load_file(out / FILE).values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(launch, train, trainer, tmp_path):
    # So large an epsilon leaves AdamW the gradient's size; by its sign alone, rounding would decide where it is small.
    run = {"rank": 2, "lora_learning_rate": 1.0, "adam_epsilon": 1.0, "max_train_steps": 3}
    whole = load_file(train(**run, train_batch_size=2, output_dir=tmp_path / "whole") / FILE)
    halves = launch(launcher="torch.distributed.run --standalone --nproc_per_node 2", **run, train_batch_size=1)
    assert halves.returncode == 0, halves.stderr
    halves = load_file(tmp_path / "out" / FILE)
    for name, rows in whole.items():
        if name.endswith("lora_B.weight"):
            assert (rows - halves[name]).norm() < 1e-4 * rows.norm()


def scaled_step(scale: float | None, factor: float = 1.0) -> torch.Tensor:
    """The adapters' parameter after a step, with fp16's gradient scaling or without, on a gradient times `factor`."""
    adapters = object.__new__(train_dti_sdxl.Adapters)
    parameter = torch.nn.Parameter(torch.ones(3))
    adapters.parameters, adapters.start_step = {"x": parameter}, 0
    adapters.optimizer = torch.optim.AdamW([parameter], lr=0.1, eps=1.0)  # so large that the gradient's size matters
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    loss = (parameter * torch.tensor([1.0, 2.0, 3.0]) * factor).sum()
    (scaler.scale(loss) if scaler else loss).backward()
    adapters.step(SimpleNamespace(num_processes=1, scaler=scaler), steps_done=0, schedule=1.0)
    assert parameter.grad is None
    return parameter.detach()


def test_fp16s_gradient_scale_is_taken_out_and_an_overflow_leaves_the_adapters_alone():
    assert torch.allclose(scaled_step(1024.0), scaled_step(None))
    assert torch.equal(scaled_step(1024.0, factor=float("inf")), torch.ones(3))


def test_an_earlier_runs_adapters_do_not_stay_beside_another_word(train):
    out = train(rank=2, max_train_steps=1)
    files = {FILE, "my-pot-lora.safetensors"}
    assert files < {path.name for path in out.iterdir()}
    shutil.copy(out / FILE, out / "mine-lora.safetensors")
    train(max_train_steps=1)
    assert not files & {path.name for path in out.iterdir()} and (out / "mine-lora.safetensors").is_file()


@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)])
def test_gradient_checkpointing_changes_nothing(train, tmp_path, checkpointing):
    plain = train(rank=2, lora_dropout=0.2, output_dir=tmp_path / "plain")
    other = train(*checkpointing, rank=2, lora_dropout=0.2, output_dir=tmp_path / "other")
    a, b = load_file(plain / FILE), load_file(other / FILE)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_dropout_is_off_in_validation_and_on_in_training(train, trainer, tmp_path):
    run = {"rank": 4, "lora_learning_rate": 0.05, "validation_prompt": "a photo of {}", "max_train_steps": 3}
    run |= {"num_validation_images": 1, "validation_inference_steps": 2, "validation_steps": 2}
    out = train(**run, lora_dropout=0.5)
    without = train(**run, output_dir=tmp_path / "without")
    a, b = load_file(out / FILE), load_file(without / FILE)
    assert any(not torch.allclose(a[name], b[name]) for name in a)
    # The last checkpoint drawn again without dropout gives the same picture: it was off.
    pictures = [(out / "validation-3.png").read_bytes()]
    train(**run, output_dir=out, lora_dropout=0.0, resume_from_checkpoint="latest")
    pictures.append((out / "validation-3.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_the_header_and_options_tell_of_the_adapters(train, trainer):
    out = train(rank=3, lora_alpha=6)
    with safe_open(out / FILE, framework="pt") as file:
        kept = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (
        kept[f"{trainer.MODEL_CLASS.denoiser_name}.r"] == 3
        and kept[f"{trainer.MODEL_CLASS.denoiser_name}.lora_alpha"] == 6
    )
    assert json.loads((out / "training_options.json").read_text())["derived"]["lora"].startswith("rank 3, alpha 6")


def test_where_the_adapters_are(train):
    out = train(rank=2, lora_target_modules="attn2.to_k,attn2.to_v")
    state = load_file(out / FILE)
    assert {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in state} == {"attn2.to_k", "attn2.to_v"}
    assert {len(rows) for name, rows in state.items() if "lora_A" in name} == {2}


@pytest.mark.slow
def test_compiled_blocks_give_the_same(train, tmp_path):
    """With the step in which the adapters join in."""
    run = {"rank": 2, "lora_start_step": 2}
    plain, compiled = train(**run, output_dir=tmp_path / "plain"), train("--compile", **run)
    for file in ("learned_embeds.safetensors", FILE):
        a, b = load_file(plain / file), load_file(compiled / file)
        # AdamW divides by the gradient's size: where it is nearly nothing its rounding decides.
        assert a.keys() == b.keys() and all((a[name] - b[name]).norm() < 0.3 * a[name].norm() for name in a)
