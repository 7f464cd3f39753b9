"""The benchmark: it watches the script without changing what it does, counts and times right, and tells of what failed."""

import json
import re
import sys

import benchmark
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import ROOT
from kill_test import results
from transformers import AutoConfig

import train_dti_sana
import train_dti_sdxl


@pytest.fixture(scope="module")
def measure(small, tmp_path_factory):
    """Measures the small job in this process. Returns the row and the job."""

    def run(phases, family: str = "sdxl", weights: str = "disk", *others: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path_factory.mktemp("run")
        options = {"resolution": 64, "train_batch_size": 2, "mixed_precision": "no"}
        argv = benchmark.script_options(options, small / family, small / "photos", 0, list(others))
        script = str(ROOT / f"train_dti_{family}.py")
        job = benchmark.Job(script, argv, str(folder / "out"), phases, steps=100, weights=weights)
        try:
            return benchmark.summarise(benchmark.measure(job), job.steps, phases[0]), job
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.fixture(scope="module")
def measured(measure):
    return measure((3, 10, 10))


def test_watching_changes_nothing(measured, trainer, tmp_path):
    _, job = measured
    argv = [str(tmp_path / "alone") if x == job.output else x for x in job.arguments()]
    watched = [(trainer.MODEL_CLASS, name) for name in ("load", "loss", "encode_prompts")] + [(trainer, "log")]
    functions = {place: getattr(*place) for place in watched}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.main(argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert results(tmp_path / "alone") == results(type(tmp_path)(job.output))
    assert all(getattr(*place) is function for place, function in functions.items())


def test_a_row_has_what_was_measured_and_nothing_else(measured):
    row, _ = measured
    assert row["status"] == "measured" and len(row["step_seconds"]) == 10
    step = row["step"]
    assert 0 < step["min"] <= step["quartiles"][0] <= step["median"] <= step["quartiles"][1] <= step["max"]
    assert row["device_peak"] is None and row["host_peak"] > 1e8  # there is no GPU's memory on a CPU
    set_up = row["set_up"]
    assert 0 < set_up["latents"] and 0 < set_up["models"] and set_up["models"] + set_up["latents"] < set_up["total"]
    estimate = row["estimated_run_seconds"]["seconds"]
    assert 87 * step["mean"] + set_up["total"] < estimate < 100 * step["mean"] + 60
    assert row["matrix_rate"] > 1e9 and 0 < row["flops_of_matrix_rate"] < 1
    assert 1000 < row["checkpoint_bytes"] < 100_000


def test_the_parts_sum_to_the_step(measured):
    row, _ = measured
    parts = row["breakdown"]
    whole = sum(parts.values())
    assert set(parts) == set(benchmark.PARTS)
    assert row["step"]["min"] / 2 < whole < row["step"]["max"] * 2  # other processes come and go
    assert parts["rest"] < 0.2 * whole and parts["saving"] == 0
    assert all(parts[name] > 0 for name in benchmark.PARTS if name != "saving")
    assert parts["denoiser forward"] + parts["denoiser backward"] > 0.2 * whole


def test_flops_of_known_layers():
    """A multiplication and an addition are two; frozen weights need no gradient of their own."""
    linear, convolution = torch.nn.Linear(8, 16).requires_grad_(False), torch.nn.Conv2d(4, 6, 3, padding=1)
    x, image = torch.randn(5, 8, requires_grad=True), torch.randn(2, 4, 7, 7)
    with benchmark.flop_counter() as counter:
        y = linear(x)
        assert counter.get_total_flops() == 2 * 5 * 8 * 16
        y.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 16
    with benchmark.flop_counter() as counter:
        convolution(image)
    assert counter.get_total_flops() == 2 * (2 * 7 * 7) * (4 * 3 * 3) * 6
    queries, keys = torch.randn(1, 4, 10, 8, requires_grad=True), torch.randn(1, 4, 12, 8)
    with benchmark.flop_counter() as counter:
        y = F.scaled_dot_product_attention(queries, keys, keys)
        assert counter.get_total_flops() == 2 * (2 * 4 * 10 * 12 * 8)
        y.sum().backward()
    assert counter.get_total_flops() in (4 * (2 * 4 * 10 * 12 * 8), 7 * (2 * 4 * 10 * 12 * 8))


def test_twice_the_batch_is_twice_the_flops(measured, measure):
    (row, _), (doubled, _) = measured, measure((1, 2, 0), "sdxl", "disk", "--train_batch_size", "4")
    for name in ("flops", "needed_flops"):
        once, twice = row[name], doubled[name]
        assert twice["denoiser forward"] == 2 * once["denoiser forward"] > 0
        assert twice["denoiser backward"] == 2 * once["denoiser backward"] > 0
        assert 1.5 < sum(twice.values()) / sum(once.values()) < 2.5
    assert "breakdown" not in doubled  # --breakdown_steps 0
    # Nothing is recomputed, but by the attention's kernels.
    assert 1 <= sum(row["flops"].values()) / sum(row["needed_flops"].values()) < 1.2


def test_weights_made_in_memory_and_recomputed_activations(measure):
    row, job = measure((1, 2, 1), "sana", "memory", "--gradient_checkpointing", "--rank", "2")
    assert row["status"] == "measured"
    assert row["flops"]["denoiser forward"] == row["needed_flops"]["denoiser forward"]
    assert row["flops"]["text encoders forward"] == row["needed_flops"]["text encoders forward"]
    for name in ("denoiser backward", "text encoders backward"):
        assert row["flops"][name] > 1.3 * row["needed_flops"][name] > 0
    assert (benchmark.Path(job.output) / "pytorch_lora_weights.safetensors").is_file()


def test_a_grid_goes_on_where_memory_ends(small, tmp_path, monkeypatch, capsys):
    """The rows are measured in this process, where the first one finds no memory."""

    def here(job, folder):
        AcceleratorState._reset_state(reset_partial_state=True)
        return json.loads(json.dumps(benchmark.measure(job)))

    def loss(model, batch, original=train_dti_sdxl.MODEL_CLASS.loss):
        if len(batch["prompt"]) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        return original(model, batch)

    monkeypatch.setattr(train_dti_sdxl.MODEL_CLASS, "loss", loss)
    monkeypatch.setattr(benchmark, "load_script", lambda path: train_dti_sdxl)
    monkeypatch.setattr(benchmark, "run_row", here)
    command = f"benchmark.py --work_dir {tmp_path} --size small --train_batch_size 4 1"
    monkeypatch.setattr(sys, "argv", f"{command} --warmup 1 --steps 2 --breakdown_steps 1".split())
    benchmark.main()

    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(report) == {"date", "machine", "model", "size", "weights", "script", "script_options", "rows"}
    assert report["machine"]["versions"]["torch"] == torch.__version__ and report["rows"][1]["device"]
    statuses = [row["status"] for row in report["rows"]]
    assert statuses == ["out of memory", "measured"]
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    table = text.split("\n\n")[2].splitlines()
    assert table[0].startswith("| resolution | train_batch_size | s per step | quartiles | set-up s |")
    assert [line.count("|") for line in table] == [table[0].count("|")] * 4
    assert table[2].startswith("| 64 | 4 | - | - | ") and table[2].endswith("| out of memory |")
    assert re.match(r"\| 64 \| 1 \| \d\.\d{4} \| \d\.\d{4} to \d\.\d{4} \| \d+\.\d \|", table[3])
    assert [cell.strip() for cell in table[3].split("|")[7:9]] == ["-", "-"]  # no GPU's memory
    assert text.count("denoiser backward") == 3


@pytest.mark.slow
def test_rows_and_whole_runs_are_processes_in_turns(tmp_path, monkeypatch):
    command = f"benchmark.py --work_dir {tmp_path} --size small --warmup 1 --steps 2 --breakdown_steps 0 --repeats 1"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--max_train_steps", "2", "--against", "sleep 0.{steps}"])
    benchmark.main()
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert row["status"] == "measured" and row["imports_seconds"] > 0.5
    runs = row["whole_runs"]["runs"]
    (sleep,), (own,) = runs["--against"], runs["the script"]
    assert 0.2 <= sleep["seconds"] < 1.5
    assert own["seconds"] > 1
    assert (tmp_path / "runs" / "00" / "plain" / "learned_embeds.safetensors").is_file()
    assert "| `sleep 0.{steps}` | 2 | 1 | 0." in (tmp_path / "benchmark.md").read_text()


def test_a_failing_command_is_told_in_one_line(tmp_path):
    with pytest.raises(benchmark.UserError, match="--against: exit status 3: what a pity"):
        command = [sys.executable, "-c", "print('what a pity'); raise SystemExit(3)"]
        benchmark.run_in_turns({"--against": lambda: command}, tmp_path, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--output_dir x", "--output_dir is set by the benchmark itself: leave it out."),
        ("--instance_data_dir=x", "--instance_data_dir is set by the benchmark itself"),
        ("--script none.py", "--script none.py is not a file."),
        ("--against nothing-of-this-name", "there is no program 'nothing-of-this-name'"),
        ("--against 'x", "cannot be read as a command"),
        ("--against true --rank 0 2", "--against needs one configuration"),
        ("--against true --repeats 0", "runs nothing"),
        ("--against true_{model} --size full", "there is no program"),
        ("--size small --resolution 60", "--resolution 60 is not a multiple of 8: try 56."),
        ("--size small --magnitude free", "--optimizer rsgd moves on a sphere"),
    ],
)
def test_user_errors(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--work_dir", str(tmp_path), *options.split()])
    with pytest.raises(benchmark.UserError, match=re.escape(message)):
        benchmark.main()
    assert not (tmp_path / "models").exists()


def test_the_scripts_own_parser_refuses_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"benchmark.py --work_dir {tmp_path} --size small --wings 2".split())
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: unrecognized arguments: --wings 2")


@pytest.mark.parametrize(
    "model, published",
    [
        ("sdxl", {"text_encoder": 123060480, "text_encoder_2": 694659840, "unet": 2567463684, "vae": 83653863}),
        ("sana-1.6b", {"text_encoder": 2614341888, "transformer": 1604641952, "vae": 312250275}),
        ("sana-4.8b", {"text_encoder": 2614341888, "transformer": 4721825952, "vae": 312250275}),
    ],
)
def test_the_models_have_their_published_sizes(model, published):
    parts = {
        name: benchmark.construct(*part, "meta", torch.bfloat16) for name, part in benchmark.parts_of(model).items()
    }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == published


@pytest.mark.parametrize("model, script", [("sdxl", train_dti_sdxl), ("sana-1.6b", train_dti_sana)])
def test_full_size_folders_are_what_the_scripts_read(model, script, tmp_path):
    args, _ = benchmark.parse_args(["--work_dir", str(tmp_path), "--model", model])
    folder = benchmark.prepare_model(args, script.built_in_templates("object"))
    options = benchmark.script_options({"rank": 2}, folder, tmp_path, 0, [])
    given = script.parse_args([*options, "--output_dir", str(tmp_path / "out")], script.MODEL_CLASS)
    loaded = script.MODEL_CLASS(given)
    script.check_model(loaded)
    script.check_lora_targets(loaded)
    loaded.load_tokenizers()
    # The prompts are as long as with the published tokenizers: a word is a token.
    script.prepare_placeholder(loaded)
    ids = loaded.tokenizers[0]("a snapshot of a <my-pot>").input_ids
    assert len(ids) == 7  # SDXL's have an end token, Gemma's a space of its own before the new word
    configs = [AutoConfig.from_pretrained(folder / name) for name in loaded.text_encoder_names]
    assert [config.hidden_size for config in configs] == ([768, 1280] if model == "sdxl" else [2304])
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1e6
