"""The miniature's training scripts: every stage in a few steps, folders that stock classes load, and runs that go on."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import SanaPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import Dinov2Model, SiglipModel, SiglipProcessor


sys.path.append(str(ROOT / "examples" / "miniature"))

import generator  # noqa: E402
import judges  # noqa: E402
import measure  # noqa: E402
import train_models  # noqa: E402
import training  # noqa: E402


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    counts = {"generator": 260, "judges": 600, "classifiers": 64, "autoencoded": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "ENCODED", 50)
        for split, count in counts.items():
            patch.setitem(training.SPLITS, split, (training.SPLITS[split][0], count))
        patch.setitem(training.SPLITS, "autoencoded_sana", (training.SPLITS["classifiers"][0] + 32, 32))
        yield


def train(folder, *options):
    steps = dict.fromkeys(train_models.STEPS, 2)
    common = ["--runs_dir", str(folder / "runs"), "--output_dir", str(folder), "--steps", json.dumps(steps)]
    train_models.main([*common, "--batch", "4", *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    train(folder)
    return folder


@pytest.mark.parametrize("name, cls", [("sdxl", StableDiffusionXLPipeline), ("sana", SanaPipeline)])
def test_stock_pipelines_load_the_folders_and_draw(trained, name, cls):
    pipe = cls.from_pretrained(trained / name)
    pipe.set_progress_bar_config(disable=True)
    args = measure.parse_args(["--count", "2", "--steps", "2", "--batch", "2"])
    pictures = measure.generate(pipe, measure.held_out_prompts(2), args)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    weights = list((trained / name).glob("*/*.safetensors"))
    assert len(weights) == {"sdxl": 4, "sana": 3}[name]
    assert all(x.dtype == torch.float16 for path in weights for x in load_file(path).values() if x.is_floating_point())


def test_the_judges_load(trained):
    siglip, processor = (
        SiglipModel.from_pretrained(trained / "siglip"),
        SiglipProcessor.from_pretrained(trained / "siglip"),
    )
    picture = generator.world.picture_array(0)[1]
    inputs = processor(text=["a red star"], images=[picture], padding="max_length", return_tensors="pt")
    assert siglip(**inputs).logits_per_image.shape == (1, 1)
    assert (
        Dinov2Model.from_pretrained(trained / "dinov2")(pixel_values=inputs.pixel_values).last_hidden_state.shape[1]
        == 65
    )
    read = judges.load_classifiers(trained / "classifiers").read([generator.world.Image.fromarray(picture)])
    assert set(read[0]) == set(generator.world.LABELS)


def test_labels_are_what_a_caption_states():
    texts, labels = training.captions_of(range(200), generator.world.generator(0, "test"), hard=60)
    assert len(texts) == len(labels) == 260
    for text, row in zip(texts, labels.tolist(), strict=True):
        said = {k: i for k, i in zip(generator.world.LABELS, row, strict=True) if i != training.UNSTATED}
        for key in ("shape", "colour", "other_shape", "other_colour", "prop_colour"):
            assert key not in said or generator.world.LABELS[key][said[key]] in text, (key, text)
    assert 0.1 < (labels == training.UNSTATED).float().mean() < 0.9
    heads = training.AttributeHeads(8)
    features, nothing = torch.randn(260, 8), torch.full_like(labels, training.UNSTATED)
    assert heads.loss(features, nothing) == 0 < heads.loss(features, labels)
    assert training.accuracy(heads, features, nothing) == {}


def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    options = ["--stages", "data", "vae", "--steps", '{"vae": 5}']
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", *options)

    def interrupted(path, model, optimizer, averaged, step):
        save(path, model, optimizer, averaged, step)
        if step == 3:
            raise KeyboardInterrupt

    save = training.save_checkpoint
    monkeypatch.setattr(training.Log, "due", lambda self, step: True)
    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", *options)
    monkeypatch.undo()
    train(tmp_path / "broken", *options)
    whole, broken = (torch.load(tmp_path / name / "runs" / "vae.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 5
    assert all(torch.equal(x, broken["averaged"][name]) for name, x in whole["averaged"].items())
