"""Whatever the terminal can show, a run goes on, and what it has learned is saved and shared."""

import io
import sys

import export
import pytest
from accelerate.state import AcceleratorState

import train_dti_sana
import train_dti_sdxl


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


class Closed(io.StringIO):
    """A pipe whose reader has gone, as after `| head`."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    flush = close = lambda self: None


@pytest.mark.parametrize(
    "trainer",
    [pytest.param(train_dti_sdxl, id="sdxl"), pytest.param(train_dti_sana, id="sana", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["ascii", "cp1252", "closed"])
def test_a_run_ends_well_and_shares(trainer, kind, options, tmp_path, monkeypatch):
    if trainer is train_dti_sana and kind != "ascii":
        pytest.skip("the two scripts' output is the same text")
    output = Closed() if kind == "closed" else terminal(kind)
    shared = []
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", Closed() if kind == "closed" else terminal(kind))
    monkeypatch.setattr(trainer.interruption, "listen", lambda: None)
    monkeypatch.setattr(trainer, "open_repository", lambda model: "me/pot")
    monkeypatch.setattr(trainer, "share", lambda *args: shared.append(print("Uploaded: ✓")))
    shown = {
        "validation_prompt": "a photo of a {} → left",
        "num_validation_images": 1,
        "validation_inference_steps": 1,
        "max_train_steps": 2,
    }
    argv = options(
        "--push_to_hub", "--hub_model_id", "me/pot", placeholder_token="<茶壺>", output_dir=tmp_path / "茶壺", **shown
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.run(trainer.MODEL_CLASS)
    assert shared and (tmp_path / "茶壺" / "learned_embeds.safetensors").is_file()
    if kind != "closed":
        output.flush()
        printed = output.buffer.getvalue().decode(kind)
        assert r"a photo of a <\u8336\u58fa>" in printed and r"Uploaded: \u2713" in printed


def test_what_the_terminal_can_show_is_shown_as_it_is(monkeypatch):
    output = terminal("utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", None)  # as where there is none
    monkeypatch.setattr(train_dti_sdxl.interruption, "listen", lambda: None)
    train_dti_sdxl.run(None, lambda **_: print("茶壺 20°", "\udce9"))
    assert output.buffer.getvalue().decode() == "" and sys.stderr is None and sys.stdout.encoding == "utf-8"
    sys.stdout.flush()
    assert output.buffer.getvalue().decode() == "茶壺 20° \\udce9\n"


def test_the_examples_end_well_too(monkeypatch):
    output = terminal("ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", Closed())
    export.run(lambda: print("out/茶壺/picture.png", flush=True))
    assert output.buffer.getvalue() == b"out/\\u8336\\u58fa/picture.png\n"
