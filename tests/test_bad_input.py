"""Every mistake that a user can make ends in one clear line, with exit status not 0, before any weight loads."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import train_dti_sdxl as script


@pytest.fixture
def bad(small, tmp_path):
    """Makes the bad folders and files that the cases below name."""

    def path(name: str):
        target = tmp_path / name
        if name == "empty":
            target.mkdir()
        elif name == "truncated":
            target.mkdir()
            noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
            Image.fromarray(noise).save(target / "dog.jpg")
            (target / "dog.jpg").write_bytes((target / "dog.jpg").read_bytes()[:9000])
        elif name == "text":
            target.mkdir()
            (target / "dog.jpg").write_text("not a picture")
        elif name in ("no_word", "long"):
            shutil.copytree(small / "photos", target)
            caption = "a dog" if name == "no_word" else "very " * 100 + "{}"
            rows = [{"file_name": f"{i:02d}.png", "text": caption} for i in range(5)]
            (target / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        elif name == "file":
            target.write_text("")
        elif name == "templates":
            target.write_text("a photo of it\n")
        elif name == "wide":
            save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, target)
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
        elif name == "nothing_in_it":
            target.mkdir()
        return target

    return path


# What is changed in the small job (a value beginning with @ names one of the paths above), and what the message says.
CASES = [
    ({"instance_data_dir": "@none"}, "--instance_data_dir .*none does not exist"),
    ({"instance_data_dir": "@file"}, "--instance_data_dir .*file is not a folder"),
    ({"instance_data_dir": "@empty"}, "--instance_data_dir .*empty holds no images"),
    ({"instance_data_dir": "@truncated"}, "dog.jpg is damaged"),
    ({"instance_data_dir": "@text"}, "dog.jpg is damaged or not an image"),
    ({"instance_data_dir": None}, "Give either --instance_data_dir or --dataset_name"),
    ({"dataset_name": "some/set"}, "Give either --instance_data_dir or --dataset_name"),
    ({"instance_data_dir": "@no_word"}, "caption 'a dog' has neither {} nor '<my-pot>'"),
    ({"instance_data_dir": "@long"}, "the new word is not among them"),
    ({"caption_column": "text"}, "--caption_column text: .* has no metadata"),
    ({"prompt_templates": "@templates"}, "--prompt_templates .* 'a photo of it' has no {}"),
    ({"placeholder_token": ""}, "--placeholder_token '' is empty"),
    ({"placeholder_token": "my pot"}, "--placeholder_token 'my pot' has spaces.*'my-pot'"),
    ({"placeholder_token": "teapot"}, "--placeholder_token 'teapot': 'teapot' is in the vocabulary already"),
    ({"placeholder_token": "<learned_embeds>"}, "--placeholder_token .*learned_embeds.safetensors"),
    ({"initializer_token": ""}, "--initializer_token '' has no tokens"),
    ({"initializer_token": "茶壺"}, "--initializer_token '茶壺' is not in the vocabulary"),
    ({"initializer_token": None}, "Give --initializer_token .* or --init_embedding"),
    ({"initializer_token": None, "init": "contextual"}, "Give --initializer_token"),
    ({"num_vectors": 0}, "--num_vectors: '0' is not an integer of at least 1"),
    ({"num_vectors": 90}, "90 vectors do not fit the 75 tokens of a prompt that the encoders read"),
    ({"num_vectors": 1.5}, "--num_vectors: '1.5' is not an integer"),
    ({"learning_rate": -1}, "--learning_rate: '-1' is not a number above 0"),
    ({"learning_rate": "nan"}, "--learning_rate: 'nan' is not a number above 0"),
    ({"kappa": -1e-4}, "--kappa: '-0.0001' is not a number of at least 0"),
    ({"kappa": 1e-4, "magnitude": "free", "optimizer": "adamw"}, "--kappa 0.0001 .* --magnitude free has none"),
    ({"magnitude": "median"}, "--magnitude: 'median' is not mean, min, free or a number above 0"),
    ({"magnitude": 0}, "--magnitude: '0' is not mean, min, free or a number above 0"),
    ({"magnitude": "free"}, "--optimizer rsgd .* add --optimizer adamw"),
    ({"resolution": 100}, "--resolution 100 is not a multiple of 8: try 96"),
    ({"max_train_steps": 0}, "--max_train_steps: '0' is not an integer of at least 1"),
    ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
    ({"scale_lr": "yes"}, "unrecognized arguments: --scale_lr"),
    ({"validation_prompt": "a dog"}, "--validation_prompt 'a dog' has neither {} nor '<my-pot>'"),
    ({"pretrained_model_name_or_path": "@none"}, "--pretrained_model_name_or_path .*none"),
    ({"pretrained_model_name_or_path": "@file"}, "is a file: load it with"),
    ({"pretrained_model_name_or_path": "@nothing_in_it"}, "has no model_index.json"),
    ({"pretrained_model_name_or_path": "@sana"}, "is a SanaPipeline; .* use train_dti_sana.py"),
    ({"pretrained_model_name_or_path": "@inpaint"}, "is a StableDiffusionXLInpaintPipeline"),
    ({"pretrained_model_name_or_path": "@predicts_sample"}, "predicts 'sample'"),
    ({"pretrained_model_name_or_path": "@no_encoder"}, "is not complete"),
    ({"output_dir": "@file"}, "--output_dir .*file cannot be written to"),
    ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written to"),
    ({"init_embedding": "@wide"}, r"--init_embedding .*width \[768, 1280\].*need \[32, 48\]"),
    ({"init_embedding": "@none"}, "--init_embedding .*none cannot be read"),
    ({"report_to": "wandb", "hub_token": "hf_x"}, "--hub_token would be logged by --report_to wandb"),
]


@pytest.mark.parametrize(
    "changes, message", CASES, ids=lambda value: " ".join(map(str, value)) if type(value) is dict else ""
)
def test_one_clear_message_before_any_weight_loads(train, bad, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(script, "load_models", lambda *args: pytest.fail("weights were loaded"))
    changes = {k: bad(v[1:]) if isinstance(v, str) and v.startswith("@") else v for k, v in changes.items()}
    with pytest.raises((script.UserError, SystemExit)) as caught:
        train(**changes)
    if caught.type is SystemExit:  # argparse has printed it
        assert caught.value.code == 2
    line = str(caught.value) if caught.type is script.UserError else capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, line), line
    assert "\n" not in line


@pytest.mark.parametrize("changes", [{"magnitude": "free"}, {"kappa": -1}, {"instance_data_dir": "/nowhere"}])
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
