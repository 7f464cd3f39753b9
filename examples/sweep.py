#!/usr/bin/env python
"""Sweep magnitude, steps, learning rate and schedule in the miniature world, against plain Textual Inversion (TI).

    python examples/sweep.py --output_dir sweep
    python examples/sweep.py --output_dir sweep --magnitudes 2mean --steps 125 --total_angles 20 --schedules linear \
      --variants "plain=" "batch 1=--train_batch_size=1"

TI is strong if it stops at its best step, so every setting is compared with TI at several steps and at both of its learning
rates, the printed one and the released one. train_many.py trains every combination on each concept with each seed. evaluate.py
scores the subject by the image score, and the prompts by the share of correct attributes. A point dominates another point if
it is better in one score and not worse in the other. A repeated run skips finished work, so a coarse sweep can be refined.

Written to --output_dir: `report.md` and `report.json` with every setting's scores, the number of TI's points that it dominates
and the number that dominate it, `scores.csv` with a row for each evaluated embedding, and `front-*.png`.

Sections: 1 options, 2 settings, 3 report, 4 main.
"""

import argparse
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

from benchmark import check_configurations, load_script
from evaluate import cell, interval
from export import make_parser, markdown_table, run, write_files
from generate import number as at_least
from reproduce import (
    EXAMPLES,
    METHODS,
    Method,
    Run,
    add_common_options,
    at_step,
    check_concepts,
    check_models,
    concept_means,
    evaluate_all,
    facts_of,
    keep_options,
    scores_by_run,
    subjects,
    train_all,
)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


def named_options(text: str) -> tuple[str, str]:
    name, equals, options = text.partition("=")
    if not equals or not all(word.startswith("--") and "=" in word for word in options.split()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS, such as 'batch 8=--train_batch_size=8'")
    return name, options


MODELS = {
    "sdxl": "train_dti_sdxl.py",
    "sd": "examples/train_dti_sd.py",
    "sana": "train_dti_sana.py",
}  # the training scripts
REFERENCES = (
    "TI",
    "TI, printed",
    "DTI",
    "DTI, printed",
)  # reproduce.py's methods: their runs in the same folder are reused


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_common_options(parser)
    add = parser.add_argument
    add("--model", choices=MODELS, default="sdxl", help="The pipeline's folder in --models, which also decides the training script.")
    add("--magnitudes", nargs="+", default=["mean", "2mean", "3mean"], help="Values of --magnitude.")
    add("--steps", type=at_least(int, 1), nargs="+", default=[60, 125, 250])
    add("--total_angles", type=at_least(float, 0), nargs="+", default=[10.0, 20.0], metavar="RADIANS", help="Learning rate times steps: the angle of a constant rate that always turns in one direction. Printed: 2.5, released: 16.")
    add("--schedules", nargs="+", default=["linear"], help="Values of --lr_scheduler.")
    add("--variants", type=named_options, nargs="+", default=[("", "")], metavar="NAME=OPTIONS", help="Further options of the script as --OPTION=VALUE. Each variant is combined with every setting.")
    add("--concepts", type=at_least(int, 2), default=4)
    add("--seeds", type=at_least(int, 1), default=3, help="Training seeds.")
    add("--prompts", choices=["world", "world-half"], default="world", help="All 40 prompts of evaluate.py, or every second one.")
    add("--several_places", action="store_true", help="Place each picture elsewhere, instead of all in one place.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.pipeline = check_models(args.models, args.model)
    args.script = EXAMPLES.parent / MODELS[args.model]
    check_concepts(args.concepts)
    args.stock_pooling = False
    args.ablation_concepts, args.ablation_seeds = (
        args.concepts,
        args.seeds,
    )  # every run is also evaluated at intermediate steps
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Settings
# ----------------------------------------------------------------------------------------------------------------------


def references(several: bool) -> list[Method]:
    """Plain TI and DTI at the released and the printed rate; TI also at intermediate steps."""
    found = [method for method in METHODS if method.name in REFERENCES]
    return [replace(m, name=f"{m.name}, several places", several=True) for m in found] if several else found


def settings_of(args: argparse.Namespace) -> list[Method]:
    """Every setting of the grid as a Method of reproduce.py."""
    grid = itertools.product(args.steps, args.total_angles, args.magnitudes, args.schedules, args.variants)
    found = []
    for steps, angle, magnitude, schedule, (variant, options) in grid:
        rate = float(f"{angle / steps:.2g}")
        name = f"{magnitude}, {steps} steps, {rate:g} {schedule}" + (f", {variant}" if variant else "")
        words = f"--max_train_steps={steps} --learning_rate={rate} --lr_scheduler={schedule} --magnitude={magnitude}"
        found.append(Method(name, f"{words} {options}".strip(), several=args.several_places))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 3. Report
# ----------------------------------------------------------------------------------------------------------------------


def scores(records: list[dict], method: str) -> dict:
    """Image score and share of the prompt's correct attributes, with intervals over concepts."""
    return {m: interval(concept_means(records, method, m).values()) for m in ("image", "said")}


def dominates(a: dict, b: dict) -> bool:
    """Whether `a` is better than `b` in at least one score and worse in none."""
    pairs = [(a[m]["mean"], b[m]["mean"]) for m in ("image", "said")]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def beaten(a: dict, b: dict) -> bool:
    """Whether `b` dominates `a`, in at least one score by more than the interval of `a`."""
    return dominates(b, a) and any(b[m]["mean"] > (a[m]["high"] or a[m]["mean"]) for m in ("image", "said"))


def draw_front(rows: dict[str, dict], curves: dict[str, list[str]]) -> bytes:
    """Plot image score against attributes: a curve for each method over its steps, a point for each setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    on_curves = {name for names in curves.values() for name in names}
    for label, names in curves.items():
        axes.plot(*([rows[n][m]["mean"] for n in names] for m in ("said", "image")), "o-", label=label)
    for name, row in rows.items():
        x, y = (row[m]["mean"] for m in ("said", "image"))
        axes.plot([x], [y], "k." if name not in on_curves else "")
        axes.annotate(name.rpartition(" @")[2], (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.margins(x=0.3)
    axes.set(xlabel="share of the prompt's attributes that are right", ylabel="image score")
    axes.legend()
    FigureCanvasAgg(figure).print_png(content := io.BytesIO())
    return content.getvalue()


def table(by_scale: dict[str, dict[str, dict]], names: list[str], front: list[str]) -> str:
    """One row per setting: both scores at each guidance scale, and how many of TI's points it dominates or is beaten by."""
    lines = []
    for name in names:
        line = [name]
        for rows in by_scale.values():
            mine, others = rows[name], [rows[n] for n in front if n != name]
            over, under = sum(dominates(mine, x) for x in others), sum(beaten(mine, x) for x in others)
            line += [cell(mine["image"]), cell(mine["said"]), f"{over} / {under}"]
        lines.append(line)
    heads = [f"{what}, {scale}" for scale in by_scale for what in ("image", "attributes", "over / under TI")]
    return markdown_table(["setting", *heads], lines)


def write_report(records: dict[str, list[dict]], settings: list[Method], args: argparse.Namespace) -> Path:
    known = references(args.several_places)
    curves = {m.name: [*(at_step(m.name, n) for n in m.at), m.name] for m in known if m.name.startswith("TI")}
    front = [name for names in curves.values() for name in names]
    names = [*front, *(m.name for m in known if m.name not in curves), *(m.name for m in settings)]
    by_scale = {scale: {name: scores(mine, name) for name in names} for scale, mine in records.items()}
    pictures = "each picture in another place" if args.several_places else "pictures in one place"
    training = f"{args.script.name}, {args.num_vectors} vectors, batch {args.train_batch_size}, {pictures}"
    facts = facts_of(args) | {"training": training}
    parts = ["# Settings against plain Textual Inversion's front", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    parts += [
        f"{args.concepts} concepts, {args.seeds} seeds; intervals are 95% over concepts. 'over / under TI' counts those of"
    ]
    parts += [
        f"TI's {len(front)} points that a row dominates by its means, and those that dominate it by more than its interval.",
        "",
    ]
    parts += [table(by_scale, names, front), ""]
    parts += [f"![image against attributes](front-{scale}.png)" for scale in by_scale]
    files = {f"front-{scale}.png": draw_front(rows, curves) for scale, rows in by_scale.items()}
    content = json.dumps({"facts": facts, "settings": by_scale}, indent=1) + "\n"
    files |= {"report.md": ("\n".join(parts) + "\n").encode(), "report.json": content.encode()}
    files |= {"scores.csv": scores_by_run(records)}
    write_files({args.output_dir / name: data for name, data in files.items()})
    return args.output_dir / "report.md"


# ----------------------------------------------------------------------------------------------------------------------
# 4. Main
# ----------------------------------------------------------------------------------------------------------------------


def check_runs(runs: list[Run], args: argparse.Namespace) -> None:
    """Let the script check every run's options before training starts. Raises UserError."""
    options = [[f"--{k}={v}" for k, v in item.row(args).items() if k != "name"] for item in runs]
    common = [f"--pretrained_model_name_or_path={args.pipeline}"]
    check_configurations(load_script(args.script), [common + words for words in options])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = settings_of(args)
    methods = [*references(args.several_places), *settings]
    runs = [Run(m, c, seed) for c in subjects()[: args.concepts] for seed in range(args.seeds) for m in methods]
    check_runs(runs, args)
    keep_options(args, "model", "num_vectors", "train_batch_size", "place_seed")
    train_all(runs, args)
    path = write_report(evaluate_all(runs, args), settings, args)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
