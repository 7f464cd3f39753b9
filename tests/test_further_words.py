"""Several words trained in one run: each learns from the photographs that name it, has files of its own, and resumes."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from export import ENCODERS, read_embedding
from generate import fill_prompt, load_embeddings, load_pipeline
from kill_test import results
from safetensors import safe_open

import train_dti_sana
import train_dti_sdxl


SCRIPTS = [
    pytest.param(train_dti_sdxl, id="sdxl"),
    pytest.param(train_dti_sana, id="sana", marks=pytest.mark.slow),
]
TOGETHER = {"further_word": "<my-toy>=stuffed animal", "num_vectors": None, "learning_rate": 0.1, "kappa": 0}


@pytest.fixture
def photos(small, tmp_path):
    """Makes a folder of the five photographs with these captions, repeated."""

    def make(*captions: str):
        folder = tmp_path / "captioned"
        shutil.copytree(small / "photos", folder, dirs_exist_ok=True)
        names = sorted(path.name for path in folder.glob("*.png"))
        rows = [{"file_name": x, "text": captions[i % len(captions)]} for i, x in enumerate(names)]
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return folder

    return make


def turned(model, token) -> list[float]:
    """How far each vector has turned, in degrees."""
    return train_dti_sdxl.angle(token.embedding().detach(), token.start).flatten().tolist()


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_each_word_learns_from_the_photographs_that_name_it(train, trainer, photos, models_seen):
    """The toy has two vectors. Only it is named, so only it turns; without a prior nothing else moves a direction."""
    train(instance_data_dir=photos("a <my-toy> on grass"), **TOGETHER)
    for token in models_seen[-1].tokens:
        pot, *toy = turned(models_seen[-1], token)
        assert pot < 1e-3 and len(toy) == 2 and min(toy) > 5
        assert list(token.counts) == [1, 2]
    train(instance_data_dir=photos("a <my-toy> left of a {}"), **TOGETHER)
    for token in models_seen[-1].tokens:
        assert min(turned(models_seen[-1], token)) > 5


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_each_word_starts_at_its_own_class_word(loaded, trainer):
    model = loaded(further_word="<my-toy>=stuffed animal", num_vectors=None)
    for token, encoder, tokenizer in zip(model.tokens, model.text_encoders, model.tokenizers, strict=True):
        words = [trainer.initializer_ids(tokenizer, text) for text in ("teapot", "stuffed animal")]
        rows = encoder.get_input_embeddings().weight[torch.tensor(sum(words, []))].float()
        assert torch.allclose(token.prior_mean, trainer.normalize(rows), atol=1e-6)
        assert len(token.start) == len(rows) == sum(token.counts)
        names = tokenizer.convert_ids_to_tokens(range(token.first_id, token.first_id + len(rows)))
        assert names == ["<my-pot>", "<my-toy>", "<my-toy>_1"]


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_every_word_has_files_that_the_other_scripts_read(train, trainer, small, photos, models_seen):
    family = trainer.__name__.removeprefix("train_dti_")
    out = train(instance_data_dir=photos("a <my-toy> left of a {}"), save_steps=2, **TOGETHER)
    embeddings = [read_embedding(out), read_embedding(out / "my-toy")]
    assert [x.token for x in embeddings] == ["<my-pot>", "<my-toy>"] and [*map(len, embeddings)] == [1, 2]
    trained = [token.embedding().detach() for token in models_seen[-1].tokens]
    for number, rows in enumerate(zip(*(x.vectors.values() for x in embeddings), strict=True)):
        assert torch.equal(torch.cat(rows), trained[number])
    with safe_open(out / "my-toy" / "my-toy.safetensors", "pt") as file:
        header = file.metadata()
    assert header["dti.initializer_token"] == "stuffed animal" and header["modelspec.trigger_phrase"] == "<my-toy>"
    assert {x.name for x in (out / "my-toy").glob("*-steps-2*")} >= {"my-toy-steps-2.safetensors"}

    pipe = load_pipeline(str(small / family))
    load_embeddings(pipe, embeddings)
    prompt = fill_prompt("a {1} left of a {0}", [x.token for x in embeddings])
    for encoder, rows in zip(ENCODERS[family], trained, strict=True):
        tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        text = pipe.maybe_convert_prompt(prompt, tokenizer)
        assert text == "a <my-toy> <my-toy>_1 left of a <my-pot>"
        ids = tokenizer.convert_tokens_to_ids(["<my-pot>", "<my-toy>", "<my-toy>_1"])
        assert torch.equal(getattr(pipe, encoder).get_input_embeddings().weight[ids], rows)


def test_a_resumed_run_is_the_uninterrupted_one(train, photos, tmp_path):
    job = {"instance_data_dir": photos("a {} and a <my-toy>", "the <my-toy>"), "checkpointing_steps": 2, **TOGETHER}
    whole = train(output_dir=tmp_path / "whole", **job)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    train(output_dir=stopped, resume_from_checkpoint="latest", **job)
    assert results(stopped) == results(whole)
    toys = [read_embedding(folder / "my-toy").vectors for folder in (stopped, whole)]
    assert all(torch.equal(rows, toys[1][encoder]) for encoder, rows in toys[0].items())
    other = job | {"further_word": "<my-doll>=stuffed animal"}
    other["instance_data_dir"] = photos("a {} and a <my-doll>")
    with pytest.raises(train_dti_sdxl.UserError, match="of another run: further_word .*my-toy.*, not .*my-doll"):
        train(output_dir=stopped, resume_from_checkpoint="latest", **other)


def test_a_single_word_leaves_no_trace_of_the_option(train, small):
    out = train(max_train_steps=1, checkpointing_steps=1)
    assert "further_word" not in json.loads((out / "checkpoint-1" / "state.json").read_text())["identity"]
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "changes, captions, said",
    [
        ({"further_word": "<my-toy>"}, ["{}"], "--further_word '<my-toy>' is not WORD=CLASS"),
        (
            {"further_word": "<runs>=toy", "logging_dir": "runs"},
            ["a {}"],
            "has a folder runs of its own: choose another word",
        ),
        ({"further_word": "checkpoint-2=toy"}, ["a {}"], "has a folder checkpoint-2 of its own: choose another word"),
        ({"further_word": "=toy"}, ["{}"], "--further_word '=toy' is not WORD=CLASS"),
        ({"further_word": "<my-pot>=toy"}, ["{}"], "another new word has the same file name"),
        ({"further_word": "my-POT=toy"}, ["{}"], "another new word has the same file name"),
        ({"further_word": "<my-pot>2=toy"}, ["{}"], "'<my-pot>' is a part of '<my-pot>2'"),
        ({"placeholder_token": "my-pot2", "further_word": "my-pot=toy"}, ["{}"], "'my-pot' is a part of 'my-pot2'"),
        ({"further_word": "dog=dog"}, ["a dog, {}"], "--further_word 'dog': 'dog' is in the vocabulary"),
        (
            {"further_word": "<my-toy>=茶壺"},
            ["{}"],
            "--further_word <my-toy>, its class word '茶壺' is not in the vocab",
        ),
        ({}, ["a {}"], "--further_word '<my-toy>': no caption names it: write <my-toy> where"),
        ({}, ["a {} and <my-toy>", "a cat"], "neither {} nor '<my-pot>' nor '<my-toy>'"),
        ({}, ["a {}" + " very" * 90 + " <my-toy>"], "the new word is not among them"),
        ({"no_captions": True}, ["{}"], "--further_word '<my-toy>=stuffed animal' needs captions"),
        ({"init_embedding": ROOT}, ["{}"], "--init_embedding is for one word: leave it out, or --further_word"),
    ],
)
def test_what_several_words_cannot_be(options, photos, no_weights, changes, captions, said):
    with pytest.raises(train_dti_sdxl.UserError) as caught:
        train_dti_sdxl.main(options(instance_data_dir=photos(*captions), **TOGETHER | changes))
    assert said in str(caught.value)
