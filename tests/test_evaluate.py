"""examples/evaluate.py: scores against naive references, pairing, resuming, statistics by hand, sheets, bad input."""

import csv
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MEAN, ROOT, STD
from PIL import Image


sys.path.append(str(ROOT / "examples" / "miniature"))

import evaluate  # noqa: E402
import generate  # noqa: E402
import transformers  # noqa: E402
import world  # noqa: E402
from export import Embedding, UserError, read_embedding, run, write_embedding  # noqa: E402
from generate import generate_pairs, load_embeddings, load_pipeline  # noqa: E402
from transformers import Dinov2Model, SiglipModel  # noqa: E402


@pytest.fixture(scope="session")
def material(small, judges, tmp_path_factory):
    """A folder with pictures of two subjects, two methods' embeddings for each, and the table of them."""
    folder = tmp_path_factory.mktemp("material")
    lines = ["subject,method,path,instance_data_dir,class_word"]
    for number, name in enumerate(("zebra_star", "clown_fish")):
        concept = world.CONCEPTS[name]
        (folder / name).mkdir()
        for index, picture in enumerate(world.instance_pictures(concept, 3)):
            picture.save(folder / name / f"{index}.png")
        for method in ("DTI", "TI"):
            torch.manual_seed(10 * number + len(method))
            vectors = {"text_encoder": torch.randn(1, 32), "text_encoder_2": torch.randn(1, 48)}
            write_embedding(Embedding("<s>", vectors), folder / "runs" / name / method)
            path = folder / "runs" / name / method
            lines.append(f"{name},{method},{path},{folder / name},{concept.initializer}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("a {} on grass\na photo of a {} with a {} at night\n")
    return folder


@pytest.fixture
def command(small, judges, material, tmp_path):
    """Builds the command line of a small evaluation of the table, with options replaced, left out (None) or added."""

    def build(**changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": small / "sdxl",
            "table": material / "table.csv",
            "prompts": material / "prompts.txt",
            "output_dir": tmp_path / "out",
            "seeds": [0, 1],
            "num_inference_steps": 1,
            "dino": judges / "dino",
            "siglip": judges / "siglip",
            "device": "cpu",
        } | changes
        argv = []
        for name, value in options.items():
            if value is not None:
                argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return argv

    return build


@pytest.fixture
def rendered(monkeypatch):
    """Stands in for the pipeline: a picture from the world, decided by prompt, token and seed. Counts its calls."""
    made = []

    def pairs(pipe, pairs, **options):
        for prompt, seed in pairs:
            made.append((prompt, seed))
            yield prompt, seed, Image.fromarray(world.picture_array(sum(map(ord, prompt)) * 10 + seed)[1])

    monkeypatch.setattr(evaluate, "start_pipeline", lambda *args: None)
    monkeypatch.setattr(generate, "generate_pairs", pairs)
    return made


def pictures_of(seeds) -> list[Image.Image]:
    return [Image.fromarray(world.picture_array(seed)[1]) for seed in seeds]


# Scores


@torch.no_grad()
def test_the_image_score_is_the_mean_cosine_of_class_features(judges):
    pictures, references = pictures_of(range(5)), pictures_of(range(50, 53))
    score = evaluate.ImageScore(str(judges / "dino"))
    found = evaluate.image_scores(score.features(pictures, batch_size=2), score.features(references))

    model = Dinov2Model.from_pretrained(judges / "dino").eval().double()

    def feature(picture):  # one by one, in float64, with the arithmetic of the processor written out
        pixels = (np.asarray(picture) / 255 - MEAN) / STD
        states = model(pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None]).last_hidden_state
        return states[0, 0].numpy()

    for picture, value in zip(pictures, found, strict=True):
        a = feature(picture)
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for b in map(feature, references)]
        assert value.item() == pytest.approx(np.mean(cosines), abs=1e-5)


def test_a_picture_that_is_the_reference_scores_one(judges):
    pictures = pictures_of(range(3))
    features = evaluate.ImageScore(str(judges / "dino")).features(pictures)
    assert evaluate.image_scores(features[:1], features[:1]).item() == pytest.approx(1, abs=1e-6)
    assert evaluate.image_scores(features[:1], features).item() < 1


@torch.no_grad()
def test_the_text_score_is_the_sigmoid_of_each_pictures_own_logit(judges):
    pictures, prompts = pictures_of(range(5)), ["a {} on the dog", "a photo of a {}", "a {} of a {}"]
    prompts = [prompts[i] for i in (0, 1, 0, 2, 1)]
    score = evaluate.TextScore(str(judges / "siglip"))
    found = evaluate.text_scores(score, pictures, prompts, "cat")

    model = SiglipModel.from_pretrained(judges / "siglip").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(judges / "siglip")
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        ids = tokenizer(prompt.replace("{}", "cat")).input_ids
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (64 - len(ids))])
        pixels = torch.tensor(np.asarray(picture) / 127.5 - 1).float().permute(2, 0, 1)[None]
        text = model.text_model(input_ids=ids).pooler_output[0]
        image = model.vision_model(pixel_values=pixels).pooler_output[0]
        cosine = torch.cosine_similarity(text, image, dim=0)
        logit = cosine * model.logit_scale.exp() + model.logit_bias
        assert found["cosine"][index].item() == pytest.approx(cosine.item(), abs=1e-5)
        assert found["logit"][index].item() == pytest.approx(logit.item(), abs=1e-5)
        assert found["text"][index].item() == pytest.approx(1 / (1 + np.exp(-logit.item())), abs=1e-6)
    assert len({round(value, 6) for value in found["cosine"].tolist()}) == 5
    assert not torch.allclose(found["text"], evaluate.text_scores(score, pictures, prompts, "dog")["text"])


def test_batches_do_not_change_scores(judges):
    pictures, score = pictures_of(range(6)), evaluate.TextScore(str(judges / "siglip"))
    texts = ["a cat", "a dog", "a cat", "a vase", "a clock", "a dog"]
    one, many = score.logits(pictures, texts, batch_size=1), score.logits(pictures, texts, batch_size=4)
    assert torch.allclose(one["logit"], many["logit"], atol=1e-5)


def test_masks_black_out_the_background(tmp_path, capsys):
    (tmp_path / "photos").mkdir(), (tmp_path / "masks").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / "photos" / f"{name}.png")
    mask = np.zeros((10, 20), np.uint8)  # of half the size
    mask[:, :10] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.jpg")
    shown, scored = evaluate.read_references(tmp_path / "photos", tmp_path / "masks")
    assert np.asarray(shown[0]).min() == 50
    pixels = np.asarray(scored[0])
    assert (pixels[:, :20] == (200, 100, 50)).all() and (pixels[:, 20:] == 0).all()
    assert np.array_equal(np.asarray(scored[1]), np.asarray(shown[1]))  # it has no mask
    assert "no mask, so the whole picture is scored: b.png" in capsys.readouterr().err
    Image.new("L", (20, 10), 255).rotate(90, expand=True).save(tmp_path / "masks" / "a.jpg")
    with pytest.raises(UserError, match="a.jpg is 10 x 20, which is not the shape of the photograph, 40 x 20"):
        evaluate.read_references(tmp_path / "photos", tmp_path / "masks")


# Prompts


@pytest.mark.parametrize("name", ["object", "live", "face", "style", "world"])
def test_forty_prompts_of_each_kind(name):
    prompts = evaluate.BUILT_IN[name]
    assert len(prompts) == 40 == len({p.text for p in prompts}) and all(p.text.count("{}") == 1 for p in prompts)
    simple = [p for p in prompts if p.kind == "simple"]
    assert prompts[: len(simple)] == simple and len(simple) == (20 if name == "world" else 25)


def test_the_worlds_prompts_state_what_they_say():
    known = set(world.vocabulary()) | {"a", "an", "the"}
    for prompt in (*evaluate.BUILT_IN["world"], *evaluate.BUILT_IN["world-style"]):
        words = prompt.text.replace("{}", "").replace(",", "").split()
        assert set(words) <= known, prompt
        said = prompt.states
        assert all(value in world.LABELS[key] for key, value in said.items()), prompt
        places = {p for p, phrases in world.PLACE_WORDS.items() for phrase in phrases if phrase in prompt.text}
        assert places == ({said["place"]} if "place" in said else set())
        assert [w for w in words if w in world.PROPS] == [said[k] for k in ("prop",) if k in said]
        shapes = [said[k] for k in ("shape", "other_shape") if k in said]
        assert [w for w in words if w in world.SHAPES] == shapes
        colours = [said[k] for k in ("colour", "prop_colour", "other_colour") if k in said]
        assert sorted(w for w in words if w in world.COLOURS) == sorted(colours)
        style = "photo" if "photo" in words else "pixel art" if "pixel" in words else None
        style = "sketch" if {"sketch", "drawing"} & set(words) else style
        assert said.get("style") == style
        relation = next((r for r in world.RELATIONS if r in words), None)
        if relation and "shape" not in said and prompt.text.index(relation) < prompt.text.index("{}"):
            relation = world.OPPOSITE[relation]
        assert said.get("relation") == relation, prompt
        # As in the world, where what stands above or below would collide with a prop.
        assert not (said.get("prop") and said.get("relation") in ("above", "below"))


def test_attributes_are_judged_where_they_are_stated():
    stated = {"place": "snow", "other_shape": "square", "other_colour": "red"}
    labels = {"place": "snow", "other_shape": "square", "other_colour": "blue", "shape": "star", "colour": "red"}
    record = evaluate.read_attributes(labels, stated, {"shape": "star", "colour": "white"})
    assert record["right"] == {
        "place": True, "other_shape": True, "other_colour": False, "second object": False, "shape": True, "colour": False,
    }  # fmt: skip
    assert record["said"] == pytest.approx(2 / 3) and record["kept"] == 0.5
    assert evaluate.read_attributes(None, stated, {}) == {}
    assert evaluate.subject_attributes("zebra_star")["pattern"] == "striped"
    assert evaluate.subject_attributes("my dog") == {}
    assert evaluate.subject_attributes("blueprint") == {"style": "sketch", "tone": "blue"}


# Statistics


def test_students_t():
    for freedom, value in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 29: 2.045}.items():  # of any printed table
        assert evaluate.student_t(freedom) == pytest.approx(value, abs=1e-3)


def test_interval_by_hand():
    found = evaluate.interval([1.0, 2.0, 6.0])  # mean 3, variance (4 + 1 + 9) / 2 = 7
    half = 4.3027 * (7 / 3) ** 0.5
    assert found["mean"] == 3 and found["n"] == 3
    assert found["low"] == pytest.approx(3 - half, abs=1e-3) and found["high"] == pytest.approx(3 + half, abs=1e-3)
    assert evaluate.interval([5.0]) == {"mean": 5.0, "low": None, "high": None, "n": 1}


def make_records() -> list[dict]:
    """Two subjects, two methods, two prompts, two seeds; the image score adds up what it came from."""
    return [
        {
            "subject": subject, "method": method, "prompt": prompt, "seed": seed, "kind": kind,
            "image": s + m + p + 0.01 * seed, "text": 0.5,
        }
        for subject, s in (("dog", 0.1), ("cat", 0.3))
        for method, m in (("DTI", 0.2), ("TI", 0.0 if subject == "dog" else 0.1))
        for prompt, kind, p in (("a {}", "simple", 0.0), ("the {}", "complex", 0.1))
        for seed in (0, 1)
    ]  # fmt: skip


def test_tables_by_hand():
    tables = evaluate.statistics(make_records())
    assert tables["unit"] == "subject" and tables["measures"] == ["image", "text"]
    means = {(r["subject"], r["method"]): r["image"]["mean"] for r in tables["subjects"]}
    expected = {("dog", "DTI"): 0.355, ("dog", "TI"): 0.155, ("cat", "DTI"): 0.555, ("cat", "TI"): 0.455}
    assert means == pytest.approx(expected)
    methods = {r["method"]: r["image"] for r in tables["methods"]}
    assert methods["DTI"]["mean"] == pytest.approx(0.455) and methods["TI"]["mean"] == pytest.approx(0.305)
    # Two values 0.2 apart: deviation 0.1 sqrt 2, so t 0.1 sqrt 2 / sqrt 2.
    assert methods["DTI"]["high"] - 0.455 == pytest.approx(12.7062 * 0.1, abs=1e-3)
    (difference,) = tables["differences"]
    assert (difference["method"], difference["minus"]) == ("DTI", "TI")
    assert difference["image"]["mean"] == pytest.approx(0.15)  # 0.2 for the dog, 0.1 for the cat
    assert difference["image"]["high"] - 0.15 == pytest.approx(12.7062 * 0.05, abs=1e-3)
    kinds = {(r["method"], r["kind"]): r["image"]["mean"] for r in tables["kinds"]}
    assert kinds["DTI", "complex"] - kinds["DTI", "simple"] == pytest.approx(0.1)


def test_one_subjects_interval_is_over_prompts():
    tables = evaluate.statistics([r for r in make_records() if r["subject"] == "dog"])
    assert tables["unit"] == "prompt"
    found = tables["methods"][0]["image"]  # prompts at 0.305 and 0.405
    assert found["n"] == 2 and found["high"] - found["mean"] == pytest.approx(12.7062 * 0.05, abs=1e-3)


def test_differences_are_over_common_subjects():
    records = [r for r in make_records() if (r["subject"], r["method"]) != ("cat", "TI")]
    (difference,) = evaluate.statistics(records)["differences"]
    assert difference["image"] == {"mean": pytest.approx(0.2), "low": None, "high": None, "n": 1}


# Runs


def test_an_evaluation_from_the_pipeline_to_the_report(command, small, material, judges, tmp_path, monkeypatch):
    report = evaluate.main(command(rescale=["TI=mean"], guidance_scale=100, num_inference_steps=3))
    out = tmp_path / "out"
    assert len(report["records"]) == 2 * 3 * 2 * 2 == len(list((out / "pictures").rglob("*.png")))
    assert json.loads((out / "evaluation.json").read_text())["records"] == report["records"]
    assert [row["method"] for row in report["tables"]["methods"]] == ["DTI", "TI", "TI-rescaled"]

    # The tables are the means of what scores.csv has, and that is what the pictures score.
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in report["tables"]["methods"]:
        mine = [float(r["image"]) for r in rows if r["method"] == row["method"]]
        assert row["image"]["mean"] == pytest.approx(np.mean(mine))
    score = evaluate.ImageScore(str(judges / "dino"))
    for row in (rows[0], rows[-1]):
        features = score.features([Image.open(out / row["file"]).convert("RGB")])
        references = score.features([Image.open(p) for p in sorted((material / row["subject"]).iterdir())])
        assert float(row["image"]) == pytest.approx((features @ references.T).mean().item(), abs=1e-5)
    assert "| DTI | TI | " in (out / "report.md").read_text()
    assert (out / "scatter.png").is_file() and len(report["sheets"]) == 2

    # Methods share their subject's token, and still each picture is its own embedding's: as of a pipeline of its own.
    pictures = {}
    for method in ("DTI", "TI"):
        pipe = load_pipeline(str(small / "sdxl"))
        load_embeddings(pipe, [read_embedding(material / "runs" / "clown_fish" / method)])
        ((_, _, picture),) = generate_pairs(pipe, [("a <s> on grass", 1)], steps=3, guidance_scale=100.0)
        pictures[method] = np.asarray(picture, int)
        saved = np.asarray(Image.open(out / "pictures" / "clown_fish" / method / "00-1.png"), int)
        assert np.abs(saved - pictures[method]).max() <= 1
    assert np.abs(pictures["DTI"] - pictures["TI"]).max() > 5

    # Again: nothing is made, nothing loaded, and the figures are the same.
    before = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    monkeypatch.setattr(evaluate, "start_pipeline", lambda *args: pytest.fail("the pipeline was loaded"))
    again = evaluate.main(command(rescale=["TI=mean"], guidance_scale=100, num_inference_steps=3))
    assert {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")} == before
    assert again["tables"] == report["tables"]


def test_stable_diffusion_is_evaluated(command, small, material, tmp_path):
    """One text encoder, and a token of 32 numbers, which could as well be SANA's: the model says whose it is."""
    methods = []
    for index, method in enumerate(("DTI", "TI")):
        torch.manual_seed(index)
        write_embedding(Embedding("<s>", {"text_encoder": torch.randn(1, 32)}), tmp_path / method)
        methods.append(f"{method}={tmp_path / method}")
    one = {"table": None, "instance_data_dir": material / "zebra_star", "class_word": "star", "embeddings": methods}
    model = {"pretrained_model_name_or_path": small / "sd"}
    report = evaluate.main(command(**one, **model, seeds=[0], rescale="TI=mean", guidance_scale=100))
    assert [row["method"] for row in report["tables"]["methods"]] == ["DTI", "TI", "TI-rescaled"]
    pictures = [Image.open(tmp_path / "out" / record["file"]).tobytes() for record in report["records"]]
    assert len(set(pictures)) == 6


def test_pictures_are_paired_with_their_prompts_and_seeds(command, rendered, tmp_path):
    evaluate.main(command())
    assert len(rendered) == 16 and len({prompt for prompt, _ in rendered}) == 8  # a token for each embedding
    for prompt, seed in rendered[:4]:
        number = 0 if "grass" in prompt else 1
        picture = Image.open(tmp_path / "out" / "pictures" / "zebra_star" / "DTI" / f"{number:02d}-{seed}.png")
        assert np.array_equal(np.asarray(picture), world.picture_array(sum(map(ord, prompt)) * 10 + seed)[1])
        assert "{}" not in prompt and len(re.findall("<subject-0>", prompt)) == (1 if number == 0 else 2)


def test_only_what_is_missing_or_was_made_otherwise_is_made(command, rendered, material, tmp_path):
    evaluate.main(command())
    folder = tmp_path / "out" / "pictures" / "clown_fish" / "TI"
    (folder / "00-1.png").unlink()
    (folder / "01-0.png").write_bytes((folder / "01-0.png").read_bytes()[:300])  # cut short
    rendered.clear()
    evaluate.main(command())
    assert [seed for _, seed in rendered] == [1, 0]
    rendered.clear()
    evaluate.main(command(seeds=[0, 1, 7]))
    assert [seed for _, seed in rendered] == [7] * 8
    rendered.clear()
    evaluate.main(command(guidance_scale=2.5))
    assert len(rendered) == 16
    rendered.clear()
    vectors = {"text_encoder": torch.ones(1, 32), "text_encoder_2": torch.ones(1, 48)}
    write_embedding(Embedding("<s>", vectors), tmp_path / "other")
    table = (material / "table.csv").read_text()
    table = table.replace(str(material / "runs" / "zebra_star" / "DTI"), str(tmp_path / "other"))
    (tmp_path / "table.csv").write_text(table)
    evaluate.main(command(guidance_scale=2.5, table=tmp_path / "table.csv"))
    assert len(rendered) == 4 and all("<subject-0>" in prompt for prompt, _ in rendered)


def test_one_subject_without_a_table(command, rendered, material, tmp_path):
    runs = material / "runs" / "zebra_star"
    options = {"table": None, "instance_data_dir": material / "zebra_star", "class_word": "star"}
    report = evaluate.main(command(**options, embeddings=[f"ours={runs / 'DTI'}", f"TI={runs / 'TI'}"]))
    assert list(report["subjects"]) == ["zebra_star"] and report["tables"]["unit"] == "prompt"
    assert {case["class_word"] for case in report["cases"]} == {"star"}


def test_the_classifiers_judge_the_worlds_prompts(command, rendered, tmp_path, monkeypatch):
    class Classifiers:  # says of every picture the same
        def read(self, pictures):
            subject = world.CONCEPTS["zebra_star"].subject
            return [world.attributes(world.Scene(subject, "snow"))] * len(pictures)

    monkeypatch.setattr(evaluate, "load_classifiers", lambda folder, device: Classifiers())
    (tmp_path / "classifiers").mkdir()
    (tmp_path / "classifiers" / "model.safetensors").touch()
    report = evaluate.main(command(prompts="world", seeds=[0], classifiers=tmp_path / "classifiers"))
    row = next(r for r in report["tables"]["attributes"] if r["method"] == "DTI")
    stating = [p.states["place"] for p in evaluate.BUILT_IN["world"] if "place" in p.states]
    assert row["place"] == {"mean": pytest.approx(stating.count("snow") / len(stating)), "n": 2 * len(stating)}
    kept = {r["subject"]: r["kept"]["mean"] for r in report["tables"]["subjects"] if r["method"] == "DTI"}
    assert kept["zebra_star"] == 1 and kept["clown_fish"] == 0.4  # stripes and eyes
    assert "prompt's attributes right" in (tmp_path / "out" / "report.md").read_text()


def test_the_contact_sheet_holds_the_pictures(tmp_path):
    pictures, references = pictures_of(range(4)), pictures_of(range(10, 13))
    records = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        record = {"subject": "dog", "method": ("DTI", "TI")[index % 2], "number": index // 2, "seed": 0}
        record |= {"prompt": "a {}", "file": str(tmp_path / f"{index}.png"), "image": 0.5, "text": 0.25}
        records.append(record)
    (name,) = evaluate.draw_sheets(records, {"dog": references}, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / name))
    places = []
    for picture in (references[2], *pictures[:3]):
        large = np.asarray(picture.resize((192, 192), Image.NEAREST))
        spots = [
            (y, x)
            for x in range(sheet.shape[1] - 191)
            for y in range(sheet.shape[0] - 191)
            if (sheet[y, x : x + 192] == large[0]).all() and (sheet[y : y + 192, x : x + 192] == large).all()
        ]
        assert len(spots) == 1
        places += spots
    (top, _), (y0, x0), (y1, x1), (y2, x2) = places
    assert top < y0 == y1 < y2 and x0 == x2 < x1


# Bad input


BAD = {
    "a method without a path": ({"table": None, "embeddings": "DTI"}, "NAME=PATH"),
    "no embeddings": ({"table": None}, "--table"),
    "both": ({"embeddings": "a=b"}, "--table"),
    "no pictures": ({"table": None, "embeddings": "DTI=x", "class_word": "dog"}, "--instance_data_dir"),
    "a subject beside a table": ({"class_word": "dog"}, "--class_word is for one subject"),
    "a table that is not there": ({"table": "none.csv"}, "--table none.csv"),
    "a seed twice": ({"seeds": [1, 1]}, "--seeds 1 1"),
    "a negative seed": ({"seeds": "-1"}, "--seeds"),
    "no such prompts": ({"prompts": "objects"}, "--prompts objects"),
    "no such method": ({"rescale": "XX=mean"}, "there is no method XX"),
    "no such rule": ({"rescale": "TI=max"}, "--rescale"),
    "no such judge": ({"dino": "nowhere"}, "--dino nowhere"),
    "judges exchanged": ({"siglip": "{judges}/dino"}, "--siglip"),
    "no such device": ({"device": "abacus"}, "--device abacus"),
    "no such model": ({"pretrained_model_name_or_path": "nowhere"}, "--pretrained_model_name_or_path nowhere"),
    "no classifiers": ({"classifiers": "nowhere"}, "--classifiers nowhere"),
    "SANA's instruction": ({"complex_human_instruction": "default"}, "--complex_human_instruction"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_message(case, command, judges, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "start_pipeline", lambda *args: pytest.fail("the pipeline was loaded"))
    monkeypatch.setattr(evaluate, "load_weights", lambda *args: pytest.fail("a judge was loaded"))
    changes, message = BAD[case]
    changes = {k: v.format(judges=judges) if isinstance(v, str) else v for k, v in changes.items()}
    try:
        evaluate.main(command(**changes))
        pytest.fail("it went through")
    except UserError as error:
        text = str(error)
    except SystemExit as error:
        assert error.code != 0
        text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


TABLES = {
    "empty": ("", "no rows"),
    "no class word": ("subject,method,path,instance_data_dir\ndog,DTI,a,b\n", "row 1 has no class_word"),
    "an unknown column": (
        "subject,method,path,instance_data_dir,class_word,prompt\ndog,DTI,a,b,dog,x\n",
        "prompt is not a column",
    ),
    "a run twice": ("{head}\ndog,DTI,{run},{photos},dog\ndog,DTI,{run},{photos},dog\n", "is given twice"),
    "two class words": (
        "{head}\ndog,DTI,{run},{photos},dog\ndog,TI,{run},{photos},cat\n",
        "methods can be compared only",
    ),
    "no such run": ("{head}\ndog,DTI,nowhere,{photos},dog\n", "nowhere"),
    "no such photographs": ("{head}\ndog,DTI,{run},nowhere,dog\n", "--instance_data_dir nowhere"),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_tables_end_in_one_message(case, command, material, tmp_path):
    text, message = TABLES[case]
    head, run = "subject,method,path,instance_data_dir,class_word", material / "runs" / "zebra_star" / "DTI"
    (tmp_path / "bad.csv").write_text(text.format(head=head, run=run, photos=material / "zebra_star"))
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate.main(command(table=tmp_path / "bad.csv"))


def test_bad_files_are_named(command, material, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {} here\na dog there\n")
    with pytest.raises(UserError, match="'a dog there' has no {}"):
        evaluate.main(command(prompts=tmp_path / "prompts.txt"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    table = (material / "table.csv").read_text().replace(str(material / "zebra_star") + ",", f"{tmp_path / 'photos'},")
    (tmp_path / "table.csv").write_text(table)
    with pytest.raises(UserError, match="a.png is damaged"):
        evaluate.main(command(table=tmp_path / "table.csv"))


def test_files_of_others_are_not_overwritten(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    with pytest.raises(UserError, match="report.md that this script did not write"):
        evaluate.main(command(output_dir=tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["report.md"]


def test_an_embedding_of_another_width_is_refused(command, material, tmp_path):
    vectors = {"text_encoder": torch.ones(1, 32), "text_encoder_2": torch.ones(1, 40)}
    write_embedding(Embedding("<s>", vectors), tmp_path / "wide")
    case = replace(evaluate.read_table(material / "table.csv", "object")[0], path=tmp_path / "wide")
    with pytest.raises(UserError, match="40"):
        evaluate.evaluate([case], evaluate.parse_args(command()))


def test_the_script_shows_one_line_and_a_status(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/evaluate.py", *command(table="none.csv")])
    with pytest.raises(SystemExit, match="^evaluate.py: error: --table none.csv cannot be read[^\n]*$"):
        run(evaluate.main)


def test_the_output_is_apart_from_the_photographs(command, material, tmp_path):
    photos = material / "zebra_star"
    with pytest.raises(UserError, match="out lies in the photographs' folder"):
        evaluate.main(command(output_dir=photos / "out"))
    one = {"table": None, "instance_data_dir": photos, "class_word": "star", "embeddings": "DTI=out"}
    for folder, relation in ((photos, "is"), (material, "holds")):
        with pytest.raises(UserError, match=f" {relation} the photographs' folder"):
            evaluate.main(command(output_dir=folder, **one))
    assert sorted(path.suffix for path in photos.iterdir()) == [".png"] * len(list(photos.iterdir()))
