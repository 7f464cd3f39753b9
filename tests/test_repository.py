"""The files around the scripts say the same as the scripts: requirements, header, README."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_dti_sd
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT
from export import Embedding, write_embedding
from PIL import Image
from test_describe import segmenter, talker  # noqa: F401

import train_dti_sana
import train_dti_sdxl


SCRIPTS = {"train_dti_sdxl.py": train_dti_sdxl, "train_dti_sana.py": train_dti_sana}
SCRIPTS["examples/train_dti_sd.py"] = train_dti_sd


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


READMES = (ROOT / "README.md", ROOT / "examples" / "README.md")


def readme_commands() -> list[str]:
    """The shell commands of both READMEs' code blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", "".join(path.read_text() for path in READMES), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in line.split("&&")]


def training_commands() -> list[str]:
    return [command for command in readme_commands() if re.match(r"accelerate launch (examples/)?train_dti", command)]


def example_commands() -> list[str]:
    """The commands that use what was learned."""
    return [
        command for command in readme_commands() if re.match(r"python examples/(?!make_small|miniature|app)", command)
    ]


def arguments(command: str) -> tuple:
    """The script's module and its arguments, of an `accelerate launch` command."""
    _, _, name, *argv = shlex.split(command)
    return SCRIPTS[name], argv


def functions_of(script):
    """The training script itself, or the one that its model's class is an example for."""
    return sys.modules[script.run.__module__]


def model_of(script, argv: list[str]):
    return script.MODEL_CLASS(functions_of(script).parse_args(argv, script.MODEL_CLASS))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_header_for_uv_asks_for_the_same_as_requirements(name):
    header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / name).read_text(), re.S | re.M).group(1)
    assert re.findall(r'"(.*?)"', header.split("dependencies")[1]) == requirements()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_front_page_names_the_command_of_the_readme(name):
    command = SCRIPTS[name].__doc__.split("\n\n")[1].replace("\\\n", " ")
    assert any(" ".join(c.split()).startswith(" ".join(command.split())) for c in training_commands())


@pytest.mark.parametrize("command", training_commands())
def test_every_training_command_of_the_readme_is_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, argv = arguments(command)
    functions, model = functions_of(script), model_of(script, argv)
    functions.check_options(model)
    functions.refuse_idle(model, argv)


@pytest.mark.parametrize("name", ["clown", pytest.param("heart", marks=pytest.mark.slow)])
def test_the_readmes_first_job_runs(monkeypatch, tmp_path, name):
    """The commands of "Try it", after the installation, in order and as they stand, and the lines that they print."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make, job = [command for command in readme_commands() if name in command][:2]
    program, *argv = shlex.split(make)[1:]
    subprocess.run([sys.executable, program, *argv], check=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    script, argv = arguments(job)
    script.main(argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = model_of(script, argv)
    assert (model.args.output_dir / "learned_embeds.safetensors").is_file()
    assert (model.args.output_dir / "validation-125.png").is_file()
    exec(model.loading_snippet(torch.device("cpu"), torch.float32), {})
    assert Image.open("picture.png").size == (64, 64)


@pytest.fixture(scope="module")
def learned(small, tmp_path_factory):
    """A folder in which the README's commands find what they name: embeddings, photographs, and the model."""
    folder = tmp_path_factory.mktemp("learned")
    shutil.copytree(small / "photos", folder / "photos" / "dog")
    for seed, name in enumerate(("my-dog", "my-cat", "my-style", "my-ti-dog")):
        generator = torch.Generator().manual_seed(seed)
        widths = {"text_encoder": 32, "text_encoder_2": 48}
        vectors = {encoder: torch.randn(1, width, generator=generator) * 0.02 for encoder, width in widths.items()}
        write_embedding(Embedding(f"<{name}>", vectors), folder / "out" / name)
    return folder


@pytest.mark.parametrize("command", example_commands())
def test_every_example_command_of_the_readme_runs(
    command,
    small,
    judges,
    talker,  # noqa: F811
    segmenter,  # noqa: F811
    learned,
    monkeypatch,
):
    """As it stands, but with small models and few steps; one may use what another made."""
    command = command.replace("stabilityai/stable-diffusion-xl-base-1.0", str(small / "sdxl"))
    command = command.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(small / "sd"))
    program, *argv = shlex.split(command)[1:]
    module = importlib.import_module(Path(program).stem)
    if "--num_inference_steps" in module.command_line().format_help():
        argv += ["--num_inference_steps", "2"]
    if program == "examples/baselines.py":
        argv += "--resolution 64 --max_train_steps 1 --train_batch_size 1".split()
    if program == "examples/benchmark.py":
        argv += "--warmup 1 --steps 2 --breakdown_steps 1".split()
    if program == "examples/evaluate.py":
        argv += ["--dino", str(judges / "dino"), "--siglip", str(judges / "siglip"), "--seeds", "0"]
    if program in ("examples/caption.py", "examples/make_masks.py"):
        argv += ["--model", str(talker if "caption" in program else segmenter)]
    before = {path: path.stat().st_mtime_ns for path in learned.rglob("*") if path.is_file()}
    monkeypatch.chdir(learned)
    monkeypatch.setattr(sys, "argv", [program, *argv])
    AcceleratorState._reset_state(reset_partial_state=True)
    module.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    after = {path: path.stat().st_mtime_ns for path in learned.rglob("*") if path.is_file()}
    assert set(after) > set(before) and all(after[path] == before[path] for path in before)  # made, and none touched


def test_the_readmes_options_exist():
    parsers = [functions_of(script).make_parser(script.MODEL_CLASS) for script in SCRIPTS.values()]
    known = {spelling for parser in parsers for action in parser._actions for spelling in action.option_strings}
    known |= {"--num_processes", "--script", "--subjects"}  # accelerate's, train_many.py's
    known |= {"--concept", "--place"}  # world.py's
    for name in {shlex.split(command)[1] for command in example_commands()}:
        parser = importlib.import_module(Path(name).stem).command_line()
        known |= {spelling for action in parser._actions for spelling in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", "".join(path.read_text() for path in READMES)))
    assert named <= known, named - known


@pytest.mark.parametrize("name, dtype", [("train_dti_sdxl.py", torch.float16), ("train_dti_sana.py", torch.bfloat16)])
def test_the_readmes_loading_lines_are_the_printed_ones(name, dtype):
    script, argv = arguments(next(c for c in training_commands() if name in c and "photos/dog" in c))
    printed = model_of(script, argv).loading_snippet(torch.device("cuda"), dtype)
    printed = printed.replace(f"{ROOT}/", "")  # of the pipeline's file
    code = [line for line in printed.strip().splitlines() if line and not line.startswith(("#", "pipe("))]
    readme = (ROOT / "README.md").read_text()
    assert [line for line in code if line not in readme] == []


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub makes links of them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = {ROOT / "README.md", *ROOT.glob("tests/*.md"), *ROOT.glob("examples/**/*.md")}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", re.sub(r"``.*?``", "", text)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors((file / "README.md" if file.is_dir() else file).read_text()), target


def test_github_runs_what_a_change_must_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
