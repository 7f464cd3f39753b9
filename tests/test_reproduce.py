"""examples/reproduce.py: which runs it starts, what it makes of their records, and, in the slow test, the whole of it."""

import csv
import io
import json
from dataclasses import replace

import generate
import numpy as np
import pytest
import reproduce
import torch
from export import UserError

import train_dti_sdxl as script


def options(miniature_models, tmp_path, *more: str):
    return reproduce.parse_args(["--models", str(miniature_models), "--output_dir", str(tmp_path / "out"), *more])


def test_every_training_is_one_that_the_script_understands(miniature_models, tmp_path):
    args = options(miniature_models, tmp_path)
    runs = reproduce.plan(args)
    trained = [run for run in runs if run.method.trained]
    # Table 2: 8 concepts x 3 seeds x 4 trained methods with four vectors and with one; 4 x 2 of the ablations' rows.
    assert len(trained) == 8 * 3 * 4 * 2 + 4 * 2 * (6 + 6 + 3)
    assert len({run.folder(args) for run in runs}) == len(runs) == len(trained) + 8 * 2
    args.concepts = 2
    assert {run.concept for run in reproduce.plan(args) if not run.method.ablation} == {*reproduce.subjects()[:2]}
    args.concepts, args.one_vector_concepts = 3, 1
    assert {r.concept for r in reproduce.plan(args) if "one vector" in r.method.name} == {*reproduce.subjects()[:1]}
    parsed = {}
    for run in trained:
        words = [f"--{k}={v}" for k, v in run.row(args).items() if k != "name"]
        given = script.parse_args([*words, "--output_dir=x", "--pretrained_model_name_or_path=x"], script.MODEL_CLASS)
        script.check_options(script.MODEL_CLASS(given))
        parsed[run.method.name] = given
    assert parsed["m* 10 x mean"].magnitude == "10mean" and parsed["m* 10 x mean"].learning_rate == 0.04
    assert parsed["TI"].magnitude == "free" and parsed["TI"].optimizer == "adamw" and parsed["TI"].kappa == 0
    assert parsed["TI"].learning_rate == 0.02 and parsed["TI, printed"].learning_rate == 5e-3
    assert parsed["DTI"].kappa == 1e-4 and parsed["DTI"].learning_rate == 0.04 and parsed["DTI"].pooling == "stock"
    assert parsed["DTI"].num_vectors == 4 and parsed["DTI, one vector"].num_vectors == 1
    assert parsed["CrossInit"].init == "contextual" and parsed["CrossInit"].reg_weight == 1e-5


def test_recommended_words_replace_the_class_word(miniature_models, tmp_path):
    args = options(miniature_models, tmp_path)
    args.models = reproduce.EXAMPLES / "miniature"  # whose classifiers can read
    rows = {r.method.name: r.row(args) for r in reproduce.plan(args) if r.concept == "clown_fish" and r.method.trained}
    words = {name: row["initializer_token"] for name, row in rows.items()}
    assert words.pop("TI, recommended words") == words.pop("DTI, recommended words") == "striped fish"
    assert words.pop("DTI, our default, recommended words") == "striped fish"
    assert set(words.values()) == {"fish"}


def test_pictures_are_in_one_place_but_where_a_row_says_otherwise(miniature_models, tmp_path):
    args = options(miniature_models, tmp_path)
    runs = [r for r in reproduce.plan(args) if r.concept == "clown_fish" and r.seed == 0]
    reproduce.write_photographs(runs, args)
    world = reproduce.miniature("world")
    concept = world.CONCEPTS["clown_fish"]
    for several, place in ((False, world.home(concept, args.place_seed)), (True, None)):
        folder = next(r.pictures(args) for r in runs if r.method.several == several)
        first, second = (world.Image.open(folder / f"{i}.png").tobytes() for i in (0, 1))
        assert [first, second] == [p.tobytes() for p in world.instance_pictures(concept, place=place)[:2]]


def test_words_stand_for_a_concept_as_they_do_in_a_prompt(miniature_models, tmp_path):
    """The prompt with what was written has the conditioning of the prompt with the words."""
    args = options(miniature_models, tmp_path)
    run = next(r for r in reproduce.plan(args) if r.method.words == "description")
    reproduce.write_words([run], args)
    embedding = reproduce.read_embedding(run.folder(args))
    pipe = generate.load_pipeline(str(miniature_models / "sdxl"))
    spelled = pipe.encode_prompt(f"a photo of a {reproduce.miniature('world').CONCEPTS[run.concept].description} here")
    generate.load_embedding(pipe, embedding)
    with generate.pooled_at(pipe, "eos"):
        learned = pipe.encode_prompt(f"a photo of a {embedding.token} here")
    assert torch.allclose(spelled[0], learned[0], atol=1e-5)


def test_the_orderings_name_methods_that_there_are():
    names = {method.name for method in reproduce.METHODS}
    assert set(reproduce.FRONT) | set(reproduce.POOLING_METHODS) <= names
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


def test_the_scores_of_every_run_are_kept():
    """From them a reader has every mean of the report again, and its difference from any other run's."""
    some = [r | {"run": run, "said": 1.0} for run in (0, 1) for r in records("DTI", {"star": [0.9 - run, 0.7 - run]})]
    some += [r | {"run": 0} for r in records("TI, one vector", {"star": [0.1, 0.2]})]
    rows = list(csv.DictReader(io.StringIO(reproduce.scores_by_run({"guidance-5": some}).decode())))
    assert [(r["setting"], r["method"], r["concept"], r["seed"], r["text"], r["said"]) for r in rows] == [
        ("guidance-5", "DTI", "star", "0", "0.8000", "1.0000"),
        ("guidance-5", "DTI", "star", "1", "-0.2000", "1.0000"),
        ("guidance-5", "TI, one vector", "star", "0", "0.1500", ""),
    ]


def test_what_is_missing_is_said_at_once(tmp_path, miniature_models):
    with pytest.raises(UserError, match="has no sdxl/model_index.json"):
        options(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="--concepts 11: the world has 10"):
        options(miniature_models, tmp_path, "--concepts", "11")


def test_runs_with_other_options_are_not_taken_for_these(tmp_path, miniature_models):
    names = ("max_train_steps", "train_batch_size")
    reproduce.keep_options(options(miniature_models, tmp_path), *names)
    reproduce.keep_options(options(miniature_models, tmp_path, "--jobs", "1"), *names)
    with pytest.raises(UserError, match="--max_train_steps 20: the runs in .* had None"):
        reproduce.keep_options(options(miniature_models, tmp_path, "--max_train_steps", "20"), *names)
    # Another script's folder has other options noted, and keeps these.
    reproduce.keep_options(options(miniature_models, tmp_path), "concepts")
    with pytest.raises(UserError, match="--train_batch_size 2: the runs in .* had 4"):
        reproduce.keep_options(options(miniature_models, tmp_path, "--train_batch_size", "2"), *names)


@pytest.mark.slow
def test_the_whole_of_it_and_again(miniature_models, tmp_path, monkeypatch):
    some = [m for m in reproduce.METHODS if m.name in ("TI", "TI-rescaled", "DTI", "AdamW")]
    some = [replace(m, at=(1,) if m.name == "TI" else ()) for m in some]
    monkeypatch.setattr(reproduce, "METHODS", some)
    argv = ["--models", str(miniature_models), "--output_dir", str(tmp_path / "out")]
    argv += ["--prompts", "world-half"]
    argv += "--concepts 2 --seeds 2 --ablation_concepts 2 --ablation_seeds 1 --max_train_steps 2".split()
    argv += "--num_inference_steps 1 --picture_seeds 0".split()
    reproduce.main(argv)
    report = (tmp_path / "out" / "report.md").read_text()
    for row in ("| TI | 2 |", "| TI-rescaled | 2 |", "| DTI | 2 |", "| AdamW | 2 |", "| text: DTI above TI |"):
        assert row in report
    assert "### Table 3" in report and "### Table 6" not in report
    for plot in ("scatter", "front", "norm"):
        assert (tmp_path / "out" / f"{plot}-guidance-5.png").stat().st_size > 5000
    # The sheet: a row for each prompt, a column for each of Table 2's methods.
    sheet = reproduce.Image.open(tmp_path / "out" / "sheet-zebra_star-guidance-5.png")
    folder = tmp_path / "out" / "evaluations" / "guidance-5" / "zebra_star" / "pictures" / "zebra_star"
    picture = reproduce.Image.open(folder / "DTI_0" / "03-0.png").convert("RGB")
    picture = np.asarray(picture.resize((2 * picture.width, 2 * picture.height), reproduce.Image.NEAREST))
    views = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), picture.shape)
    assert any((row == picture).all(axis=(-3, -2, -1)).any() for row in views)
    assert "guidance-1.5-stock" in report
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["orderings"]["guidance-5"][0]["score"]["n"] == 2
    assert [curve["steps"] for curve in found["curves"]["guidance-5"]] == [
        [1, 2],
        [2],
    ]  # TI on the way, DTI at its end

    # Two seeds of each row of Table 2, one of the others; from them the report's differences can be computed.
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "scores.csv").read_text())))
    rows = [row for row in rows if row["setting"] == "guidance-5"]
    count = {
        name: sum(row["method"] == name for row in rows) for name in ("TI", "TI-rescaled", "DTI", "AdamW", "TI @1")
    }
    assert count == {"TI": 4, "TI-rescaled": 4, "DTI": 4, "AdamW": 2, "TI @1": 2}
    mean = {name: np.mean([float(r["text"]) for r in rows if r["method"] == name]) for name in ("DTI", "TI")}
    assert mean["DTI"] - mean["TI"] == pytest.approx(found["orderings"]["guidance-5"][0]["score"]["mean"], abs=2e-4)

    # A method that is rescaled has other pictures than the one that it is of; and nothing is trained twice.
    folder = tmp_path / "out" / "evaluations" / "guidance-5" / "zebra_star"
    scores = {
        (r["method"], r["number"]): r["cosine"]
        for r in json.loads((folder / "evaluation.json").read_text())["records"]
    }
    assert any(scores["TI #0", n] != scores["TI #0-rescaled", n] for n in range(0, 40, 2) if ("TI #0", n) in scores)
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("learned_embeds.safetensors")}
    assert len(trained) == 2 * 2 * 2 + 2
    reproduce.main(argv)
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items())

    # Prompts of a user's state no attributes, and without ablations there are no curves: the report is written all the same.
    (tmp_path / "prompts.txt").write_text("a {} on grass\na {} at night\n")
    reproduce.main([*argv, "--prompts", str(tmp_path / "prompts.txt"), "--ablation_concepts", "0"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["curves"]["guidance-5"] == []
