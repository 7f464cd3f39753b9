"""examples/baselines.py: P+, NeTI and CoRe, on the small random Stable Diffusion."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import baselines
import evaluate
import export
import generate
import numpy as np
import pytest
import rescale
import torch
import train_dti_sd
from accelerate.state import AcceleratorState
from export import Embedding, EmbeddingError, read_embedding
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dti_sdxl as script


LAYERS, WIDTH = 4, 32  # the small pipeline's cross-attention layers, and its text encoder's width
PROMPT = "a photo of <my-pot> on the grass"
TWO = ("<my-pot>", "<new>")
# The word anywhere in the prompt, twice and not at all.
PLACES = ["<my-pot>", "a drawing of a red house and a <my-pot>", "a <my-pot> and a <my-pot>", "a house"]


@pytest.fixture
def options(small, tmp_path):
    """Builds a command line for a method, with options replaced (or, by None, left out) and added."""

    def build(method: str, *flags: str, **changes) -> list[str]:
        values = {
            "method": method,
            "pretrained_model_name_or_path": small / "sd",
            "instance_data_dir": small / "photos",
            "placeholder_token": "<my-pot>",
            "initializer_token": "teapot",
            "output_dir": tmp_path / method,
            "resolution": 64,
            "crops_per_image": 1,
            "max_train_steps": 3,
            "train_batch_size": 2,
            "seed": 0,
            "report_to": "none",
        } | changes
        return [*flags, *(str(part) for k, v in values.items() if v is not None for part in (f"--{k}", v))]

    return build


@pytest.fixture
def model(options):
    """Builds the model of a method as main has it before the first step."""

    def build(method: str, **changes):
        cls = baselines.METHODS[method]
        model = cls(script.parse_args(options(method, **changes), cls))
        model.args.output_dir.mkdir(exist_ok=True)
        model.load_tokenizers()
        count, (first_id,), _ = script.prepare_placeholder(model)
        model.load(torch.float32)
        encoder, tokenizer = model.text_encoders[0], model.tokenizers[0]
        model.tokens.append(model.make_token(encoder, tokenizer, first_id, count, None))
        return model

    return build


def batch_of(prompt: str, count: int = 2) -> dict:
    generators = [torch.Generator().manual_seed(index) for index in range(count)]
    return {"prompt": [prompt] * count, "generators": generators}


def draw(small, words: list[Embedding], prompts: list[str], batch_size: int = 4) -> list[np.ndarray]:
    pipe = generate.load_pipeline(str(small / "sd"))
    generate.load_embeddings(pipe, words)
    pictures = generate.generate(pipe, prompts, [3], steps=2, guidance_scale=5.0, batch_size=batch_size)
    return [np.asarray(picture).astype(int) for *_, picture in pictures]


def word_of(vectors: torch.Tensor, token: str = "<my-pot>") -> baselines.Word:
    """A word of P+ with these embeddings."""
    metadata = {"baseline.method": "plus", "baseline.layers": str(len(vectors))}
    metadata["modelspec.architecture"] = "stable-diffusion-v1/textual-inversion"
    return baselines.Word(token, {"text_encoder": vectors}, metadata)


def differ(a: np.ndarray, b: np.ndarray) -> int:
    return np.abs(a - b).max()


# P+


def test_equal_layers_draw_what_textual_inversion_draws(small):
    """To the picture, wherever the words are, two of them or beside a stock embedding in one pipeline and batch."""
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    metadata = word_of(rows).metadata
    other = Embedding("<other>", {"text_encoder": rows[:2]}, metadata)
    prompts = [*PLACES, "a <my-pot> and a <other>", "<other>", "a <new> and a <my-pot>"]
    plain = [Embedding(token, {"text_encoder": row[None]}, metadata) for token, row in zip(TWO, rows[1:], strict=True)]
    ours = [word_of(row.repeat(LAYERS, 1), token) for token, row in zip(TWO, rows[1:], strict=True)]
    stock, same = draw(small, [*plain, other], prompts), draw(small, [*ours, other], prompts)
    assert max(map(differ, stock, same)) <= 1  # of 255: rounding
    ours[0] = word_of(rows[[1, 2, 1, 1]])
    moved = [differ(a, b) > 1 for a, b in zip(same, draw(small, [*ours, other], prompts), strict=True)]
    assert moved == ["<my-pot>" in prompt for prompt in prompts]


def test_one_layers_embedding_changes_only_its_own_text(model):
    plus = model("plus")
    word, ids = plus.tokens[0], baselines.token_ids(plus.tokenizers[0], [PROMPT])
    with torch.no_grad():
        before = plus.text.states(ids, torch.tensor([500])).unflatten(-1, (LAYERS, 2, WIDTH))
        word.parameter[1] += 1
        after = plus.text.states(ids, torch.tensor([500])).unflatten(-1, (LAYERS, 2, WIDTH))
        plus.text.table = word.parameter[1:]  # what a stock encoder would find behind its vocabulary
        (stock,) = plus.conditioning([plus.text_encoders[0](ids)])
    changed = (before != after).flatten(3).any(dim=-1).any(dim=1)[0]  # by layer
    assert changed.tolist() == [False, True, False, False]
    assert torch.allclose(after[:, :, 1, 0], stock, atol=1e-5) and torch.equal(after[:, :, 1, 0], after[:, :, 1, 1])


def test_layers_are_in_the_order_of_computation(model):
    plus = model("plus")
    seen = []
    for processor in baselines.set_processors(plus.denoiser, baselines.LayerAttention):
        processor.observe = lambda q, k, index=processor.index: seen.append(index)
    plus.denoiser(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 77, WIDTH))
    assert seen == list(range(LAYERS))


def test_every_layer_of_plus_is_trained(model):
    """Each layer's embedding gets a gradient of its own."""
    plus = model("plus")
    plus.predict(torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), batch_of(PROMPT)).square().mean().backward()
    gradients = plus.tokens[0].parameter.grad
    assert gradients.shape == (LAYERS, WIDTH) and gradients.norm(dim=-1).min() > 0
    assert not torch.allclose(gradients[0], gradients[1])


# NeTI


@pytest.fixture
def mapper():
    torch.manual_seed(0)
    return baselines.Mapper(WIDTH, LAYERS, norm=0.4)


def test_the_mapper_tells_timesteps_and_layers_apart(mapper):
    times, layers = torch.tensor([10, 10, 400, 400]), torch.tensor([0, 1, 0, 1])
    e, bypass = mapper(times, layers)
    assert torch.allclose(e.norm(dim=-1), torch.tensor(0.4)) and e.shape == bypass.shape == (4, WIDTH)
    for x in (e, bypass):
        assert torch.pdist(x).min() > 1e-3 * x.norm(dim=-1).mean()
    assert torch.equal(e, mapper(times, layers)[0])  # nothing is drawn


def test_anchors_start_at_their_own_features(mapper):
    """The first layer's rows are the features of the anchors, so that each anchor is its own nearest."""
    times, layers = baselines.anchors(LAYERS)
    answers = mapper.features(times, layers) @ mapper.anchors.weight.T
    assert torch.equal(answers.argmax(dim=-1), torch.arange(10 * LAYERS))
    assert torch.allclose(answers.diagonal(), torch.ones(10 * LAYERS), atol=1e-5)


def test_nested_dropout_keeps_the_first_units(mapper):
    times, layers = torch.tensor([400, 400, 400]), torch.tensor([1, 1, 1])
    cut = mapper(times, layers, torch.tensor([5, 128, 0]))[1]
    assert torch.equal(cut[1], mapper(times, layers)[1][1])
    assert torch.allclose(cut[2], mapper.output.bias[WIDTH:]) and not torch.allclose(cut[0], cut[1])
    with torch.no_grad():
        mapper.output.weight[:, 5:] = 0  # the units that the first row lacks
    assert torch.allclose(mapper(times, layers)[1][1], cut[0], atol=1e-6)


def test_nested_dropout_is_drawn_in_training_only(model):
    word = model("neti", nested_dropout=1).tokens[0]
    times, layers = torch.full((16,), 400), torch.zeros(16, dtype=torch.long)
    whole, cut = word.rows(times, layers)[0], word.rows(times, layers, torch.Generator().manual_seed(0))[0]
    assert torch.allclose(whole[0], whole[1]) and len(cut.detach().unique(dim=0)) > 8
    word.nested_dropout = 0
    assert torch.allclose(word.rows(times, layers, torch.Generator())[0], whole)


def test_the_bypass_is_added_at_the_word_with_the_outputs_norm(model):
    neti = model("neti", bypass_alpha=0.3)
    ids = baselines.token_ids(neti.tokenizers[0], [PROMPT, "<my-pot>"])
    with torch.no_grad():
        keys, values = neti.text.states(ids, torch.tensor([10, 900])).unflatten(-1, (LAYERS, 2, WIDTH)).unbind(dim=-2)
        bypass = neti.tokens[0].rows(torch.tensor([900]), torch.tensor([1]))[1][0]
    shift = values - keys
    at_word = (ids == neti.tokens[0].first_id)[..., None, None]
    assert not (shift * ~at_word).any()
    lengths = (shift.norm(dim=-1) / keys.norm(dim=-1))[at_word[..., 0].expand(-1, -1, LAYERS)]
    assert torch.allclose(lengths, torch.tensor(0.3), atol=1e-5)
    assert torch.cosine_similarity(shift[1, 1, 1], bypass, dim=0) > 0.999


def test_a_saved_network_is_the_trained_one(model, tmp_path):
    neti = model("neti")
    neti.save_result(3, {})
    path = tmp_path / "neti" / "learned_embeds.safetensors"
    word = baselines.read_word(path)
    again = baselines.MappedWord.read(word, 0)
    times, layers = torch.tensor([7, 511]), torch.tensor([2, 0])
    for ours, theirs in zip(neti.tokens[0].rows(times, layers), again.rows(times, layers), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    vocabulary = neti.text_encoders[0].get_input_embeddings().weight
    norm = vocabulary[script.initializer_ids(neti.tokenizers[0], "teapot")].norm()
    assert torch.allclose(word.vectors["text_encoder"].norm(dim=-1), norm) and len(word) == 1
    rescaled = rescale.rescale(word, {"text_encoder": 2.0})
    assert torch.allclose(
        baselines.MappedWord.read(rescaled, 0).rows(times, layers)[0].norm(dim=-1), torch.tensor(2.0)
    )


# CoRe


def test_the_penalty_is_zero_for_the_class_word(model):
    """It pulls every other embedding towards the class word, through the text and through the attention alone."""
    core = model("core", context_weight=1)
    e, start = core.tokens[0].parameter, core.tokens[0].start.clone()
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])

    def penalty(context: str = "a {} beside a red house") -> torch.Tensor:
        return core.context_penalty(context, noisy, times)

    assert penalty().abs() < 1e-6
    for context_weight, attention_weight in ((1, 0), (0, 1e6)):
        core.args.context_weight, core.args.attention_weight = context_weight, attention_weight
        with torch.no_grad():
            e.copy_(start + 0.3 * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1)))
        before, distance = penalty(), (e - start).norm().item()
        assert before > 1e-4
        for _ in range(8):
            (gradient,) = torch.autograd.grad(penalty(), e)
            with torch.no_grad():
                e -= 0.05 * gradient / gradient.norm()
        assert penalty() < before / 2 and (e - start).norm() < distance


def test_shared_tokens_leave_the_words_out(model):
    core = model("core", initializer_token="stuffed animal", num_vectors=3)
    ids = core.context_ids(["a red <my-pot> on grass", "a red stuffed animal on grass"])
    mine, theirs = (row[places].tolist() for row, places in zip(ids, core.shared_tokens(ids), strict=True))
    tokenizer = core.tokenizers[0]
    assert mine == theirs == tokenizer("a red on grass").input_ids
    assert mine[0] == tokenizer.bos_token_id and mine[-1] == tokenizer.eos_token_id


def test_the_norm_is_held_between_the_two_steps(model):
    core = model("core", rescale_start_step=2, rescale_stop_step=4)
    parameter = core.tokens[0].parameter
    norms = []
    for step in range(1, 6):
        core.norms = parameter.detach().norm(dim=-1, keepdim=True)
        with torch.no_grad():
            parameter += 0.1
        core.after_step(step)
        norms.append(round(parameter.norm().item(), 5))
    assert norms[1] == norms[2] == norms[3] and len(set(norms)) == 3


def test_observed_attention_is_the_attention(model):
    core = model("core")
    text = torch.randn(1, 77, WIDTH)
    noisy = torch.randn(2, 4, 8, 8)
    everything = torch.arange(77)
    seen = core.attention_to(text[0], everything, noisy, torch.tensor([5, 900]))
    assert len(seen) == LAYERS and all(torch.allclose(a.sum(dim=-1), torch.ones(2)) for a in seen)
    assert all(processor.seen is None for processor in core.attention)


# Whole runs


@pytest.fixture(scope="module")
def untrained(small) -> tuple[torch.Tensor, np.ndarray]:
    """The class word's row of the vocabulary, (1, d), and the picture that it gives in the word's place."""
    pipe = generate.load_pipeline(str(small / "sd"))
    vocabulary = pipe.text_encoder.get_input_embeddings().weight.detach()
    row = vocabulary[pipe.tokenizer("teapot", add_special_tokens=False).input_ids].clone()
    generate.load_embedding(pipe, Embedding("<my-pot>", {"text_encoder": row}, word_of(row).metadata))
    (picture,) = generate.generate(pipe, ["a <my-pot> here"], [0], steps=2, guidance_scale=7.5)
    return row, np.asarray(picture[2]).astype(int)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_trained_saved_and_drawn(method, options, small, untrained, tmp_path, monkeypatch, capsys):
    """Through main and generate.py's command line: the word is learned, and a picture with it shows that."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / method
    rate = 0.02 if method == "neti" else 0.1
    baselines.main(options(method, learning_rate=rate))
    AcceleratorState._reset_state(reset_partial_state=True)
    with safe_open(out / "learned_embeds.safetensors", "pt") as file:
        header = file.metadata()
    assert header["baseline.method"] == method and header["modelspec.trigger_phrase"] == "<my-pot>"
    assert header["dti.initializer_token"] == "teapot" and header["dti.base_model"] == "sd"
    assert baselines.METHODS[method].method_name in header["modelspec.description"]
    assert [path.name for path in out.glob("*.safetensors")] == ["learned_embeds.safetensors"]
    assert f"generate.py {out}" in capsys.readouterr().out

    word = baselines.read_word(out)
    assert isinstance(word, baselines.Word) == (method != "core")
    row, before = untrained
    assert (word.vectors["text_encoder"] - row).norm(dim=-1).min() > 0.05

    picture = tmp_path / "pictures"
    command = ["generate.py", out, "--pretrained_model_name_or_path", small / "sd", "--prompt", "a {} here"]
    command += ["--output_dir", picture, "--num_inference_steps", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    generate.main()
    name = generate.picture_name("a <my-pot> here", 0)
    drawn = np.asarray(generate.Image.open(picture / name)).astype(int)
    assert differ(before, drawn) > 2


@pytest.mark.parametrize("method", ["plus", "neti"])
def test_validation_draws_as_the_saved_word(method, model, small, tmp_path):
    """The training's own pipeline and generate.py's install the same conditioning; training goes on undisturbed after it."""
    ours = model(method, validation_inference_steps=2, num_validation_images=1)
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    with torch.no_grad():
        before = ours.predict(noisy, times, batch_of(PROMPT))
        (latents,) = ours.sample_latents(PROMPT, None, seed=3)
        assert torch.equal(before, ours.predict(noisy, times, batch_of(PROMPT)))
    ours.save_result(1, {})
    pipe = generate.load_pipeline(str(small / "sd"))
    generate.load_embeddings(pipe, [baselines.read_word(tmp_path / method)])
    generator = torch.Generator().manual_seed(3)
    again = pipe(PROMPT, num_inference_steps=2, guidance_scale=7.5, generator=generator, output_type="latent").images
    assert torch.allclose(latents, again, atol=1e-4)
    assert not pipe.unet.training and latents.std() > 0


def test_a_resumed_network_goes_on_as_if_never_stopped(options, tmp_path):
    def run(**changes) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        baselines.main(options("neti", **changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        return load_file(Path(changes["output_dir"]) / "learned_embeds.safetensors")

    whole = run(output_dir=tmp_path / "whole", checkpointing_steps=2)
    parts = run(output_dir=tmp_path / "parts", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_of_another_method_is_not_gone_on_with(options, tmp_path):
    run = {"checkpointing_steps": 1, "max_train_steps": 1, "output_dir": tmp_path / "out"}
    core = options("core", **run)
    ti = [*core[2:], "--magnitude=free", "--optimizer=adamw"]  # without --method
    for (train, argv), (go_on, others) in itertools.permutations(((baselines.main, core), (train_dti_sd.main, ti))):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(script.UserError, match="is of another run: method"):
            go_on([*others, "--resume_from_checkpoint=latest"])


def test_the_data_loss_falls(model):
    """Plain descent on one batch with fixed noise, for the two methods with a form of their own."""
    for method, rate in (("plus", 0.1), ("neti", 0.003)):
        ours = model(method, nested_dropout=0 if method == "neti" else None)
        latents = {"mean": torch.randn(2, 4, 8, 8), "std": torch.zeros(2, 4, 8, 8)}
        optimizer = torch.optim.AdamW([ours.tokens[0].parameter], lr=rate)
        losses = []
        for _ in range(4):
            loss = ours.loss(latents | batch_of(PROMPT))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]


def test_evaluate_reads_the_words(model, small, tmp_path):
    model("plus").save_result(1, {})
    cases = [evaluate.Case("pot", "P+", tmp_path / "plus", small / "photos", "teapot")]
    argv = [
        "--pretrained_model_name_or_path",
        str(small / "sd"),
        "--output_dir",
        str(tmp_path / "e"),
        "--embeddings",
        "P+=x",
    ]
    args = evaluate.command_line().parse_args([*argv, "--instance_data_dir", "x", "--class_word", "teapot"])
    args.device = "cpu"
    (word,) = evaluate.read_embeddings(cases, args)
    assert isinstance(word, baselines.Word) and word.token == "<subject-0>" and word.layers == LAYERS


# Mistakes


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("plus", {"optimizer": "rsgd"}, "--optimizer rsgd is not for --method plus: leave it out."),
        ("neti", {"magnitude": "mean"}, "--magnitude mean is not for --method neti: leave it out."),
        ("core", {"rank": 4}, "--rank 4 is not for --method core: leave it out."),
        ("core", {"gradient_checkpointing": "true"}, "--gradient_checkpointing is not for --method core"),
        ("core", {"initializer_token": None}, "--method core needs --initializer_token, the class word"),
        ("plus", {"num_vectors": 2}, "--num_vectors 2: --method plus has one a layer: leave it out."),
        ("neti", {"initializer_token": "stuffed animal"}, "has 2 tokens, and --method neti starts from one"),
        ("neti", {"nested_dropout": 1.5}, "--nested_dropout 1.5 is a probability: give at most 1."),
        ("plus", {"bypass_alpha": 0.3}, "--bypass_alpha 0.3 has no effect except with --method neti: leave it out."),
        ("neti", {"context_weight": 1}, "--context_weight 1.0 has no effect except with --method core: leave it out."),
        ("core", {"context_prompts": "nowhere.txt"}, "--context_prompts nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_told_before_weights_load(method, changes, message, options, monkeypatch):
    monkeypatch.setattr(baselines.Baseline, "load", lambda self, dtype: pytest.fail("weights were loaded"))
    with pytest.raises(script.UserError) as error:
        baselines.main(options(method, **changes))
    assert message in str(error.value)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "line, message",
    [("two {}s", "is no word of its own"), ("a {} and a {}", "more than once"), ("a dog", "has no {}")],
)
def test_context_prompts_that_cannot_be_compared(line, message, options, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a {{}} on grass\n{line}\n")
    cls = baselines.CoRe
    with pytest.raises(script.UserError, match=message):
        cls(script.parse_args(options("core", context_prompts=tmp_path / "prompts.txt"), cls)).load_tokenizers()


def test_without_a_method_the_parser_says_so(options, capsys):
    with pytest.raises(SystemExit) as error:
        baselines.main(options("plus")[2:])
    assert error.value.code == 2 and "required: --method" in capsys.readouterr().err


def test_the_method_may_come_from_a_file(options, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps({"method": "neti"}))
    assert baselines.chosen_method(["--config", str(tmp_path / "options.json")]) == "neti"
    assert baselines.chosen_method(options("core")) == "core"


def test_each_methods_settings_are_its_own(options):
    settings = {}
    for method, cls in baselines.METHODS.items():
        args = script.parse_args(options(method, max_train_steps=None, train_batch_size=None), cls)
        assert args.magnitude == "free" and args.lr_scheduler == "constant" and args.optimizer == "adamw"
        settings[method] = (args.max_train_steps, args.learning_rate, args.train_batch_size)
    assert settings == {"plus": (500, 5e-3, 8), "neti": (1000, 8e-3, 8), "core": (300, 5e-3, 6)}


def test_files_that_do_not_fit_are_refused(model, small, tmp_path):
    model("plus").save_result(1, {})
    path = tmp_path / "plus" / "learned_embeds.safetensors"
    with pytest.raises(EmbeddingError, match="needs|has clip_l"):
        read_embedding(path)  # scripts that cannot use it say so
    word = baselines.read_word(path)
    word.metadata["baseline.layers"] = "16"
    with pytest.raises(EmbeddingError, match="is for 16 cross-attention layers, and .* has 4"):
        generate.check_model_fits(str(small / "sd"), None, [path], [word])
    with pytest.raises(export.UserError, match="half of SDXL|--pretrained_model_name_or_path"):
        generate.check_model_fits(str(small / "sdxl"), None, [path], [word])
    shutil.copy(path, damaged := tmp_path / "damaged.safetensors")
    with safe_open(path, "pt") as file:
        save_file({"layer.0": file.get_tensor("layer.0")}, damaged, metadata=file.metadata())
    with pytest.raises(EmbeddingError, match="is not whole: it says it is a word of plus"):
        baselines.read_word(damaged)
