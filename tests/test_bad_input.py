"""Every mistake that a user can make ends in one clear line, with exit status not 0, before any weight loads.

BAD_INPUT.md shows them all. `python tests/test_bad_input.py` writes it, from what the scripts say.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import train_dti_sana
import train_dti_sdxl as script


TABLE = Path(__file__).with_name("BAD_INPUT.md")
INTRODUCTION = """# Bad input, and what the training scripts say

The README's job with one change each, and the line that ends it, always before any weight is loaded. The line begins with
the script's name and `error:`. `...` stands for a folder, for the rest of a long text, and for a library's own words.

Written by `python tests/test_bad_input.py`; the tests hold it up to date.
"""


@pytest.fixture
def bad(small, tmp_path, monkeypatch):
    """Makes the bad folders and files that the cases below name."""

    def path(name: str):
        target = tmp_path / name
        if name == "empty":
            target.mkdir()
        elif name == "photos":
            shutil.copytree(small / "photos", target, dirs_exist_ok=True)
        elif name == "truncated":
            target.mkdir()
            noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
            Image.fromarray(noise).save(target / "dog.jpg")
            (target / "dog.jpg").write_bytes((target / "dog.jpg").read_bytes()[:9000])
        elif name == "float":
            target.mkdir()
            Image.new("F", (80, 80)).save(target / "depth.tif")
        elif name == "postscript":
            target.mkdir()
            Image.new("RGB", (80, 80)).save(target / "dog.jpg", "EPS")
        elif name == "text":
            target.mkdir()
            (target / "dog.jpg").write_text("not a picture")
        elif name == "heif":
            target.mkdir()
            (target / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
            Image.init()
            monkeypatch.delitem(Image.EXTENSION, ".heic")  # as it is where pillow-heif is not installed
        elif name in CAPTIONS:
            shutil.copytree(small / "photos", target)
            (target / "metadata.jsonl").write_text(CAPTIONS[name])
        elif name in TEXTS:
            shutil.copytree(small / "photos", target)
            for file, text in TEXTS[name].items():
                (target / file).write_bytes(text.encode("utf-16" if name == "utf16" else "utf-8"))
        elif name.endswith("masks"):
            for photo in target.mkdir() or sorted((small / "photos").iterdir()):
                size = (90, 30) if name == "wide_masks" else Image.open(photo).size
                mask = Image.new("L", size, 255 * (name == "white_masks"))
                mask.paste(255 * (name != "black_masks"), (9, 9, 30, 30))
                if name == "alpha_masks":
                    mask.putalpha(mask.copy())
                mask.save(target / f"{'mask-' * (name == 'other_masks')}{photo.name}")
        elif name == "latin1_name":
            shutil.copytree(small / "photos", target)
            os.rename(target / "00.png", os.fsencode(target) + b"/caf\xe9.png")
        elif name in DATA_SETS:
            images = {"image": datasets.Image(), "text": datasets.Value("string")}
            columns = {"image": datasets.Value("int64")} if name == "numbers_only" else images
            data = {column: [row[i] for row in DATA_SETS[name]] for i, column in enumerate(columns)}
            datasets.Dataset.from_dict(data, features=datasets.Features(columns)).to_parquet(target / "train.parquet")
        elif name == "file":
            target.write_text("")
        elif name == "templates":
            target.write_text("a photo of it\n")
        elif name in CONFIGS:
            target.write_text(CONFIGS[name])
        elif name in EMBEDDINGS:
            save_file(EMBEDDINGS[name], target)
        elif name in ("sana", "inpaint", "predicts_sample", "no_encoder"):
            shutil.copytree(small / "sdxl", target)
            index, scheduler = target / "model_index.json", target / "scheduler" / "scheduler_config.json"
            if name == "predicts_sample":
                scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"sample"'))
            elif name == "no_encoder":
                shutil.rmtree(target / "tokenizer_2")
            else:
                cls = {"sana": "SanaPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"}[name]
                index.write_text(index.read_text().replace("StableDiffusionXLPipeline", cls))
        elif name in SINGLE_FILES:
            target = tmp_path / f"{name}.safetensors"
            save_file(
                {key: torch.ones(2, 9 if name == "inpaint_file" else 4, 3, 3) for key in SINGLE_FILES[name]}, target
            )
        elif name == "only_fp16":
            shutil.copytree(small / "sdxl", target)
            weights = target / "unet" / "diffusion_pytorch_model.safetensors"
            weights.rename(weights.with_suffix(".fp16.safetensors"))
        elif name in PARTS:
            shutil.copytree(small / PARTS[name][0], target)
            config = target / PARTS[name][1]
            config.write_text(json.dumps(json.loads(config.read_text()) | PARTS[name][2]))
        elif name in ("nothing_in_it", "checkpoint-5"):
            target.mkdir()
        elif name == "checkpoint-6":
            target.mkdir()
            save_file({"parameter.0": torch.ones(1, 32)}, target / "state.safetensors")
            identity = {"model": "sdxl", "vectors": 1, "magnitude": "mean", "optimizer": "rsgd", "init": "token"}
            identity |= {"kappa": 1e-4, "reg_weight": 0.0, "seed": 0, "placeholder_token": "<her-pot>"}
            identity |= {"rank": 0, "lora_alpha": None, "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
            (target / "state.json").write_text(json.dumps({"step": 6, "written": 1, "identity": identity}))
        return target

    return path


def captions(caption: object = "a {}", count: int = 5, column: str = "text") -> str:
    return "\n".join(json.dumps({"file_name": f"{i:02d}.png", column: caption}) for i in range(count))


CAPTIONS = {
    "no_word": captions("a dog"),
    "captioned": captions(),
    "long": captions("very " * 100 + "{}"),
    "other_column": captions(column="caption"),
    "row_missing": captions(count=4),
    "half_a_character": captions("a {} \ud800"),
    "no_rows": "[1, 2]\n",
    "not_json": "file_name\ttext\n",
}
CAPTIONS |= {
    "null": captions(None),
    "twice": f"{captions()}\n{captions().splitlines()[-1]}",
    "no_name": captions().replace('"00.png"', "null"),
}
TEXTS = {
    "class_word": {f"{i:02d}.txt": "a teapot on a table" for i in range(5)},
    "no_text": {f"{i:02d}.txt": "a {}" * (i != 1) for i in range(5)} | {"00.txt": "{}"},
    "one_text": {"01.txt": "a {}"},
    "utf16": {f"{i:02d}.txt": "a {}" for i in range(5)},
    "commas": {"metadata.csv": "file_name,text\n00.png,a {}, asleep\n"},
}
PICTURE = Image.new("RGB", (80, 80))
DATA_SETS = {
    "images_and_text": [(PICTURE, "a {}")],
    "numbers_only": [(1,)],
    "image_missing": [(PICTURE, "a {}"), (None, "a {}")],
    "caption_missing": [(PICTURE, "a {}"), (PICTURE, None)],
    "empty_set": [],
}
EMBEDDINGS = {
    "wide": {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
    "two_vectors": {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)},
    "uneven": {"clip_l": torch.ones(1, 32), "clip_g": torch.ones(2, 48)},
    "nan": {"clip_l": torch.ones(1, 32), "clip_g": torch.full((1, 48), float("nan"))},
    "integers": {"clip_l": torch.ones(1, 32, dtype=torch.int64), "clip_g": torch.ones(1, 48)},
    "other_keys": {"a": torch.ones(1, 32), "b": torch.ones(1, 48)},
    "many_keys": {f"block.{index}": torch.ones(1, 32) for index in range(100)},
    "lora": {f"unet.x.to_{q}.lora_{a}.weight": torch.ones(2, 2) for q in "qkv" for a in "AB"},
}

SCHEDULER = "scheduler/scheduler_config.json"
PARTS = {  # of models that are loaded by the same pipeline: the small one, the file, and what it says there
    "playground": ("sdxl", SCHEDULER, {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}),
    "cosxl": ("sdxl", SCHEDULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "flow": ("sdxl", SCHEDULER, {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}),
    "lcm": ("sdxl", "unet/config.json", {"time_cond_proj_dim": 256}),
    "rescaled": ("sdxl", SCHEDULER, {"rescale_betas_zero_snr": True}),
    "no_flow": ("sana", SCHEDULER, {"use_flow_sigmas": False}),
    "sprint": ("sana", "transformer/config.json", {"guidance_embeds": True}),
}
PREFIXES = ("first_stage_model.x", "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")
PREFIXES += ("model.diffusion_model.input_blocks.0.0.weight",)
SINGLE_FILES = {  # the names of what is in them
    "unet_only": PREFIXES[-1:],
    "edm_file": (*PREFIXES, "edm_mean"),
    "inpaint_file": PREFIXES,
    "whole_file": PREFIXES,
}
CONFIGS = {
    "unknown.toml": "learningrate = 0.1\n",
    "list.toml": "kappa = [0, 1]\n",
    "sections.toml": "[method]\nkappa = 0\n[rest]\nkappa = 1\n",
    "negative.toml": "kappa = -1\n",
    "idle.toml": "lora_dropout = 0.1\n",
    "two_spellings.yaml": "instance_data_dir: a\ntrain_data_dir: b\n",
    "twice.json": '{"kappa": 0, "kappa": 1}',
    "words.yaml": "just words\n",
    "options.txt": "--kappa 0\n",
}

# What is changed in the small job (a value beginning with @ names one of the paths above), and what the message says.
CASES = [
    ({"instance_data_dir": "@none"}, "--instance_data_dir .*none does not exist"),
    ({"instance_data_dir": "@file"}, "--instance_data_dir .*file is not a folder"),
    ({"instance_data_dir": "@empty"}, "--instance_data_dir .*empty holds no images"),
    ({"instance_data_dir": "@truncated"}, "dog.jpg is damaged"),
    ({"instance_data_dir": "@text"}, "dog.jpg is damaged or not an image"),
    ({"instance_data_dir": "@heif"}, "holds only images in formats that are not installed: .* 'pillow-heif'"),
    ({"instance_data_dir": "@float"}, "depth.tif has floating-point pixels"),
    ({"instance_data_dir": "@postscript"}, "dog.jpg is PostScript"),
    ({"instance_data_dir": None}, "Give either --instance_data_dir or --dataset_name"),
    ({"dataset_name": "some/set"}, "Give either --instance_data_dir or --dataset_name"),
    ({"instance_data_dir": "@no_word"}, "caption 'a dog' has neither {} nor '<my-pot>'"),
    ({"instance_data_dir": "@class_word"}, "None has. Where they say 'teapot', write {} instead, by: perl -pi -e"),
    ({"instance_data_dir": "@null"}, "metadata.jsonl, row 1: the caption is None, which is not text"),
    ({"instance_data_dir": "@no_text"}, "01.txt: the caption is empty"),
    ({"instance_data_dir": "@one_text"}, "00.png has no caption, and others have: write 00.txt, or add --no_captions"),
    ({"instance_data_dir": "@utf16"}, "00.txt cannot be read as text in UTF-8"),
    ({"instance_data_dir": "@twice"}, "row 6: '04.png' is there a second time, after .*, row 5"),
    ({"instance_data_dir": "@no_name"}, "row 1: the file_name is None"),
    ({"instance_data_dir": "@commas"}, "row 1 has more cells than the file has columns"),
    ({"caption_extension": ".tags"}, "--caption_extension .tags: .* has no captions, such as 00.tags"),
    ({"caption_extension": "a/b"}, "--caption_extension: 'a/b' is not the ending of a file's name, such as .txt"),
    (
        {"caption_extension": ".txt", "prompt_templates": "x"},
        "--caption_extension and --prompt_templates both say what",
    ),
    (
        {"instance_data_dir": None, "dataset_name": "@images_and_text", "caption_extension": ".txt"},
        "--caption_extension is for --instance_data_dir",
    ),
    ({"instance_data_dir": "@long"}, "the new word is not among them"),
    ({"caption_column": "text"}, "--caption_column text: .* has no metadata"),
    ({"mask_dir": "@masks", "alpha_mask": True}, "--mask_dir and --alpha_mask both say where the masks are"),
    ({"mask_background": 0.2}, "--mask_background 0.2 needs masks"),
    ({"mask_dir": "@masks", "mask_background": 1}, "--mask_background 1 must be below 1"),
    ({"mask_dir": "@none"}, "--mask_dir .*none does not exist"),
    ({"mask_dir": "@other_masks"}, "--mask_dir .* has no mask named as a photograph, such as 00.png"),
    ({"mask_dir": "@black_masks"}, "00.png shows no subject: its mask is black everywhere"),
    ({"mask_dir": "@white_masks"}, "the masks are white everywhere and would change nothing"),
    ({"mask_dir": "@wide_masks"}, "00.png is 90 x 30, which is not the shape of the photograph"),
    ({"mask_dir": "@alpha_masks"}, "00.png has transparent parts: a mask is grey"),
    ({"instance_data_dir": "@photos", "mask_dir": "@photos"}, "--mask_dir .*photos is the photographs' folder"),
    ({"alpha_mask": True}, "--alpha_mask: the masks are white everywhere"),
    (
        {"instance_data_dir": None, "dataset_name": "@images_and_text", "mask_dir": "@masks"},
        "--mask_dir is for --instance_data_dir",
    ),
    ({"further_word": "<my-toy>"}, "--further_word '<my-toy>' is not WORD=CLASS"),
    ({"further_word": "<my-toy>=toy"}, "--further_word '<my-toy>=toy' needs captions"),
    ({"further_word": "<hub>=toy"}, "--further_word '<hub>=toy': --output_dir has a folder hub of its own"),
    ({"further_word": "my-pot=toy"}, "--further_word 'my-pot=toy': another new word has the same file name"),
    ({"further_word": "<my-pot>2=toy"}, "--further_word: '<my-pot>' is a part of '<my-pot>2'"),
    ({"further_word": "<my-toy>=toy", "init_embedding": "@none"}, "--init_embedding is for one word"),
    (
        {"instance_data_dir": "@captioned", "further_word": "<my-toy>=toy"},
        "--further_word '<my-toy>': no caption names it",
    ),
    ({"prompt_templates": "@templates"}, "--prompt_templates .* 'a photo of it' has no {}"),
    ({"placeholder_token": ""}, "--placeholder_token '' is empty"),
    ({"placeholder_token": "my pot"}, "--placeholder_token 'my pot' has spaces.*'my-pot'"),
    ({"placeholder_token": "teapot"}, "--placeholder_token 'teapot': 'teapot' is in the vocabulary: choose another"),
    ({"placeholder_token": "<learned_embeds>"}, "--placeholder_token .*learned_embeds.safetensors"),
    ({"placeholder_token": "<pytorch_lora_weights>"}, "the file pytorch_lora_weights.safetensors is diffusers'"),
    ({"initializer_token": ""}, "--initializer_token '' has no tokens"),
    ({"initializer_token": "茶壺"}, "--initializer_token '茶壺' is not in the vocabulary"),
    ({"initializer_token": "茶壺", "num_vectors": 2}, "--initializer_token '茶壺' is not in the vocabulary"),
    ({"initializer_token": None}, "Give --initializer_token .* or --init_embedding"),
    ({"initializer_token": None, "init": "contextual"}, "Give --initializer_token"),
    ({"num_vectors": 0}, "--num_vectors: '0' is not an integer of at least 1"),
    ({"num_vectors": 90}, "90 vectors do not fit the 75 tokens that the encoders read"),
    ({"num_vectors": 73}, "shorten it \\(or --num_vectors, now 73\\)"),
    ({"num_vectors": 10**10}, "--num_vectors: '10000000000' is not .* of at least 1 and at most 4294967295"),
    ({"num_vectors": 1.5}, "--num_vectors: '1.5' is not an integer"),
    ({"rank": -1}, "--rank: '-1' is not an integer of at least 0"),
    ({"rank": 4, "lora_dropout": 1}, "--lora_dropout 1 must be below 1"),
    ({"rank": 4, "lora_start_step": 100}, "--lora_start_step 100 leaves no step for the adapters"),
    ({"rank": 4, "lora_target_modules": "to_z"}, "--lora_target_modules to_z: the model has no such layers"),
    ({"rank": 4, "lora_target_modules": "norm1"}, "ones that take no adapter"),
    ({"rank": 4, "lora_target_modules": "to_q,,to_k"}, "is not a list of names separated by commas"),
    ({"learning_rate": -1}, "--learning_rate: '-1' is not a number above 0"),
    ({"learning_rate": "nan"}, "--learning_rate: 'nan' is not a number above 0"),
    ({"kappa": -1e-4}, "--kappa: '-0.0001' is not a number of at least 0"),
    ({"kappa": 1e-4, "magnitude": "free", "optimizer": "adamw"}, "--kappa 0.0001 .* --magnitude free has none"),
    ({"magnitude": "median"}, "--magnitude: 'median' is not mean, a multiple such as 2mean"),
    ({"magnitude": 0}, "--magnitude: '0' is not mean, a multiple such as 2mean"),
    ({"magnitude": "free"}, "--optimizer rsgd .* add --optimizer adamw"),
    ({"resolution": 100}, "--resolution 100 is not a multiple of 8: try 96"),
    ({"max_train_steps": 0}, "--max_train_steps: '0' is not an integer of at least 1"),
    ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
    ({"use_ema": "yes"}, "unrecognized arguments: --use_ema"),
    ({"preset": "fast", "optimizer": "adamw"}, "--preset fast has a learning rate for --optimizer rsgd"),
    ({"validation_prompt": "a dog"}, "--validation_prompt 'a dog' has neither {} nor '<my-pot>'"),
    ({"pretrained_model_name_or_path": "@none"}, "--pretrained_model_name_or_path .*none"),
    ({"pretrained_model_name_or_path": "@file"}, "is a file: give a .safetensors file or the folder"),
    ({"pretrained_model_name_or_path": "@unet_only"}, "unet_only.safetensors has no VAE of SDXL's in it"),
    ({"pretrained_model_name_or_path": "@edm_file"}, "edm_file.safetensors is an EDM model"),
    ({"pretrained_model_name_or_path": "@inpaint_file"}, "inpaint_file.safetensors is an inpainting or editing model"),
    (
        {"pretrained_model_name_or_path": "@whole_file", "variant": "fp16"},
        "--variant fp16 has no effect on a single file: leave it out",
    ),
    ({"single_file_config": "@none"}, "--single_file_config .*none has no effect without a file: leave it out"),
    ({"pretrained_model_name_or_path": "@nothing_in_it"}, "has no model_index.json"),
    ({"pretrained_model_name_or_path": "@sana"}, "is a SanaPipeline; .* use train_dti_sana.py"),
    ({"pretrained_model_name_or_path": "@inpaint"}, "is a StableDiffusionXLInpaintPipeline"),
    ({"pretrained_model_name_or_path": "@predicts_sample"}, "predicts 'sample'"),
    ({"pretrained_model_name_or_path": "@no_encoder"}, "is not complete"),
    ({"pretrained_model_name_or_path": "@playground"}, "is sampled by EDMDPMSolverMultistepScheduler"),
    ({"pretrained_model_name_or_path": "@cosxl"}, "EulerDiscreteScheduler with timestep_type continuous"),
    ({"pretrained_model_name_or_path": "@flow"}, "UniPCMultistepScheduler with use_flow_sigmas True"),
    ({"pretrained_model_name_or_path": "@lcm"}, "has a UNet with time_cond_proj_dim: train with"),
    ({"pretrained_model_name_or_path": "@rescaled"}, "rescaled rescales betas and needs v_prediction: add"),
    ({"pretrained_model_name_or_path": "@only_fp16"}, "has unet only as fp16: give --variant fp16"),
    ({"variant": "fp16"}, "--variant fp16: .*sdxl has no such weights. It has no variants: leave it out"),
    (
        {"rescale_betas_zero_snr": True},
        "--rescale_betas_zero_snr needs v_prediction: add --prediction_type",
    ),
    ({"output_dir": "@file"}, "--output_dir .*file cannot be written to"),
    ({"instance_data_dir": "@photos", "output_dir": "@photos"}, "--output_dir .*photos is the photographs' folder"),
    (
        {"instance_data_dir": "@photos", "output_dir": "@photos/out"},
        "--output_dir .*out lies in the photographs' folder",
    ),
    ({"instance_data_dir": "@photos", "output_dir": "@"}, "--output_dir .* holds the photographs' folder"),
    (
        {"instance_data_dir": None, "dataset_name": "@images_and_text", "output_dir": "@images_and_text/out"},
        "--output_dir .*out lies in the photographs' folder .*images_and_text",
    ),
    ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written to"),
    ({"init_embedding": "@wide"}, r"--init_embedding .*width \[768, 1280\].*need \[32, 48\]"),
    ({"init_embedding": "@none"}, "--init_embedding .*none cannot be read"),
    ({"report_to": "wandb", "hub_token": "hf_x"}, "--hub_token would be logged by --report_to wandb"),
    ({"report_to": "trackio"}, "--report_to trackio needs `pip install trackio`"),
    ({"adam_beta2": 1}, "--adam_beta2 1 must be below 1"),
    ({"initializer_token": None, "init_embedding": "@wide", "init": "contextual"}, "--init contextual needs"),
    ({"init_embedding": "@wide", "init": "contextual"}, "--init contextual has no effect beside --init_embedding"),
    ({"init_embedding": "@other_keys"}, "has the keys a, b: it needs clip_l and clip_g, or exactly one"),
    (
        {"init_embedding": "@many_keys"},
        r"has the keys (block\.\d+, ){5}\.\.\.: it needs clip_l and clip_g, or exactly one",
    ),
    ({"init_embedding": "@lora"}, "holds LoRA weights and no embedding: give the folder or file of the embedding"),
    ({"init_embedding": "@integers"}, "does not hold rows of floating-point numbers"),
    ({"init_embedding": "@uneven"}, "every encoder needs the same number of vectors"),
    ({"init_embedding": "@nan"}, "all finite and none zero"),
    ({"init_embedding": "@two_vectors", "num_vectors": 3}, "--num_vectors 3, but --init_embedding has 2"),
    ({"placeholder_token": None}, "the following arguments are required: --placeholder_token"),
    ({"placeholder_token": "<caf\udce9>"}, "--placeholder_token is not valid UTF-8"),
    ({"placeholder_token": "x" * 201}, "--placeholder_token 'x*' is too long for the name of a file"),
    ({"initializer_token": "teapot " * 80}, "--initializer_token has 80 tokens, and the encoders read 75"),
    ({"prompt_templates": "@file"}, "--prompt_templates .*file: it is empty"),
    ({"prompt_templates": "@none"}, "--prompt_templates .*none cannot be read"),
    ({"instance_data_dir": "@latin1_name"}, r"caf\\udce9.png' is not valid UTF-8: rename the file"),
    ({"instance_data_dir": "@half_a_character"}, "is not valid UTF-8: rename the file or correct the caption"),
    ({"instance_data_dir": "@other_column"}, "has no column 'text': it needs file_name and --caption_column text"),
    ({"instance_data_dir": "@row_missing"}, "the metadata file has no row for '04.png'"),
    ({"instance_data_dir": "@no_rows"}, "metadata.jsonl cannot be read as rows of file_name and text"),
    ({"instance_data_dir": "@not_json"}, "metadata.jsonl cannot be read as rows of file_name and text"),
    ({"instance_data_dir": None, "dataset_name": "@none"}, "--dataset_name .*none cannot be loaded"),
    ({"instance_data_dir": None, "dataset_name": "@numbers_only"}, "--image_column image of .* does not hold images"),
    (
        {"instance_data_dir": None, "dataset_name": "@images_and_text", "caption_column": "said"},
        "--caption_column said is none of the data set's: image, text",
    ),
    (
        {"instance_data_dir": None, "dataset_name": "@caption_missing", "caption_column": "text"},
        "row 2: the caption is None, which is not text",
    ),
    ({"resume_from_checkpoint": "@none"}, "--resume_from_checkpoint .*none does not exist"),
    ({"resume_from_checkpoint": "@checkpoint-5"}, "checkpoint-5 is damaged, and there is none before it"),
    (
        {"resume_from_checkpoint": "@checkpoint-6"},
        "checkpoint-6 is of another run: placeholder_token '<her-pot>', not",
    ),
    ({"config": "@none.toml"}, "--config .*none.toml cannot be read as a table of options"),
    ({"config": "@words.yaml"}, "--config .*words.yaml cannot be read as a table of options"),
    ({"config": "@twice.json"}, "--config .*twice.json cannot be read as a table of options: 'kappa' is there twice"),
    ({"config": "@options.txt"}, "--config .*options.txt must end in .toml, .yaml, .yml or .json"),
    ({"config": "@unknown.toml"}, "there is no option 'learningrate'. The nearest is 'learning_rate'"),
    ({"config": "@two_spellings.yaml"}, "'instance_data_dir' and 'train_data_dir' are the same option"),
    ({"config": "@sections.toml"}, "'kappa' and 'kappa' are the same option"),
    ({"config": "@list.toml"}, "'kappa' takes one value, not a list or a table"),
    ({"config": "@negative.toml"}, "argument --kappa: '-1' is not a number of at least 0"),
    ({"center_crop": "maybe"}, "--center_crop: 'maybe' is not true or false"),
    ({"adam_beta1": 0.8}, "--adam_beta1 0.8 has no effect without AdamW: add --optimizer adamw, or leave it out"),
    ({"adam_weight_decay": 0}, "--adam_weight_decay 0.0 has no effect without AdamW"),
    ({"lora_learning_rate": 1e-3}, "--lora_learning_rate 0.001 has no effect without --rank"),
    ({"lora_target_modules": "to_q,to_k"}, "--lora_target_modules to_q,to_k has no effect without --rank"),
    ({"validation_steps": 100}, "--validation_steps 100 has no effect without --validation_prompt: give one"),
    ({"validate_first": "true"}, "--validate_first has no effect without --validation_prompt"),
    (
        {"validation_prompt": "a {}", "validation_negative_prompt": "fog", "validation_guidance_scale": 1},
        "--validation_negative_prompt fog has no effect without .* --validation_guidance_scale above 1",
    ),
    ({"lr_warmup_steps": 2}, "--lr_warmup_steps 2 has no effect with --lr_scheduler constant: use constant_with_warm"),
    ({"lr_num_cycles": 2, "lr_scheduler": "cosine"}, "--lr_num_cycles 2 has no effect except with --lr_scheduler"),
    ({"init": "token", "init_embedding": "@wide"}, "--init token has no effect beside --init_embedding"),
    ({"dataset_config_name": "train"}, "--dataset_config_name train has no effect without --dataset_name"),
    (
        {"image_column": "photo", "no_captions": "true"},
        "--image_column photo has no effect on a folder whose metadata",
    ),
    ({"image_column": "photo"}, "--image_column photo: .* has no metadata.jsonl"),
    ({"learnable_property": "style", "caption_column": "said"}, "--learnable_property style has no effect where the"),
    (
        {"learnable_property": "style", "instance_data_dir": "@captioned"},
        "--learnable_property style has no effect with captions",
    ),
    (
        {"learnable_property": "face", "instance_data_dir": "@captioned"},
        "--learnable_property face has no effect with captions",
    ),
    ({"crops_per_image": 8, "no_cache_latents": "true"}, "--crops_per_image 8 has no effect with --no_cache_latents"),
    (
        {"crops_per_image": 8, "center_crop": "true"},
        "--crops_per_image 8 has no effect .* --center_crop leaves one view",
    ),
    ({"dataloader_num_workers": 2}, "--dataloader_num_workers 2 has no effect while latents are cached"),
    ({"revision": "main"}, "--revision main has no effect on a local model: leave it out"),
    ({"save_steps": 4}, "--save_steps 4 has no effect from the last step on, which is saved anyway: give less"),
    ({"logging_dir": "logbook"}, "--logging_dir logbook has no effect except with --report_to tensorboard"),
    (
        {"learning_rate": 0.1, "lr_scheduler": "cosine", "magnitude": "min"},
        "--preset paper has no effect where each of max_train_steps, learning_rate, lr_scheduler, magnitude is given",
    ),
    ({"config": "@idle.toml"}, "--lora_dropout 0.1 has no effect without --rank"),
    ({"hub_model_id": "me/my-pot"}, "--hub_model_id me/my-pot has no effect without --push_to_hub: add that"),
    ({"instance_data_dir": None, "dataset_name": "@image_missing"}, "A row of the data set has no image"),
    ({"instance_data_dir": None, "dataset_name": "@empty_set"}, "--dataset_name .*empty_set cannot be loaded"),
]
# Of the other script only what is its own: the rest of its checks are the same text.
SANA_CASES = [
    ({"resolution": 72}, "--resolution 72 is not a multiple of 32: try 64"),
    ({"max_sequence_length": 1}, "--max_sequence_length: '1' is not an integer of at least 2"),
    ({"max_sequence_length": 6}, "The encoders read 6 tokens, and the new word is not among them"),
    ({"weighting_scheme": "cosine"}, "--weighting_scheme: invalid choice"),
    ({"logit_mean": 1}, "--logit_mean 1.0 has no effect except with --weighting_scheme logit_normal: leave it out"),
    ({"mode_scale": 1, "weighting_scheme": "logit_normal"}, "--mode_scale 1.0 has no effect except with"),
    ({"weighting_scheme": "logit_normal", "logit_mean": "nan"}, "--logit_mean: 'nan' is not a number of at least"),
    ({"weighting_scheme": "mode", "mode_scale": "inf"}, "--mode_scale: 'inf' is not a number of at least -1"),
    ({"initializer_token": "茶壺"}, "--initializer_token '茶壺' is not in the vocabulary"),
    ({"initializer_token": "茶壺", "num_vectors": 2}, "--initializer_token '茶壺' is not in the vocabulary"),
    ({"placeholder_token": "<My-Pot>"}, "'<My-Pot>' is not found again .*: write '<my-pot>', in lower case"),
    ({"init_embedding": "@wide"}, "has the keys clip_g, clip_l: it needs gemma, or exactly one"),
    ({"pretrained_model_name_or_path": "@file"}, "is a file: give the folder of a pipeline in diffusers' format"),
    (
        {"pretrained_model_name_or_path": "@no_flow"},
        "is sampled by DPMSolverMultistepScheduler without use_flow_sigmas",
    ),
    ({"pretrained_model_name_or_path": "@sprint"}, "is a distilled SANA"),
]
ALL = [(script, *case) for case in CASES] + [(train_dti_sana, *case) for case in SANA_CASES]

# Where the words of a library begin, which differ by its version.
FOREIGN = [
    r"(?<=is not complete: ).*",
    r"(?<=cannot be loaded: ).*",
    r"(?<=as a table of options: ).*",
    r"(?<=cannot be read as safetensors: ).*",
    r"(?<=as rows of file_name and text: ).*",
    r"(?<=cannot be read as text in UTF-8: ).*",
    r"(?<= cannot be read: ).*",
    r"(?<=\(choose from ).*(?=\))",
    r"(?<=damaged or not an image \().*(?=\):)",
]
# Messages that no change of the small job brings about on every machine, or that need a run, a full disk or a Hub: the
# tests of checkpoints and of sharing have those.
ELSEWHERE = [
    "--mixed_precision ",
    ": there is no trained model here to be divided: ",
    ": give both the same value, or unset the first.",
    ": give --mixed_precision no, fp16 or bf16.",
    ": to compile, add --compile; otherwise set it to no.",
    ": for several processes on CPUs set ACCELERATE_USE_CPU=true, otherwise start one.",
    "--resume_from_checkpoint: it began elsewhere, with another model or initializer.",
    " cannot be written: ",
    "--scale_lr multiplies --learning_rate, and a preset's is not to be multiplied: give one.",
    " is beyond --max_train_steps ",
    ", which holds others: move them or --output_dir.",
    "--push_to_hub: ",
    " Give another --hub_model_id or --output_dir.",
    " is public: make it private or give another --hub_model_id.",
    ": the Hub does not accept the model card: ",
    ": TOML needs Python 3.11 or `pip install tomli`. YAML and JSON do not.",
    ", which is missing: take it from where this script is from.",
]


def row(trainer, changes: dict, line: str, folders: list) -> str:
    """The table's row: what was changed of the command, and what was printed."""

    def cell(text: str) -> str:
        for folder in folders:
            text = text.replace(str(folder), "...")
        text = text if len(text) <= 160 else f"{text[:80]} ... {text[-60:]}"
        return f"`` {text} ``".replace("|", "\\|")

    for pattern in FOREIGN:
        line = re.sub(pattern, "...", line)
    options = [f"without --{k}" if v is None else f"--{k} {shlex.quote(str(v))}" for k, v in changes.items()]
    return f"| {trainer.__name__} | {cell(str(script.UserError(' '.join(options))))} | {cell(line)} |"


@pytest.mark.parametrize(
    "trainer, changes, message", ALL, ids=lambda value: " ".join(map(str, value)) if type(value) is dict else ""
)
def test_one_clear_message_before_any_weight_loads(
    trainer, changes, message, train, bad, small, tmp_path, no_weights, capsys, record_property
):
    changes = {k: bad(v[1:]) if isinstance(v, str) and v.startswith("@") else v for k, v in changes.items()}
    with pytest.raises((trainer.UserError, SystemExit)) as caught:
        train(**changes)
    if caught.type is SystemExit:  # argparse has printed it
        assert caught.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1].partition(": error: ")[2]
    else:
        line = str(caught.value)
    assert re.search(message, line), line
    assert "\n" not in line
    expected = row(trainer, changes, line, [tmp_path, small])
    record_property("row", expected)
    assert expected in TABLE.read_text(encoding="utf-8"), "`python tests/test_bad_input.py` writes the table"


def test_the_table_has_no_more_than_the_cases():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| train_dti")]
    assert len(rows) == len(ALL)


@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_the_table_has_every_message(module):
    """By the longest stretch of each message that is written as it stands in the script."""
    table = TABLE.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") == "UserError":
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            longest = max(texts, key=len)
            assert longest in table or longest in ELSEWHERE, f"{longest!r}, line {node.lineno}: give it a case"


# The first is refused by argparse, the second by the script.
@pytest.mark.parametrize("changes", [{"kappa": -1}, {"instance_data_dir": "/nowhere"}])
def test_a_user_sees_one_line_and_no_traceback(options, changes):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_dti_sdxl.py"), *options(**changes)], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert re.match(r"train_dti_sdxl.py: error: .*--", result.stderr.splitlines()[-1])


def test_the_token_is_written_nowhere(train):
    out = train(hub_token="hf_secret", report_to="tensorboard")
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


class Rows:
    """A pytest plugin that gathers the rows which the tests have made."""

    def __init__(self):
        self.rows = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "row"]


def write_table() -> None:
    gathered = Rows()
    pytest.main([__file__, "-p", "no:terminal", "-k", "one_clear_message", "-n", "0"], plugins=[gathered])
    head = "| script | changed | printed |\n| --- | --- | --- |\n"
    TABLE.write_text(f"{INTRODUCTION}\n{head}" + "\n".join(gathered.rows) + "\n", encoding="utf-8")
    print(f"{len(gathered.rows)} rows of {len(ALL)} cases written to {TABLE}")


if __name__ == "__main__":
    write_table()
