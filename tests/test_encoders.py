"""Encoders of other kinds: what a large norm does to a word where norms stand elsewhere and positions are not added."""

import json

import analyze
import encoders
import pytest
import torch
from export import UserError
from transformers import CLIPTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(encoders.MINIATURE / "sdxl" / "tokenizer")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    encoders.main(["--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def found(report) -> dict[str, dict]:
    return {e["name"]: e for e in json.loads((report / "encoders.json").read_text())["encoders"]}


TRAINED = ("CLIP, the miniature SDXL's first", "CLIP, the miniature SDXL's second", "Gemma-2, the miniature SANA's")
RANDOM = tuple(f"{kind}, random" for kind, *_ in encoders.KINDS.values())


def test_where_the_stream_keeps_its_norm_a_large_word_is_hardly_turned(found):
    assert set(found) == {*TRAINED, *RANDOM}
    for name in set(found) - {"BERT, random"}:
        entry = found[name]
        assert entry["state"][-1] > 30  # CLIP adds the position, so less than 50
        for quantity in ("turning", "context"):
            values = entry[quantity]
            assert values == sorted(values, reverse=True) and values[-1] < values[0] / 2, (name, quantity)
        assert entry["above_bound"] == 0 and entry["bound"][-1] > entry["turning"][-1]


def test_where_the_stream_is_normalised_only_the_position_is_lost(found):
    entry = found["BERT, random"]
    assert entry["state"] == pytest.approx([1] * len(encoders.TIMES), abs=0.01)
    for quantity in ("turning", "context"):
        assert entry[quantity] == pytest.approx([entry[quantity][0]] * len(encoders.TIMES), rel=0.05)
    assert entry["position"][-1] < entry["position"][0] / 20


def test_an_added_position_fades_as_one_over_the_norm(found):
    for name, entry in found.items():
        if name.startswith(("CLIP", "BERT")):
            ten, fifty = (entry["position"][encoders.TIMES.index(times)] for times in (10, 50))
            assert ten / fifty == pytest.approx(5, rel=0.03), name
        else:
            assert entry["position"] is None


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_the_word_is_put_in_and_the_states_are_the_model_s(kind, tokenizer):
    encoder = encoders.random_encoder(kind, tokenizer, 3)
    ids = tokenizer("a photo of a fish", add_special_tokens=False).input_ids
    states = analyze.hidden_states(encoder, ids[:-1], encoder.vocabulary[ids[-1]][None])[0]
    expected = encoder.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == encoders.BLOCKS + 1
    for state, layer in list(zip(states, expected, strict=True))[:-1]:  # the last may have the final norm on it
        assert torch.allclose(state, layer[0, -1], atol=1e-4)


def test_the_report_has_the_measured_figures(report, found):
    text = (report / "encoders.md").read_text()
    for name, entry in found.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{entry['turning'][0]:.3g} / " in row and ("none is added" in row) == (entry["position"] is None)
    assert (report / "encoders.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_one_s_own_is_a_row(tokenizer, tmp_path):
    encoder = encoders.random_encoder("bert", tokenizer, 5)
    encoder.model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    args = encoders.command_line().parse_args(["--output_dir", "-", "--models", str(tmp_path / "mine")])
    loaded = encoders.find_trained(args)[-1].load()
    assert loaded.name == "BERT, mine" and torch.equal(loaded.vocabulary, encoder.vocabulary)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "nowhere/at-all"], "--models nowhere/at-all cannot be loaded"),
        (["--models", "@vit"], "is of the kind vit: give an encoder of these kinds: CLIP, T5"),
        (["--words", "fish", "été"], "--words 'été' is not in the vocabulary"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_weights_load(options, message, tmp_path, tokenizer, monkeypatch):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    tokenizer.save_pretrained(tmp_path / "vit")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(encoders.Trained, "load", lambda self: pytest.fail("weights were loaded"))
    options = [option.replace("@", f"{tmp_path}/") for option in options]
    with pytest.raises(UserError, match=message):
        encoders.main(["--output_dir", str(tmp_path / "out"), *options])
