"""--config: a file of options is the command line that it stands for, and a run's own file repeats the run."""

import argparse
import contextlib
import json

import pytest
from kill_test import results

import train_dti_sana
import train_dti_sdxl as script


WRITTEN = {
    "toml": "placeholder_token = '<my-pot>'\nkappa = 5e-5\nmax-train-steps = 3\nmixed_precision = 'no'\n"
    "random_flip = true\nvalidation_prompt = ['a {}', 'my {}']\n[lora]\nlora_target_modules = 'to_q,to_k'\nrank = 2\n",
    "yaml": "placeholder_token: <my-pot>\nkappa: 5e-5\n--max_train_steps: 3\nmixed_precision: no\nseed: null\n"
    "random_flip: yes\nvalidation_prompt:\n- a {}\n- my {}\nlora_target_modules: [to_q, to_k]\nrank: 2\n",
    "json": '{"placeholder_token": "<my-pot>", "kappa": 5e-5, "--max-train-steps": 3, "mixed_precision": "no", "seed":'
    ' null, "random_flip": true, "validation_prompt": ["a {}", "my {}"], "lora_target_modules": ["to_q", "to_k"],'
    ' "rank": 2}',
}
MEANT = "--placeholder_token <my-pot> --kappa 5e-5 --max_train_steps 3 --mixed_precision no --random_flip --rank 2"
MEANT = [*MEANT.split(), "--validation_prompt=a {}", "--validation_prompt=my {}", "--lora_target_modules=to_q,to_k"]


def parse(argv: list[str], module=script) -> argparse.Namespace:
    return module.parse_args(argv, module.MODEL_CLASS)


@pytest.fixture
def config(tmp_path):
    """Writes a file of options and returns its path."""

    def write(text: str, name: str = "options.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_stands_for_its_command_line(config, kind):
    rest = ["--pretrained_model_name_or_path=sdxl", "--initializer_token=pot", "--output_dir=out"]
    path = config(WRITTEN[kind], f"options.{kind}")
    assert vars(parse(["--config", path, *rest])) == vars(parse([*MEANT, *rest]))


def test_the_command_line_wins(options, config):
    path = config("kappa = 5e-5\nrandom_flip = true\nvalidation_prompt = ['a {}']\nlearning_rate = 0.1\n")
    flags = ["--kappa", "0", "--random_flip", "false", "--validation_prompt", "my {}"]
    for argv in (["--config", path, *flags], [*flags, "--config", path]):  # wherever it stands
        args = parse(options(*argv, preset=None))
        assert (args.kappa, args.random_flip, args.validation_prompt) == (0, False, ["my {}"])
        assert args.learning_rate == 0.1


def test_a_preset_gives_way_to_what_is_said_later_and_nearer(options, config):
    """Defaults, the file's preset, the file's options, the command line's preset, the command line's options."""
    presets = script.MODEL_CLASS.presets
    fast, paper = (dict(zip(script.PRESET_OPTIONS, presets[x]["rsgd"], strict=True)) for x in ("fast", "paper"))
    path = config("preset = 'fast'\nlr_scheduler = 'cosine'\n")

    def chosen(*flags):
        args = parse(options("--config", path, *flags, max_train_steps=None, preset=None))
        return args.learning_rate, args.lr_scheduler

    assert chosen() == (fast["learning_rate"], "cosine")
    assert chosen("--learning_rate", "1") == (1, "cosine")
    assert chosen("--preset", "fast") == (fast["learning_rate"], fast["lr_scheduler"])
    assert chosen("--preset", "paper") == (paper["learning_rate"], paper["lr_scheduler"])


def two_values(kind) -> tuple:
    """Two that an argparse type takes."""
    for pair in ((True, False), (64, 128), (0.25, 0.5)):
        with contextlib.suppress(argparse.ArgumentTypeError):
            if kind is not None and [kind(str(value)) for value in pair]:
                return pair
    return "some", "other"


@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_every_option_can_be_in_a_file_and_overruled(module, config):
    """Also those to come: an option that is on or off takes true and false."""
    job = ["--pretrained_model_name_or_path=m", "--placeholder_token=<x>", "--initializer_token=a", "--output_dir=out"]
    for action in module.make_parser(module.MODEL_CLASS, add_help=False)._actions:
        for spelling in set(action.option_strings) - {"--config"}:
            first, second = list(action.choices)[:2] if action.choices else two_values(action.type)
            path = config(json.dumps({spelling: first}), "options.json")
            rest = [argument for argument in job if not argument.startswith(f"{spelling}=")]
            written, read, overruled = (
                getattr(parse([*rest, *flags], module), action.dest)
                for flags in (
                    [f"{spelling}={first}"],
                    [f"--config={path}"],
                    [f"--config={path}", f"{spelling}={second}"],
                )
            )
            assert read == written != overruled, spelling


@pytest.mark.parametrize(
    "trainer, flags",
    [
        (script, "--magnitude free --optimizer adamw --rank 2 --random_flip"),
        (train_dti_sana, "--scale_lr --learning_rate 0.01"),
    ],
)
def test_a_runs_own_file_repeats_it_to_the_bit(trainer, flags, options, tmp_path, train):
    shown = {"validation_prompt": "a {}", "num_validation_images": 1}
    out = train(*flags.split(), **shown, seed=None, max_train_steps=2)
    first = out.rename(tmp_path / "first")
    said_by_the_file = {option.removeprefix("--"): None for option in options() if option.startswith("--")}
    file = first / "training_options.json"
    train("--config", str(file), **said_by_the_file | {"output_dir": out})  # which is what the file says, too
    assert results(out) == results(first)
    assert (out / "validation-2.png").read_bytes() == (first / "validation-2.png").read_bytes()
    assert (out / "training_options.json").read_text() == file.read_text()


def test_toml_without_a_reader_says_what_to_do(options, config, monkeypatch):
    monkeypatch.setattr(script, "TOML_READER", "no_such_module")
    with pytest.raises(script.UserError, match="TOML needs Python 3.11 or `pip install tomli`"):
        parse(options("--config", config("")))
    assert parse(options("--config", config("", "o.yaml")))


def test_what_is_wrong_in_the_file_is_said_to_be_in_the_file(options, config, capsys):
    path = config("kappa = -1\n")
    with pytest.raises(SystemExit):
        parse(options("--config", path))
    assert f"--config {path}: error: argument --kappa: '-1' is not a number of at least 0" in capsys.readouterr().err


def test_help_still_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--config FILE" in printed and "(default: rsgd)" in printed
