"""Using what was learned: export.py, rescale.py, generate.py and interpolate.py, on the small pipelines."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import export
import generate
import interpolate
import pytest
import rescale
import torch
import transformers
from conftest import ROOT
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from export import Embedding, EmbeddingError, read_embedding, write_embedding
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dti_sdxl


FAMILIES = ("sdxl", "sana", "sd")
WIDTHS = {"sdxl": {"text_encoder": 32, "text_encoder_2": 48}}  # the small pipelines'
WIDTHS |= {"sana": {"text_encoder": 32}, "sd": {"text_encoder": 32}}
PROMPT = "a photo of {} on the grass"
FAST = ["--num_inference_steps", "2", "--resolution", "64"]


def make(token: str, family: str = "sdxl", count: int = 2, norm: float = 0.4, seed: int = 0) -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(count, width, generator=generator) for name, width in WIDTHS[family].items()}
    vectors = {name: norm * torch.nn.functional.normalize(x, dim=-1) for name, x in rows.items()}
    metadata = {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"} if family == "sd" else {}
    return Embedding(token, vectors, {"dti.base_model": "small", "dti.steps": "500"} | metadata)


def same(a: Embedding, b: Embedding) -> bool:
    return a.vectors.keys() == b.vectors.keys() and all(torch.equal(a.vectors[x], b.vectors[x]) for x in a.vectors)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script's main in this process with a command line. Returns its output and error stream and its status."""

    def run(script, *argv) -> tuple[str, str, int]:
        levels = transformers.utils.logging.get_verbosity(), diffusers.utils.logging.get_verbosity()
        monkeypatch.setattr("sys.argv", [script.__file__, *map(str, argv)])
        status = 0
        try:
            export.run(script.main)
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):  # which the interpreter prints
                print(status, file=sys.stderr)
                status = 1
        transformers.utils.logging.set_verbosity(levels[0])
        diffusers.utils.logging.set_verbosity(levels[1])
        captured = capsys.readouterr()
        return captured.out, captured.err, status

    return run


@pytest.fixture
def dog(tmp_path) -> Path:
    write_embedding(make("<my-dog>"), tmp_path / "dog")
    return tmp_path / "dog"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a weight loads."""
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("weights are loaded"))


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*seed*.png"))


def pixels(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).int()


# ----------------------------------------------------------------------------------------------------------------------
# export.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_way_through_all_formats_and_back_is_exact(tmp_path, family, count, monkeypatch):
    monkeypatch.setitem(WIDTHS, "sd", {"text_encoder": 1024})  # pickles have no metadata: the width says whose it is
    embedding = start = make("<my-dog>", family, count)
    for step, form in enumerate([*export.FORMATS, *reversed(export.FORMATS)]):
        paths = write_embedding(embedding, tmp_path / str(step), [form])
        readings = [read_embedding(path) for path in (*paths, tmp_path / str(step))]
        assert all(same(x, start) and x.token == "<my-dog>" and x.family == family for x in readings), form
        assert all(x.dtype == torch.float32 for x in readings[0].vectors.values())
        embedding = readings[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_is_kept_and_follows_a_new_name(call, tmp_path, family):
    write_embedding(make("<my-dog>", family), tmp_path / "a")
    out, _, status = call(export, tmp_path / "a", "--output_dir", tmp_path / "b", "--token", "<rex>")
    assert status == 0 and "rex.safetensors" in out
    for path in (tmp_path / "b").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["dti.base_model"] == "small" and metadata["dti.steps"] == "500"
        assert metadata["modelspec.trigger_phrase"] == "<rex>" and metadata["modelspec.title"] == "rex"
        assert metadata["modelspec.architecture"] == f"{export.ARCHITECTURES[family]}/textual-inversion"


def test_reads_a_run_and_writes_what_the_run_wrote(train, tmp_path):
    out = train(initializer_token="stuffed animal")
    embedding = read_embedding(out)
    assert embedding.token == "<my-pot>" and len(embedding) == 2
    for path in write_embedding(embedding, tmp_path / "again"):
        assert all(torch.equal(x, load_file(out / path.name)[key]) for key, x in load_file(path).items())
        with safe_open(path, "pt") as new, safe_open(out / path.name, "pt") as old:
            assert new.metadata() == old.metadata()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    write_embedding(embedding, out)  # the same vectors: nothing to do
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_the_web_ui_finds_what_it_looks_for(tmp_path):
    write_embedding(make("<my-dog>"), tmp_path, ["a1111"])
    state = torch.load(tmp_path / "my-dog.pt", weights_only=True)
    assert set(state) == {"clip_l", "clip_g"} and state["clip_g"].dtype == torch.float32
    write_embedding(make("<my-cat>", "sana"), tmp_path, ["a1111"])
    state = torch.load(tmp_path / "my-cat.pt", weights_only=True)
    assert state["name"] == "<my-cat>" and state["step"] == 500 and set(state["string_to_param"]) == {"*"}


def test_reads_old_pickles_with_a_parameter_dict_and_half_precision(tmp_path):
    rows = torch.nn.Parameter(torch.randn(2, 32).half())
    state = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": rows})}
    torch.save(state, tmp_path / "old-dog.pt")
    embedding = read_embedding(tmp_path / "old-dog.pt")
    assert embedding.token == "<old-dog>" and torch.equal(embedding.vectors["text_encoder"], rows.detach().float())


def test_a_pickle_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"<x>": Trap()}, tmp_path / "x.bin")
    with pytest.raises(EmbeddingError, match="cannot be read as an embedding"):
        read_embedding(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_stock_pipeline_draws_the_same_with_every_format(small, tmp_path, form):
    write_embedding(make("<my-dog>"), tmp_path / "a", [form])
    write_embedding(read_embedding(tmp_path / "a"), tmp_path / "b", ["diffusers"])
    pipe = StableDiffusionXLPipeline.from_pretrained(small / "sdxl", add_watermarker=False)
    pipe.load_textual_inversion(str(tmp_path / "b"))
    second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
    pipe.load_textual_inversion(str(tmp_path / "b"), weight_name="learned_embeds_2.safetensors", **second)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    seed = torch.Generator().manual_seed(3)
    stock = pipe(PROMPT.format("<my-dog>"), num_inference_steps=2, guidance_scale=5.0, generator=seed).images[0]

    ours = generate.load_pipeline(str(small / "sdxl"))
    generate.load_embedding(ours, make("<my-dog>"))
    options = {"steps": 2, "guidance_scale": 5.0, "pooling": "stock"}
    image = next(generate.generate(ours, [PROMPT.format("<my-dog>")], [3], **options))[2]
    assert (to_tensor(image) - to_tensor(stock)).abs().max() <= 1  # of 255: convolutions round by the memory's layout


@pytest.mark.parametrize(
    "state",
    [
        [1],
        {},
        {7: torch.ones(1, 8)},
        {"string_to_param": 3},
        {"string_to_param": {}},
        {"string_to_param": {"*": "text"}, "name": 5},
        {"gemma": torch.ones(1, 2, 3)},
        {"clip_l": None, "clip_g": torch.ones(1, 8)},
        {"<x>": torch.ones(0, 8)},
        {"<x>": torch.ones(())},
    ],
)
def test_whatever_a_pickle_holds_there_is_one_message(call, tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    _, err, status = call(export, tmp_path / "x.pt", "--output_dir", tmp_path / "out")
    assert status == 1 and err.startswith("export.py: error: ") and err.count("\n") == 1


BAD_FILES = {
    "nan": ("learned_embeds.safetensors", {"<x>": torch.tensor([[1.0, math.nan]])}, "zeros, NaN or infinity"),
    "zeros": ("learned_embeds.safetensors", {"<x>": torch.zeros(1, 8)}, "zeros, NaN or infinity"),
    "integers": ("x.safetensors", {"<x>": torch.ones(1, 8, dtype=torch.int64)}, "rows of floating-point"),
    "keys": ("x.safetensors", {"a": torch.ones(1, 8), "b": torch.ones(1, 8)}, "has the keys a, b"),
    "counts": ("x.safetensors", {"clip_l": torch.ones(1, 8), "clip_g": torch.ones(2, 8)}, "1 and 2 vectors"),
    "half": ("learned_embeds_2.safetensors", {"<x>": torch.ones(1, 1280)}, "half of a pair: put learned_embeds.saf"),
    "width": ("x.safetensors", {"<x>": torch.ones(1, 1280)}, "width 1280: the second half of SDXL's pair"),
    "name": ("x.safetensors", {"a dog": torch.ones(1, 8)}, "'a dog' is not a word without spaces"),
}


@pytest.mark.parametrize("name, state, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_embedding_ends_in_one_line(call, tmp_path, name, state, message):
    save_file(state, tmp_path / name)
    _, err, status = call(export, tmp_path / name, "--output_dir", tmp_path / "out")
    assert status == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pair_of_two_tokens_a_missing_file_and_a_damaged_one_are_told(call, tmp_path):
    save_file({"<x>": torch.ones(1, 8)}, tmp_path / "learned_embeds.safetensors")
    save_file({"<y>": torch.ones(1, 8)}, tmp_path / "learned_embeds_2.safetensors")
    assert "has '<y>': they are not a pair" in call(export, tmp_path, "--output_dir", tmp_path / "out")[1]
    assert "does not exist" in call(export, tmp_path / "none", "--output_dir", tmp_path / "out")[1]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "learned_embeds.safetensors").read_bytes()[:90])
    assert "cannot be read" in call(export, tmp_path / "cut.safetensors", "--output_dir", tmp_path / "out")[1]


def test_other_vectors_are_not_overwritten_unless_told(call, dog, tmp_path):
    write_embedding(make("<my-dog>", seed=1), tmp_path / "other")
    kept = read_embedding(tmp_path / "other")
    (tmp_path / "other" / "learned_embeds.safetensors").touch()
    _, err, status = call(export, dog, "--output_dir", tmp_path / "other", "--format", *export.FORMATS)
    assert status == 1 and "exists with other content: choose another folder, or add --overwrite" in err
    assert same(read_embedding(tmp_path / "other"), kept) and not list((tmp_path / "other").glob("*.pt"))
    assert call(export, dog, "--output_dir", tmp_path / "other", "--overwrite")[2] == 0
    assert same(read_embedding(tmp_path / "other"), read_embedding(dog))


# ----------------------------------------------------------------------------------------------------------------------
# rescale.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["mean", "min"])
def test_magnitudes_are_the_training_scripts(small, family, rule):
    found = rescale.magnitudes(str(small / family))
    for name, statistics in found.items():
        weights = load_file(small / family / name / "model.safetensors")
        matrix = next(x for key, x in weights.items() if key.endswith(rescale.VOCABULARIES))
        assert statistics[rule] == train_dti_sdxl.vocabulary_magnitude(matrix, rule)
        assert statistics["zero_rows"] == (matrix.norm(dim=-1) == 0).sum() and statistics["rows"] == len(matrix)


def test_reads_sharded_files_and_files_of_other_kinds(small, tmp_path, monkeypatch):
    monkeypatch.setattr(rescale, "ROWS_AT_A_TIME", 100)
    expected = rescale.magnitudes(str(small / "sana"))["text_encoder"]
    encoder = transformers.Gemma2Model.from_pretrained(small / "sana" / "text_encoder")
    for kind in ("sharded", "pickled"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "model_index.json").write_text((small / "sana" / "model_index.json").read_text())
        encoder.save_pretrained(folder / "text_encoder", max_shard_size="60KB")
        if kind == "pickled":
            for file in (folder / "text_encoder").glob("model*"):
                file.unlink()
            torch.save(encoder.state_dict(), folder / "text_encoder" / "pytorch_model.bin")
        else:
            assert len(list((folder / "text_encoder").glob("model-*.safetensors"))) > 1
        assert rescale.magnitudes(str(folder))["text_encoder"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_sets_the_norm_and_keeps_the_direction(call, small, tmp_path, family):
    inflated = make("<my-dog>", family, norm=21.0)
    write_embedding(inflated, tmp_path / "ti")
    options = ("--pretrained_model_name_or_path", small / family, "--output_dir", tmp_path / "rescaled")
    out, _, status = call(rescale, tmp_path / "ti", *options)
    assert status == 0 and "21.0000 -> " in out
    result, m = read_embedding(tmp_path / "rescaled"), rescale.magnitudes(str(small / family))
    for name, rows in result.vectors.items():
        torch.testing.assert_close(rows.norm(dim=-1), torch.full((2,), m[name]["mean"]))
        cosine = torch.nn.functional.cosine_similarity(rows.double(), inflated.vectors[name].double())
        assert (cosine > 1 - 1e-12).all()
    assert {path.suffix for path in (tmp_path / "rescaled").iterdir()} == {".safetensors", ".pt", ".bin"}
    out, _, _ = call(rescale, "--pretrained_model_name_or_path", small / family)
    assert f"{m['text_encoder']['mean']:.4f}" in out


@pytest.mark.parametrize(
    "argv, status, message",
    [
        (["{dog}", "--output_dir", "x", "--magnitude", "0"], 2, "'0' is not mean, min or a number above 0"),
        (["{dog}"], 1, "--output_dir is missing"),
        (["--output_dir", "x"], 1, "give an embedding to rescale"),
        (["{sana}", "--output_dir", "x"], 1, "is an embedding for SANA"),
        (["{sd}", "--output_dir", "x"], 1, "is an embedding for Stable Diffusion 1 or 2, or half of SDXL's pair"),
        (["{wide}", "--output_dir", "x"], 1, "vectors of width 33 and 48, but the text encoders of"),
    ],
)
def test_bad_rescaling_ends_in_one_line(call, small, dog, tmp_path, argv, status, message):
    write_embedding(make("<my-pot>", "sana"), tmp_path / "sana")
    wide = make("<my-pot>")
    wide.vectors["text_encoder"] = torch.ones(2, 33)
    write_embedding(wide, tmp_path / "wide")
    write_embedding(make("<my-pot>", "sd"), tmp_path / "sd")
    paths = {"dog": dog, "sana": tmp_path / "sana", "sd": tmp_path / "sd", "wide": tmp_path / "wide"}
    _, err, code = call(rescale, *(x.format(**paths) for x in argv), "--pretrained_model_name_or_path", small / "sdxl")
    assert code == status and message in err.splitlines()[-1] and "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------------------
# generate.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_two_tokens_in_one_prompt_and_goes_on_where_it_was(call, small, tmp_path, family, monkeypatch):
    write_embedding(make("<my-dog>", family), tmp_path / "dog")
    write_embedding(make("<my-style>", family, count=1, seed=1), tmp_path / "style")
    (tmp_path / "prompts.txt").write_text("a painting of {0} in the style of {1}\n\na photo of {}\n")
    model, out = small / family, tmp_path / "out"
    options = ["--pretrained_model_name_or_path", model, "--output_dir", out, "--seeds", "3", "4", *FAST]
    command = [generate, tmp_path / "dog", tmp_path / "style", "--prompts", tmp_path / "prompts.txt", *options]
    printed, _, status = call(*command)
    assert status == 0 and "4 pictures drawn" in printed
    files = pictures(out)
    assert len(files) == 4 and len({pixels(file).numpy().tobytes() for file in files}) == 4

    text = Image.open(files[0]).text
    assert text["prompt"] == "a painting of <my-dog> in the style of <my-style>" and text["seed"] == "3"
    settings = json.loads(text["settings"])
    assert settings["num_inference_steps"] == 2 and list(settings["embeddings"]) == ["<my-dog>", "<my-style>"]
    assert str(tmp_path) not in text["settings"]
    grid = Image.open(out / "grid.png")
    assert grid.width >= 2 * 64 and grid.height >= 2 * 64

    times = {file: file.stat().st_mtime_ns for file in files}
    before = pixels(files[2])
    files[2].unlink()
    printed, _, _ = call(*command, "--batch_size", "3")
    assert "1 pictures drawn, 3 kept" in printed
    assert all(file.stat().st_mtime_ns == time for file, time in times.items() if file != files[2])
    assert (pixels(files[2]) - before).abs().max() <= 1
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("weights are loaded"))
    assert "0 pictures drawn, 4 kept" in call(*command)[0]
    _, err, status = call(*command, "--guidance_scale", "2")
    assert status == 1 and "exists with other settings: choose another --output_dir, or add --overwrite" in err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_token_changes_the_picture_and_the_batch_does_not(small, family):
    pipe = generate.load_pipeline(str(small / family))
    generate.load_embedding(pipe, make("<my-dog>", family))
    generate.load_embedding(pipe, make("<my-style>", family, seed=1))
    prompts = ["a photo of <my-dog>", "a photo of <my-dog> in the style of <my-style>", "a photo of <my-style>"]
    common = {"steps": 2, "guidance_scale": 4.0, "resolution": 64}
    alone = list(generate.generate(pipe, prompts, [0, 1], **common))
    batched = list(generate.generate(pipe, prompts, [0, 1], batch_size=4, **common))
    assert [x[:2] for x in alone] == [x[:2] for x in batched] == [(p, s) for p in prompts for s in (0, 1)]
    one, other = (torch.stack([to_tensor(x[2]) for x in run]) for run in (alone, batched))
    assert (one - other).abs().max() <= 1  # of 255: rounding of matrix products
    assert all((one[a] - one[b]).abs().max() > 1 for a in range(6) for b in range(a))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_pooling_at_the_end_token_sees_what_follows_the_token(small):
    pipe = generate.load_pipeline(str(small / "sdxl"))
    generate.load_embedding(pipe, make("<my-dog>"))
    shipped = pipe.text_encoder_2.text_model.eos_token_id

    def pooled(pooling: str) -> list[torch.Tensor]:
        with generate.pooled_at(pipe, pooling), torch.no_grad():
            return [pipe.encode_prompt(f"a <my-dog> {end}", device="cpu")[2] for end in ("on the grass", "painting")]

    assert torch.equal(*pooled("stock")) and not torch.equal(*pooled("eos"))
    assert pipe.text_encoder_2.text_model.eos_token_id == shipped
    options = {"steps": 2, "guidance_scale": 4.0}
    eos, stock = (
        to_tensor(next(generate.generate(pipe, ["a <my-dog> painting"], [0], pooling=x, **options))[2])
        for x in ("eos", "stock")
    )
    assert not torch.equal(eos, stock)


def test_the_papers_samplers(small):
    sdxl, sana = (generate.load_pipeline(str(small / family)).scheduler for family in ("sdxl", "sana"))
    assert type(sdxl).__name__ == "DDIMScheduler" and not sdxl.config.clip_sample and not sdxl.config.set_alpha_to_one
    assert sdxl.config.beta_schedule == "scaled_linear"  # the model's
    assert type(sana).__name__ == "FlowMatchEulerDiscreteScheduler" and sana.config.shift == 3.0
    pipe = generate.load_pipeline(str(small / "sana"), scheduler="model")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert next(generate.generate(pipe, ["a dog"], [0], steps=2, guidance_scale=4.0, resolution=64))


@pytest.mark.parametrize("family, words", [("sdxl", 77), ("sana", 300), ("sd", 77)])
def test_a_prompt_that_is_too_long_is_told(call, small, tmp_path, no_weights, monkeypatch, family, words):
    write_embedding(make("<my-dog>", family), tmp_path / "dog")
    monkeypatch.setattr(generate, "draw_missing", lambda *args: sys.exit(7))
    options = ["--pretrained_model_name_or_path", small / family, "--output_dir", tmp_path / "out"]
    _, err, status = call(generate, tmp_path / "dog", *options, "--prompt", "dog " * words + "{}", "a photo of {}")
    assert status == 7 and err.count("Note:") == 1 and f"only {words} of the" in err


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_weights_beside_the_embedding_are_loaded(call, small, tmp_path, family):
    peft = pytest.importorskip("peft")
    write_embedding(make("<my-dog>", family), tmp_path / "dog")
    pipe = generate.load_pipeline(str(small / family))
    denoiser = generate.denoiser_of(pipe)
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    denoiser.add_adapter(peft.LoraConfig(**config))
    name = "transformer" if family == "sana" else "unet"
    layers = {f"{name}_lora_layers": peft.get_peft_model_state_dict(denoiser)}
    pipe.save_lora_weights(tmp_path / "dog", **layers)
    options = ["--pretrained_model_name_or_path", small / family, "--prompt", PROMPT, *FAST]
    assert call(generate, tmp_path / "dog", *options, "--output_dir", tmp_path / "lora")[2] == 0
    assert call(generate, tmp_path / "dog", *options, "--output_dir", tmp_path / "plain", "--no_lora")[2] == 0
    in_int8 = [*options, "--output_dir", tmp_path / "int8", "--base_precision", "int8"]
    assert call(generate, tmp_path / "dog", *in_int8)[2] == 0
    with_lora, plain, coarse = (pixels(pictures(tmp_path / x)[0]).float() for x in ("lora", "plain", "int8"))
    assert 0 < (coarse - with_lora).norm() < 0.3 * (with_lora - plain).norm()  # on the int8 layers too
    in_float = [*options, "--output_dir", tmp_path / "int8"]  # the pictures tell how they were drawn
    assert call(generate, tmp_path / "dog", *in_float)[2] != 0
    other = "sdxl" if family == "sana" else "sana"
    with pytest.raises(export.UserError, match="for another model; ignore it by --no_lora"):
        generate.find_loras([tmp_path / "dog"], other)


def test_low_memory_and_half_precision(call, small, dog, tmp_path):
    options = ["--pretrained_model_name_or_path", small / "sdxl", "--prompt", PROMPT, "--dtype", "bf16", *FAST]
    options += ["--enable_vae_tiling", "--enable_vae_slicing", "--output_dir", tmp_path / "out"]
    out, err, status = call(generate, dog, *options)
    assert status == 0, err
    assert pixels(pictures(tmp_path / "out")[0]).float().std() > 1


@pytest.mark.parametrize(
    "argv, status, message",
    [
        ([], 1, "Give --prompt or --prompts"),
        (["--prompt", "a {1}"], 1, "--prompt 'a {1}' has {1}, but only 1 embeddings are given"),
        (["--prompt", " "], 1, "--prompt is empty"),
        (["--prompts", "none.txt"], 1, "--prompts none.txt cannot be read"),
        (["--prompt", "a {}", "--token", "dog"], 1, "'dog' is already a word; give another word by --token"),
        (["--prompt", "a {}", "--token", "<a>", "<b>"], 1, "--token has 2 words for 1 embeddings"),
        (["--prompt", "a {}", "--resolution", "60"], 1, "--resolution 60 is not a multiple of 8: try 56"),
        (["--prompt", "a {}", "--batch_size", "0"], 2, "'0' is not an integer of at least 1"),
        (["--prompt", "a {}", "--guidance_scale", "nan"], 2, "'nan' is not a number of at least 0"),
        (
            ["--prompt", "a {}", "--enable_model_cpu_offload", "--device", "cpu"],
            1,
            "the device is the CPU: leave it out",
        ),
        (["--prompt", "a {}", "--device", "cuda:99"], 1, "--device cuda:99 cannot be used"),
        (["--prompt", "a {}", "--complex_human_instruction", "default"], 1, "is SANA's"),
        (["--prompt", "a {}", "--pretrained_model_name_or_path", "photos"], 1, "has no model_index.json"),
        (
            ["--prompt", "a {}", "--pretrained_model_name_or_path", "sana"],
            1,
            "is an embedding for Stable Diffusion XL",
        ),
        (["--prompt", "a {}", "--output_dir", "sdxl/model_index.json/x"], 1, "cannot be written to: Not a directory"),
    ],
)
def test_bad_options_of_generate_end_in_one_line(call, small, dog, no_weights, monkeypatch, argv, status, message):
    monkeypatch.chdir(small)
    defaults = ["--pretrained_model_name_or_path", "sdxl", "--output_dir", dog.parent / "out"]
    _, err, code = call(generate, dog, *defaults, *argv)
    assert code == status and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_grid_that_is_another_ones_and_names_that_clash_are_refused(call, small, dog, no_weights, tmp_path):
    options = ["--pretrained_model_name_or_path", small / "sdxl", "--prompt", "a {}", "--output_dir", tmp_path]
    _, err, status = call(generate, dog, dog, *options)
    assert status == 1 and "Two embeddings have the token '<my-dog>'" in err
    _, err, status = call(generate, dog, dog, *options, "--token", "<x>", "<x>_1")
    assert status == 1 and "'<x>_1' is already a word" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    _, err, status = call(generate, dog, *options)
    assert status == 1 and "grid.png exists and is not from this script" in err


def test_a_model_with_missing_weights_is_refused(call, small, dog, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for part in (small / "sdxl").iterdir():
        (model / part.name).symlink_to(part)
    (model / "text_encoder_2").unlink()
    (model / "text_encoder_2").mkdir()
    source = small / "sdxl" / "text_encoder_2"
    (model / "text_encoder_2" / "config.json").write_text((source / "config.json").read_text())
    weights = {x: v for x, v in load_file(source / "model.safetensors").items() if "layers.1.mlp" not in x}
    save_file(weights, model / "text_encoder_2" / "model.safetensors", metadata={"format": "pt"})
    options = ["--pretrained_model_name_or_path", model, "--prompt", "a {}", "--output_dir", tmp_path / "out"]
    _, err, status = call(generate, dog, *options)
    assert status == 1 and "text_encoder_2 lacks the weights" in err.splitlines()[-1] and "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------------------
# interpolate.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_turns_evenly_on_the_sphere(dtype):
    v1, v2 = torch.randn(2, 3, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    v1, v2 = v1 / v1.norm(dim=-1, keepdim=True), v2 / v2.norm(dim=-1, keepdim=True)
    theta = interpolate.angle(v1.double(), v2.double())
    for t in (0, 0.1, 0.35, 0.5, 0.9, 1):
        v = interpolate.slerp(v1, v2, t)
        assert v.dtype == dtype
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(3, dtype=dtype))
        torch.testing.assert_close(interpolate.angle(v1.double(), v.double()), t * theta, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(interpolate.slerp(v2, v1, 1 - t), v)
        torch.testing.assert_close(interpolate.slerp(5 * v1, 0.1 * v2, t), v)  # of any norm


def test_slerp_at_its_limits():
    v = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1)
    torch.testing.assert_close(interpolate.slerp(v, v, 0.5), v)
    near = torch.nn.functional.normalize(v + 1e-6 * torch.randn(1, 16), dim=-1)
    assert interpolate.slerp(v, near, 0.3).isfinite().all()
    torch.testing.assert_close(interpolate.slerp(v, near, 1.0), near)
    with pytest.raises(ValueError, match="opposite"):
        interpolate.slerp(v, -v, 0.5)
    with pytest.raises(ValueError, match="no direction"):
        interpolate.slerp(v, 0 * v, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_are_exact_and_the_norm_is_kept_between(family):
    first, second = make("<a>", family), make("<b>", family, seed=1)
    assert same(interpolate.interpolate(first, second, 0), first)
    assert same(interpolate.interpolate(first, second, 1), second)
    middle = interpolate.interpolate(first, second, 0.5)
    chord = interpolate.interpolate_linearly(first, second, 0.5)
    for name, rows in middle.vectors.items():
        torch.testing.assert_close(rows.norm(dim=-1), torch.full((2,), 0.4))
        assert (chord.vectors[name].norm(dim=-1) < 0.35).all()
    given = interpolate.interpolate(first, second, 0, dict.fromkeys(first.vectors, 2.0))
    assert all(torch.allclose(rows.norm(dim=-1), torch.tensor(2.0)) for rows in given.vectors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_strips_ends_are_the_two_subjects(call, small, tmp_path, family):
    for name, seed in (("dog", 0), ("cat", 1)):
        write_embedding(make(f"<my-{name}>", family, seed=seed), tmp_path / name)
    options = ["--pretrained_model_name_or_path", small / family, "--prompt", PROMPT, *FAST]
    for name in ("dog", "cat"):
        assert call(generate, tmp_path / name, *options, "--output_dir", tmp_path / f"{name}-alone")[2] == 0
    out = tmp_path / "out"
    flags = ["--num", "3", "--linear", "--animation", "gif", "--output_dir", out]
    command = [interpolate, tmp_path / "dog", tmp_path / "cat", *options, *flags]
    printed, err, status = call(*command)
    assert status == 0 and "6 pictures drawn" in printed, err
    start, middle, end = (pixels(*pictures(out / f"t-{t}")) for t in ("0.000", "0.500", "1.000"))
    assert torch.equal(start, pixels(*pictures(tmp_path / "dog-alone")))
    assert torch.equal(end, pixels(*pictures(tmp_path / "cat-alone")))
    assert not torch.equal(middle, start) and not torch.equal(middle, end)
    assert torch.equal(start, pixels(*pictures(out / "linear" / "t-0.000")))
    assert not torch.equal(middle, pixels(*pictures(out / "linear" / "t-0.500")))

    strip = Image.open(out / "strip.png").convert("RGB").tobytes()
    row = Image.frombytes("RGB", (64, 64), start.to(torch.uint8).numpy().tobytes()).crop((0, 30, 64, 31)).tobytes()
    assert strip.count(row) >= 2  # in both rows, as it is
    assert Image.open(out / "animation.gif").n_frames >= 3
    found = read_embedding(out / "t-0.500")
    assert found.token == "<my-dog-my-cat>" and found.metadata["dti.interpolated_at"] == "0.5"
    assert len(list((out / "t-0.500").glob("my-dog-my-cat.*"))) == 2
    assert "0 pictures drawn, 6 kept" in call(*command)[0]


def test_without_a_prompt_no_model_is_needed_and_other_norms_are_told(call, small, dog, no_weights, tmp_path):
    write_embedding(make("<my-cat>", seed=1, norm=20.0), tmp_path / "cat")
    printed, err, status = call(interpolate, dog, tmp_path / "cat", "--output_dir", tmp_path / "a")
    assert status == 0 and "norms of text_encoder differ" in err and "norms of text_encoder_2 differ" in err
    assert len(list((tmp_path / "a").glob("t-*"))) == len(interpolate.PAPER_RATIOS)
    middle = read_embedding(tmp_path / "a" / "t-0.500").vectors["text_encoder"]
    torch.testing.assert_close(middle.norm(dim=-1), torch.full((2,), 10.2))
    flags = ["--magnitude", "mean", "--pretrained_model_name_or_path", small / "sdxl", "--output_dir", tmp_path / "b"]
    _, err, status = call(interpolate, dog, tmp_path / "cat", *flags)
    assert status == 0 and "differ" not in err
    m = rescale.magnitudes(str(small / "sdxl"))["text_encoder"]["mean"]
    for t in ("0.000", "0.500", "1.000"):
        norms = read_embedding(tmp_path / "b" / f"t-{t}").vectors["text_encoder"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.full((2,), m))


@pytest.mark.parametrize(
    "change, argv, status, message",
    [
        ("count", [], 1, "<my-dog> has 2 vectors and <my-cat> has 1: train both with the same --num_vectors"),
        ("opposite", [], 1, "point in opposite directions (vector 2 of text_encoder_2, antipodal)"),
        ("family", [], 1, "give two for the same model"),
        (None, ["--num", "1"], 2, "'1' is not an integer of at least 2"),
        (None, ["--num", "102"], 1, "--num 102 is more than 101"),
        (None, ["--linear"], 1, "--linear needs pictures: add --prompt"),
        (None, ["--prompt", "a {}"], 1, "--prompt needs a model: add --pretrained_model_name_or_path"),
        (None, ["--magnitude", "mean"], 1, "--magnitude mean needs a model"),
        (None, ["--magnitude", "big"], 2, "'big' is not ends, mean, min or a number above 0"),
        (None, ["--prompt", "a dog", "--pretrained_model_name_or_path", "sdxl"], 1, "its picture would be the same"),
        (None, ["--prompt", "a {}", "--pretrained_model_name_or_path", "sana"], 1, "for Stable Diffusion XL"),
    ],
)
def test_bad_ways_end_in_one_line(call, small, dog, no_weights, tmp_path, monkeypatch, change, argv, status, message):
    monkeypatch.chdir(small)
    cat = make("<my-cat>", "sana" if change == "family" else "sdxl", count=1 if change == "count" else 2, seed=1)
    if change == "opposite":
        cat.vectors["text_encoder_2"][1] = -3 * make("<my-dog>").vectors["text_encoder_2"][1]
    write_embedding(cat, tmp_path / "cat")
    _, err, code = call(interpolate, dog, tmp_path / "cat", "--output_dir", tmp_path / "out", *argv)
    assert code == status and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# As a user runs them
# ----------------------------------------------------------------------------------------------------------------------


def test_from_a_shell(small, dog, tmp_path):
    def shell(name: str, *argv) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "examples" / name), *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)

    write_embedding(make("<my-cat>", seed=1), tmp_path / "cat")
    options = ["--pretrained_model_name_or_path", small / "sdxl", "--prompt", PROMPT, *FAST]
    result = shell("interpolate.py", dog, "cat", *options, "--num", "2", "--output_dir", "way")
    assert result.returncode == 0 and (tmp_path / "way" / "strip.png").is_file(), result.stderr
    result = shell("export.py", dog / "nothing.pt", "--output_dir", "web")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("export.py: error: ") and result.stderr.count("\n") == 1
