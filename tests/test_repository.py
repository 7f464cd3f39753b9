"""The files around the scripts say the same as the scripts: requirements, header, README."""

import re
import shlex

import pytest
from conftest import ROOT

import train_dti_sdxl as script


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def readme_commands() -> list[str]:
    """The shell commands of the README's code blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in line.split("&&")]


def test_the_header_for_uv_asks_for_the_same_as_requirements():
    source = (ROOT / "train_dti_sdxl.py").read_text()
    header = re.search(r"^# /// script\n(.*?)^# ///$", source, re.S | re.M).group(1)
    assert re.findall(r'"(.*?)"', header.split("dependencies")[1]) == requirements()


@pytest.mark.parametrize("command", [c for c in readme_commands() if c.startswith("accelerate launch")])
def test_every_training_command_of_the_readme_is_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = script.parse_args(shlex.split(command)[3:])
    script.check_options(args)


def test_the_readmes_first_job_runs(monkeypatch, tmp_path):
    """The commands of "Try it", after the installation, in order and as they stand, in an empty folder."""
    import make_small_sdxl
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    make, job = (c for c in readme_commands() if "small" in c)
    monkeypatch.setattr("sys.argv", shlex.split(make)[1:])
    make_small_sdxl.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(shlex.split(job)[3:])
    assert (tmp_path / "out" / "my-pot" / "learned_embeds.safetensors").is_file()
    assert (tmp_path / "out" / "my-pot" / "validation-100.png").is_file()


def test_the_readmes_options_exist():
    known = {spelling for action in script.make_parser()._actions for spelling in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", (ROOT / "README.md").read_text()))
    assert named <= known, named - known


def test_the_readmes_loading_lines_are_the_printed_ones():
    args = script.parse_args(shlex.split(next(c for c in readme_commands() if "photos/dog" in c))[3:])
    printed = script.loading_snippet(args, script.torch.device("cuda"), script.torch.float16)
    code = [line for line in printed.strip().splitlines() if line and not line.startswith(("#", "pipe("))]
    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in code)
