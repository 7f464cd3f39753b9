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
    grid = "--steps 30 60 --total_angles 4.8 --schedules constant linear --magnitudes 2mean --concepts 2 --seeds 1 --variants"
    args = sweep.parse_args(options(*grid.split(), "=", "batch 8=--train_batch_size=8"))
    settings = sweep.settings_of(args)
    assert len(settings) == 2 * 1 * 1 * 2 * 2
    given = {}
    for method in (*sweep.references(several=False), *settings):
        argv = [f"--{k}={v}" for k, v in reproduce.Run(method, "zebra_star", 1).row(args).items() if k != "name"]
        given[method.name] = script.parse_args(
            [*argv, "--output_dir=x", "--pretrained_model_name_or_path=x"], script.MODEL_CLASS
        )
    paper = given["DTI, printed"]
    assert (paper.max_train_steps, paper.learning_rate, paper.lr_scheduler) == (500, 0.005, "constant")
    other = given["2mean, 60 steps, 0.08 linear, batch 8"]
    assert (other.max_train_steps, other.learning_rate, other.lr_scheduler) == (60, 0.08, "linear")
    assert other.train_batch_size == 8 and other.seed == 1 and other.placeholder_token == "<zebra_star>"
    assert other.magnitude == "2mean"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--variants|batch 8=--train_batch_size 8", "is not NAME=OPTIONS"),
        ("--schedules|square", "--lr_scheduler: invalid choice: 'square'"),
        ("--variants|beta=--adam_beta1=2", "--adam_beta1 2 must be below 1"),
        ("--model|sana|--variants|beta=--adam_beta1=2", "--adam_beta1 2 must be below 1"),
        ("--model|sd|--variants|beta=--adam_beta1=2", "--adam_beta1 2 must be below 1"),
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


def row(image: float, said: float, within: float = 0.0) -> dict:
    return {name: {"mean": mean, "high": mean + within} for name, mean in (("image", image), ("said", said))}


def test_a_point_dominates_what_is_better_by_neither_score():
    assert sweep.dominates(row(0.6, 0.9), row(0.5, 0.9)) and sweep.dominates(row(0.6, 0.9), row(0.5, 0.8))
    assert not sweep.dominates(row(0.6, 0.8), row(0.5, 0.9)) and not sweep.dominates(row(0.5, 0.9), row(0.5, 0.9))


def test_a_setting_is_beaten_only_by_more_than_its_interval():
    assert sweep.beaten(row(0.5, 0.8, within=0.05), row(0.6, 0.82))
    assert not sweep.beaten(row(0.5, 0.8, within=0.2), row(0.6, 0.82))
    assert not sweep.beaten(row(0.5, 0.8), row(0.9, 0.79))  # which does not dominate it


@pytest.mark.slow
@pytest.mark.parametrize("model", sweep.MODELS)
def test_a_small_sweep_trains_scores_and_reports(options, tmp_path, monkeypatch, model):
    short = reproduce.Method("TI", f"--preset=released {reproduce.FREE} --max_train_steps=3", at=(1,))
    monkeypatch.setattr(sweep, "METHODS", [short])
    grid = f"--model {model} --steps 2 --total_angles 0.04 --magnitudes 2mean --concepts 2 --seeds 1 --num_inference_steps 1"
    sweep.main(options(*grid.split()))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for scale in ("guidance-5", "guidance-1.5"):
        settings = report["settings"][scale]
        assert list(settings) == ["TI @1", "TI", "2mean, 2 steps, 0.02 linear"]
        assert all(setting["image"]["n"] == setting["said"]["n"] == 2 for setting in settings.values())
        assert (tmp_path / "out" / f"front-{scale}.png").stat().st_size > 5000
    noted = next((tmp_path / "out" / "runs").rglob("training_options.json")).read_text()
    assert json.loads(noted)["options"]["pretrained_model_name_or_path"].endswith(f"/{model}")
