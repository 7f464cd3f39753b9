"""The new word: its names, its place in the tokenizers, where it starts, and the files that a warm start reads."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import train_dti_sdxl as script
from train_dti_sdxl import UserError


MODEL = script.MODEL_CLASS


@pytest.fixture
def tokenizer(small):
    return CLIPTokenizer.from_pretrained(small / "sdxl" / "tokenizer")


@pytest.fixture
def encoder(small):
    return CLIPTextModel.from_pretrained(small / "sdxl" / "text_encoder").float().eval()


def token_options(**changes) -> argparse.Namespace:
    return argparse.Namespace(
        **{"magnitude": "mean", "init": "token", "initializer_token": "teapot", "base_precision": "auto"}
        | {"placeholder_token": "<new>", "further_word": []}
        | changes
    )


def make(encoder, tokenizer, num_vectors=1, warm_start=None, **changes):
    first_id = script.add_placeholder(MODEL, tokenizer, "<new>", num_vectors)
    return script.make_token(encoder, tokenizer, first_id, [num_vectors], warm_start, token_options(**changes))


@pytest.mark.parametrize("name", ["", " ", "my dog", "dog", "<|endoftext|>", "a\tb"])
def test_names_that_will_not_do(tokenizer, name):
    with pytest.raises(UserError, match="--placeholder_token"):
        script.add_placeholder(MODEL, tokenizer, name, 1)


@pytest.mark.parametrize("there, name, vectors", [("<x>_1", "<x>", 1), ("<x>", "<x>_1", 1), ("<x>", "<x>_2", 1)])
def test_names_that_clash_with_the_further_vectors_of_another(tokenizer, there, name, vectors):
    tokenizer.add_tokens(there)
    with pytest.raises(UserError, match="is in the vocabulary: choose another"):
        script.add_placeholder(MODEL, tokenizer, name, vectors)


def test_capitals_are_refused_where_the_pipeline_would_lose_vectors(tokenizer):
    """Some versions of transformers report an added token in lower case; the loader then finds only its first vector."""
    tokenizer.add_tokens(["<Probe>", "<Probe>_1"])
    found = MODEL.to_pipeline_prompt("a <Probe>", tokenizer) == "a <Probe> <Probe>_1"
    if found:
        script.add_placeholder(MODEL, tokenizer, "<My-Dog>", 2)
    else:
        with pytest.raises(UserError, match="<my-dog>"):
            script.add_placeholder(MODEL, tokenizer, "<My-Dog>", 2)


def test_several_vectors_are_joined_as_the_pipeline_does(tokenizer):
    first = script.add_placeholder(MODEL, tokenizer, "<new>", 3)
    prompt = MODEL.to_pipeline_prompt("a photo of <new> here", tokenizer)
    assert prompt == "a photo of <new> <new>_1 <new>_2 here"
    ids = tokenizer(prompt).input_ids
    assert [i for i in ids if i >= first] == [first, first + 1, first + 2]


@pytest.mark.parametrize("text", ["", "  ", "茶壺", "żółw"])
def test_initializers_without_words_in_the_vocabulary(tokenizer, text):
    with pytest.raises(UserError, match="--initializer_token"):
        script.initializer_ids(tokenizer, text)


def test_magnitudes_are_of_the_nonzero_rows():
    vocabulary = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [6.0, 8.0]])
    assert script.vocabulary_magnitude(vocabulary, "mean") == pytest.approx(16 / 3)
    assert script.vocabulary_magnitude(vocabulary, "min") == pytest.approx(1)
    assert script.vocabulary_magnitude(vocabulary, 5.0) == 5.0
    assert script.vocabulary_magnitude(vocabulary, "free") is None
    big = torch.randn(20000, 8).bfloat16()
    assert script.vocabulary_magnitude(big, "mean") == pytest.approx(big.double().norm(dim=-1).mean().item(), rel=1e-6)


def test_the_start_is_the_initializers_direction_at_m_star(encoder, tokenizer):
    row = encoder.get_input_embeddings().weight[tokenizer("teapot").input_ids[1]].detach().clone()
    mean = encoder.get_input_embeddings().weight.double().norm(dim=-1).mean().item()
    token = make(encoder, tokenizer)
    assert token.magnitude == pytest.approx(mean, rel=1e-6)
    torch.testing.assert_close(token.embedding()[0], mean * row / row.norm())
    torch.testing.assert_close(token.prior_mean[0], row / row.norm())


def test_free_magnitude_starts_at_the_raw_row(encoder, tokenizer):
    row = encoder.get_input_embeddings().weight[tokenizer("teapot").input_ids[1]].detach().clone()
    assert torch.equal(make(encoder, tokenizer, magnitude="free").embedding()[0], row)


@pytest.mark.parametrize("vectors, expected", [(1, [0]), (2, [0, 1]), (5, [0, 1, 0, 1, 0])])
def test_the_initializer_of_two_tokens_fills_the_vectors_and_repeats(encoder, tokenizer, vectors, expected):
    ids = tokenizer("stuffed animal").input_ids[1:-1]
    rows = script.normalize(encoder.get_input_embeddings().weight[ids].detach())
    token = make(encoder, tokenizer, vectors, initializer_token="stuffed animal")
    torch.testing.assert_close(token.prior_mean, rows[expected])


def test_contextual_start_is_the_last_hidden_state_at_the_initializer(encoder, tokenizer):
    with torch.no_grad():
        hidden = encoder(**tokenizer("stuffed animal", return_tensors="pt")).last_hidden_state[0, 1:3]
    token = make(encoder, tokenizer, 2, init="contextual", magnitude="free", initializer_token="stuffed animal")
    torch.testing.assert_close(token.start, hidden)
    torch.testing.assert_close(token.prior_mean, script.normalize(hidden))


def test_a_warm_start_begins_at_the_file_and_is_pulled_to_the_class_word(encoder, tokenizer):
    embedding = torch.randn(1, 32)
    mu = script.normalize(encoder.get_input_embeddings().weight[tokenizer("teapot").input_ids[1:2]].detach())
    token = make(encoder, tokenizer, warm_start=embedding)
    torch.testing.assert_close(token.parameter.detach(), script.normalize(embedding))
    torch.testing.assert_close(token.prior_mean, mu)


def test_a_warm_start_without_class_word_has_itself_for_prior(encoder, tokenizer):
    embedding = torch.randn(1, 32)
    token = make(encoder, tokenizer, warm_start=embedding, initializer_token=None)
    torch.testing.assert_close(token.prior_mean, script.normalize(embedding))


def test_no_cast_of_the_encoder_reaches_the_learned_rows(encoder, tokenizer):
    token = make(encoder, tokenizer)
    encoder.to(torch.bfloat16)
    assert token.parameter.dtype == torch.float32
    assert encoder.get_input_embeddings().weight.dtype == torch.bfloat16
    assert [p for p in encoder.parameters() if p is token.parameter] == []


def test_only_the_new_rows_get_a_gradient(encoder, tokenizer):
    encoder.requires_grad_(False)
    token = make(encoder, tokenizer, 2)
    ids = tokenizer(MODEL.to_pipeline_prompt("a <new> dog", tokenizer), return_tensors="pt").input_ids
    encoder(ids).last_hidden_state.square().sum().backward()
    assert token.parameter.grad.abs().sum(dim=-1).min() > 0
    assert all(p.grad is None for p in encoder.parameters())


def pair(folder, widths=(32, 48), vectors=(1, 1)):
    for name, width, count in zip(MODEL.embedding_files, widths, vectors, strict=True):
        save_file({"<old>": torch.randn(count, width)}, folder / f"{name}.safetensors")


def test_warm_start_reads_a_folder_a_file_of_the_pair_and_a_web_file(tmp_path):
    pair(tmp_path)
    from_folder = script.read_warm_start(MODEL, tmp_path, [32, 48])
    from_file = script.read_warm_start(MODEL, tmp_path / "learned_embeds.safetensors", [32, 48])
    save_file({"clip_l": from_folder[0], "clip_g": from_folder[1]}, tmp_path / "web.safetensors")
    from_web = script.read_warm_start(MODEL, tmp_path / "web.safetensors", [32, 48])
    for rows in (from_file, from_web):
        assert all(torch.equal(a, b) for a, b in zip(rows, from_folder, strict=True))


def test_warm_starts_that_will_not_do(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        script.read_warm_start(MODEL, tmp_path, [32, 48])
    pair(tmp_path)
    with pytest.raises(UserError, match=r"width \[32, 48\].*\[768, 1280\]"):
        script.read_warm_start(MODEL, tmp_path, [768, 1280])
    pair(tmp_path, vectors=(1, 2))
    with pytest.raises(UserError, match="same number"):
        script.read_warm_start(MODEL, tmp_path, [32, 48])
    save_file({"a": torch.ones(1, 32), "b": torch.ones(1, 48)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="clip_l and clip_g"):
        script.read_warm_start(MODEL, tmp_path / "odd.safetensors", [32, 48])
