"""examples/reproduce.py: which runs it starts, what it makes of their records, and, in the slow test, the whole of it."""

import json

import pytest
import reproduce
from export import UserError

import train_dti_sdxl as script


def options(miniature_models, tmp_path, *more: str):
    return reproduce.parse_args(["--models", str(miniature_models), "--output_dir", str(tmp_path / "out"), *more])


def test_every_training_is_one_that_the_script_understands(miniature_models, tmp_path):
    args = options(miniature_models, tmp_path)
    runs = reproduce.plan(args)
    # Table 2: 8 concepts x 3 seeds x 3 trained methods; Table 3: 4 x 2 x 13.
    assert len(runs) == 8 * 3 * 3 + 4 * 2 * 13
    assert len({run.folder(args) for run in runs}) == len(runs)
    parsed = {}
    for run in runs:
        given = script.parse_args(reproduce.training_command(run, args, mean=0.4)[2:])
        script.check_options(given)
        parsed[run.method.name] = given
    assert parsed["m* 10 x mean"].magnitude == pytest.approx(4.0)
    assert parsed["TI"].magnitude == "free" and parsed["TI"].optimizer == "adamw" and parsed["TI"].kappa == 0
    assert parsed["DTI"].kappa == 1e-4 and parsed["DTI"].learning_rate == 5e-3 and parsed["DTI"].pooling == "stock"
    assert parsed["CrossInit"].init == "contextual" and parsed["CrossInit"].reg_weight == 1e-5


def test_the_orderings_name_methods_that_there_are():
    names = {method.name for method in reproduce.METHODS}
    assert {name for _, above, below in reproduce.ORDERINGS for name in (above, below)} <= names
    # And the paper's own figures have them so.
    paper = {method.name: method.paper for method in reproduce.METHODS}
    for measure, above, below in reproduce.ORDERINGS:
        column = ("image", "text").index(measure)
        assert paper[above][column] > paper[below][column]


def records(method: str, scores: dict[str, list[float]]) -> list[dict]:
    return [{"subject": s, "method": method, "text": x} for s, values in scores.items() for x in values]


def test_a_difference_is_paired_by_concept_and_says_what_is_decided():
    a = {"star": [0.9, 0.7], "fish": [0.5], "heart": [0.3]}
    b = {"star": [0.7], "fish": [0.4, 0.4], "heart": [0.15], "house": [0.0]}  # one that the other lacks
    both = records("DTI", a) + records("TI", b)
    difference = reproduce.paired(both, "text", "DTI", "TI")
    assert difference["mean"] == pytest.approx((0.1 + 0.1 + 0.15) / 3) and difference["n"] == 3
    assert reproduce.verdict(difference) == "**yes**"
    assert reproduce.verdict(reproduce.paired(both, "text", "TI", "DTI")) == "**reversed**"
    assert reproduce.verdict(reproduce.paired(both, "image", "TI", "DTI")) == "not measured"
    noisy = records("DTI", {"star": [0.9], "fish": [0.1]}) + records("TI", {"star": [0.1], "fish": [0.8]})
    assert reproduce.verdict(reproduce.paired(noisy, "text", "DTI", "TI")) == "undecided"


def test_what_is_missing_is_said_at_once(tmp_path, miniature_models):
    with pytest.raises(UserError, match="has no sdxl/model_index.json"):
        options(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="--concepts 11: the world has 10"):
        options(miniature_models, tmp_path, "--concepts", "11")


def test_runs_with_other_options_are_not_taken_for_these(tmp_path, miniature_models):
    names = ("max_train_steps", "train_batch_size")
    reproduce.keep_options(options(miniature_models, tmp_path), *names)
    reproduce.keep_options(options(miniature_models, tmp_path, "--jobs", "1"), *names)
    with pytest.raises(UserError, match="--max_train_steps 20: the runs in .* had 500"):
        reproduce.keep_options(options(miniature_models, tmp_path, "--max_train_steps", "20"), *names)
    # Another script's folder has other options noted, and keeps these.
    reproduce.keep_options(options(miniature_models, tmp_path), "concepts")
    with pytest.raises(UserError, match="--train_batch_size 2: the runs in .* had 4"):
        reproduce.keep_options(options(miniature_models, tmp_path, "--train_batch_size", "2"), *names)


def test_a_failed_run_ends_it_with_the_runs_own_words(miniature_models, tmp_path):
    few = "--concepts 2 --seeds 1 --ablation_concepts 0 --jobs 1"
    args = options(miniature_models, tmp_path, *few.split())
    (miniature_models / "sdxl").unlink()
    (miniature_models / "sdxl").mkdir()
    (miniature_models / "sdxl" / "model_index.json").write_text("{}")
    run = reproduce.plan(args)[0]
    with pytest.raises(UserError, match=r"train_dti_sdxl.py failed: .*error: --"):
        reproduce.call(reproduce.training_command(run, args, 0.4), tmp_path / "out" / "log")


@pytest.mark.slow
def test_the_whole_of_it_and_again(miniature_models, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a {} on grass\na {} at night\n")
    some = [m for m in reproduce.METHODS if m.name in ("TI", "TI-rescaled", "DTI", "AdamW")]
    monkeypatch.setattr(reproduce, "METHODS", some)
    argv = ["--models", str(miniature_models), "--output_dir", str(tmp_path / "out")]
    argv += ["--prompts", str(tmp_path / "prompts.txt")]
    argv += "--concepts 2 --seeds 2 --ablation_concepts 2 --ablation_seeds 1 --max_train_steps 2".split()
    argv += "--num_inference_steps 1 --picture_seeds 0".split()
    reproduce.main(argv)
    report = (tmp_path / "out" / "report.md").read_text()
    for row in ("| TI | 2 |", "| TI-rescaled | 2 |", "| DTI | 2 |", "| AdamW | 2 |", "| text: DTI above TI |"):
        assert row in report
    assert "guidance-1.5-stock" in report and (tmp_path / "out" / "scatter-guidance-5.png").is_file()
    found = json.loads((tmp_path / "out" / "report.json").read_text())["orderings"]
    assert found["guidance-5"][0]["score"]["n"] == 2

    # A method that is rescaled has other pictures than the one that it is of; and nothing is trained twice.
    folder = tmp_path / "out" / "evaluations" / "guidance-5" / "zebra_star"
    scores = {r["method"]: r["cosine"] for r in json.loads((folder / "evaluation.json").read_text())["records"]}
    assert scores["TI #0"] != scores["TI #0-rescaled"]
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("learned_embeds.safetensors")}
    assert len(trained) == 2 * 2 * 2 + 2
    reproduce.main(argv)
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items())
