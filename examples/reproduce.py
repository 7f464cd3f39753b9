#!/usr/bin/env python
"""Repeat the paper's Tables 2 and 3 in the miniature world: train every method on several concepts, and compare.

    python examples/reproduce.py --output_dir reproduction

Eight concepts and three seeds for the four methods of Table 2, four concepts and two seeds for the ablations. Each is a run
of train_dti_sdxl.py as a user starts it; each is evaluated by evaluate.py with 40 prompts and 4 seeds, at guidance scales 5
and 1.5. Runs share the processor's cores (`--jobs`) or take turns on a GPU, and whatever is finished is not done again: stop
it and start it as you like.

Written to --output_dir: `report.md` with the tables beside the paper's and its orderings one by one, `report.json`, scatter
plots, `runs/<concept>/<method>-<seed>` and `evaluations/<setting>/<concept>` with contact sheets.

Sections: 1 options, 2 methods and what the paper says of them, 3 training, 4 evaluation, 5 report, 6 main.
"""

import argparse
import csv
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from evaluate import MEASURES, cell, draw_scatter, interval, markdown_table, miniature, statistics
from export import UserError, make_parser, run, write_files
from generate import number as at_least
from rescale import magnitudes


EXAMPLES = Path(__file__).resolve().parent
SCRIPT = EXAMPLES.parent / "train_dti_sdxl.py"


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What a comparison of trainings needs, whatever it compares: sweep.py has the same."""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Where everything is written, and gone on from.")
    add("--models", type=Path, default=EXAMPLES / "miniature", help="Folder with the pipeline, siglip, dinov2 and classifiers.")
    add("--train_batch_size", type=at_least(int, 1), default=4, help="Paper: 4.")
    add("--num_inference_steps", type=at_least(int, 1), default=25, help="Of every picture.")
    add("--dtype", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="Of the pictures, as evaluate.py has it. Some processors multiply bf16 matrices far faster.")
    add("--jobs", type=at_least(int, 1), default=1 if torch.cuda.is_available() else os.cpu_count(), help="Processes at a time. Default: one a core, one on a GPU.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_common_options(parser)
    add = parser.add_argument
    add("--concepts", type=at_least(int, 2), default=8, help="Concepts for Table 2.")
    add("--seeds", type=at_least(int, 1), default=3, help="Training seeds for Table 2.")
    add("--ablation_concepts", type=at_least(int, 0), default=4, help="Concepts for Table 3; 0: Table 2 alone.")
    add("--ablation_seeds", type=at_least(int, 1), default=2, help="Training seeds for Table 3.")
    add("--max_train_steps", type=at_least(int, 1), default=500, help="Paper: 500.")
    add("--guidance_scales", type=at_least(float, 0), nargs="+", default=[5.0, 1.5], help="One evaluation for each.")
    add("--picture_seeds", type=at_least(int, 0), nargs="+", default=[0, 1, 2, 3], help="Pictures of each prompt. Paper: four.")
    add("--prompts", default="world", help="As evaluate.py has them.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.pipeline = check_models(args.models, "sdxl")
    check_concepts(max(args.concepts, args.ablation_concepts))
    return args


def check_concepts(count: int) -> None:
    """Refuse more concepts than there are. Raises UserError."""
    available = sum(concept.subject is not None for concept in miniature("world").CONCEPTS.values())
    if count > available:
        raise UserError(f"--concepts {count}: the world has {available} subjects among its concepts.")


JUDGES = ("siglip/config.json", "dinov2/config.json", "classifiers/model.safetensors")


def check_models(folder: Path, model: str) -> Path:
    """The pipeline's folder. Raises UserError for a folder that lacks it or a judge."""
    for name in (f"{model}/model_index.json", *JUDGES):
        if not (folder / name).is_file():
            raise UserError(f"--models {folder} has no {name}: give the folder that train_models.py has filled.")
    return folder / model


# ----------------------------------------------------------------------------------------------------------------------
# 2. Methods and what the paper says of them
# ----------------------------------------------------------------------------------------------------------------------

FREE = "--magnitude free --optimizer adamw"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        options: the training script's; "{5}" stands for five times the vocabulary's mean norm.
        paper: its image and text score on SDXL in the paper, where it is there.
        of: for a finished embedding treated otherwise, the method that it is of.
        ablation: trained for Table 3 only.
    """

    name: str
    options: str = ""
    paper: tuple[float, float] | None = None
    of: str | None = None
    ablation: bool = False


METHODS = (
    Method("TI", FREE, (0.561, 0.292)),
    Method("TI-rescaled", paper=(0.243, 0.466), of="TI"),
    Method("CrossInit", f"{FREE} --init contextual --reg_weight 1e-5", (0.545, 0.464)),
    Method("DTI", "", (0.450, 0.522)),
    Method("AdamW", "--optimizer adamw", (0.335, 0.463), ablation=True),
    Method("m* min", "--magnitude min", (0.030, 0.074), ablation=True),
    Method("m* 5 x mean", "--magnitude {5}", ablation=True),
    Method("m* 10 x mean", "--magnitude {10}", (0.383, 0.373), ablation=True),  # the paper's 5.0 is 12 times the mean
    Method("kappa 0", "--kappa 0", (0.507, 0.436), ablation=True),
    Method("kappa 5e-4", "--kappa 5e-4", (0.278, 0.688), ablation=True),
    Method("eta 1e-2", "--learning_rate 1e-2", ablation=True),
    Method("eta 2e-2", "--learning_rate 2e-2", ablation=True),
    # A norm grows by the learning rate and with the root of the width: the miniature's narrow TI ends at 5 times the mean
    # norm, the paper's at 50 times.
    Method("TI, eta 2e-2", f"{FREE} --learning_rate 2e-2", ablation=True),
    # A subject has up to five attributes, and a word of the miniature's states one of them.
    Method("TI, 4 vectors", f"{FREE} --num_vectors 4", ablation=True),
    Method("DTI, 4 vectors", "--num_vectors 4", ablation=True),
    Method("TI, trained at end token", f"{FREE} --pooling eos", ablation=True),
    Method("DTI, trained at end token", "--pooling eos", ablation=True),
)

# The paper's orderings on SDXL: by this measure the first is above the second.
ORDERINGS = (
    ("text", "DTI", "TI"),
    ("text", "DTI", "CrossInit"),
    ("text", "DTI", "TI-rescaled"),
    ("text", "CrossInit", "TI"),
    ("text", "TI-rescaled", "TI"),
    ("image", "TI", "DTI"),
    ("image", "CrossInit", "DTI"),
    ("image", "DTI", "TI-rescaled"),
    ("text", "DTI", "AdamW"),
    ("image", "DTI", "AdamW"),
    ("text", "DTI", "m* min"),
    ("image", "DTI", "m* min"),
    ("text", "DTI", "m* 10 x mean"),
    ("image", "DTI", "m* 10 x mean"),
    ("text", "DTI", "kappa 0"),
    ("image", "kappa 0", "DTI"),
    ("text", "kappa 5e-4", "DTI"),
    ("image", "DTI", "kappa 5e-4"),
)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: a method's on a concept from a seed."""

    method: Method
    concept: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method.name} #{self.seed}"

    def folder(self, args: argparse.Namespace) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in self.method.name)
        return args.output_dir / "runs" / self.concept / f"{name}-{self.seed}"


def plan(args: argparse.Namespace) -> list[Run]:
    """All trainings, a concept's methods together, Table 2 before Table 3."""
    world = miniature("world")
    concepts = [name for name, concept in world.CONCEPTS.items() if concept.subject is not None]
    trained = [method for method in METHODS if method.of is None]
    runs = []
    for ablation, count, seeds in (
        (False, args.concepts, args.seeds),
        (True, args.ablation_concepts, args.ablation_seeds),
    ):
        methods = [method for method in trained if method.ablation == ablation]
        runs += [Run(m, concept, seed) for concept in concepts[:count] for seed in range(seeds) for m in methods]
    return runs


def training_command(item: Run, args: argparse.Namespace, mean: float) -> list[str]:
    concept = miniature("world").CONCEPTS[item.concept]
    options = {
        "pretrained_model_name_or_path": args.pipeline,
        "instance_data_dir": args.output_dir / "concepts" / item.concept,
        "placeholder_token": f"<{item.concept}>",
        "initializer_token": concept.initializer,
        "output_dir": item.folder(args),
        "resolution": miniature("world").SIZE,
        "max_train_steps": args.max_train_steps,
        "train_batch_size": args.train_batch_size,
        "seed": item.seed,
        "report_to": "none",
        "resume_from_checkpoint": "latest",
    }
    chosen = item.method.options.replace("{5}", f"{5 * mean:.4f}").replace("{10}", f"{10 * mean:.4f}")
    pairs = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, str(SCRIPT), *pairs, *chosen.split()]


def call(command: list[str], log: Path) -> None:
    """Run a command on one core. Raises UserError with the end of what it said."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(f"{Path(command[1]).name} failed: {last} (all that it said: {log})")


def in_parallel(tasks: list, work, jobs: int, what: str) -> None:
    """Do all tasks, several at a time, and say how long it will take. A failure ends the rest."""
    began = time.time()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                left = (time.time() - began) / done * (len(tasks) - done)
                print(f"{what}: {done}/{len(tasks)}, about {left / 60:.0f} minutes left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_photographs(runs: list[Run], args: argparse.Namespace) -> None:
    world = miniature("world")
    for name in dict.fromkeys(item.concept for item in runs):
        folder = args.output_dir / "concepts" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(world.instance_pictures(world.CONCEPTS[name])):
            picture.save(folder / f"{number}.png")


def keep_options(args: argparse.Namespace, *names: str) -> None:
    """Refuse to go on in a folder whose runs had other options, and note these. Raises UserError."""
    path, given = args.output_dir / "options.json", {name: getattr(args, name) for name in names}
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in given.items():
        if noted.get(name, value) != value:
            raise UserError(
                f"--{name} {value}: the runs in {path.parent} had {noted[name]}. Give another --output_dir."
            )
    write_files({path: (json.dumps(noted | given) + "\n").encode()})


def train_all(runs: list[Run], args: argparse.Namespace) -> None:
    keep_options(args, "max_train_steps", "train_batch_size")
    write_photographs(runs, args)
    means = [m["mean"] for m in magnitudes(str(args.pipeline)).values()]
    missing = [item for item in runs if not (item.folder(args) / "learned_embeds.safetensors").is_file()]

    def train(item: Run) -> None:
        command = training_command(item, args, sum(means) / len(means))
        call(command, item.folder(args).with_suffix(".log"))

    in_parallel(missing, train, args.jobs, "trained")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How pictures are sampled: all methods at each guidance scale, and a few pooled as a stock pipeline does."""

    guidance_scale: float
    pooling: str = "eos"

    @property
    def name(self) -> str:
        return f"guidance-{self.guidance_scale:g}" + ("-stock" if self.pooling == "stock" else "")


POOLING_METHODS = ("TI", "DTI")  # sampled with stock pooling too, at the last guidance scale


def settings_of(args: argparse.Namespace) -> list[Setting]:
    stock = [Setting(args.guidance_scales[-1], "stock")] if args.ablation_concepts else []
    return [Setting(scale) for scale in args.guidance_scales] + stock


def evaluation_folder(setting: Setting, concept: str, args: argparse.Namespace) -> Path:
    return args.output_dir / "evaluations" / setting.name / concept


def evaluated_runs(setting: Setting, runs: list[Run], args: argparse.Namespace) -> list[Run]:
    if setting.pooling == "eos":
        return runs
    concepts = list(dict.fromkeys(item.concept for item in runs))[: args.ablation_concepts]
    return [
        item
        for item in runs
        if item.method.name in POOLING_METHODS and item.concept in concepts and item.seed < args.ablation_seeds
    ]


def evaluate_concept(task: tuple[Setting, str, list[Run]], args: argparse.Namespace) -> None:
    """All of a concept's embeddings by evaluate.py, in one process."""
    setting, concept, runs = task
    folder = evaluation_folder(setting, concept, args)
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["subject", "method", "path", "instance_data_dir", "class_word"])
    pictures, word = args.output_dir / "concepts" / concept, miniature("world").CONCEPTS[concept].initializer
    for item in runs:
        writer.writerow([concept, item.label, item.folder(args), pictures, word])
    write_files({folder / "table.csv": rows.getvalue().encode()})
    options = {
        "pretrained_model_name_or_path": args.pipeline,
        "table": folder / "table.csv",
        "output_dir": folder,
        "prompts": args.prompts,
        "dino": args.models / "dinov2",
        "siglip": args.models / "siglip",
        "classifiers": args.models / "classifiers",
        "guidance_scale": setting.guidance_scale,
        "pooling": setting.pooling,
        "num_inference_steps": args.num_inference_steps,
        "batch_size": 40,
        "dtype": args.dtype,
        "device": args.device,
    }
    command = [sys.executable, str(EXAMPLES / "evaluate.py")]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += ["--seeds", *map(str, args.picture_seeds)]
    rescaled = [f"{item.label}=mean" for item in runs if item.method.name == "TI" and setting.pooling == "eos"]
    call(command + (["--rescale", *rescaled] if rescaled else []), folder / "evaluate.log")


def evaluate_all(runs: list[Run], args: argparse.Namespace) -> dict[str, list[dict]]:
    """The records of all pictures by setting, with the method's name in place of the run's."""
    tasks = []
    for setting in settings_of(args):
        chosen = evaluated_runs(setting, runs, args)
        for concept in dict.fromkeys(item.concept for item in chosen):
            tasks.append((setting, concept, [item for item in chosen if item.concept == concept]))
    in_parallel(tasks, lambda task: evaluate_concept(task, args), args.jobs, "evaluated")
    records = {}
    for setting, concept, _ in tasks:
        report = json.loads((evaluation_folder(setting, concept, args) / "evaluation.json").read_text("utf-8"))
        for record in report["records"]:
            method, _, rest = record["method"].partition(" #")
            record["method"] = method + "-rescaled" * rest.endswith("-rescaled")
            records.setdefault(setting.name, []).append(record)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# 5. Report
# ----------------------------------------------------------------------------------------------------------------------

SHOWN = ("image", "text", "cosine", "said", "kept")


def concept_means(records: list[dict], method: str, measure: str) -> dict[str, float]:
    """The measure's mean by concept, over seeds, prompts and pictures."""
    values = {}
    for record in records:
        if record["method"] == method and measure in record:
            values.setdefault(record["subject"], []).append(record[measure])
    return {subject: sum(v) / len(v) for subject, v in values.items()}


def paired(records: list[dict], measure: str, above: str, below: str) -> dict | None:
    """Difference of two methods, with its 95% interval over the concepts that both have."""
    a, b = concept_means(records, above, measure), concept_means(records, below, measure)
    common = [name for name in a if name in b]
    return interval(a[name] - b[name] for name in common) if common else None


def verdict(difference: dict | None) -> str:
    if difference is None or difference["low"] is None:
        return "not measured"
    if difference["low"] > 0:
        return "**yes**"
    return "**reversed**" if difference["high"] < 0 else "undecided"


def table(records: list[dict], methods: list[str]) -> str:
    """A row a method: concepts, the measures with their intervals, and the paper's two scores."""
    paper = {method.name: method.paper for method in METHODS}
    rows = []
    for name in methods:
        means = {measure: concept_means(records, name, measure) for measure in SHOWN}
        count = len(means["image"])
        if count:
            scores = [cell(interval(values.values())) if values else "" for values in means.values()]
            published = " / ".join(f"{x:.3f}" for x in paper[name]) if paper.get(name) else ""
            rows.append([name, str(count), *scores, published])
    return markdown_table(["method", "concepts", *(MEASURES[m] for m in SHOWN), "paper, image / text"], rows)


def orderings(records: list[dict]) -> tuple[str, list[dict]]:
    """The paper's orderings by the scores, and by the share of attributes that are right, which is less noisy."""
    rows, found = [], []
    for measure, above, below in ORDERINGS:
        other = {"text": "said", "image": "kept"}[measure]
        score, attribute = (paired(records, m, above, below) for m in (measure, other))
        found.append({"measure": measure, "above": above, "below": below, "score": score, "attributes": attribute})
        rows.append(
            [
                f"{measure}: {above} above {below}",
                cell(score, "+") if score else "",
                verdict(score),
                cell(attribute, "+") if attribute else "",
                verdict(attribute),
            ]
        )
    names = ["in the paper", "difference of scores", "here", "difference of attributes right", "here"]
    return markdown_table(names, rows), found


def commit() -> str:
    command = ["git", "-C", str(EXAMPLES), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def facts_of(args: argparse.Namespace) -> dict[str, str]:
    """Where a report comes from."""
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    seeds = ", ".join(map(str, args.picture_seeds))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": f"{machine}, {platform.machine()}",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}",
        "sampling": f"{args.num_inference_steps} steps of the paper's sampler, seeds {seeds} of each prompt, dtype {args.dtype}",
    }


def write_report(records: dict[str, list[dict]], args: argparse.Namespace) -> Path:
    facts = facts_of(args) | {"training": f"{args.max_train_steps} steps, batch {args.train_batch_size}"}
    parts = ["# The paper's Tables 2 and 3 in miniature", "", *(f"- {k}: {v}" for k, v in facts.items())]
    parts += ["", "Intervals are 95%, over concepts; seeds are averaged first. Differences are paired by concept.", ""]
    found, plots = {}, {}
    for name, mine in records.items():
        shared = {r["subject"] for r in mine if r["method"] == "AdamW"}
        ablated = [r for r in mine if r["subject"] in shared]
        parts += [f"## {name}", ""]
        if name.endswith("-stock"):
            parts += ["Pooled in sampling as a stock pipeline does, at the new word.", ""]
            parts += [table(mine, list(POOLING_METHODS)), ""]
            continue
        parts += [table(mine, [m.name for m in METHODS if not m.ablation]), ""]
        if ablated:
            parts += ["The ablations, on the concepts that all of these have:", ""]
            parts += [table(ablated, [m.name for m in METHODS]), ""]
        text, found[name] = orderings(mine)
        parts += [text, "", f"![image against text score](scatter-{name}.png)", ""]
        plots[f"scatter-{name}.png"] = draw_scatter(statistics(mine))
    content = json.dumps({"facts": facts, "orderings": found}, indent=1) + "\n"
    files = {"report.md": "\n".join(parts).encode(), "report.json": content.encode(), **plots}
    write_files({args.output_dir / name: data for name, data in files.items()})
    return args.output_dir / "report.md"


# ----------------------------------------------------------------------------------------------------------------------
# 6. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = plan(args)
    train_all(runs, args)
    path = write_report(evaluate_all(runs, args), args)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
