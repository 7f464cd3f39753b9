"""Many subjects: each as if trained alone, the models loaded once, finished ones skipped, a failing one reported."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from kill_test import results

import train_dti_sana
import train_dti_sdxl


SCRIPTS = [
    pytest.param(train_dti_sdxl, id="sdxl"),
    pytest.param(train_dti_sana, id="sana", marks=pytest.mark.slow),
]
LORA = {"rank": 2, "lora_learning_rate": 0.01}
ROWS = """name,instance_data_dir,placeholder_token,initializer_token
pot,{photos},<my-pot>,teapot
nowhere,{photos}/none,<none>,dog
toy,{photos},<my-toy>,stuffed animal
dog,{photos},<my-dog>,dog
"""


@pytest.fixture
def many(small, tmp_path):
    """Runs the example on four subjects, one of them with no photographs, and returns the finished process."""
    (tmp_path / "subjects.csv").write_text(ROWS.format(photos=small / "photos"))

    def run(launcher: str, family: str = "sdxl", more: str = "") -> subprocess.CompletedProcess:
        options = (
            f"--script {ROOT}/train_dti_{family}.py --subjects {tmp_path}/subjects.csv --output_dir {tmp_path}/many"
        )
        options += f" --pretrained_model_name_or_path {small}/{family} --resolution 64 --max_train_steps 3 --seed 0"
        options += f" --train_batch_size 2 --report_to none --preset paper --rank 2 --lora_learning_rate 0.01 {more}"
        return subprocess.run(
            [sys.executable, *launcher.split(), str(ROOT / "examples" / "train_many.py"), *options.split()],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )

    return run


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_every_subject_is_as_if_trained_alone(many, train, trainer, tmp_path):
    family = trainer.__name__.removeprefix("train_dti_")
    result = many("", family)
    assert result.returncode == 1, result.stderr  # one of them failed
    assert result.stdout.count("Loading") + result.stderr.count("Loading weights: 100%") <= 2  # the encoders, once
    summary = (tmp_path / "many" / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| (\w+)", summary, re.M)[1:] == [
        ("dog", "trained"),
        ("nowhere", "failed"),
        ("pot", "trained"),
        ("toy", "trained"),
    ]
    assert "none does not exist: give a folder of images" in summary
    # The second subject has the models of the first, without its word.
    alone = train(placeholder_token="<my-toy>", initializer_token="stuffed animal", max_train_steps=3, **LORA)
    assert results(tmp_path / "many" / "toy") == results(alone)

    written = (tmp_path / "many" / "dog" / "learned_embeds.safetensors").stat().st_mtime_ns
    again = many("", family)
    assert again.stdout.count("finished before") == 3 + 3 and "Loading weights" not in again.stderr
    assert (tmp_path / "many" / "dog" / "learned_embeds.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize("trainer", SCRIPTS)
def test_in_half_precision_too_every_subject_begins_at_the_rows_that_were_loaded(many, train, trainer, tmp_path):
    many("", trainer.__name__.removeprefix("train_dti_"), "--mixed_precision bf16")
    options = {"placeholder_token": "<my-toy>", "initializer_token": "stuffed animal", "mixed_precision": "bf16"}
    alone = train(max_train_steps=3, **options, **LORA)
    assert results(tmp_path / "many" / "toy") == results(alone)


@pytest.mark.slow
def test_two_processes_share_the_subjects_and_one_tells_of_all(many, tmp_path):
    result = many("-m torch.distributed.run --standalone --nproc_per_node 2")
    assert result.returncode != 0 and "SIGTERM" not in result.stderr
    summary = (tmp_path / "many" / "summary.md").read_text()
    assert len(re.findall(r"^\| (pot|toy|dog) \| trained \|", summary, re.M)) == 3
    assert len(re.findall(r"^\| nowhere \| failed", summary, re.M)) == 1
    assert [path.name for path in (tmp_path / "many").glob(".summary*")] == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "it has no subjects"),
        ("placeholder_token\n<a>\n", "a subject has no 'instance_data_dir'"),
        ("instance_data_dir\na/dog\nb/dog\n", "dog occurs twice"),
    ],
)
def test_a_bad_list_ends_in_one_line(many, tmp_path, content, message):
    (tmp_path / "subjects.csv").write_text(content)
    result = many("")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]
