"""Pushing to a Hub (a small one, on this computer) as a user does, loading from it as a stranger does, and what can go wrong."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_dti_sd
import yaml
from conftest import ROOT
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file

import train_dti_sana
import train_dti_sdxl


TOKEN = "hf_secretThatMayWrite"
PROMPTS = ["a photo of {} on the grass", "{}: an oil painting"]
EMBEDDINGS = {
    "sdxl": {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "my-pot.safetensors"},
    "sana": {"learned_embeds.safetensors", "my-pot.safetensors", "pipeline.py"},
    "sd": {"learned_embeds.safetensors", "my-pot.safetensors"},
}
LORA = {"pytorch_lora_weights.safetensors", "my-pot-lora.safetensors"}
OTHERS = {".gitattributes", "README.md", "training_curves.png", "training_options.json"}

# Runs the script's main for each case of a list, each with its token, and says what came of it: importing takes longest.
CASES_DRIVER = """
import importlib, json, os, sys
from accelerate.state import AcceleratorState
script = importlib.import_module(sys.argv[1])
load, loaded = script.MODEL_CLASS.load, []
script.MODEL_CLASS.load = lambda *args: loaded.append(1) or load(*args)
for case in json.load(open(sys.argv[2])):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": case["token"]} if case["token"] else {})
    AcceleratorState._reset_state(reset_partial_state=True)
    loaded.clear()
    said = None
    try:
        script.main(case["argv"])
    except script.UserError as error:
        said = str(error)
    print("RESULT", json.dumps({"said": said, "loaded": bool(loaded)}))
"""

ROWS = """
from safetensors.torch import save_file
rows = {}
for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
    if hasattr(pipe, encoder):
        ids = getattr(pipe, tokenizer).convert_tokens_to_ids(["<my-pot>", "<my-pot>_1"])
        rows[encoder] = getattr(pipe, encoder).get_input_embeddings().weight.detach()[ids].float().contiguous()
save_file(rows, "rows.safetensors")
adapted = hasattr(pipe, "unet") and bool(getattr(pipe.unet, "peft_config", None))
open("adapted", "w").write(str(adapted))
"""


@pytest.fixture
def hub(small):
    """A Hub with the small pipelines of `someone`, and the account `me`."""
    with HubServer() as server:
        server.add_user("me", TOKEN)
        server.add_user("me", "hf_mayRead", role="read")
        for family in ("sdxl", "sana", "sd"):
            server.add_repository(f"someone/small-{family}", small / family)
        yield server
    # The `hf` command asks for a list of coding agents, and does without.
    assert set(server.unknown) <= {"GET /api/agent-harnesses"}


@pytest.fixture
def job(options):
    """Builds a job's command line that pushes."""

    def build(*flags: str, prompts: list[str] = PROMPTS, **changes) -> list[str]:
        few = {"num_vectors": 2, "num_validation_images": 2, "validation_inference_steps": 2, "max_train_steps": 2}
        asked = [part for prompt in prompts for part in ("--validation_prompt", prompt)]
        return options("--push_to_hub", *flags, *asked, **(few | changes))

    return build


@pytest.fixture
def run_cases(hub, tmp_path):
    """Runs train_dti_sdxl's main with each (token, command line) and returns what was said, and if weights were loaded."""

    def run(cases: list[tuple[str | None, list[str]]]) -> list[dict]:
        file = tmp_path / "cases.json"
        file.write_text(json.dumps([{"token": token, "argv": argv} for token, argv in cases]))
        result = subprocess.run(
            [sys.executable, "-c", CASES_DRIVER, "train_dti_sdxl", str(file)],
            **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": 600},
            env=hub.environment(None, tmp_path / "home"),
        )
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in re.findall(r"^RESULT (.*)", result.stdout, re.M)]

    return run


def head(hub: HubServer, repo_id: str) -> dict:
    """The card's metadata."""
    return yaml.safe_load(hub.repositories[repo_id].files["README.md"].decode().split("---\n")[1])


@pytest.mark.parametrize("family", ["sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sana", "sd"))])
def test_pushed_as_a_user_does_and_loaded_by_the_cards_lines(hub, job, tmp_path, family):
    # SDXL: a public repository and --hub_token; the others: a private one, and logged in.
    script = {"sdxl": train_dti_sdxl, "sana": train_dti_sana, "sd": train_dti_sd}[family]
    lora = LORA if family == "sdxl" else set()  # one with LoRA, the others without
    flags = (
        ["--rank", "2", "--hub_token", TOKEN, "--license", "cc-by-4.0"] if family == "sdxl" else ["--hub_private_repo"]
    )
    model = f"someone/small-{family}"
    out, repo_id = tmp_path / "my-pot", "me/my-pot"
    argv = job(*flags, pretrained_model_name_or_path=model, output_dir=out, save_steps=1, report_to="tensorboard")
    environment = hub.environment(None if family == "sdxl" else TOKEN, tmp_path / "home")
    result = subprocess.run([sys.executable, script.__file__, *argv], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {hub.url}/me/my-pot" in result.stdout

    # What is there: the allowed files, kilobytes, and nothing that is secret.
    repository = hub.repositories[repo_id]
    samples = {f"samples/{prompt}-{number}.jpg" for prompt in (0, 1) for number in (0, 1)}
    assert set(repository.files) == EMBEDDINGS[family] | lora | OTHERS | samples
    assert len(repository.commits) == 2  # as made, and one of ours
    assert sum(len(data) for name, data in repository.files.items() if name not in lora) < 100_000
    assert set(hub.blobs.values()) <= set(repository.files.values())
    secrets = (TOKEN.encode(), str(tmp_path).encode(), str(ROOT).encode())
    uploaded = [body for _, _, body in hub.requests] + list(repository.files.values())
    assert not [data[:200] for data in uploaded for secret in secrets if secret in data]
    assert not [p for p in out.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert repository.private == (family != "sdxl")
    for name in EMBEDDINGS[family] - {"pipeline.py"} | lora:
        assert repository.files[name] == (out / name).read_bytes()

    # The card.
    kind = {"sdxl": "stable-diffusion-xl", "sana": "sana", "sd": "stable-diffusion"}[family]
    common = ["text-to-image", "diffusers", "diffusers-training", "textual_inversion"]
    prompts = [prompt.replace("{}", "<my-pot>") for prompt in PROMPTS for _ in (0, 1)]
    assert head(hub, repo_id) == {
        "library_name": "diffusers",
        "base_model": model,
        "instance_prompt": "<my-pot>",
        "tags": [*common, kind, f"{kind}-diffusers", *["lora"] * bool(lora)],
        "widget": [{"text": t, "output": {"url": u}} for t, u in zip(prompts, sorted(samples), strict=True)],
        **({"license": "cc-by-4.0"} if family == "sdxl" else {}),
    }
    card = repository.files["README.md"].decode()
    assert all(f'pipe.load_lora_weights("{repo_id}", weight_name=' in card and "| lora | rank 2" in card for _ in lora)
    assert "<Gallery />" in card and "Write `<my-pot>` where" in card and "| photographs | 5 |" in card
    assert "| lr scheduler | constant |" in card
    assert (f"{repo_id}/resolve/main/my-pot.safetensors" in card) and ("embedding:my-pot" in card) == (
        family != "sana"
    )
    # What to put where in the web tools, LoRA included, and how they read the rest of the prompt.
    assert (
        ("`<lora:my-pot-lora:1>`" in card) == (f"{repo_id}/resolve/main/my-pot-lora.safetensors" in card) == bool(lora)
    )
    assert ("InvokeAI and SD.Next read SDXL's pooled text embedding at the new word" in card) == (family == "sdxl")
    for name in EMBEDDINGS[family] - {"pipeline.py"} | lora:
        with safe_open(out / name, "pt") as file:
            assert file.metadata()["modelspec.author"] == "me"

    # The card's lines load it and draw a picture, with no file but the Hub's.
    lines = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment["HF_HOME"] = str(tmp_path / "another home")
    run = subprocess.run(
        [sys.executable, "-c", lines + ROWS], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert not re.search("dtype|deprecated", run.stderr), run.stderr
    assert (elsewhere / "picture.png").is_file()
    assert (elsewhere / "adapted").read_text() == str(bool(lora))
    loaded = load_file(elsewhere / "rows.safetensors")
    for encoder, name in zip(script.MODEL_CLASS.text_encoder_names, script.MODEL_CLASS.embedding_files, strict=True):
        assert torch.equal(loaded[encoder], load_file(out / f"{name}.safetensors")["<my-pot>"])


def test_a_second_push_refreshes_card_gallery_and_embedding(hub, job, run_cases, tmp_path):
    hub.add_repository("me/my-pot", {"notes.md": b"A file of the user's."})
    changed = {"seed": 1, "num_validation_images": 1, "output_dir": tmp_path / "my-pot"}
    first = job(output_dir=tmp_path / "my-pot", rank=2)  # and no LoRA the second time
    second = job("--license", "mit", prompts=["one {} in the snow"], **changed)
    assert [r["said"] for r in run_cases([(TOKEN, first), (TOKEN, second)])] == [None, None]
    made, before, after = hub.repositories["me/my-pot"].commits
    samples = {name for name in before if name.startswith("samples/")}
    assert len(samples) == 4
    assert (
        set(after)
        == set(before) - samples - LORA | {"samples/0-0.jpg"}
        == EMBEDDINGS["sdxl"]
        | OTHERS
        | {
            "notes.md",
            "samples/0-0.jpg",
        }
    )
    for name in EMBEDDINGS["sdxl"] | {"samples/0-0.jpg", "README.md", "training_options.json"}:
        assert before[name] != after[name], name
    card = head(hub, "me/my-pot")
    assert card["license"] == "mit" and "base_model" not in card  # a local folder
    assert card["widget"] == [{"text": "one <my-pot> in the snow", "output": {"url": "samples/0-0.jpg"}}]
    assert str(tmp_path).encode() not in b"".join(after.values())
    assert sorted(p.name for p in (tmp_path / "my-pot" / "hub" / "samples").iterdir()) == ["0-0.jpg"]


def test_what_the_hub_refuses_is_said_before_any_weight_loads(hub, job, run_cases, tmp_path):
    hub.add_repository("me/public", private=False)
    cases = [
        (None, [], "--push_to_hub: there is no token: log in with `hf auth login`"),
        ("hf_unknown", [], "the Hub does not know the token .*hf auth login"),
        ("hf_mayRead", [], "the token may not write to me/out .*write permission"),
        (
            TOKEN,
            ["--hub_model_id", "someone/new"],
            "the token may not write to someone/new .*--hub_model_id of an acc",
        ),
        (TOKEN, ["--hub_model_id", "someone/small-sdxl"], "the token may not write to someone/small-sdxl"),
        (
            TOKEN,
            ["--hub_model_id", "public", "--hub_private_repo"],
            "--hub_private_repo: me/public is public: make it",
        ),
        (TOKEN, ["--license", "mine"], '--license mine: the Hub does not accept the model card: "license" must be'),
    ]
    results = run_cases([(token, job(*flags)) for token, flags, _ in cases])
    for result, (_, _, message) in zip(results, cases, strict=True):
        assert re.search(message, result["said"]), result["said"]
        assert not result["loaded"] and "\n" not in result["said"]
    assert not [path for _, path, _ in hub.requests if path.endswith("/commit/main")]


def test_a_failed_upload_loses_nothing_and_says_how_to_upload_later(hub, job, run_cases, tmp_path):
    hub.fail = {"me/dropped/commit": None, "me/full.git/info/lfs": 403}
    names = ["dropped", "full"]
    results = run_cases(
        [(TOKEN, job("--hub_private_repo", output_dir=tmp_path / "a folder" / name)) for name in names]
    )
    for name, result in zip(names, results, strict=True):
        said, out = result["said"], tmp_path / "a folder" / name
        assert result["loaded"] and "\n" not in said
        assert f"Nothing is lost, all files are in {out}" in said
        assert all((out / file).stat().st_size > 0 for file in EMBEDDINGS["sdxl"] | {"validation-2.png"})
        assert set(hub.repositories[f"me/{name}"].files) == {".gitattributes"}
    assert "cannot be reached" in results[0]["said"]
    assert "the token may not write to me/full (Simulated.)" in results[1]["said"]

    # The line works, for the user who is logged in by then.
    hub.fail.clear()
    del hub.repositories["me/dropped"]
    command = shlex.split(re.search(r"hf upload .*", results[0]["said"]).group())
    run = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        **{"capture_output": True, "text": True, "env": hub.environment(TOKEN, tmp_path / "home")},
    )
    assert run.returncode == 0, run.stderr
    samples = {f"samples/{prompt}-{number}.jpg" for prompt in (0, 1) for number in (0, 1)}
    assert hub.repositories["me/dropped"].private
    assert set(hub.repositories["me/dropped"].files) == EMBEDDINGS["sdxl"] | OTHERS | samples


def test_no_network_is_said_before_any_weight_loads(trainer, train, no_weights, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")  # the tests run with HF_HUB_OFFLINE set
    with pytest.raises(trainer.UserError, match="--push_to_hub: https://.* cannot be reached .*check the connection"):
        train("--push_to_hub")


@pytest.mark.parametrize(
    "flags, changes, message",
    [
        ("--push_to_hub", {"hub_model_id": "me/my/dog"}, "--push_to_hub: .*'me/my/dog'.* Give another --hub_model_id"),
        ("--push_to_hub", {"hub_model_id": "me/my dog"}, "--push_to_hub: .*'me/my dog'. Give another --hub_model_id"),
        (
            "--push_to_hub",
            {"output_dir": "my dog"},
            "--push_to_hub: .*'my dog'. Give another --hub_model_id or --output_dir",
        ),
        ("--hub_private_repo", {}, "--hub_private_repo has no effect without --push_to_hub"),
        ("", {"license": "mit"}, "--license mit has no effect without --push_to_hub: add that, or"),
        ("", {"hub_model_id": "me/my-dog"}, "--hub_model_id me/my-dog has no effect without --push_to_hub"),
    ],
)
def test_what_can_be_seen_without_the_hub(trainer, train, monkeypatch, tmp_path, flags, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trainer.UserError, match=message) as caught:
        train(*flags.split(), **changes)
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_users_is_not_taken_for_an_earlier_pushs(trainer, train, no_weights, tmp_path):
    mine = tmp_path / "out" / "hub" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(trainer.UserError, match="--push_to_hub gathers its files in .*hub, which holds others: move"):
        train("--push_to_hub", output_dir=tmp_path / "out")
    assert mine.read_text() == "mine"


def test_sharing_sana_needs_its_pipelines_file(train, options, small, monkeypatch, tmp_path):
    monkeypatch.setattr(train_dti_sana.Sana, "hub_code", {"pipeline.py": tmp_path / "nowhere.py"})
    monkeypatch.setattr(train_dti_sana.Sana, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(train_dti_sana.UserError, match="--push_to_hub uploads .*nowhere.py, which is missing"):
        train_dti_sana.main(options("--push_to_hub", pretrained_model_name_or_path=small / "sana"))


def test_without_push_nothing_is_prepared_for_it(train):
    out = train(validation_prompt="a photo of {}", num_validation_images=1, validation_inference_steps=1)
    assert not (out / "hub").exists()


def test_a_full_disk_while_sharing_names_the_file_and_what_is_safe(trainer, train, models_seen, monkeypatch):
    out = train(max_train_steps=1)
    write = Path.write_bytes

    def full(path, content):
        if path.parent.name == "hub" and path.name.startswith(".README"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(trainer.UserError, match="README.md cannot be written: No space left.*saved before is intact"):
        trainer.share(models_seen[0], "me/my-dog", {}, {}, "")
    assert load_file(out / "learned_embeds.safetensors")
