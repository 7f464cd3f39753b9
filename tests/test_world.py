"""The miniature world: a seed is a picture, captions tell the truth, and no training picture shows a concept."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


MINIATURE = Path(__file__).resolve().parents[1] / "examples" / "miniature"
sys.path.insert(0, str(MINIATURE))

import generator_sana  # noqa: E402
import judges  # noqa: E402
import recommend  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402


SEEDS = range(3000)


def test_a_seed_is_a_picture():
    for seed in range(20):
        scene, picture = world.picture_array(seed)
        again, same = world.picture_array(seed)
        assert scene == again and np.array_equal(picture, same)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert world.caption(scene, seed) == world.caption(scene, seed)
    assert not np.array_equal(world.picture_array(0)[1], world.picture_array(1)[1])


@pytest.mark.parametrize("field, value", [
    ("place", "snow"), ("style", "sketch"), ("tone", "sepia"), ("prop_colour", "green"), ("other", ("star", "blue")),
    ("relation", "right"),
])  # fmt: skip
def test_every_attribute_shows(field, value):
    subject = world.Subject("heart", "red", "striped", "white", True)
    scene = world.Scene(subject, "grass", prop="hat", prop_colour="red", other=("star", "red"), relation="left")
    before, after = (np.asarray(world.render(s, 5), int) for s in (scene, replace(scene, **{field: value})))
    assert np.abs(before - after).max() > 30


@pytest.mark.parametrize("field, value", [
    ("shape", "star"), ("colour", "blue"), ("pattern", "spotted"), ("colour2", "black"), ("eyes", False),
    ("size", "large"),
])  # fmt: skip
def test_every_attribute_of_the_subject_shows(field, value):
    subject = world.Subject("heart", "red", "striped", "white", True)
    scene = world.Scene(subject, "grass")
    changed = replace(scene, subject=replace(subject, **{field: value}))
    before, after = (np.asarray(world.render(s, 5), int) for s in (scene, changed))
    assert np.abs(before - after).max() > 30


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_relation_is_where_the_subject_is(relation):
    scene = world.Scene(world.Subject("square", "red"), "snow", other=("circle", "blue"), relation=relation)
    for seed in range(10):
        picture = np.asarray(world.render(scene, seed), int)
        red = np.argwhere((picture[..., 0] > 150) & (picture[..., 1] < 90))
        blue = np.argwhere((picture[..., 2] > 150) & (picture[..., 0] < 90))
        dy, dx = red.mean(0) - blue.mean(0)
        assert {"left": dx < -8, "right": dx > 8, "above": dy < -8, "below": dy > 8}[relation]


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_what_changes_with_a_things_colour_is_where_it_stands(relation):
    scene = world.Scene(world.Subject("square", "red"), "snow", other=("circle", "blue"), relation=relation)
    others = replace(scene, subject=replace(scene.subject, colour="green")), replace(scene, other=("circle", "orange"))
    for seed in range(10):
        before = np.asarray(world.render(scene, seed), int)
        for (x, y, radius), other in zip(world.standing(scene, seed), others, strict=True):
            rows, columns = np.nonzero(np.abs(before - np.asarray(world.render(other, seed), int)).max(-1) > 30)
            assert abs(columns.mean() - x) < 2 and abs(rows.mean() - y) < 2
            assert radius / 2 < np.abs(columns - x).max() < radius + 2


def test_a_thing_weighs_the_more_the_smaller_it_is_and_where_it_stands():
    small, large = (generator_sana.squares_of([(20, 44, world.SIZES[size])]) for size in ("small", "large"))
    centres = np.arange(4, world.SIZE, 8)
    for squares, mean in ((small, 17 / 11), (large, 1)):
        assert squares.mean() == pytest.approx(mean)
        assert np.average(centres, weights=squares.sum(0)) == pytest.approx(20, abs=1)
        assert np.average(centres, weights=squares.sum(1)) == pytest.approx(44, abs=1)
    assert small.max() > 2.3 * large.max()
    assert generator_sana.squares_of([(20, 44, 17), (50, 30, 8)]).mean() == pytest.approx(1 + 17 / 8)


def test_a_runs_folder_with_another_number_of_pictures_is_filled_anew(tmp_path, monkeypatch):
    args = SimpleNamespace(runs_dir=tmp_path, output_dir=MINIATURE, device="cpu", seed=0, precision="fp32")
    monkeypatch.setitem(training.SPLITS, "classifiers", (7, 4))
    training.render_split("classifiers", args)
    for count in (2, 3):
        for split in ("judges", "autoencoded", "autoencoded_sana"):
            monkeypatch.setitem(training.SPLITS, split, (7, count))
        training.render_split("judges", args)
        judges.autoencode_pictures(args)
        rendered = np.load(tmp_path / "judges.npy")
        assert np.array_equal(rendered, [world.picture_array(7 + i)[1] for i in range(count)])
        for split in ("autoencoded", "autoencoded_sana"):
            drawn = np.load(tmp_path / f"{split}.npy")
            assert drawn.shape == rendered.shape and np.abs(drawn.astype(int) - rendered).mean() < 30


def test_captions_say_what_is_there():
    for seed in SEEDS:
        scene = world.sample_scene(seed)
        text, stated = world.caption(scene, seed)
        words = set(text.replace(",", " ").split())
        truth = world.attributes(scene)
        assert words.isdisjoint({"none", "None"}) and "  " not in text and not text.endswith(",")
        for key in stated & {"colour", "colour2", "prop_colour", "other_colour", "other_shape", "prop"}:
            assert truth[key] in words, (text, key)
        colours = {truth[k] for k in ("colour", "colour2", "prop_colour", "other_colour", "tone")}
        assert words & set(world.COLOURS) <= colours, text
        shapes = {truth["shape"], truth["other_shape"]}
        assert words & set(world.SHAPES) <= shapes, text


def test_reversed_clauses_turn_the_relation_around():
    scene = world.Scene(world.Subject("star", "red"), "snow", other=("circle", "blue"), relation="left")
    texts = {world.caption(scene, seed, leave_out=0)[0] for seed in range(300)}
    assert any(
        "star left of a small blue circle" in t or "star to the left of a small blue circle" in t for t in texts
    )
    assert any("circle right of a" in t or "circle to the right of a" in t for t in texts)
    assert not any("circle left of a" in t or "star right of a" in t for t in texts)


def test_training_never_shows_or_names_a_concept():
    looks = {(s.shape, s.colour, s.pattern, s.colour2) for c in world.CONCEPTS.values() if (s := c.subject)}
    composed = [world.compose_concept(seed).subject for seed in range(20)]
    looks |= {(s.shape, s.colour, s.pattern, s.colour2) for s in composed}
    pairs = {(c.style, c.tone) for c in world.CONCEPTS.values() if c.style}
    descriptions = [c.description for c in world.CONCEPTS.values()]
    for seed in range(20_000):
        scene = world.sample_scene(seed)
        s = scene.subject
        assert (s.shape, s.colour, s.pattern, s.colour2) not in looks and (scene.style, scene.tone) not in pairs
        text = world.caption(scene, seed)[0]
        assert not any(d in text for d in descriptions)


def test_concepts():
    subjects = [c for c in world.CONCEPTS.values() if c.subject]
    assert len({c.subject.shape for c in subjects}) >= 8
    assert sum(c.style is not None for c in world.CONCEPTS.values()) == 2
    for concept in world.CONCEPTS.values():
        pictures = [np.asarray(p) for p in world.instance_pictures(concept)]
        assert len(pictures) == 5 and len({p.tobytes() for p in pictures}) == 5
        assert concept.initializer in world.vocabulary()
        assert set(concept.description.split()) <= set(world.vocabulary())
    assert len({world.compose_concept(seed).subject for seed in range(10)}) == 10


def test_pictures_in_one_place_show_it_and_differ_a_little():
    """What surrounds the subject is the same place in all five, and the five are no copies of one another."""
    concept = world.CONCEPTS["clown_fish"]
    beach, city = (world.instance_scenes(concept, place=place) for place in ("beach", "city"))
    assert {scene.place for scene, _ in beach} == {"beach"} and {scene.place for scene, _ in city} == {"city"}
    assert [scene.subject for scene, _ in beach] == [scene.subject for scene, _ in city]
    pictures = [np.asarray(picture, int) for picture in world.instance_pictures(concept, place="beach")]
    sands = [picture[-2, 2:8].mean(0) for picture in pictures]
    assert np.ptp(sands, axis=0).max() < 10 and len({picture.tobytes() for picture in pictures}) == 5
    assert len({scene.place for scene, _ in world.instance_scenes(concept)}) == 5


def test_a_concepts_home_follows_from_the_seed():
    homes = [[world.home(concept, seed) for concept in world.CONCEPTS.values()] for seed in (0, 0, 1)]
    assert homes[0] == homes[1] != homes[2] and len(set(homes[0])) > 4


def test_command_writes_instance_pictures(tmp_path):
    world.main(["--concept", "zebra_star", "--output_dir", str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == 5
    elsewhere = tmp_path / "beach"
    world.main(["--concept", "zebra_star", "--place", "beach", "--output_dir", str(elsewhere)])
    pictures = [np.asarray(world.Image.open(path)) for path in sorted(elsewhere.glob("*.png"))]
    wanted = world.instance_pictures(world.CONCEPTS["zebra_star"], place="beach")
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(pictures, wanted, strict=True))
    with pytest.raises(SystemExit):
        world.main(["--concept", "zebra_star"])


def test_the_classifiers_recommend_a_class_word(tmp_path, capsys):
    for name, words in (
        ("clown_fish", "striped fish"),
        ("two_faced_heart", "pink heart"),
        ("toadstool", "spotted mushroom"),
    ):
        world.main(["--concept", name, "--place", "city", "--output_dir", str(tmp_path / name)])
        capsys.readouterr()
        recommend.main(["--instance_data_dir", str(tmp_path / name)])
        shape = world.CONCEPTS[name].initializer
        assert capsys.readouterr().out == f'--initializer_token "{shape}"\n--initializer_token "{words}"\n'
    (tmp_path / "toadstool" / "9.png").write_text("no picture")
    for folder, problem in ((tmp_path, "has no PNG"), (tmp_path / "toadstool", "has a damaged PNG")):
        with pytest.raises(SystemExit):
            recommend.main(["--instance_data_dir", str(folder)])
        assert problem in capsys.readouterr().err


def test_pictures_of_two_subjects_name_both_where_both_are(tmp_path):
    world.main(
        ["--concept", "clown_fish", "--beside", "chess_flower", "--place", "beach", "--output_dir", str(tmp_path)]
    )
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and len(list(tmp_path.glob("*.png"))) == 15
    both = [row for row in rows if "<clown_fish>" in row["text"] and "<chess_flower>" in row["text"]]
    assert len(both) == 5 and rows[0]["text"] == "a photo of a <clown_fish>"
    # The small subject is there with its own pattern: pink and green in a picture of the fish.
    alone, together = (
        np.asarray(Image.open(tmp_path / row["file_name"])).reshape(-1, 3) for row in (rows[0], both[0])
    )
    for colour in ("pink", "green"):
        near = [(np.abs(p.astype(int) - world.COLOURS[colour]).sum(1) < 40).sum() for p in (alone, together)]
        assert near[0] == 0 and near[1] > 10


@pytest.mark.parametrize("beside", ["clown_fish", "blueprint"])
def test_what_is_not_a_second_subject_is_refused(beside, tmp_path, capsys):
    with pytest.raises(SystemExit):
        world.main(["--concept", "clown_fish", "--beside", beside, "--output_dir", str(tmp_path)])
    assert "--beside needs another concept" in capsys.readouterr().err
