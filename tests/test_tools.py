"""What the tools' loaders want of a file, a table for each kind, and every file of ours held against it.

The tables are written from what the loaders do (ComfyUI 0.3.64, AUTOMATIC1111 1.10, Forge 2.0, InvokeAI 6.14, SD.Next of
July 2026, Fooocus 2.5, kohya's sd-scripts 0.10, OneTrainer of August 2026, diffusers 0.35 and 0.42).
"""

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import benchmark
import export
import pytest
import torch
import train_dti_sd
from accelerate.state import AcceleratorState
from diffusers import SanaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from export import Embedding, EmbeddingError, read_both, read_embedding, read_lora, web_name, write_embedding
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dti_sana
import train_dti_sdxl


SCRIPTS = {"sdxl": train_dti_sdxl, "sana": train_dti_sana, "sd": train_dti_sd}
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sana": SanaPipeline, "sd": StableDiffusionPipeline}
RANK, ALPHA = 4, 6.0  # not equal: a reader that takes the rank for alpha is two thirds as strong
WIDTHS = {"clip_l": 32, "clip_g": 48, "gemma": 32, "emb_params": 32}  # the small pipelines'; SDXL's are 768 and 1280


# ----------------------------------------------------------------------------------------------------------------------
# What the tools want
# ----------------------------------------------------------------------------------------------------------------------

# Embedding files: the tool, the model, the file, its keys, and whether a key more is an error. Each holds a 2-D matrix of
# one row a vector; the two encoders' have equally many. The tools convert from any floating-point type; float32 is exact.
WORD = "<my-pot>"  # diffusers' key is the word
EMBEDDING_READERS = [
    ("diffusers", "sdxl", "learned_embeds.safetensors", {WORD: "clip_l"}, True),
    ("diffusers", "sdxl", "learned_embeds_2.safetensors", {WORD: "clip_g"}, True),
    ("diffusers", "sana", "learned_embeds.safetensors", {WORD: "gemma"}, True),  # by examples/pipeline_sana_...
    ("ComfyUI", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("AUTOMATIC1111", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("AUTOMATIC1111", "sdxl", "my-pot.pt", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("Forge", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("InvokeAI", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("SD.Next", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, True),  # goes by the widths
    ("Fooocus", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("kohya", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("OneTrainer", "sdxl", "my-pot.safetensors", {"clip_l": "clip_l", "clip_g": "clip_g"}, False),
    ("OneTrainer", "sana", "my-pot.safetensors", {"gemma": "gemma"}, False),
    ("diffusers", "sd", "learned_embeds.safetensors", {WORD: "emb_params"}, True),
    ("ComfyUI", "sd", "my-pot.safetensors", {"emb_params": "emb_params"}, True),  # any single key
    ("AUTOMATIC1111", "sd", "my-pot.safetensors", {"emb_params": "emb_params"}, True),
    ("InvokeAI", "sd", "my-pot.safetensors", {"emb_params": "emb_params"}, False),
    ("kohya", "sd", "my-pot.safetensors", {"emb_params": "emb_params"}, True),
]

# LoRA files: the tool, the model, the file, how a layer is called there (MODULE: as in diffusers, with underscores), the
# names of its down and up matrix, where alpha is, and whether a key that fits no layer is an error.
KOHYA = ("lora_unet_MODULE", "lora_down.weight", "lora_up.weight", "alpha")
LORA_READERS = [
    ("diffusers", "sdxl", "pytorch_lora_weights.safetensors", ("unet.MODULE", "lora_A.weight", "lora_B.weight", None), True),
    ("diffusers", "sana", "pytorch_lora_weights.safetensors", ("transformer.MODULE", "lora_A.weight", "lora_B.weight", None), True),
    ("diffusers", "sdxl", "my-pot-lora.safetensors", KOHYA, True),
    ("ComfyUI", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("AUTOMATIC1111", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("Forge", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("InvokeAI", "sdxl", "my-pot-lora.safetensors", KOHYA, True),
    ("SD.Next", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("SD.Next", "sana", "pytorch_lora_weights.safetensors", ("transformer.MODULE", "lora_A.weight", "lora_B.weight", None), True),
    ("Fooocus", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("kohya", "sdxl", "my-pot-lora.safetensors", KOHYA, False),
    ("OneTrainer", "sdxl", "my-pot-lora.safetensors", KOHYA, True),
    ("OneTrainer", "sana", "my-pot-lora.safetensors", KOHYA, True),
    ("diffusers", "sd", "pytorch_lora_weights.safetensors", ("unet.MODULE", "lora_A.weight", "lora_B.weight", None), True),
    ("ComfyUI", "sd", "my-pot-lora.safetensors", KOHYA, False),
    ("AUTOMATIC1111", "sd", "my-pot-lora.safetensors", KOHYA, False),
    ("kohya", "sd", "my-pot-lora.safetensors", KOHYA, False),
    ("InvokeAI", "sd", "my-pot-lora.safetensors", KOHYA, False),
]  # fmt: skip

# Where a tool finds the embedding's word in a prompt: the first group must be the file's name without its suffix, NAME.
WORDS = {
    "ComfyUI": (
        r"(?:^| )embedding:([^ ]+?),*(?= |$)",
        "a photo of embedding:NAME, on grass",
        "a photo of embedding:NAME.",
    ),
    "Fooocus": (r"(?:^| )embedding:([^ ]+?),*(?= |$)", "a photo of embedding:NAME on grass", "a photo of NAME"),
    "InvokeAI": (r"<([a-zA-Z0-9., _-]+)>", "a photo of <NAME>.", "a photo of NAME"),
    "AUTOMATIC1111": (r"\b(?!BREAK\b|AND\b)(NAME)\b", "a photo of NAME.", "a photo of BREAK"),
}

# Placeholders, the name of their files, and what is said of them: the tools that cannot take them.
DIGITS = "-[0-9a-f]{6}"
NAMES = [
    ("<my-dog>", "my-dog", ()),
    ("my-dog", "my-dog", ()),
    ("<my-dog-v1.5>", "my-dog-v1.5", ()),
    ("<dog>", "dog", ("AUTOMATIC1111, Forge and SD.Next replace",)),
    ("<BREAK>", "BREAK", ("AUTOMATIC1111 and Forge read BREAK",)),
    ("<my-AND-dog>", "my-AND-dog", ("AUTOMATIC1111 and Forge read AND",)),
    ("<my+dog>", r"my\+dog", ("InvokeAI",)),
    ("<\u732b-1>", "\u732b-1", ("InvokeAI",)),
    ("<con>", f"con{DIGITS}", ("every system",)),
    ("<NUL>", f"NUL{DIGITS}", ("every system",)),
    ("<com1.5>", f"com1-5{DIGITS}", ("every system",)),
    ("<lpt\u00b9>", f"lpt\u00b9{DIGITS}", ("every system", "InvokeAI")),
    ("<*>", f"word{DIGITS}", ("every system",)),
    ("<..>", f"word{DIGITS}", ("every system",)),
    ("<\U0001f436>", f"word{DIGITS}", ("every system",)),
    ("<my:dog>", f"mydog{DIGITS}", ("every system",)),
    ("<my/dog>", f"mydog{DIGITS}", ("every system",)),
    ("<<my-dog>>", f"my-dog{DIGITS}", ("every system",)),
]

# The modelspec standard 1.0.1: keys that a file of weights must and should have, and those that it can have, with the
# form of their values. `resolution` is for whole models alone.
MODELSPEC = {
    "sai_model_spec": r"1\.0\.[01]",
    "architecture": r"(stable-diffusion-xl-v1-base|stable-diffusion-v1|sana)/(textual-inversion|lora)",
    "implementation": r"diffusers",
    "title": r"my-pot(-lora)?",
    "description": r".*<my-pot>.*",
    "date": r"\d{4}-\d\d-\d\d",
    "hash_sha256": r"0x[0-9a-f]{64}",
    "usage_hint": r".*<my-pot>.*",
    "trigger_phrase": r"<my-pot>",
    "thumbnail": r"data:image/jpeg;base64,[A-Za-z0-9+/=]+",
}


# ----------------------------------------------------------------------------------------------------------------------
# Our files
# ----------------------------------------------------------------------------------------------------------------------


def main_of(family: str, small: Path, out: Path, *flags: str, **options) -> Path:
    """A small run with LoRA, in this process. Returns the output folder."""
    job = {
        "pretrained_model_name_or_path": small / family,
        "instance_data_dir": small / "photos",
        "placeholder_token": WORD,
        "initializer_token": "teapot",
        "num_vectors": 2,
        "output_dir": out,
        "resolution": 64,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "seed": 0,
        "report_to": "none",
        "rank": RANK,
        "lora_alpha": ALPHA,
        "lora_learning_rate": 0.02,
    } | options
    AcceleratorState._reset_state(reset_partial_state=True)
    SCRIPTS[family].main([*flags, *(str(part) for name, x in job.items() for part in (f"--{name}", x))])
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request, small, tmp_path_factory):
    """A run's folder, and that of the same exported to all formats, with the model's family."""
    folder = tmp_path_factory.mktemp(request.param)
    picture = {"validation_prompt": "a photo of {}", "num_validation_images": 1, "validation_inference_steps": 1}
    out = main_of(request.param, small, folder / "run", **picture)
    embedding, lora = read_both(out)
    files = export.embedding_files(embedding, folder / "exported", export.FORMATS)
    files |= export.lora_files(lora, "my-pot", folder / "exported", export.FORMATS)
    export.write_states(files)
    return SimpleNamespace(out=out, exported=folder / "exported", family=request.param, script=SCRIPTS[request.param])


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def read_layers(
    state: dict, naming: tuple, strict: bool, modules: dict[str, torch.nn.Module]
) -> dict[str, torch.Tensor]:
    """What a tool adds to each layer's weight: alpha / rank times up times down, for the layers whose names it finds.

    Asserts what the tool asserts, and that there is nothing in the file that it does not take.
    """
    layer, down_key, up_key, alpha_key = naming
    joint = "_" if layer.startswith("lora_unet_") else "."
    added, taken = {}, set()
    for name, module in modules.items():
        key = layer.replace("MODULE", name.replace(".", joint))
        if f"{key}.{down_key}" not in state:
            continue
        down, up = state[f"{key}.{down_key}"], state[f"{key}.{up_key}"]
        assert down.dtype == up.dtype == torch.float32 and down.shape[0] == up.shape[1]
        assert (up.shape[0], down.shape[1]) == tuple(module.weight.shape)
        alpha = float(ALPHA)  # diffusers': from the header
        if alpha_key:
            assert state[f"{key}.{alpha_key}"].shape == () and state[f"{key}.{alpha_key}"].is_floating_point()
            alpha = state[f"{key}.{alpha_key}"].item()
        added[name] = alpha / len(down) * up @ down
        taken |= {f"{key}.{part}" for part in (down_key, up_key, alpha_key) if part}
    assert set(state) == taken, f"{'refused' if strict else 'silently left out'}: {sorted(set(state) - taken)[:3]}"
    return added


def fused(pipe, **source) -> dict[str, torch.Tensor]:
    """What diffusers' own loader adds to each layer's weight."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    before = {name: x.clone() for name, x in denoiser.state_dict().items()}
    pipe.load_lora_weights(**source)
    pipe.fuse_lora()
    after = {name.replace("base_layer.", ""): x for name, x in denoiser.state_dict().items() if "lora_" not in name}
    added = {
        name.removesuffix(".weight"): after[name] - x for name, x in before.items() if not torch.equal(after[name], x)
    }
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return added


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings
# ----------------------------------------------------------------------------------------------------------------------


def test_every_reader_finds_the_embedding_in_its_file(run):
    rows = read_embedding(run.out).vectors
    wanted = dict(zip(export.WEB_KEYS[run.family], rows.values(), strict=True))
    for tool, family, name, keys, strict in EMBEDDING_READERS:
        for folder in (run.exported, run.out)[: 2 if name.endswith(".safetensors") else 1]:
            if family != run.family:
                continue
            state = state_of(folder / name)
            assert set(keys) == set(state) if strict else set(keys) <= set(state), tool
            for key, encoder in keys.items():
                assert state[key].dtype == torch.float32 and state[key].shape == (2, WIDTHS[encoder]), tool
                assert torch.equal(state[key], wanted[encoder]), tool


def test_no_file_of_ours_is_without_a_reader(run):
    known = {(family, name) for _, family, name, *_ in EMBEDDING_READERS + LORA_READERS}
    for folder in (run.out, run.exported):
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.pt")]:
            assert (run.family, path.name) in known or (path.suffix == ".pt" and run.family != "sdxl"), path


# ----------------------------------------------------------------------------------------------------------------------
# LoRA
# ----------------------------------------------------------------------------------------------------------------------


def test_every_reader_finds_all_of_the_lora_weights_at_full_strength(run, small):
    pipe = PIPELINES[run.family].from_pretrained(small / run.family)
    modules = dict((pipe.transformer if run.family == "sana" else pipe.unet).named_modules())
    source = {"pretrained_model_name_or_path_or_dict": str(run.out)}
    reference = fused(pipe, **source, weight_name="pytorch_lora_weights.safetensors")
    assert (
        len(reference) == len([name for name in modules if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]) > 15
    )
    assert all(x.abs().max() > 1e-4 for x in reference.values())
    for tool, family, name, naming, strict in LORA_READERS:
        for folder in (run.out, run.exported) if family == run.family else ():
            added = read_layers(state_of(folder / name), naming, strict, modules)
            assert added.keys() == reference.keys(), tool
            for layer, x in added.items():
                torch.testing.assert_close(x, reference[layer], rtol=1e-4, atol=2e-7, msg=f"{tool}: {layer}")
    if run.family != "sana":  # diffusers reads kohya's naming too, by its own conversion
        converted = fused(pipe, **source, weight_name="my-pot-lora.safetensors")
        assert converted.keys() == reference.keys()
        for layer, x in reference.items():
            torch.testing.assert_close(converted[layer], x, rtol=1e-4, atol=2e-7)


def test_the_run_and_export_write_the_same_files(run):
    for path in run.exported.glob("*.safetensors"):
        ours, theirs = load_file(run.out / path.name), load_file(path)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items()), path.name
        assert metadata_of(run.out / path.name) == metadata_of(path), path.name


def test_all_560_layers_of_sdxl_have_the_names_that_the_tools_know():
    cls, config = benchmark.parts_of("sdxl")["unet"]
    with torch.device("meta"):
        unet = cls.from_config(config)
    layers = {n: m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert len(layers) == 560
    parts = {"lora_A": lambda m: torch.zeros(2, m.in_features), "lora_B": lambda m: torch.zeros(m.out_features, 2)}
    state = {f"unet.{n}.{part}.weight": make(m) for n, m in layers.items() for part, make in parts.items()}
    kohya = export.to_kohya(state, {"unet.lora_alpha": 1})
    assert len(kohya) == 3 * 560
    # AUTOMATIC1111's, InvokeAI's and kohya's names of a block follow from these.
    blocks = r"(down_blocks_[12]_attentions_[01]|mid_block_attentions_0|up_blocks_[01]_attentions_[012])"
    layer = rf"lora_unet_{blocks}_transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)"
    assert all(re.fullmatch(rf"{layer}\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in kohya)
    # InvokeAI knows SDXL's weights by this width.
    assert {kohya[key].shape[1] for key in kohya if re.search("attn2_to_[kv].lora_down", key)} == {2048}
    # diffusers' own conversion gives the same names, but the rank for alpha.
    theirs = convert_state_dict_to_kohya(state)
    assert theirs.keys() == kohya.keys() and {theirs[key].item() for key in theirs if key.endswith("alpha")} == {2}


@pytest.mark.parametrize(
    "config, alphas",
    [
        ({}, {4.0}),  # nothing told: diffusers takes the rank
        ({"unet.lora_alpha": 6}, {6.0}),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, {12.0}),  # alpha / sqrt(r), and the tools divide by r
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_k": 1, "mid_block.*to_q": 2}}, {6.0, 1.0, 2.0}),
    ],
)
def test_alpha_is_what_diffusers_makes_of_the_header(small, tmp_path, config, alphas):
    """Also for files of other trainers, held against diffusers' fused weights."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionXLPipeline.from_pretrained(small / "sdxl")
    own = {key.removeprefix("unet."): x for key, x in config.items()}
    targets = ["to_q", "to_k", "ff.net.0.proj", "conv1", "time_emb_proj"]
    pipe.unet.add_adapter(LoraConfig(r=4, **{"lora_alpha": 4} | own, target_modules=targets, init_lora_weights=False))
    layers = {"unet_lora_layers": get_peft_model_state_dict(pipe.unet)}
    if config:
        layers["unet_lora_adapter_metadata"] = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **layers)
    pipe.unload_lora_weights()
    reference = fused(pipe, pretrained_model_name_or_path_or_dict=str(tmp_path), weight_name=export.LORA_FILE)
    lora = read_lora(tmp_path / export.LORA_FILE)
    assert set(lora.alphas) == alphas
    # The tools' arithmetic. (diffusers reads this file's alphas right only where they are all the same.)
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in reference}
    assert lora.layers.keys() == names.keys()
    for key, rank in lora.layers.items():
        down, up, alpha = (lora.kohya[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        added = (alpha / rank * up.flatten(1) @ down.flatten(1)).view_as(reference[names[key]])
        torch.testing.assert_close(added, reference[names[key]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width, family, prefix, version", [
    (768, "sd", "lora_te", "sd_v1"), (1024, "sd", "lora_te", "sd_v2"), (2048, "sdxl", "lora_te1", "sdxl_base_v1-0"),
])  # fmt: skip
def test_other_peoples_lora_weights_are_told_apart_by_the_text_embeddings_width(
    tmp_path, width, family, prefix, version
):
    layers = {"unet.mid_block.x.attn2.to_k": (width, 8), "text_encoder.text_model.y": (8, 8)}
    state = {f"{n}.lora_A.weight": torch.ones(2, a) for n, (a, b) in layers.items()}
    state |= {f"{n}.lora_B.weight": torch.ones(b, 2) for n, (a, b) in layers.items()}
    save_file(state, tmp_path / export.LORA_FILE)
    lora = read_lora(tmp_path / export.LORA_FILE)
    assert lora.family == family and set(lora.layers) == {"lora_unet_mid_block_x_attn2_to_k", f"{prefix}_text_model_y"}
    told = export.kohya_header(lora, "name")
    assert told["ss_base_model_version"] == version and told["ss_v2"] == str(width == 1024)
    assert "modelspec.trigger_phrase" not in told  # nobody knows it


# ----------------------------------------------------------------------------------------------------------------------
# export.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs export.py in this process and returns standard output, standard error and the status."""

    def execute(*argv) -> tuple[str, str, int]:
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, argv)])
        status, said = 0, ""
        try:
            export.run(export.main)
        except SystemExit as error:
            status, said = (1, error.code) if isinstance(error.code, str) else (error.code, "")
        captured = capsys.readouterr()
        return captured.out, captured.err + said, status

    return execute


@pytest.fixture
def both(tmp_path) -> Path:
    """A folder with an embedding and LoRA weights for SDXL, of two layers."""
    vectors = {"text_encoder": torch.randn(2, 32), "text_encoder_2": torch.randn(2, 48)}
    write_embedding(Embedding("<my-dog>", vectors), tmp_path / "my-dog")
    state = {}
    for layer in ("mid_block.attentions.0.proj_in", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"):
        state |= {f"unet.{layer}.lora_A.weight": torch.randn(4, 8), f"unet.{layer}.lora_B.weight": torch.randn(8, 4)}
    told = json.dumps({"unet.r": 4, "unet.lora_alpha": 2.0})
    save_file(state, tmp_path / "my-dog" / export.LORA_FILE, {"format": "pt", "lora_adapter_metadata": told})
    return tmp_path / "my-dog"


def test_export_says_what_it_did_with_the_lora_weights(call, both, tmp_path):
    out, err, status = call(both, "--output_dir", tmp_path / "a", "--format", "web", "bin")
    assert status == 0 and "LoRA: sdxl, 2 layers, rank 4, alpha 2\n" in out
    assert "my-dog-lora.safetensors  (LoRA for ComfyUI" in out and "<lora:my-dog-lora:1>" in out
    assert err == "Note: the bin format has no LoRA weights, so they are not written in it.\n"
    files = {"my-dog.safetensors", "my-dog-lora.safetensors", "learned_embeds.bin", "learned_embeds_2.bin"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files

    # The LoRA weights' file alone, and kohya's naming as the input.
    out, err, status = call(both / export.LORA_FILE, "--output_dir", tmp_path / "b")
    assert status == 0 and not err and "pytorch_lora_weights.safetensors  (diffusers: pipe.load_lora_weights)" in out
    assert {path.name for path in (tmp_path / "b").iterdir()} == {export.LORA_FILE, "my-dog-lora.safetensors"}
    out, err, status = call(tmp_path / "a" / "my-dog-lora.safetensors", "--output_dir", tmp_path / "c")
    assert status == 0 and "pipe.load_lora_weights reads the original file" in err
    kept = [load_file(tmp_path / folder / "my-dog-lora.safetensors") for folder in "abc"]
    assert all(x.keys() == kept[0].keys() and all(torch.equal(x[k], kept[0][k]) for k in x) for x in kept)
    _, err, status = call(both / export.LORA_FILE, "--output_dir", tmp_path / "d", "--format", "bin")
    assert status == 1 and "There is nothing to write: the bin format has no LoRA weights" in err


def test_a_bundle_is_what_automatic1111_and_sdnext_take_apart(call, both, tmp_path):
    out, err, status = call(both, "--output_dir", tmp_path / "out", "--format", "bundle")
    assert (
        status == 0 and not err and "my-dog-bundle.safetensors  (AUTOMATIC1111, SD.Next: <lora:my-dog-bundle:1>" in out
    )
    (path,) = (tmp_path / "out").iterdir()
    embeddings, layers = {}, {}
    for key, x in load_file(path).items():
        if key.startswith("bundle_emb."):
            _, name, vectors = key.split(".")
            embeddings.setdefault(name, {})[vectors] = x
        else:
            layers[key] = x
    web = load_file(both / "my-dog.safetensors")
    assert embeddings.keys() == {"my-dog"} and embeddings["my-dog"].keys() == web.keys() == {"clip_l", "clip_g"}
    assert all(torch.equal(embeddings["my-dog"][key], x) for key, x in web.items())
    assert layers.keys() == read_lora(both / export.LORA_FILE).kohya.keys()
    assert metadata_of(path)["ss_base_model_version"] == "sdxl_base_v1-0"

    # It is read again, as what it holds.
    embedding, lora = read_both(path)
    assert embedding.token == "<my-dog>" and torch.equal(embedding.vectors["text_encoder"], web["clip_l"])
    assert lora.alphas == [2.0] and lora.layers.keys() == read_lora(both / export.LORA_FILE).layers.keys()
    assert export.header(embedding)["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert not [key for key in embedding.metadata if key.startswith("ss_")]
    assert read_embedding(tmp_path / "out").token == "<my-dog>"  # the folder's only file


def test_a_renamed_export_is_renamed_throughout(call, both, tmp_path):
    call(both, "--output_dir", tmp_path / "a", "--format", "diffusers", "web")
    _, _, status = call(
        tmp_path / "a", "--output_dir", tmp_path / "b", "--format", "web", "bundle", "--token", "<my-rex>"
    )
    assert status == 0
    names = {"my-rex.safetensors", "my-rex-lora.safetensors", "my-rex-bundle.safetensors"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == names
    for name in names:
        told = metadata_of(tmp_path / "b" / name)
        assert told["modelspec.trigger_phrase"] == "<my-rex>" and told["modelspec.title"].startswith("my-rex")
        assert not [x for x in told.values() if "my-dog" in x]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{both}/learned_embeds.safetensors", "--format", "bundle"], "has no LoRA weights. Give a folder with"),
        (["{both}/pytorch_lora_weights.safetensors", "--format", "bundle"], "has no embedding. Give a folder"),
        (["{both}", "--format", "bundle", "--token", "<my.dog>"], "must not contain a full stop: add --token '<my-dog>'"),
        (["{both}", "--token", "<pytorch_lora_weights>"], "'<pytorch_lora_weights>' cannot name a file"),
        (["{old}"], "unknown naming, such as unet.x.to_q.lora.down.weight: load it with diffusers and"),
        (["{hada}"], "unknown naming, such as "),
        (["{half}"], "half.safetensors is damaged: lora_unet_mid_block_x lacks a matrix, or has one that is not finite"),
        (["{nan}"], "nan.safetensors is damaged: lora_unet_mid_block_x lacks a matrix, or has one that is not finite"),
        (["{sana}", "--format", "bundle"], "no tool reads a bundle for SANA"),
        (["{mixed}"], "has an embedding for sana and LoRA weights for sdxl"),
        (["{header}"], "lora_adapter_metadata in its header is damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_ends_in_one_line(call, both, tmp_path, argv, message):
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    files = {
        "old": {"unet.x.to_q.lora.down.weight": down, "unet.x.to_q.lora.up.weight": up},
        "hada": {"lora_unet_x.hada_w1_a": up, "unet.x.lora_A.weight": down},
        "half": {"lora_unet_mid_block_x.lora_down.weight": down},
        "nan": {"unet.mid_block.x.lora_A.weight": down * torch.nan, "unet.mid_block.x.lora_B.weight": up},
        "header": {"unet.mid_block.x.lora_A.weight": down, "unet.mid_block.x.lora_B.weight": up},
    }
    for name, state in files.items():
        told = {"lora_adapter_metadata": "[1"} if name == "header" else None
        save_file(state, tmp_path / f"{name}.safetensors", told)
    for name, part in (("sana", "transformer.transformer_blocks.0.x"), ("mixed", "unet.mid_block.x")):
        write_embedding(Embedding("<my-dog>", {"text_encoder": torch.ones(1, 8)}), tmp_path / name)
        state = {f"{part}.lora_A.weight": down, f"{part}.lora_B.weight": up}
        save_file(state, tmp_path / name / export.LORA_FILE)
    paths = {name: tmp_path / f"{name}.safetensors" for name in files}
    paths |= {"both": both, "sana": tmp_path / "sana", "mixed": tmp_path / "mixed"}
    _, err, status = call(*(x.format(**paths) for x in argv), "--output_dir", tmp_path / "out")
    assert status == 1 and message in err and "\n" not in err
    assert not (tmp_path / "out").exists()


def test_lora_weights_in_the_place_of_an_embedding_are_called_so(both, call, tmp_path):
    """Never a dump of keys."""
    for path in (both / export.LORA_FILE, tmp_path / "lora.pt"):
        torch.save(load_file(both / export.LORA_FILE), tmp_path / "lora.pt")
        with pytest.raises(
            EmbeddingError, match="holds LoRA weights, not an embedding: give the folder or file of the em"
        ):
            read_embedding(path)


def test_alpha_in_the_header_counts_where_the_file_is_there(call, both, tmp_path):
    """The same matrices with another alpha are another LoRA."""
    assert call(both, "--output_dir", tmp_path / "out")[2] == 0
    state = load_file(both / export.LORA_FILE)
    save_file(state, both / export.LORA_FILE, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})})
    _, err, status = call(both, "--output_dir", tmp_path / "out", "--format", "diffusers")
    assert status == 1 and "exists with other content" in err


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placeholder, name, tools", NAMES, ids=[ascii(x[0]) for x in NAMES])
def test_a_file_has_one_name_that_every_system_takes(placeholder, name, tools):
    found = web_name(placeholder)
    assert re.fullmatch(name, found) and re.fullmatch(r"[\w.+-]+", found) and not found.endswith(".")
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])(\..*)?", found)
    assert train_dti_sdxl.web_name(placeholder) == found
    notes = export.name_notes(placeholder, "sdxl")
    assert len(notes) == len(tools) and all(tool in note for tool, note in zip(tools, notes, strict=True))
    for note in notes:  # what is proposed has no such trouble
        better = re.search(r"(<\S+>) avoids this", note)[1]
        assert better != placeholder and not export.name_notes(better, "sdxl")
    if not tools:
        for tool, (pattern, right, wrong) in WORDS.items():
            assert re.findall(pattern.replace("NAME", re.escape(found)), right.replace("NAME", found)) == [found], tool
            assert found not in re.findall(pattern.replace("NAME", re.escape(found)), wrong.replace("NAME", found)), (
                tool
            )
    assert export.name_notes(placeholder, "sd") == notes
    # SANA's files have one reader, which takes any word.
    assert len(export.name_notes(placeholder, "sana")) == ("every system" in tools)


def test_no_two_words_share_a_file():
    placeholders = [placeholder for placeholder, *_ in NAMES if placeholder != "my-dog"]  # the same word as <my-dog>
    assert len({web_name(placeholder).lower() for placeholder in placeholders}) == len(placeholders)


def test_the_training_warns_before_any_weight_loads_and_proposes_a_word(options, monkeypatch, caplog, tmp_path):
    class Loaded(Exception):
        pass

    def stop(*args):
        raise Loaded

    monkeypatch.setattr(train_dti_sdxl, "check_images", stop)
    for placeholder, note in (("<Nul>", "every system"), ("<rex>", 'replace every "rex"'), ("<my-rex>", None)):
        AcceleratorState._reset_state(reset_partial_state=True)
        caplog.clear()
        with pytest.raises(Loaded):
            train_dti_sdxl.main(options(placeholder_token=placeholder, initializer_token="teapot"))
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        if note:
            assert len(warnings) == 1 and note in warnings[0] and "<my-teapot> avoids this" in warnings[0]
        else:
            assert not warnings


# ----------------------------------------------------------------------------------------------------------------------
# Metadata
# ----------------------------------------------------------------------------------------------------------------------


def test_all_files_have_the_standards_metadata(run, small):
    for path in run.out.glob("*.safetensors"):
        told = {
            key.removeprefix("modelspec."): x for key, x in metadata_of(path).items() if key.startswith("modelspec.")
        }
        assert told.keys() == MODELSPEC.keys(), path.name
        for key, pattern in MODELSPEC.items():
            assert re.fullmatch(pattern, told[key]), (path.name, key, told[key][:100])
        assert told["architecture"].endswith("/lora") == ("lora" in path.name)
        assert told["title"].endswith("-lora") == ("lora" in path.name)
        content = path.read_bytes()  # 8 bytes, that many bytes of header, the tensors
        tensors = content[8 + int.from_bytes(content[:8], "little") :]
        assert told["hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
        picture = Image.open(io.BytesIO(base64.b64decode(told["thumbnail"].partition(",")[2])))
        assert picture.format == "JPEG" and max(picture.size) <= 256
        assert f"{run.family}," in told["description"]  # the model's name, and of its folder no more
        assert not [x for x in metadata_of(path).values() if "/" in x and str(small) in x]


def test_the_thumbnail_is_the_last_validation_picture(run):
    whole = Image.open(next(run.out.glob("validation-*.png"))).convert("RGB")
    content = metadata_of(run.out / "my-pot.safetensors")["modelspec.thumbnail"].partition(",")[2]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
    # Below its label, and enlarged.
    picture = whole.crop((0, whole.height - 192, 192, whole.height)).resize((64, 64), Image.Resampling.NEAREST)
    pixels = [torch.tensor(list(x.tobytes())).float() for x in (picture, thumbnail)]
    assert torch.corrcoef(torch.stack(pixels))[0, 1] > 0.7  # noise does not pass JPEG unharmed


def test_tools_that_go_by_kohyas_own_metadata_know_the_model(run):
    told = metadata_of(run.out / "my-pot-lora.safetensors")
    if run.family == "sana":
        assert not [key for key in told if key.startswith("ss_")]
        return
    # AUTOMATIC1111 takes a file with metadata but without this for Stable Diffusion 1's, and does not offer it.
    assert told["ss_base_model_version"].startswith("sdxl_" if run.family == "sdxl" else "sd_v1")
    assert told["ss_v2"] == "False"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == (str(RANK), f"{ALPHA:g}")
    assert "lora_adapter_metadata" not in told  # diffusers refuses it beside alphas


def test_a_picture_of_other_vectors_is_not_kept():
    embedding = Embedding(
        "<x>", {"text_encoder": torch.ones(1, 8)}, {"modelspec.thumbnail": "data:", "dti.steps": "5"}
    )
    assert export.changed(embedding, embedding.vectors, **{"a": "b"}).metadata == {"dti.steps": "5", "a": "b"}
