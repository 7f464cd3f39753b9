"""examples/sweep.py: which runs it asks for, how it judges settings, and, in the slow test, the whole of it."""

import json

import pytest
import reproduce
import sweep
from export import UserError

import train_dti_sdxl as script


@pytest.fixture
def options(miniature_models, tmp_path):
    return lambda *more: ["--models", str(miniature_models), "--output_dir", str(tmp_path / "out"), *more]


def test_every_setting_is_one_that_the_script_understands(options):
    grid = "--steps 30 60 --total_angles 4.8 --schedules constant linear --concepts 2 --seeds 1 --variants".split()
    args = sweep.parse_args(options(*grid, "=", "batch 8=--train_batch_size=8"))
    settings = sweep.settings_of(args)
    assert len(settings) == 1 + 2 * 1 * 2 * 2
    given = {}
    for method in settings:
        row = sweep.subject_row(reproduce.Run(method, "zebra_star", 1), args)
        argv = [f"--{k}={v}" for k, v in row.items() if k != "name"]
        given[method.name] = script.parse_args([*argv, "--output_dir=x", "--pretrained_model_name_or_path=x"])
    paper = given[next(iter(settings)).name]
    assert (paper.max_train_steps, paper.learning_rate, paper.lr_scheduler) == (500, 0.005, "constant")
    other = given["60 steps, 0.08 linear, batch 8"]
    assert (other.max_train_steps, other.learning_rate, other.lr_scheduler) == (60, 0.08, "linear")
    assert other.train_batch_size == 8 and other.seed == 1 and other.placeholder_token == "<zebra_star>"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--variants|batch 8=--train_batch_size 8", "is not NAME=OPTIONS"),
        ("--schedules|square", "--lr_scheduler: invalid choice: 'square'"),
        ("--variants|beta=--adam_beta1=2", "--adam_beta1 2 must be below 1"),
        ("--concepts|11", "the world has 10 subjects"),
    ],
)
def test_what_no_run_understands_is_said_before_any_is_trained(options, tmp_path, capsys, wrong, said):
    with pytest.raises((SystemExit, UserError)) as caught:
        sweep.main(options(*wrong.split("|")))
    assert said in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_models_runs_are_not_taken_for_these(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "options.json").write_text('{"model": "sdxl"}')
    with pytest.raises(UserError, match="--model sana: the runs in .* had sdxl"):
        sweep.main(options(*"--model sana --steps 2 --total_angles 0.04 --schedules linear".split()))
    assert not (tmp_path / "out" / "runs").exists()


def row(image: float, said: float) -> dict:
    return {"image": {"mean": image}, "said": {"mean": said}}


def test_the_front_has_what_no_other_setting_beats():
    rows = [row(0.5, 0.9), row(0.6, 0.8), row(0.5, 0.8), row(0.4, 0.95)]
    assert [sweep.on_front(each, rows) for each in rows] == [True, True, False, True]


def test_better_is_better_by_one_score_and_not_worse_by_the_other():
    up, down, about = {"low": 0.1, "high": 0.3}, {"low": -0.3, "high": -0.1}, {"low": -0.1, "high": 0.1}
    assert "better in image" in sweep.verdict({"image": up, "said": about})
    assert "worse in said" in sweep.verdict({"image": up, "said": down})
    assert sweep.verdict({"image": about, "said": about}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("model", sweep.PAPERS)
def test_a_small_sweep_trains_scores_and_reports(options, tmp_path, monkeypatch, model):
    monkeypatch.setitem(sweep.PAPERS, model, (3, 0.02))
    grid = f"--model {model} --steps 2 --total_angles 0.04 --schedules constant --concepts 2 --seeds 1 --num_inference_steps 1"
    sweep.main(options(*grid.split()))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [setting["setting"] for setting in report["settings"]] == [
        "paper: 3 steps, 0.02 constant",
        "2 steps, 0.02 constant",
    ]
    assert all(setting["image"]["n"] == setting["said"]["n"] == 2 for setting in report["settings"])
    assert (tmp_path / "out" / "fronts.png").stat().st_size > 5000
    noted = next((tmp_path / "out" / "runs").rglob("training_options.json")).read_text()
    assert json.loads(noted)["options"]["pretrained_model_name_or_path"].endswith(f"/{model}")
