#!/usr/bin/env python
"""Sweep steps, learning rate and schedule in the miniature world: which settings learn a subject best in how many steps?

    python examples/sweep.py --output_dir sweep
    python examples/sweep.py --output_dir sweep --steps 60 --total_angles 5 10 --schedules linear \
      --variants "plain=" "batch 8=--train_batch_size=8"

Every combination is trained on each concept from each seed by train_many.py, that is by the model's training script with
the models loaded once, beside the paper's setting for the model. evaluate.py scores them: the subject by the image score at
the first guidance scale, the prompts by the share of attributes that are right at the last one, where the differences are
larger. What is finished is not done again, so that a coarse sweep can be refined.

Written to --output_dir: `report.md` and `report.json` with every setting's scores and its differences from the paper's,
and `fronts.png`, image against text for each number of steps.

Sections: 1 options, 2 settings, 3 training, 4 report, 5 main.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmark import check_configurations, load_script
from evaluate import cell, interval, markdown_table
from export import UserError, make_parser, run, write_files
from generate import number as at_least
from reproduce import (
    EXAMPLES,
    Method,
    Run,
    add_common_options,
    check_concepts,
    check_models,
    concept_means,
    evaluate_all,
    facts_of,
    keep_options,
    miniature,
    paired,
    write_photographs,
)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


def named_options(text: str) -> tuple[str, str]:
    name, equals, options = text.partition("=")
    if not equals or not all(word.startswith("--") and "=" in word for word in options.split()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS, such as 'batch 8=--train_batch_size=8'")
    return name, options


PAPERS = {"sdxl": (500, 0.005), "sana": (1000, 0.02)}  # steps and constant learning rate


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_common_options(parser)
    add = parser.add_argument
    add("--model", choices=PAPERS, default="sdxl", help="The pipeline's folder in --models, and the script that trains on it.")
    add("--steps", type=at_least(int, 1), nargs="+", default=[30, 60, 125, 250, 500])
    add("--total_angles", type=at_least(float, 0), nargs="+", default=[2.5, 5.0, 10.0, 20.0], metavar="RADIANS", help="Learning rate times steps: how far a constant rate would turn the token if it always turned one way. Paper: 2.5.")
    add("--schedules", nargs="+", default=["constant", "linear", "cosine"], help="Of --lr_scheduler.")
    add("--variants", type=named_options, nargs="+", default=[("", "")], metavar="NAME=OPTIONS", help="Further options of the script as --OPTION=VALUE, each with every combination.")
    add("--num_vectors", type=at_least(int, 1), default=4, help="Of every setting. One is too little for a subject of this world: reproduction/README.md.")
    add("--concepts", type=at_least(int, 2), default=4)
    add("--seeds", type=at_least(int, 1), default=3, help="Training seeds.")
    add("--guidance_scales", type=at_least(float, 0), nargs="+", default=[5.0, 1.5], help="The first for the image score, the last for the attributes.")
    add("--picture_seeds", type=at_least(int, 0), nargs="+", default=[0], help="Pictures of each prompt.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.pipeline = check_models(args.models, args.model)
    args.script = EXAMPLES.parent / f"train_dti_{args.model}.py"
    check_concepts(args.concepts)
    args.prompts, args.ablation_concepts = "world", 0  # whose attributes can be judged; no stock pooling
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Settings
# ----------------------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> dict[Method, int]:
    """Every setting as reproduce.py's method, with its number of steps; the paper's first."""
    steps, rate = PAPERS[args.model]
    words = f"--max_train_steps={steps} --learning_rate={rate} --lr_scheduler=constant"
    found = {Method(f"paper: {steps} steps, {rate} constant", words): steps}
    grid = itertools.product(args.steps, args.total_angles, args.schedules, args.variants)
    for steps, angle, schedule, (variant, options) in grid:
        rate = float(f"{angle / steps:.2g}")
        name = f"{steps} steps, {rate:g} {schedule}" + (f", {variant}" if variant else "")
        words = f"--max_train_steps={steps} --learning_rate={rate} --lr_scheduler={schedule} {options}"
        found[Method(name, words.strip())] = steps
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 3. Training
# ----------------------------------------------------------------------------------------------------------------------


def subject_row(item: Run, args: argparse.Namespace) -> dict[str, str]:
    """A run as train_many.py has it: its name, and the script's options for it alone."""
    row = {
        "name": item.folder(args).relative_to(args.output_dir / "runs"),
        "instance_data_dir": args.output_dir / "concepts" / item.concept,
        "placeholder_token": f"<{item.concept}>",
        "initializer_token": miniature("world").CONCEPTS[item.concept].initializer,
        "seed": item.seed,
    }
    words = [word.removeprefix("--").split("=", 1) for word in item.method.options.split()]
    return {k: str(v) for k, v in row.items()} | dict(words)


def check_runs(runs: list[Run], args: argparse.Namespace) -> None:
    """Let the script look at every run's options before anything is trained. Raises UserError."""
    rows = [subject_row(item, args) for item in runs]
    options = [[f"--{k}={v}" for k, v in row.items() if k != "name"] for row in rows]
    common = [f"--pretrained_model_name_or_path={args.pipeline}"]
    check_configurations(load_script(args.script), [common + words for words in options])


def train(runs: list[Run], args: argparse.Namespace) -> None:
    """Train what is not finished, the runs shared by --jobs processes. Raises UserError."""
    keep_options(args, "model", "num_vectors", "train_batch_size")
    write_photographs(runs, args)
    write_files({args.output_dir / "runs.json": json.dumps([subject_row(item, args) for item in runs]).encode()})
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.jobs)]
    options = {
        "script": args.script,
        "subjects": args.output_dir / "runs.json",
        "output_dir": args.output_dir / "runs",
        "pretrained_model_name_or_path": args.pipeline,
        "resolution": miniature("world").SIZE,
        "train_batch_size": args.train_batch_size,
        "num_vectors": args.num_vectors,
        "report_to": "none",
    }
    command += [str(EXAMPLES / "train_many.py"), *(f"--{name}={value}" for name, value in options.items())]
    log = args.output_dir / "train.log"
    print(f"{len(runs)} runs; {log} tells how far they are", flush=True)
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if result.returncode:
        raise UserError(f"train_many.py: a run failed; which one and why is in {log}.")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Report
# ----------------------------------------------------------------------------------------------------------------------


def scores(strong: list[dict], weak: list[dict], method: str, paper: str) -> dict:
    """The two scores of a setting, and their differences from the paper's, with intervals over the concepts."""
    image, said = (interval(concept_means(r, method, m).values()) for r, m in ((strong, "image"), (weak, "said")))
    differences = {m: paired(r, m, method, paper) for r, m in ((strong, "image"), (weak, "said"))}
    return {"setting": method, "image": image, "said": said, "differences": differences}


def on_front(row: dict, rows: list[dict]) -> bool:
    """Whether no other setting is better by both scores."""
    pairs = [(other["image"]["mean"], other["said"]["mean"]) for other in rows if other is not row]
    mine = (row["image"]["mean"], row["said"]["mean"])
    return not any(a >= mine[0] and b >= mine[1] and (a, b) != mine for a, b in pairs)


def verdict(differences: dict) -> str:
    """Better by one score and not worse by the other, as far as the intervals tell."""
    if any(d["low"] is None for d in differences.values()):
        return ""
    if any(d["high"] < 0 for d in differences.values()):
        return "worse in " + " and ".join(name for name, d in differences.items() if d["high"] < 0)
    better = [name for name, d in differences.items() if d["low"] > 0]
    return f"**better in {' and '.join(better)}**" if better else ""


def draw_fronts(rows: dict[int, list[dict]], paper: dict) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def plot(some: list[dict], *style, **options) -> None:
        axes.plot([r["said"]["mean"] for r in some], [r["image"]["mean"] for r in some], *style, **options)

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, (steps, mine) in enumerate(rows.items()):
        front = sorted((row for row in mine if on_front(row, mine)), key=lambda row: row["said"]["mean"])
        plot(mine, ".", color=f"C{number}", alpha=0.4)
        plot(front, "o-", color=f"C{number}", label=f"{steps} steps")
    plot([paper], "k*", markersize=12, label=paper["setting"])
    axes.set(xlabel="attributes of the prompt that are right", ylabel="image score")
    axes.legend()
    FigureCanvasAgg(figure).print_png(content := io.BytesIO())
    return content.getvalue()


def table(rows: list[dict], paper: dict) -> str:
    """A row a setting, the best by the image score first."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["image"]["mean"]):
        line = [row["setting"], cell(row["image"]), cell(row["said"])]
        if row is not paper:
            differences = row["differences"]
            line += [cell(differences["image"], "+"), cell(differences["said"], "+"), verdict(differences)]
            line.append("x" if on_front(row, rows) else "")
        lines.append(line + [""] * (7 - len(line)))
    names = ["setting", "image", "attributes", "difference in image", "in attributes", "against the paper's", "front"]
    return markdown_table(names, lines)


def write_report(records: dict[str, list[dict]], settings: dict[Method, int], args: argparse.Namespace) -> Path:
    first, last = args.guidance_scales[0], args.guidance_scales[-1]
    strong, weak = records[f"guidance-{first:g}"], records[f"guidance-{last:g}"]
    baseline = next(iter(settings))
    rows = {method: scores(strong, weak, method.name, baseline.name) for method in settings}
    training = f"{args.script.name}, {args.num_vectors} vectors, batch {args.train_batch_size}"
    facts = facts_of(args) | {"training": training}
    paper = rows.pop(baseline)
    by_steps = {n: [row for m, row in rows.items() if settings[m] == n] for n in args.steps}
    parts = ["# Steps, learning rate and schedule in miniature", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    parts += [
        f"Image score at guidance {first:g}, attributes right at {last:g}, {args.seeds} seeds. Intervals are 95% over"
    ]
    parts += [f"{args.concepts} concepts, differences from the paper's setting paired.", "", table([paper], paper), ""]
    for steps, mine in by_steps.items():
        parts += [f"## {steps} steps", "", table(mine, paper), ""]
    parts += ["![image against text by number of steps](fronts.png)", ""]
    content = json.dumps({"facts": facts, "settings": [paper, *rows.values()]}, indent=1) + "\n"
    files = {"report.md": "\n".join(parts).encode(), "report.json": content.encode()}
    files["fronts.png"] = draw_fronts(by_steps, paper)
    write_files({args.output_dir / name: data for name, data in files.items()})
    return args.output_dir / "report.md"


# ----------------------------------------------------------------------------------------------------------------------
# 5. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = settings_of(args)
    concepts = [name for name, concept in miniature("world").CONCEPTS.items() if concept.subject is not None]
    runs = [Run(m, c, seed) for c in concepts[: args.concepts] for seed in range(args.seeds) for m in settings]
    check_runs(runs, args)
    train(runs, args)
    path = write_report(evaluate_all(runs, args), settings, args)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
