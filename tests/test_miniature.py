"""The miniature's training scripts: every stage in a few steps, folders that stock classes load, and runs that go on."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import SanaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import Dinov2Model, SiglipModel, SiglipProcessor


sys.path.append(str(ROOT / "examples" / "miniature"))

import generator  # noqa: E402
import generator_sd  # noqa: E402
import judges  # noqa: E402
import measure  # noqa: E402
import train_models  # noqa: E402
import training  # noqa: E402


MINIATURE = ROOT / "examples" / "miniature"


@pytest.fixture(scope="module")
def few_pictures():
    counts = {"generator": 260, "judges": 600, "classifiers": 64, "autoencoded": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "ENCODED", 50)
        patch.setattr(generator_sd, "PICTURES", 50)
        for split, count in counts.items():
            patch.setitem(training.SPLITS, split, (training.SPLITS[split][0], count))
        patch.setitem(training.SPLITS, "autoencoded_sana", (training.SPLITS["classifiers"][0] + 32, 32))
        yield


def train(folder, *options):
    steps = dict.fromkeys(train_models.STEPS, 2)
    common = ["--runs_dir", str(folder / "runs"), "--output_dir", str(folder), "--steps", json.dumps(steps)]
    train_models.main([*common, "--batch", "4", *options])


@pytest.fixture(scope="module")
def trained(few_pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    train(folder)
    return folder


PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline, "sana": SanaPipeline}


@pytest.mark.slow
@pytest.mark.parametrize("name, cls", PIPELINES.items())
def test_stock_pipelines_load_the_folders_and_draw(trained, name, cls):
    pipe = cls.from_pretrained(trained / name)
    pipe.set_progress_bar_config(disable=True)
    args = measure.parse_args(["--count", "2", "--steps", "2", "--batch", "2"])
    pictures = measure.generate(pipe, measure.held_out_prompts(2), args)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    weights = list((trained / name).glob("*/*.safetensors"))
    assert len(weights) == {"sdxl": 4, "sd": 3, "sana": 3}[name]
    for path in weights:
        stored = {x.dtype for x in load_file(path).values() if x.is_floating_point()}
        assert stored == {torch.float16} | ({torch.float8_e4m3fn} if path.parts[-3:-1] == ("sd", "unet") else set())
    assert all(
        x.dtype == torch.float32 for x in pipe.components["transformer" if name == "sana" else "unet"].parameters()
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_interrupted_run_ends_where_an_unbroken_one_does(few_pictures, tmp_path, monkeypatch):
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


def test_the_committed_models_are_small():
    """A clone is quick, and the folder passes for an example."""
    files = [path for path in MINIATURE.glob("*/**/*") if path.suffix in (".safetensors", ".json", ".txt")]
    assert sum(path.stat().st_size for path in files) < 75e6


def test_stable_diffusion_starts_with_the_answers_of_sdxl(tmp_path):
    """With a text encoder that gives SDXL's own states, the conversion loses no more than what it says it drops."""
    args = train_models.parse_args(["--output_dir", str(MINIATURE), "--runs_dir", str(tmp_path), "--device", "cpu"])
    encoders, tokenizers = generator.load_text_encoders(MINIATURE / "sdxl", "cpu")
    texts = [text for _, _, text, _ in measure.held_out_prompts(8)]
    states, pooled = generator.embed_texts(texts, encoders, tokenizers)
    teacher, time_ids = generator_sd.load_teacher(args), torch.tensor([[64, 64, 0, 0, 64, 64]])
    project = torch.nn.Linear(224, 224)
    torch.nn.init.orthogonal_(project.weight)
    unet = generator_sd.convert_unet(teacher, project, pooled, time_ids)
    torch.manual_seed(0)
    noisy, t = torch.randn(8, 8, 16, 16), torch.full((8,), 900)
    inputs = (states - project.bias) @ project.weight  # an orthogonal matrix's transpose is its inverse
    added = {"text_embeds": pooled, "time_ids": time_ids.expand(8, -1)}
    with torch.no_grad():
        other = {**added, "text_embeds": pooled.roll(1, 0)}
        target = teacher(noisy, t, states, added_cond_kwargs=added).sample
        wrong = teacher(noisy, t, states.roll(1, 0), added_cond_kwargs=other).sample
        answer = unet(noisy, t, inputs).sample
    assert (answer - target).square().mean() < 0.2 * (wrong - target).square().mean()


def test_stable_diffusion_follows_prompts():
    """Of the attributes that prompts state, more than an encoder or a UNet that went wrong would give."""
    pipe = StableDiffusionPipeline.from_pretrained(MINIATURE / "sd")
    pipe.set_progress_bar_config(disable=True)
    prompts = measure.held_out_prompts(16)
    pictures = measure.generate(pipe, prompts, measure.parse_args(["--steps", "10", "--batch", "16"]))
    reads = judges.load_classifiers().read(pictures)
    verdicts = [measure.compare(scene, said, read) for (_, scene, _, said), read in zip(prompts, reads, strict=True)]
    right = [verdict[name] for verdict in verdicts for name in verdict]
    assert sum(right) / len(right) > 0.85


def test_no_config_names_a_folder_of_the_computer_that_trained_it():
    configs = [*MINIATURE.glob("*/*.json"), *MINIATURE.glob("*/*/config.json")]
    assert len(configs) > 10 and not [path for path in configs if '_name_or_path": "/' in path.read_text("utf-8")]
