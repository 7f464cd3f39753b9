"""Nothing is lost: a resumed run is the uninterrupted one to the bit, and no kill, damage or full disk takes what was saved."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_test import results
from safetensors.torch import load_file

import train_dti_sana
import train_dti_sdxl


@pytest.fixture(
    params=[pytest.param(train_dti_sdxl, id="sdxl"), pytest.param(train_dti_sana, id="sana", marks=pytest.mark.slow)]
)
def trainer(request):
    return request.param


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def as_killed_after(step: int, finished: Path) -> Path:
    """A folder with what a kill soon after `step` would have left of a finished run."""
    folder = finished.with_name(f"killed-{step}")
    shutil.copytree(finished / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


KINDS = {
    "plain": "",
    "accumulation": "--gradient_accumulation_steps 2",
    "not cached, with workers": "--no_cache_latents --dataloader_num_workers 2",
    "schedule": "--lr_scheduler cosine --lr_warmup_steps 2",
    "AdamW": "--magnitude free --optimizer adamw --reg_weight 0.01",
    "LoRA": "--rank 2 --lora_start_step 2 --lora_dropout 0.2 --lora_learning_rate 0.01",
    "half precision": "--mixed_precision bf16",
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted_to_the_bit(train, trainer, kind):
    if trainer is train_dti_sana and kind not in ("plain", "AdamW", "LoRA"):
        pytest.skip("the two scripts' loops are the same text")
    run = {"max_train_steps": 6, "checkpointing_steps": 1, "logging_steps": 2}
    finished = train(*KINDS[kind].split(), **run)
    for step in (5, 4, 1):  # between two log entries, and at one
        killed = as_killed_after(step, finished)
        train(*KINDS[kind].split(), **run, output_dir=killed, resume_from_checkpoint="latest")
        assert results(killed) == results(finished)


def test_a_checkpoint_is_small_and_holds_no_pickle(train):
    out = train(max_train_steps=2, checkpointing_steps=1)
    files = list((out / "checkpoint-2").rglob("*"))
    assert sorted(path.name for path in files) == ["state.json", "state.safetensors"]
    assert sum(path.stat().st_size for path in files) < 100_000


def test_old_checkpoints_are_rotated_out(train):
    out = train(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert checkpoints(out) == [4, 5]


@pytest.mark.parametrize("damage", ["truncated", "missing", "not JSON", "half written"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(train, caplog, damage):
    run = {"max_train_steps": 6, "checkpointing_steps": 2}
    out = train(**run)
    expected = results(out)
    newest = out / "checkpoint-6"
    if damage == "truncated":
        content = (newest / "state.safetensors").read_bytes()
        (newest / "state.safetensors").write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        (newest / "state.safetensors").unlink()
    elif damage == "not JSON":
        (newest / "state.json").write_text("{")
    else:
        (newest / "state.json").unlink()  # it is written last
        (newest / ".state.json.tmp").touch()
    with caplog.at_level("INFO", logger="dti"):
        train(**run, resume_from_checkpoint=newest if damage == "truncated" else "latest")
    assert f"Going on from {out / 'checkpoint-4'}" in caplog.text
    assert results(out) == expected


def test_the_newest_checkpoint_is_the_one_written_last(train, caplog):
    """Not the highest step, which an earlier run in the same folder may have left."""
    out = train(max_train_steps=6, checkpointing_steps=6)
    train(max_train_steps=2, checkpointing_steps=2)
    assert checkpoints(out) == [2, 6]
    with caplog.at_level("INFO", logger="dti"):
        train(max_train_steps=3, resume_from_checkpoint="latest")
    assert f"Going on from {out / 'checkpoint-2'}" in caplog.text
    with caplog.at_level("INFO", logger="dti"):
        train(max_train_steps=6, resume_from_checkpoint=out / "checkpoint-6")  # asked for by name
    assert f"Going on from {out / 'checkpoint-6'}" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"placeholder_token": "<other>"}, "placeholder_token '<my-pot>', not '<other>'"),
        ({"num_vectors": 3}, "vectors 1, not 3"),
        ({"kappa": 0.5}, "kappa 0.0001, not 0.5"),
        ({"magnitude": "min"}, "magnitude 'mean', not 'min'"),
        ({"optimizer": "adamw"}, "optimizer 'rsgd', not 'adamw'"),
        ({"seed": 1}, "seed 0, not 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(train, trainer, changes, message):
    train(max_train_steps=2)
    with pytest.raises(trainer.UserError, match=f"is of another run: .*{re.escape(message)}"):
        train(resume_from_checkpoint="latest", **changes)


def test_a_checkpoint_beyond_the_end_is_refused_and_one_at_the_end_writes_the_results(train, trainer):
    out = train(max_train_steps=3)
    expected = results(out)
    (out / "learned_embeds.safetensors").unlink()
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert results(out) == expected
    with pytest.raises(trainer.UserError, match="beyond --max_train_steps 2: give at least 3"):
        train(max_train_steps=2, resume_from_checkpoint="latest")


def test_another_initializer_is_refused(train, trainer):
    train(max_train_steps=2)
    with pytest.raises(trainer.UserError, match="with another model or initializer"):
        train(resume_from_checkpoint="latest", initializer_token="dog")


def test_without_a_checkpoint_latest_begins_and_a_path_is_an_error(train, trainer, caplog):
    with caplog.at_level("WARNING", logger="dti"):
        train(resume_from_checkpoint="latest")
    assert "has no checkpoint, so the training begins" in caplog.text
    with pytest.raises(trainer.UserError, match="checkpoint-77 does not exist"):
        train(resume_from_checkpoint="somewhere/checkpoint-77")


def test_the_seed_is_the_checkpoints_where_none_is_given(train):
    run = {"seed": None, "max_train_steps": 6, "checkpointing_steps": 3}
    finished = train(**run)
    killed = as_killed_after(3, finished)
    train(**run, output_dir=killed, resume_from_checkpoint="latest")
    assert results(killed) == results(finished)


def test_a_full_disk_ends_in_a_message_and_leaves_the_last_good_checkpoint(train, trainer, monkeypatch):
    write, full = Path.write_bytes, []

    def write_while_there_is_room(path, content):
        if full and path.name.startswith(".state"):
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        if path.name.startswith(".state.json"):
            full.append(True)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_while_there_is_room)
    with pytest.raises(trainer.UserError, match="cannot be written: No space left on device") as caught:
        train(max_train_steps=6, checkpointing_steps=2)
    out = Path(re.search(r"(\S+out)/", str(caught.value)).group(1))
    monkeypatch.undo()
    assert [path.parent.name for path in out.glob("*checkpoint*/state.json")] == ["checkpoint-2"]
    assert not list((out / "checkpoint-4").glob(".*"))  # nothing half written
    expected = results(train(max_train_steps=6, checkpointing_steps=2, output_dir=out.with_name("undisturbed")))
    train(max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert results(out) == expected


def test_a_limited_file_size_for_real(options, trainer, tmp_path):
    """The curves do not fit, so the run ends in a message; the embedding, saved before, is whole."""
    result = subprocess.run(
        [sys.executable, trainer.__file__, *options()],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(
        r"error: \S+training_curves.png cannot be written: File too large. What was saved before is intact; make room",
        result.stderr,
    )
    assert list(load_file(tmp_path / "out" / "learned_embeds.safetensors")) == ["<my-pot>"]


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_save_a_checkpoint_and_say_how_to_go_on(options, trainer, tmp_path, number, status):
    if trainer is train_dti_sana and number == signal.SIGINT:
        pytest.skip("the two scripts' handling is the same text")
    command = [sys.executable, trainer.__file__, *options(max_train_steps=100_000, checkpointing_steps=3)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not checkpoints(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    step = int(re.search(r"Stopped after step (\d+) of 100000. .*--resume_from_checkpoint latest", errors).group(1))
    assert checkpoints(tmp_path / "out")[-1] == step
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "state.json").read_text())
    assert state["step"] == step


@pytest.mark.slow
def test_twenty_kills(small, tmp_path):
    import kill_test

    kill_test.main(["--small", str(small), "--work_dir", str(tmp_path), "--kills", "20", "--seed", "0"])
