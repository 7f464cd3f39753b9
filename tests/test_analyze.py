"""The analysis tool: what it reports of vectors whose norm, neighbours and behaviour are known beforehand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import analyze
import numpy as np
import pytest
import torch
from conftest import ROOT
from export import Embedding, write_embedding
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer


ENCODERS = ("text_encoder", "text_encoder_2")


def load(folder: Path, name: str, cls: str) -> analyze.TextEncoder:
    """A text encoder as analyze.py loads it."""
    args = analyze.command_line().parse_args(
        ["--pretrained_model_name_or_path", str(folder), "--output_dir", "-", "--device", "cpu"]
    )
    tokenizer_class = CLIPTokenizer if cls.startswith("CLIP") else AutoTokenizer
    tokenizer = tokenizer_class.from_pretrained(folder, subfolder=name.replace("text_encoder", "tokenizer"))
    return analyze.load_encoder(args, name, cls, tokenizer)


def run(model: Path, output_dir: Path, *options) -> dict:
    """Run analyze.py's main in this process. Returns analysis.json's encoders."""
    argv = ["--pretrained_model_name_or_path", model, "--output_dir", output_dir, "--device", "cpu", *options]
    analyze.main([str(part) for part in argv])
    return json.loads((output_dir / "analysis.json").read_text())["encoders"]


@pytest.fixture(scope="module")
def clip(small):
    return load(small / "sdxl", "text_encoder", "CLIPTextModel")


@pytest.fixture(scope="module")
def gemma(small):
    return load(small / "sana", "text_encoder", "Gemma2Model")


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> Path:
    """SDXL analysed: `dog` inflated 200 times, whose file names its initializer, and copies of two words, whose run does."""
    folder = tmp_path_factory.mktemp("analysis")
    classes = dict(zip(ENCODERS, ("CLIPTextModel", "CLIPTextModelWithProjection"), strict=True))
    rows = {}
    for name, cls in classes.items():
        encoder = load(small / "sdxl", name, cls)
        ids = encoder.tokenizer.convert_tokens_to_ids(["dog</w>", "vase</w>", "teapot</w>"])
        rows[name] = encoder.vocabulary[ids].clone()
    big = Embedding("<big>", {name: 200 * row[:1] for name, row in rows.items()}, {"dti.initializer_token": "dog"})
    two = Embedding("<two>", {name: row[1:] for name, row in rows.items()})
    write_embedding(big, folder / "big", ["diffusers"], overwrite=False)
    write_embedding(two, folder / "two", ["web"], overwrite=False)
    (folder / "two" / "training_options.json").write_text('{"options": {"initializer_token": "stuffed animal"}}')
    run(small / "sdxl", folder / "report", "--embeddings", folder / "big", folder / "two", "--words", "cat", "teapot")
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "report" / "analysis.json").read_text())["encoders"]


@pytest.fixture(scope="module")
def found_sana(small, gemma, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sana")
    write_embedding(
        Embedding("<big>", {"text_encoder": torch.full((1, 32), 2.0)}), folder / "big", ["diffusers"], False
    )
    return run(small / "sana", folder, "--embeddings", folder / "big", "--initializer_token", "dog") | {"at": folder}


# ----------------------------------------------------------------------------------------------------------------------
# Norms, neighbours, initializers
# ----------------------------------------------------------------------------------------------------------------------


def test_an_inflated_norm_is_reported(found, small):
    for name in ENCODERS:
        norms = found[name]["norms"]
        big, dog = norms["vectors"]["<big>"], norms["vectors"]["dog"]
        assert big["norm"] == pytest.approx(200 * dog["norm"], rel=1e-5)
        assert big["percentile"] == 100 and 0 < dog["percentile"] < 100
        assert big["times_mean"] == pytest.approx(big["norm"] / norms["mean"])
        assert (big["kind"], dog["kind"], norms["vectors"]["cat"]["kind"]) == ("learned", "initializer", "word")


def test_zero_rows_are_counted_and_left_out():
    vocabulary = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, 4.0]))
    vector = analyze.Vector("x", "learned", torch.tensor([2.0, 0, 0, 0, 0, 0]))
    result, norms = analyze.measure_norms(vocabulary, [vector])
    assert (result["rows"], result["zero_rows"], result["mean"]) == (6, 2, 2.5) and list(norms) == [1, 2, 3, 4]
    assert result["vectors"]["x"]["percentile"] == 50
    nearest = analyze.nearest_tokens(torch.zeros(1, 6) + 0.1, vocabulary, [None])
    for _, rows in nearest.values():
        assert not {1, 4} & set(rows[0, :4].tolist())


def test_the_nearest_token_of_a_copied_row_is_that_word(found):
    for name in ENCODERS:
        neighbours = found[name]["neighbours"]
        for label, word in (("<two> [0]", "vase"), ("<two> [1]", "teapot"), ("<big>", "dog")):
            first = neighbours[label]["cosine"][0]
            assert first["token"] == word and first["value"] == pytest.approx(1, abs=1e-6)
        assert neighbours["<two> [0]"]["euclidean"][0]["token"] == "vase"
        assert neighbours["<two> [0]"]["euclidean"][0]["value"] == 0
        assert neighbours["<big>"]["euclidean"][0]["value"] > 10  # far from all of them
        assert "cat" not in [token["token"] for token in neighbours["cat"]["cosine"]]  # itself


def test_neighbours_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    vocabulary, queries = torch.randn(50, 8), torch.randn(3, 8)
    monkeypatch.setattr(analyze, "CHUNK", 4)  # smaller than the number of neighbours
    found = analyze.nearest_tokens(queries, vocabulary, [None, 7, None])
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], vocabulary, dim=-1)
    distance = (queries[:, None] - vocabulary).norm(dim=-1)
    cosine[1, 7], distance[1, 7] = -9, 9e9
    assert torch.equal(found["cosine"][1], cosine.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(found["euclidean"][1], distance.argsort(dim=1)[:, :5])
    assert torch.allclose(found["euclidean"][0], distance.sort(dim=1).values[:, :5])


def test_the_initializer_is_known_from_the_file_or_the_run(found):
    for name in ENCODERS:
        initializers = found[name]["initializers"]
        assert [entry["initializer"] for entry in initializers.values()] == ["dog", "stuffed", "animal"]
        assert initializers["<big>"]["cosine"] == pytest.approx(1, abs=1e-6)
        for entry in initializers.values():
            assert math.cos(math.radians(entry["degrees"])) == pytest.approx(entry["cosine"], abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Attenuation: Lemma 1
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_attenuation_falls_as_one_over_the_norm_and_stays_below_the_bound(eps):
    torch.manual_seed(1)
    d = 24
    norm = torch.nn.LayerNorm(d, eps=eps)
    torch.nn.init.normal_(norm.weight, std=2)
    torch.nn.init.normal_(norm.bias)
    v, p = analyze.normalize(torch.randn(d)), torch.randn(50, d) * torch.rand(50, 1) * 3
    p[0], p[1] = v, -2 * v  # along the word: hardly seen; and against it, where m v + p passes through zero
    m = torch.logspace(-3, 4, 40)
    difference, bound = (f(norm, v, p, m) for f in (analyze.attenuation, analyze.attenuation_bound))
    assert (difference <= bound).all()
    assert difference[:, 2:].max() > 0.1 * bound[:, 2:].min()

    m = torch.tensor([1e5, 2e5, 4e5])
    difference = analyze.attenuation(norm, v, p[2:], m)
    assert torch.allclose(difference[:-1] / difference[1:], torch.tensor(2.0).double(), rtol=1e-3)
    # The limit of m times the difference: sqrt(d) |g * (q - (q . u) u)| / |C v|, q = C p, u = C v / |C v|
    q, c = p[2:].double() - p[2:].double().mean(dim=1, keepdim=True), (v - v.mean()).double()
    u = c / c.norm()
    limit = math.sqrt(d) * (norm.weight.double() * (q - (q @ u)[:, None] * u)).norm(dim=1) / c.norm()
    assert torch.allclose(m[-1] * difference[-1], limit, rtol=1e-3)


def test_the_bound_is_nearly_reached():
    """A position that turns the word around, equal gains: the difference is as large as the bound allows."""
    v = analyze.normalize(torch.tensor([1.0, -1, 0, 0]))
    norm = torch.nn.LayerNorm(4, eps=0)
    m = torch.tensor([1.0])
    difference, bound = (f(norm, v, -1.001 * v[None], m) for f in (analyze.attenuation, analyze.attenuation_bound))
    assert 0.99 * bound < difference <= bound


def test_the_model_s_own_attenuation(found):
    for name in ENCODERS:
        curves = found[name]["attenuation"]
        m = np.array(curves["m"])
        for curve in curves["vectors"].values():
            assert 0.1 < curve["largest_share_of_bound"] <= 1
            for lower, higher in (("min", "mean"), ("mean", "max"), ("max", "bound")):
                assert (np.array(curve[lower]) <= curve[higher]).all()
            last = [np.interp(math.log(x), np.log(m), np.log(curve["mean"])) for x in (m[-1] / 2, m[-1])]
            assert math.exp(last[0] - last[1]) == pytest.approx(2, rel=0.02)
        big, dog = curves["vectors"]["<big>"], curves["vectors"]["dog"]
        assert big["mean"] == pytest.approx(dog["mean"], rel=1e-4)  # of one direction
        assert big["at_own_norm"] < dog["at_own_norm"] / 50


# ----------------------------------------------------------------------------------------------------------------------
# Turning: Proposition 1
# ----------------------------------------------------------------------------------------------------------------------


def test_the_turning_bound_holds_for_any_update():
    torch.manual_seed(2)
    x, update = torch.randn(2000, 3).double(), torch.randn(2000, 3).double()
    x *= torch.logspace(-1, 3, 2000)[:, None]
    update[::2] -= (update[::2] * x[::2]).sum(1, keepdim=True) * x[::2] / x[::2].pow(2).sum(1, keepdim=True)
    bound = analyze.turning_bound(x.norm(dim=1), update.norm(dim=1))
    applies = x.norm(dim=1) > update.norm(dim=1)
    assert torch.equal(bound.isfinite(), applies) and 0.5 < applies.float().mean() < 1
    turned = analyze.angle(x, x + update)
    assert (turned <= bound).all()
    assert (turned[applies] > bound[applies] / 2).any()  # across x, far out, it is pi/2 times the angle


@pytest.mark.parametrize("kind", ["clip", "gemma"])
def test_hidden_states_are_the_model_s_own(kind, request):
    """A word put in by its embedding has the states that the model gives for its token."""
    encoder = request.getfixturevalue(kind)
    ids = encoder.tokenizer("a photo of dog").input_ids
    ids = ids[:-1] if kind == "clip" else ids
    hooks = [len(module._forward_hooks) for module in encoder.model.modules()]
    states = analyze.hidden_states(encoder, ids[:-1], encoder.vocabulary[ids[-1]][None])[0]
    assert [len(module._forward_hooks) for module in encoder.model.modules()] == hooks
    expected = encoder.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == len(encoder.layers) + 1 == len(expected)
    for state, layer in list(zip(states, expected, strict=True))[:-1]:  # the last may have the final norm on it
        assert torch.allclose(state, layer[0, -1], atol=1e-5)
    if kind == "gemma":
        assert torch.allclose(encoder.model.norm(states[-1]), expected[-1][0, -1], atol=1e-5)


def test_no_angle_is_above_its_bound(found, found_sana):
    for result in (*(found[name] for name in ENCODERS), found_sana["text_encoder"]):
        turning = result["turning"]
        assert turning["angles_above_bound"] == 0
        assert 0 < turning["angles_with_bound"] < turning["angles"]
        assert turning["S"] == pytest.approx(sum(turning["B"]))
        for curve in turning["vectors"].values():
            for x0, total, path, bound in zip(
                *(curve[k] for k in ("x0", "total", "path", "total_bound")), strict=True
            ):
                if bound is None:  # |x0| differs between contexts, by the position
                    assert x0 < 1.3 * turning["S"]
                else:
                    assert x0 > turning["S"] and total <= path + 1e-6 and path <= bound
            assert curve["total"][-1] < 0.1 * curve["total"][0]  # a large norm is hardly turned


def test_an_inflated_word_turns_less(found):
    for name in ENCODERS:
        big, dog = (found[name]["turning"]["vectors"][label]["own"] for label in ("<big>", "dog"))
        assert big["mean_block"] < dog["mean_block"] / 2
        assert dog["total_bound"] is None and big["total_bound"] >= big["path"]
        assert big["mean_block"] == pytest.approx(np.mean(big["blocks"]))


# ----------------------------------------------------------------------------------------------------------------------
# Positions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loud_positions(small):
    """The small CLIP with position embeddings of about ten times a word's norm."""
    encoder = load(small / "sdxl", "text_encoder", "CLIPTextModel")
    encoder.positions.mul_(10)
    return encoder


def test_the_position_is_read_at_small_norms_and_not_at_large_ones(loud_positions):
    vector = analyze.Vector("x", "learned", torch.randn(32, generator=torch.manual_seed(3)))
    prompts = analyze.read_prompts(None)
    result = analyze.measure_positions(loud_positions, [vector], prompts, seed=0)
    accuracy = result["vectors"]["x"]["accuracy"]
    assert result["held_out"] == 1 and accuracy[0] == 1 and result["words"][0] == 1
    assert accuracy[-1] < 0.3 and result["words"][-1] < 0.3
    assert accuracy == sorted(accuracy, reverse=True)  # the norms rise
    assert result["chance"] == pytest.approx(1 / 77)


def test_the_classifier_depends_on_the_seed_alone(clip, monkeypatch):
    monkeypatch.setattr(analyze, "CLASSIFIER_STEPS", 5)
    vector, prompts = analyze.Vector("x", "learned", torch.ones(32).cumsum(0)), analyze.read_prompts(None)
    first, again, other = (analyze.measure_positions(clip, [vector], prompts, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_training_prompts_put_words_everywhere(clip):
    words = np.array(clip.tokenizer.convert_tokens_to_ids(["dog</w>", "cat</w>"]))
    ids = analyze.draw_prompts(clip.tokenizer, ["a {} on {}"], words, 200, 77, np.random.default_rng(0))
    assert ids.shape == (200, 77)
    assert (ids[:, 0] == clip.tokenizer.bos_token_id).sum() == 100
    assert np.isin(ids.numpy(), words).any(axis=0).all()  # at every position
    assert set(ids.unique().tolist()) == {*words, *clip.tokenizer("a on").input_ids[:-1]}


# ----------------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_with_its_plots(folder):
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in (folder / "report").glob("*.png"))
    assert len(pictures) == 2 * len(analyze.PLOTS) == page.count('src="data:image/png;base64,')
    assert "src=" not in page.replace('src="data:image', "") and "<link" not in page
    assert "&lt;big&gt;" in page and "<big>" not in page
    assert "at most (π/2) B/(|x| − B)" in page and "Does not apply" not in page


def test_gemma_s_report_says_what_does_not_apply(found_sana, gemma):
    result = found_sana["text_encoder"]
    assert result["attenuation"] is None and result["positions"] is None
    assert (found_sana["at"] / "report.html").read_text(encoding="utf-8").count(analyze.POSITIONS_ABSENT) == 2
    turning = result["turning"]
    for curve in turning["vectors"].values():  # x0 = sqrt(d) m v
        assert curve["x0"] == pytest.approx([math.sqrt(32) * m for m in turning["m"]], rel=1e-5)
    assert result["norms"]["vectors"]["<big>"]["norm"] == pytest.approx(2 * math.sqrt(32))


def test_words_alone_will_do(small, tmp_path):
    (tmp_path / "prompts.txt").write_text("a picture of {}\n")
    found = run(small / "sana", tmp_path / "out", "--words", "dog", "--prompts", tmp_path / "prompts.txt")[
        "text_encoder"
    ]
    assert list(found["turning"]["vectors"]) == ["dog"] and found["turning"]["contexts"] == 1
    assert found["initializers"] == {}


def test_stable_diffusion_has_one_encoder_with_positions(small, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "CLASSIFIER_STEPS", 5)
    vocabulary = load(small / "sd", "text_encoder", "CLIPTextModel").vocabulary
    for name, vector in (("big", 9 * vocabulary[300:301]), ("flat", torch.full((1, 32), 2.0))):
        write_embedding(Embedding(f"<{name}>", {"text_encoder": vector}), tmp_path / name, ["diffusers"])
    options = ["--embeddings", tmp_path / "big", tmp_path / "flat", "--initializer_token", "dog"]
    found = run(small / "sd", tmp_path / "out", *options)
    assert list(found) == ["text_encoder"]
    result = found["text_encoder"]
    assert result["class"] == "CLIPTextModel" and result["neighbours"]["<big>"]["cosine"][0]["id"] == 300
    assert result["initializers"]["<big>"]["initializer"] == "dog"
    assert result["turning"]["angles_above_bound"] == 0 and result["positions"]["vectors"]["<big>"]["own"] >= 0
    attenuation = result["attenuation"]["vectors"]
    assert attenuation["<big>"]["largest_share_of_bound"] <= 1
    assert set(attenuation["<flat>"]["bound"]) == {None}  # the LayerNorm leaves nothing of a constant vector


# ----------------------------------------------------------------------------------------------------------------------
# What a user can get wrong
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embeddings": "{tmp}/none"}, "--embeddings {tmp}/none: {tmp}/none does not exist: give"),
        ({"embeddings": "{tmp}/text.safetensors"}, "--embeddings {tmp}/text.safetensors: "),
        ({"embeddings": "{big} {big}"}, "--embeddings {big} is given twice: leave one out."),
        ({"embeddings": None}, "There is nothing to analyse: give --embeddings PATH, --words WORD or both."),
        ({"pretrained_model_name_or_path": "{tmp}"}, "--pretrained_model_name_or_path {tmp} has no model_index.json: "),
        ({"pretrained_model_name_or_path": "{tmp}/text.safetensors"}, "is a file: load it with"),
        ({"pretrained_model_name_or_path": "{tmp}/nowhere"}, "--pretrained_model_name_or_path {tmp}/nowhere cannot be"),
        ({"pretrained_model_name_or_path": "{small}/sana"}, "{big} is an embedding for Stable Diffusion XL, and"),
        ({"pretrained_model_name_or_path": "{tmp}/t5"}, "{tmp}/t5 is a DeepFloydPipeline: give one of "),
        ({"pretrained_model_name_or_path": "{tmp}/empty"}, "--pretrained_model_name_or_path {tmp}/empty is not complete: "),
        ({"words": "茶壺"}, "--words '茶壺' is not in the vocabulary: give an English word."),
        ({"initializer_token": "茶壺"}, "--initializer_token '茶壺' is not in the vocabulary: give an English word."),
        ({"prompts": "{tmp}/none"}, "--prompts {tmp}/none cannot be read: "),
        ({"prompts": "{tmp}/text.safetensors"}, "the line 'nothing' has no {{}}: write it in place of the word."),
        ({"output_dir": "{tmp}/text.safetensors"}, "cannot be written to: File exists. Choose another folder."),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used: "),
        ({"device": "toaster"}, "--device toaster cannot be used: "),
        ({"seed": "-1"}, "--seed -1 is not between 0 and 4294967295: choose another."),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line_before_weights_load(folder, small, tmp_path, monkeypatch, changes, message):
    places = {"tmp": tmp_path, "small": small, "big": folder / "big"}
    (tmp_path / "text.safetensors").write_text("nothing")
    for name, pipeline in (("t5", "DeepFloydPipeline"), ("empty", "StableDiffusionPipeline")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    options = {"pretrained_model_name_or_path": "{small}/sdxl", "embeddings": "{big}", "output_dir": "{tmp}/out"}
    options = {name: value.format(**places) for name, value in (options | changes).items() if value is not None}
    monkeypatch.setattr(analyze, "load_encoder", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(analyze.UserError) as caught:
        analyze.main([part for name, value in options.items() for part in (f"--{name}", *value.split(" "))])
    assert message.format(**places) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_shows_one_line_and_fails(small, tmp_path):
    def command(*options) -> subprocess.CompletedProcess:
        argv = [sys.executable, str(ROOT / "examples" / "analyze.py"), "--output_dir", str(tmp_path / "out"), *options]
        return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    result = command("--pretrained_model_name_or_path", str(small / "sdxl"), "--words", "茶壺")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("analyze.py: error: --words '茶壺' is not in")
    assert "Traceback" not in result.stderr


def test_a_model_without_its_weights_is_refused(small, tmp_path):
    """transformers would go on with random weights."""
    encoder = CLIPTextModel.from_pretrained(small / "sdxl", subfolder="text_encoder")
    weights = {name: x for name, x in encoder.state_dict().items() if "layer_norm1" not in name}
    encoder.save_pretrained(tmp_path / "text_encoder", state_dict=weights)
    CLIPTokenizer.from_pretrained(small / "sdxl", subfolder="tokenizer").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(analyze.UserError, match="is not complete: text_encoder lacks the weights"):
        load(tmp_path, "text_encoder", "CLIPTextModel")
