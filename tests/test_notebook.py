"""The notebook: its form, and that it runs from top to bottom on the miniature, with nothing but its first cell's values set."""

import base64
import io
import json
import re
import shutil
import subprocess
import zipfile

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from hub_server import HubServer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from safetensors.torch import load


NOTEBOOK = ROOT / "examples" / "train_dti_sdxl.ipynb"
TOKEN = "hf_secretThatMayWrite"


def read(**values) -> nbformat.NotebookNode:
    """The notebook, with values in its first code cell replaced."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in values.items():
        first.source, found = re.subn(rf"^{name} = .*?(?=  #|$)", f"{name} = {value!r}", first.source, flags=re.M)
        assert found == 1, name
    return notebook


@pytest.fixture
def project(tmp_path):
    """A copy of the project's files that the notebook needs, as a git repository."""
    folder = tmp_path / "project"
    others = shutil.ignore_patterns("sana", "siglip", "dinov2", "classifiers", "runs", "*.png", "__pycache__")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=others)
    for name in ("train_dti_sdxl.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@localhost", "-c", "core.compression=0"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "The project"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        server.add_user("me", TOKEN)
        yield server


@pytest.fixture
def execute(hub, tmp_path):
    """Executes a notebook in a folder, logged in to the Hub of the tests, on a computer without a GPU."""
    environment = hub.environment(TOKEN, tmp_path / "home")
    environment |= {"IPYTHONDIR": str(tmp_path / "ipython"), "CUDA_VISIBLE_DEVICES": ""}

    def run(notebook, folder) -> None:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute(env=environment)

    return run


def outputs(notebook, name: str) -> list:
    return next(cell.outputs for cell in notebook.cells if cell.id == name)


def text(notebook, name: str) -> str:
    return "".join(output.text for output in outputs(notebook, name) if output.output_type == "stream")


def pictures(notebook, name: str) -> list[Image.Image]:
    data = [output.data["image/png"] for output in outputs(notebook, name) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in data]


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.metadata.kernelspec.name) == (4, "python3")
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 100
    # As json.dumps writes it, so that a change made in an editor of notebooks shows as few lines.
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert content == json.dumps(json.loads(content), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_on_the_miniature(project, hub, execute, tmp_path):
    """As on Colab, in an empty folder: from the clone to pictures that follow their prompts, and the push."""
    folder = tmp_path / "content"
    folder.mkdir()
    notebook = read(MINIATURE=True, STEPS=6, REPOSITORY=str(project), HUB_MODEL_ID="me/clown-fish")
    execute(notebook, folder)
    out = folder / "dti" / "out" / "clown-fish"

    # Training, with a bar.
    trained = json.loads((out / "training_options.json").read_text())["derived"]
    assert (trained["photographs"], trained["steps"], trained["vectors"]) == (5, 6, 4)
    assert "\rSteps: 100%" in text(notebook, "train-code") and "6/6" in text(notebook, "train-code")

    # Pictures: the photographs, two validations and the curves, and one for each prompt.
    assert [picture.size for picture in pictures(notebook, "photographs-code")] == [(5 * 192, 192)]
    assert len(pictures(notebook, "curves")) == 3
    drawn = pictures(notebook, "draw")
    assert [picture.size for picture in drawn] == 4 * [(512, 512)]
    night, snow = [np.asarray(picture.convert("L"), float).mean() for picture in drawn[:2]]
    assert night < 0.7 * snow

    # What is kept and shared is what was trained.
    with zipfile.ZipFile(folder / "dti" / "out" / "clown-fish.zip") as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if name.endswith(".safetensors")}
    shared = hub.repositories["me/clown-fish"].files
    widths = {"learned_embeds.safetensors": ("<clown-fish>",), "learned_embeds_2.safetensors": ("<clown-fish>",)}
    for name, keys in (widths | {"clown-fish.safetensors": ("clip_l", "clip_g")}).items():
        learned, uploaded = load(kept[name]), load(shared[name])
        assert learned.keys() == set(keys) and all(rows.shape[0] == 4 for rows in learned.values())
        assert all(rows.equal(uploaded[key]) for key, rows in learned.items())
    assert sum(name.startswith("samples/") for name in shared) == 4


@pytest.mark.parametrize(
    "values, cell, message",
    [
        pytest.param(
            {"MINIATURE": True, "STEPS": 0},
            "train-code",
            "error: argument --max_train_steps: '0' is not an integer of at least 1",
            marks=pytest.mark.slow,
        ),
        ({"MINIATURE": False}, "model", "there is no GPU: choose one under Runtime, or set MINIATURE = True"),
        ({"MINIATURE": True}, "install-code", "REPOSITORY is empty: give this project's address for git clone"),
    ],
)
def test_what_fails_stops_the_notebook_with_one_message(values, cell, message, project, execute, tmp_path):
    """Opened in the checkout's examples/, or for the last in an empty folder."""
    folder = tmp_path / "empty" if cell == "install-code" else project / "examples"
    folder.mkdir(exist_ok=True)
    notebook = read(**values)
    with pytest.raises(CellExecutionError):
        execute(notebook, folder)
    failed = [c.id for c in notebook.cells for output in c.get("outputs", []) if output.output_type == "error"]
    last = [c.id for c in notebook.cells if c.get("execution_count")][-1]
    (error,) = [output for output in outputs(notebook, cell) if output.output_type == "error"]
    assert failed == [cell] and last == cell
    said = text(notebook, cell) + "".join(error.traceback)
    assert said.count(message) == 1 and "Traceback" not in said and 'File "' not in said
    assert not list(project.rglob("learned_embeds*"))
