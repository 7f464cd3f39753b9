"""examples/bind.py: what counts as arrived and as leaked, by scenes whose truth is known, and the whole of it on small models."""

import json

import bind
import pytest
import torch
from evaluate import load_classifiers, subject_attributes
from export import Embedding, UserError, read_embedding, write_embedding
from PIL import Image


PAIR = ("spotted_house", "zebra_star")  # yellow, spotted in purple, no eyes; white, striped in black, with eyes
STYLE = ("clown_fish", "blueprint")


def labels(large: str, small: str, **changes) -> dict[str, str]:
    """What a perfect classifier reads in a picture of the two."""
    first, second = subject_attributes(large), subject_attributes(small)
    read = first | {label: second[name] for name, label in bind.SMALL.items()}
    return read | {"relation": "left", "style": "photo"} | changes


def shares(record: dict) -> dict[str, float]:
    found = {}
    for measure in ("arrived", "leaked"):
        for part in ("large", "small"):
            found[f"{part} {measure}"] = bind.share([record | {"order": PAIR, "prompt": ""}], measure, part)["mean"]
    return found


def test_the_word_order_has_a_table_of_its_own():
    """Named first the large object is right; named second it is swapped."""
    records = []
    for prompt in bind.TWO_SUBJECTS:
        first = not prompt.text.startswith("a small")
        read = labels(*(PAIR if first else PAIR[::-1]), **{"place": "grass"} | prompt.states)
        record = {"row": "DTI", "order": list(PAIR), "prompt": prompt.text}
        records.append(record | bind.count(read, PAIR, prompt.states))
    line = bind.by_word_order(records).splitlines()[-1]
    assert line == "| DTI | 1.000 ± 0.000 / 0.000 ± 0.000 | 0.000 ± 0.000 / 1.000 ± 0.000 |"


def test_the_right_picture_has_all_attributes_and_the_swapped_one_only_leaks():
    stated = {"relation": "left", "style": "photo"}
    right = bind.count(labels(*PAIR), PAIR, stated)
    assert shares(right) == {"large arrived": 1, "small arrived": 1, "large leaked": 0, "small leaked": 0}
    swapped = bind.count(labels(*PAIR[::-1]), PAIR, stated)
    assert shares(swapped) == {"large arrived": 0, "small arrived": 0, "large leaked": 1, "small leaked": 1}
    assert right["said"] == swapped["said"] == 1 and right["drawn"] and swapped["drawn"]
    assert bind.count(labels(*PAIR, relation="right"), PAIR, stated)["said"] == 0.5


def test_one_wrong_attribute_is_one_leak_and_only_if_it_is_the_others():
    star = bind.count(labels(*PAIR, shape="star"), PAIR, {"style": "photo"})
    assert [name for name, leaked in star["leaked"].items() if leaked] == ["large shape"]
    assert [name for name, arrived in star["arrived"].items() if not arrived] == ["large shape"]
    circle = bind.count(labels(*PAIR, shape="circle", other_colour="red"), PAIR, {"style": "photo"})
    assert not any(circle["leaked"].values())
    assert [name for name, arrived in circle["arrived"].items() if not arrived] == ["large shape", "small colour"]


def test_what_both_have_cannot_leak():
    """The fish is orange and white, the star white and black; both are striped, and both have eyes."""
    record = bind.count(labels("clown_fish", "zebra_star"), ("clown_fish", "zebra_star"), {"style": "photo"})
    assert set(record["leaked"]) == {"large shape", "large colour", "large colour2", "small shape", "small colour"}
    white = labels("clown_fish", "zebra_star", colour="white", colour2="black")
    leaked = bind.count(white, ("clown_fish", "zebra_star"), {"style": "photo"})["leaked"]
    assert leaked["large colour2"] and not leaked["large colour"]
    twins = bind.count(labels("clown_fish", "clown_fish"), ("clown_fish", "clown_fish"), {"style": "photo"})
    head = {"row": "DTI", "order": ["clown_fish", "clown_fish"], "prompt": "a {0} left of a small {1}"}
    (row,) = bind.summary([head | twins], "subjects")
    assert bind.table([row]).splitlines()[-1].startswith("| DTI | 1 | 1.000 | 1.000 |")
    assert bind.by_word_order([head | twins]).splitlines()[-1] == "| DTI | 1.000 / - | - / - |"


def test_a_small_plain_object_may_have_either_of_its_colours():
    """The star is white and black."""
    for colour, arrives in (("white", True), ("black", True), ("yellow", False)):
        record = bind.count(labels(*PAIR, other_colour=colour, colour=colour), PAIR, {"style": "photo"})
        assert record["arrived"]["small colour"] == arrives
        assert record["arrived"]["large colour"] == (colour == "yellow")
    assert record["leaked"]["small colour"]  # yellow is the house's


def test_what_the_other_does_not_have_cannot_leak():
    """The star has eyes and the house has none: only the house can get some from the other."""
    counted = [bind.count(labels(*order), order, {"style": "photo"})["leaked"] for order in (PAIR, PAIR[::-1])]
    assert ["large eyes" in leaked for leaked in counted] == [True, False]


def test_a_style_has_arrived_or_gave_way_to_the_photographs():
    read = subject_attributes("clown_fish") | {"style": "sketch", "tone": "blue", "place": "grass"}
    record = bind.count(read, STYLE, {"place": "grass"})
    assert all(record["arrived"].values()) and record["leaked"] == {"style style": False}
    photo = bind.count(read | {"style": "photo", "tone": "none"}, STYLE, {"place": "snow"})
    assert photo["leaked"] == {"style style": True} and photo["said"] == 0
    assert [n for n, arrived in photo["arrived"].items() if not arrived] == ["style style", "style tone"]


@pytest.fixture(scope="module")
def classifiers():
    return load_classifiers(bind.MINIATURE / "classifiers", "cpu")


def test_the_classifiers_tell_rendered_scenes_from_swapped_ones(classifiers):
    records = bind.rendered_records([PAIR, STYLE], classifiers)
    for kind, parts in bind.PARTS.items():
        rows = {row["row"]: row for row in bind.summary([r for r in records if r["kind"] == kind], kind)}
        for part in map(bind.SAID.get, parts):
            in_blue = part == "subject"  # whose own colours the style's tone nearly hides
            assert rows[bind.TRUE][f"{part} arrived"]["mean"] > (0.6 if in_blue else 0.85)
            if not in_blue:  # nor has a style a shape that could leak to it
                assert rows[bind.SWAPPED][f"{part} arrived"]["mean"] < 0.15
                assert rows[bind.TRUE][f"{part} leaked"]["mean"] < 0.1
                assert rows[bind.SWAPPED][f"{part} leaked"]["mean"] > 0.85
        assert all(rows[row]["rest of the prompt"]["mean"] > 0.9 for row in (bind.TRUE, bind.SWAPPED))


def test_the_crop_shows_the_small_objects_pattern_and_eyes(classifiers):
    """Of the two small objects, one is spotted without eyes, one striped with eyes; the world's own are plain without."""
    prompts = [p for p in bind.TWO_SUBJECTS if "style" not in p.states]
    for order, kind, pattern, eyes in (
        (PAIR, bind.PATTERNED, "striped", "eyes"),
        (PAIR[::-1], bind.PATTERNED, "spotted", "none"),
        (PAIR, bind.TRUE, "plain", "none"),
    ):
        scenes = [bind.rendered_scene(order, p.states, kind, 0) for p in prompts]
        read = bind.read_labels(classifiers, scenes, prompts)
        assert sum(x["other_pattern"] == pattern for x in read) >= 0.7 * len(read)
        assert sum(x["other_eyes"] == eyes for x in read) >= 0.7 * len(read)
    blank = type("Blank", (), {"read": lambda self, x: [labels(*PAIR, other_shape="none")] * len(x)})()
    (nothing,) = bind.read_labels(blank, [Image.new("RGB", (64, 64))], bind.TWO_SUBJECTS[:1])
    assert nothing["other_pattern"] == nothing["other_eyes"] == "none"


def options(models, folder, *more: str) -> list[str]:
    known = ["--pretrained_model_name_or_path", str(models / "sdxl"), "--classifiers", str(models / "classifiers")]
    return [*known, "--output_dir", str(folder / "out"), "--num_inference_steps", "1", *more]


def test_the_words_of_a_row(miniature_models, tmp_path):
    argv = options(miniature_models, tmp_path, "--pairs", "clown_fish+chess_flower")
    rows = bind.rows_of(bind.parse_args([*argv, "--embeddings", "TI=a/{}", "DTI=b/{}", "DTI=c/{}"]))
    texts = {row.name: row.prompt(bind.TWO_SUBJECTS[0], PAIR[::-1], max(row.runs, default=None)) for row in rows}
    star, house = "striped white and black star with eyes", "spotted yellow and purple house"
    assert texts == {
        "TI": "a photo of a <zebra_star-0> left of a small <spotted_house-0>",
        "TI, class words after": "a photo of a <zebra_star-0> star left of a small <spotted_house-0> house",
        "TI, the second in words": f"a photo of a <zebra_star-0> left of a small {house}",
        "DTI": "a photo of a <zebra_star-2> left of a small <spotted_house-2>",
        "DTI, class words after": "a photo of a <zebra_star-2> star left of a small <spotted_house-2> house",
        "DTI, the second in words": f"a photo of a <zebra_star-2> left of a small {house}",
        "class words": "a photo of a star left of a small house",
        "described in words": f"a photo of a {star} left of a small {house}",
    }
    assert rows[3].runs == (1, 2) and rows[-1].runs == ()


def test_the_command_draws_counts_and_goes_on(miniature_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bind, "TWO_SUBJECTS", bind.TWO_SUBJECTS[:2])
    monkeypatch.setattr(bind, "IN_A_STYLE", bind.IN_A_STYLE[:2])
    monkeypatch.setattr(bind, "RENDERED", 1)
    for seed, name in enumerate((*PAIR, "blueprint")):
        torch.manual_seed(seed)
        vectors = {"text_encoder": torch.randn(2, 32), "text_encoder_2": torch.randn(2, 48)}
        write_embedding(Embedding("<same>", vectors), tmp_path / "runs" / name)
    pairs = ["--pairs", "+".join(PAIR), "zebra_star+blueprint", "--forms", "alone"]
    argv = options(miniature_models, tmp_path, *pairs, "--embeddings", f"DTI={tmp_path}/runs/{{}}")
    report = bind.main(argv)
    assert "18 pictures drawn, 0 kept" in capsys.readouterr().out  # 3 rows x 2 prompts x (2 orders + 1)
    out = tmp_path / "out"
    assert (
        json.loads((out / "report.json").read_text())["records"] == report["records"] and (out / "sheet.png").exists()
    )
    assert len({(out / record["file"]).read_bytes() for record in report["records"]}) == 18
    text = (out / "report.md").read_text()
    assert all(f"\n| {row} |" in text for row in ("DTI", "class words", "described in words", bind.TRUE, bind.SWAPPED))
    assert str(tmp_path) not in text + (out / "report.json").read_text()

    # Another embedding of the house: only the learned words' pictures of its pair are drawn again.
    house = tmp_path / "runs" / "spotted_house"
    turned = {name: -rows for name, rows in read_embedding(house).vectors.items()}
    write_embedding(Embedding("<same>", turned), house, overwrite=True)
    bind.main(argv)
    assert "4 pictures drawn, 14 kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pairs, embeddings, said",
    [
        ("clown_fish", "DTI=runs/{}", "'clown_fish' is not two concepts, such as clown_fish+zebra_star"),
        ("clown_fish+clown_fish", "DTI=runs/{}", "is not two concepts"),
        ("clown_fish+dog", "DTI=runs/{}", "'dog' is none of the world's concepts: zebra_star, clown_fish"),
        ("blueprint+clown_fish", "DTI=runs/{}", "no subject before the style: write clown_fish+blueprint"),
        ("clown_fish+zebra_star", "DTI=runs/fish", "has no {} for the concept, such as DTI=runs/{}/DTI-0"),
        ("clown_fish+zebra_star", "runs/{}", "'runs/{}' is not NAME=PATH"),
        ("clown_fish+zebra_star", "DTI=runs/{}", "runs/clown_fish"),
    ],
)
def test_what_cannot_be_drawn_is_said_at_once(
    miniature_models, tmp_path, monkeypatch, capsys, pairs, embeddings, said
):
    monkeypatch.setattr(bind, "start_pipeline", lambda *args: pytest.fail("a pipeline was loaded"))
    with pytest.raises((SystemExit, UserError)) as caught:
        bind.main(options(miniature_models, tmp_path, "--pairs", pairs, "--embeddings", embeddings))
    assert said in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_of_another_script_is_not_replaced(miniature_models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    vectors = {"text_encoder": torch.ones(1, 32), "text_encoder_2": torch.ones(1, 48)}
    for name in PAIR:
        write_embedding(Embedding("<x>", vectors), tmp_path / name)
    argv = options(miniature_models, tmp_path, "--pairs", "+".join(PAIR), "--embeddings", f"DTI={tmp_path}/{{}}")
    with pytest.raises(UserError, match="has a report.md that this script did not write"):
        bind.main(argv)
    assert (tmp_path / "out" / "report.md").read_text() == "mine"
