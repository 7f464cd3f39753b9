"""No option and no setting of accelerate's is without effect in silence: it acts, or one line refuses it."""

from types import SimpleNamespace

import pytest
from kill_test import results

import train_dti_sana
import train_dti_sdxl as script


# Options that no other option makes idle, by why that is.
ALWAYS = {
    "act in every run": """preset learning_rate kappa magnitude optimizer reg_weight placeholder_token initializer_token
        rank random_flip center_crop cache_latents no_cache_latents resolution instance_data_dir train_data_dir
        pretrained_model_name_or_path mixed_precision base_precision prediction_type
        rescale_betas_zero_snr allow_tf32 gradient_checkpointing compile config output_dir
        seed max_train_steps train_batch_size gradient_accumulation_steps lr_scheduler checkpointing_steps
        checkpoints_total_limit resume_from_checkpoint validation_prompt logging_steps report_to push_to_hub pooling
        max_sequence_length complex_human_instruction weighting_scheme""",
    "are refused by check_options, or what they need is": """scale_lr num_vectors further_word init_embedding
        dataset_name caption_column caption_extension no_captions prompt_templates mask_dir alpha_mask mask_background hub_model_id
        hub_private_repo license""",
    "are no setting: a token that nothing asks for does no harm": "hub_token",
}


def refusal(options: list[str], module=script) -> str:
    """What the options are refused with, or nothing."""
    model = module.MODEL_CLASS(module.parse_args(options, module.MODEL_CLASS))
    try:
        module.refuse_idle(model, options)
    except module.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_every_option_is_in_the_table_or_has_a_reason_not_to_be(module):
    model_class = module.MODEL_CLASS
    spellings = {
        o.removeprefix("--") for a in module.make_parser(model_class, False)._actions for o in a.option_strings
    }
    known = {*module.IDLE, *model_class.idle_options}
    assert spellings - known <= set(" ".join(ALWAYS.values()).split())
    assert known <= spellings


IN_USE = [
    (script, "--optimizer adamw --adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0 --adam_epsilon 1e-6"),
    (
        script,
        "--rank 2 --adam_beta1 0.8 --lora_alpha 4 --lora_dropout 0.1 --lora_target_modules to_q --lora_start_step 1",
    ),
    (script, "--rank 2 --lora_learning_rate 0.1 --save_steps 2 --no_cache_latents --dataloader_num_workers 2"),
    (script, "--validation_prompt {} --validation_steps 2 --validate_first --num_validation_images 1"),
    (script, "--validation_prompt {} --validation_negative_prompt fog --validation_inference_steps 2"),
    (script, "--lr_scheduler constant_with_warmup --lr_warmup_steps 2 --init contextual --crops_per_image 8"),
    (script, "--lr_scheduler cosine_with_restarts --lr_num_cycles 2 --lr_warmup_steps 2 --learnable_property style"),
    (script, "--center_crop --random_flip --crops_per_image 2 --report_to tensorboard --logging_dir logbook"),
    (
        script,
        "--center_crop --crops_per_image 1 --dataloader_num_workers 0 --lr_warmup_steps 0 --validate_first false",
    ),
    (train_dti_sana, "--weighting_scheme logit_normal --logit_mean 1 --logit_std 2"),
    (train_dti_sana, "--weighting_scheme mode --mode_scale 1"),
]


@pytest.mark.parametrize("trainer, words", IN_USE)
def test_what_has_an_effect_is_not_refused(trainer, options, words):
    changes = {"report_to": None} if "--report_to" in words else {}
    assert refusal(options(*words.split(), **changes), trainer) == ""


def test_what_nobody_gave_is_not_refused(options, tmp_path):
    """Neither a default, nor a default in a file, where it cannot be told from one that a run has written."""
    assert refusal(options()) == ""
    (tmp_path / "o.toml").write_text("adam_beta1 = 0.9\nvalidation_steps = 100\nlora_dropout = 0\nsave_steps = 2\n")
    assert refusal(options("--config", str(tmp_path / "o.toml"))) == ""
    assert "--adam_beta1 0.9 has no effect" in refusal(options("--adam_beta1", "0.9"))


def test_a_preset_beside_a_runs_own_file_acts(train, options):
    file = train(max_train_steps=2, learning_rate=0.1, lr_scheduler="cosine") / "training_options.json"
    assert refusal(options("--config", str(file), preset="fast", max_train_steps=None)) == ""
    assert refusal(options("--config", str(file), preset=None, max_train_steps=None)) == ""


def test_a_column_of_images_is_the_one_that_is_read(train, small, tmp_path, trainer):
    """Of a folder, as imagefolder has it: <column>_file_name, and no other in its place."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("00.png", "01.png"):
        (photos / name).write_bytes((small / "photos" / name).read_bytes())
    (photos / "metadata.csv").write_text("file_name,text\n00.png,a {}\n01.png,a {}\n")
    with pytest.raises(trainer.UserError, match="row 1 has no column 'view_file_name'"):
        train(instance_data_dir=photos, image_column="view")


# Accelerate's settings.


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED: there is no trained model here to be divided"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP: .* choose another by `accelerate config`"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "STEPS is 4, and --gradient_accumulation_steps 1: give both"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "ACCELERATE_MIXED_PRECISION is fp8: give --mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND is inductor: to compile, add --compile"),
    ],
)
def test_settings_that_nothing_obeys_end_in_one_line(train, trainer, no_weights, monkeypatch, name, value, message):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(trainer.UserError, match=message):
        train()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_of_each_other_end_in_one_line(trainer, monkeypatch, name):
    """As `torchrun` on a machine without a GPU starts them: each would be a whole run in the same folder."""
    monkeypatch.setenv(name, "2")
    trainer.check_processes(SimpleNamespace(num_processes=2, device="cpu"))
    with pytest.raises(
        trainer.UserError, match=f"^{name} is 2, and accelerate sees 1 process on cpu: .* ACCELERATE_USE"
    ):
        trainer.check_processes(SimpleNamespace(num_processes=1, device="cpu"))


def test_settings_that_ask_for_nothing_are_as_none(train, monkeypatch):
    """What `accelerate launch` always sets."""
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "False"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    train(max_train_steps=1)


def test_accumulation_in_the_environment_divides_the_loss_once(train, tmp_path, monkeypatch):
    """Twice would leave the gradient a quarter of itself, and the prior four times as strong beside it."""
    run = {"gradient_accumulation_steps": 4, "train_batch_size": 1, "kappa": 0.01, "max_train_steps": 2}
    alone = results(train(**run, output_dir=tmp_path / "alone"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert results(train(**run)) == alone


def test_precision_in_the_environment_is_obeyed(train, monkeypatch, models_seen):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(max_train_steps=1)
    assert models_seen[0].denoiser.dtype == script.torch.bfloat16
