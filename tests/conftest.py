"""What the tests share: the small pipeline and photographs, and ways to run the training script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the Hub

import make_small_sana  # noqa: E402
import make_small_sdxl  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from evaluate import miniature  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel  # noqa: E402

import train_dti_sdxl  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """Folder with `sdxl`, `sd` and `sana`, small random pipelines, and `photos`, five pictures of one subject."""
    folder = tmp_path_factory.mktemp("small")
    make_small_sdxl.make_pipeline(folder / "sdxl")
    make_small_sdxl.make_sd_pipeline(folder / "sd")
    make_small_sana.make_pipeline(folder / "sana")
    make_small_sdxl.make_photographs(folder / "photos")
    return folder


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of DINOv2's pictures


def save_processor(folder, kind: str, **config) -> None:
    """What a judge's repository on the Hub has, in the words that all versions of transformers know."""
    config = {"image_processor_type": kind, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255} | config
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "resample": 3} | config))


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """Small random judges with their processors, for pictures of 64 pixels."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    crop = {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}}
    save_processor(folder / "dino", "BitImageProcessor", image_mean=list(MEAN), image_std=list(STD), **crop)
    tokenizer = make_small_sdxl.make_tokenizer(folder / "siglip", "<|endoftext|>")
    last = len(tokenizer) - 1
    text = {"vocab_size": last + 1, "pad_token_id": last, "bos_token_id": last - 1, "eos_token_id": last}
    text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SiglipModel(
        SiglipConfig(
            text_config=text | {"projection_size": 32, "max_position_embeddings": 64},
            vision_config=sizes | {"intermediate_size": 64},
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(1.5), model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder / "siglip")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    save_processor(folder / "siglip", "SiglipImageProcessor", size={"height": 64, "width": 64}, **half)
    return folder


@pytest.fixture
def miniature_models(small, judges, tmp_path) -> Path:
    """A folder as the miniature's train_models.py fills it, with small random models in it."""
    folder = tmp_path / "models"
    (folder / "classifiers").mkdir(parents=True)
    for name in ("sdxl", "sd", "sana"):
        (folder / name).symlink_to(small / name)
    (folder / "siglip").symlink_to(judges / "siglip")
    (folder / "dinov2").symlink_to(judges / "dino")
    state = {name: x.half().contiguous() for name, x in miniature("judges").Classifiers().state_dict().items()}
    save_file(state, folder / "classifiers" / "model.safetensors")
    return folder


@pytest.fixture
def trainer():
    """The training script under test, as a module. A test file for another one overrides this."""
    return train_dti_sdxl


@pytest.fixture
def options(trainer, small, tmp_path):
    """Builds the script's command line: the small job, with options replaced (or, by None, left out) and added."""

    def build(*flags: str, **changes) -> list[str]:
        values = {
            "pretrained_model_name_or_path": small / trainer.__name__.removeprefix("train_dti_"),
            "instance_data_dir": small / "photos",
            "placeholder_token": "<my-pot>",
            "initializer_token": "teapot",
            "output_dir": tmp_path / "out",
            "preset": "paper",
            "resolution": 64,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "seed": 0,
            "report_to": "none",
        } | changes
        return [*flags, *(str(part) for k, v in values.items() if v is not None for part in (f"--{k}", v))]

    return build


@pytest.fixture
def train(trainer, options):
    """Runs the script's main in this process and returns the output folder."""

    def run(*flags: str, **changes) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = options(*flags, **changes)
        trainer.main(argv)
        return Path(argv[argv.index("--output_dir") + 1])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def models_seen(trainer, monkeypatch):
    """Collects the models that main loads, for tests that look into a run."""
    seen, load = [], trainer.MODEL_CLASS.load
    monkeypatch.setattr(trainer.MODEL_CLASS, "load", lambda self, dtype: seen.append(self) or load(self, dtype))
    return seen


@pytest.fixture
def no_weights(trainer, monkeypatch):
    """Lets the test fail as soon as weights are loaded."""
    monkeypatch.setattr(trainer.MODEL_CLASS, "load", lambda self, dtype: pytest.fail("weights were loaded"))


@pytest.fixture
def loaded(trainer, options):
    """Builds the small model with the new word in it, as main has it before the first step."""

    def load(*flags: str, **changes):
        model = trainer.MODEL_CLASS(trainer.parse_args(options(*flags, **changes), trainer.MODEL_CLASS))
        model.load_tokenizers()
        counts, first_ids, _ = trainer.prepare_placeholder(model)
        model.load(torch.float32)
        for encoder, tokenizer, first_id in zip(model.text_encoders, model.tokenizers, first_ids, strict=True):
            model.tokens.append(trainer.make_token(encoder, tokenizer, first_id, counts, None, model.args))
            encoder.float()
        return model

    return load


@pytest.fixture
def launch(trainer, options):
    """Runs the script as a user does, by `accelerate launch` (or another launcher), and returns the finished process."""

    def run(
        *flags: str, launcher: str = "accelerate.commands.launch --quiet", **changes
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *launcher.split(), trainer.__file__, *options(*flags, **changes)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=600,
        )

    return run
