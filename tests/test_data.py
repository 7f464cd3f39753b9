"""Photographs and prompts: what becomes of any kind of image, what the model is told of a crop, and what a step sees."""

import argparse
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import train_dti_sdxl as script
from train_dti_sdxl import UserError


def images(photographs) -> list[dict]:
    return [row["image"] for row in photographs]


def data_options(folder=None, **changes) -> argparse.Namespace:
    defaults = {
        "instance_data_dir": folder,
        "dataset_name": None,
        "dataset_config_name": None,
        "image_column": "image",
        "caption_column": None,
        "caption_extension": None,
        "no_captions": False,
        "mask_dir": None,
        "alpha_mask": False,
        "initializer_token": None,
        "hub_token": None,
        "prompt_templates": None,
        "learnable_property": "object",
        "placeholder_token": "<new>",
        "further_word": [],
        "resolution": 32,
        "center_crop": False,
        "random_flip": False,
    }
    return argparse.Namespace(**defaults | changes)


def opened(path) -> np.ndarray:
    return np.asarray(script.open_image({"path": str(path), "bytes": None}))


def test_every_mode_becomes_sensible_rgb(tmp_path):
    gradient = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    rgb = np.stack([gradient, gradient[::-1], gradient.T], axis=-1)
    grey_as_rgb = np.repeat(gradient[..., None], 3, axis=-1)
    half = np.full((8, 8, 1), 128, np.uint8)

    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(gradient).save(tmp_path / "grey.png")
    Image.fromarray(gradient.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.concatenate([rgb, half], axis=-1)).save(tmp_path / "alpha.png")
    Image.fromarray(rgb).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")

    assert np.array_equal(opened(tmp_path / "rgb.png"), rgb)
    assert np.array_equal(opened(tmp_path / "grey.png"), grey_as_rgb)
    assert np.array_equal(opened(tmp_path / "sixteen.png"), grey_as_rgb)
    over_white = rgb * (128 / 255) + 255 * (127 / 255)
    np.testing.assert_allclose(opened(tmp_path / "alpha.png"), over_white, atol=1)
    np.testing.assert_allclose(opened(tmp_path / "palette.png"), rgb, atol=24)
    np.testing.assert_allclose(opened(tmp_path / "cmyk.tif"), rgb, atol=2)


def test_a_transparent_palette_shows_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0] + [0] * 765)
    image.save(tmp_path / "p.png", transparency=0)
    assert (opened(tmp_path / "p.png") == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = opened(tmp_path / "turned.png")
    assert pixels.shape == (20, 10, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[-1, 0].tolist() == [0, 0, 255]


def test_a_truncated_jpeg_is_named_in_the_check(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = tmp_path / "broken.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:8000])
    photographs = script.load_photographs(data_options(tmp_path))
    with pytest.raises(UserError, match="broken.jpg"):
        script.check_images(photographs, 32)


def test_a_folder_of_odds_and_ends(tmp_path, caplog):
    Image.new("RGB", (40, 40)).save(tmp_path / "test [1] *.png")  # a name that patterns and split names trip over
    Image.new("RGB", (40, 40)).save(tmp_path / "train.JPG", format="JPEG")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / ".ipynb_checkpoints" / "copy.png")
    with caplog.at_level("INFO", logger="dti"):
        photographs = script.load_photographs(data_options(tmp_path))
    assert [script.open_image(record).size for record in images(photographs)] == [(40, 40)] * 2
    assert "notes.txt" in caplog.text and ".DS_Store" in caplog.text


def test_a_data_set_that_datasets_loads(tmp_path):
    pictures = [Image.new("RGB", (40, 50), color) for color in ("red", "green")]
    features = datasets.Features({"photo": datasets.Image(), "said": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"photo": pictures, "said": ["a {}", "my {}"]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    args = data_options(dataset_name=str(tmp_path), image_column="photo", caption_column="said")
    photographs = script.load_photographs(args)
    assert [script.open_image(record).getpixel((0, 0)) for record in images(photographs)] == [
        (255, 0, 0),
        (0, 128, 0),
    ]
    assert script.prompts_by_image(photographs, args) == [["a <new>"], ["my <new>"]]
    with pytest.raises(UserError, match="--image_column image is none of"):
        script.load_photographs(data_options(dataset_name=str(tmp_path)))
    with pytest.raises(UserError, match="cannot be loaded"):
        script.load_photographs(data_options(dataset_name=str(tmp_path / "nowhere")))
    data.select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="cannot be loaded.*no data"):
        script.load_photographs(args)


def test_templates(tmp_path):
    kinds = {kind: script.built_in_templates(kind) for kind in ("object", "style", "face")}
    for kind, templates in kinds.items():
        assert len(set(templates)) == len(templates) >= 24
        assert all(template.count("{}") == 1 for template in templates)
        named = [word in template for template in templates for word in ("style", "portrait")]
        assert any(named) == (kind != "object")
    assert "a portrait of a {}" in kinds["face"] and "a picture in the style of a {}" in kinds["style"]
    path = tmp_path / "templates.txt"
    path.write_text("a {} here\n\n{} there\n")
    assert script.read_templates(path) == ["a {} here", "{} there"]
    path.write_text("a {} here\nnothing\n")
    with pytest.raises(UserError, match="'nothing' has no {}"):
        script.read_templates(path)
    with pytest.raises(UserError, match="cannot be read"):
        script.read_templates(tmp_path / "none.txt")


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row, as fractions of 250."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(120, 60), (60, 120), (64, 64), (41, 97)])
@pytest.mark.parametrize("center", [True, False])
def test_time_ids_tell_the_truth_about_the_crop(size, center):
    """Resizing the whole picture and cutting at the corner that the model is told gives the pixels that it is shown."""
    image, resolution = coordinates(*size), 32
    view = script.draw_view(size, data_options(center_crop=center), np.random.default_rng(3))
    seen = script.render_view(image, None, view, resolution)
    height, width, top, left, *target = (int(n) for n in seen["time_ids"])
    assert (width, height) == size and target == [32, 32]
    scale = resolution / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    cut = np.asarray(whole.crop((left, top, left + resolution, top + resolution)))
    shown = ((seen["pixel_values"].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    assert np.abs(cut - shown).mean() < 1.0
    if center:
        assert abs(top - (whole.height - 32) / 2) <= 0.5 and abs(left - (whole.width - 32) / 2) <= 0.5


def test_random_views_reach_both_ends_and_flips_mirror():
    args = data_options(random_flip=True)
    views = [script.draw_view((128, 32), args, np.random.default_rng(i)) for i in range(600)]
    assert {view.left for view in views} == set(range(97)) and {view.top for view in views} == {0}
    assert 0.4 < np.mean([view.flip for view in views]) < 0.6
    image = coordinates(32, 32)
    views = [script.View(flip, 0, 0) for flip in (False, True)]
    plain, mirrored = (script.render_view(image, None, view, 32)["pixel_values"] for view in views)
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)


def test_extreme_shapes_cost_no_more_than_their_crop():
    for size in [(1, 1), (1, 5000), (20000, 3)]:
        image = Image.new("RGB", size, "red")
        view = script.draw_view(size, data_options(), np.random.default_rng(0))
        pixels = script.render_view(image, None, view, 32)["pixel_values"]
        assert pixels.shape == (3, 32, 32) and (pixels[0] == 1).all()


@pytest.fixture
def examples(small):
    args = data_options(small / "photos")
    photographs = script.load_photographs(args)
    prompts = script.prompts_by_image(photographs, args)
    return script.TrainingExamples(photographs, prompts, None, 7, args)


def test_an_example_is_a_function_of_seed_and_position(examples):
    again = script.TrainingExamples(examples.photographs, examples.prompts, None, 7, examples.args)
    other = script.TrainingExamples(examples.photographs, examples.prompts, None, 8, examples.args)
    for position in (31, 0, 12):  # in any order
        a, b = examples[position], again[position]
        assert a["prompt"] == b["prompt"] and torch.equal(a["pixel_values"], b["pixel_values"])
    assert any(examples[i]["prompt"] != other[i]["prompt"] for i in range(5))


def test_each_epoch_shows_every_photograph_once_in_a_new_order(examples):
    size = {tuple(script.open_image(r).size[::-1]): i for i, r in enumerate(images(examples.photographs))}
    order = [size[tuple(int(n) for n in examples[i]["time_ids"][:2])] for i in range(20)]
    epochs = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_all_templates_are_drawn_about_equally(examples):
    examples.cache = [[{}]] * len(examples.prompts)
    templates = examples.prompts[0]
    drawn = [examples[position]["prompt"] for position in range(1000)]
    expected = len(drawn) / len(templates)
    assert all(abs(drawn.count(template) - expected) < 5 * math.sqrt(expected) for template in templates)


def test_processes_share_out_the_same_sequence(examples):
    class Process:
        def __init__(self, rank, world):
            self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")

    def shares(rank, world, size, count, start=0):
        args = argparse.Namespace(train_batch_size=size, dataloader_num_workers=0)
        stream = script.batches(examples, Process(rank, world), args, start)
        return [seen(next(stream)) for _ in range(count)]

    def seen(batch):
        noise = [generator.initial_seed() for generator in batch["generators"]]
        return list(zip(batch["prompt"], map(torch.Tensor.tolist, batch["time_ids"]), noise, strict=True))

    alone = sum(shares(0, 1, 4, 3), [])
    both = zip(shares(0, 2, 2, 3), shares(1, 2, 2, 3), strict=True)
    assert [example for pair in both for batch in pair for example in batch] == alone
    assert sum(shares(0, 1, 4, 2, start=1), []) == alone[4:]  # a resumed run
    assert len({noise for _, _, noise in alone}) == 12


def test_each_example_has_noise_of_its_own_that_repeats():
    like = torch.zeros(3, 4, 2, 2)

    def draw(*positions):
        return script.draw_normal(like[: len(positions)], [script.noise_generator(0, p) for p in positions])

    noise = draw(0, 1, 2)
    assert noise.shape == like.shape and len({float(row[0, 0, 0]) for row in noise}) == 3
    assert torch.equal(draw(2)[0], noise[2])
    assert not torch.equal(script.draw_normal(like[:1], [script.noise_generator(1, 0)])[0], noise[0])


def test_the_output_folder_is_apart_from_the_photographs(tmp_path):
    photos = tmp_path / "all" / "photos"
    photos.mkdir(parents=True)
    (tmp_path / "link").symlink_to(photos)
    for output, relation in [
        (photos, "is"),
        (tmp_path / "link", "is"),
        (tmp_path / "all" / "out" / ".." / "photos", "is"),
        (photos / "new" / "out", "lies in"),
        (tmp_path / "link" / "out", "lies in"),
        (tmp_path / "all", "holds"),
        (tmp_path, "holds"),
    ]:
        (tmp_path / "all" / "out").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f" {relation} the photographs' folder"):
            script.check_apart(output, photos)
        assert not (photos / "new").exists() and not (photos / "out").exists()
    for output in (tmp_path / "all" / "out", tmp_path / "all" / "photos-out", tmp_path / "none" / "photos"):
        script.check_apart(output, photos)
        script.check_apart(output, tmp_path / "nowhere")
