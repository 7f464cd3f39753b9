#!/usr/bin/env python
"""Reproduce the paper's Tables 2, 3 and 6 in the miniature world: train every method on several concepts and compare.

    python examples/reproduce.py --output_dir reproduction

Each concept's five pictures show one place, as people's photographs often do. A seed chooses the place before any method
runs. Table 2 uses eight concepts and three seeds, with four vectors and with one. The ablations of Table 3 and further
settings use four concepts and two seeds. The settings are those of the authors' launchers (`--preset released`). Separate
rows have the printed settings, pictures in several places, the class word alone, and a description in words. train_many.py
runs the training script. evaluate.py evaluates each run with 40 prompts at guidance scales 5 and 1.5, some runs at several
steps. Runs share the processor's cores (`--jobs`) or take turns on a GPU. A repeated run skips finished work, so the script
can be stopped and restarted at any time.

Written to --output_dir: `report.md` with the tables beside the paper's and a comparison of each of its orderings,
`report.json`, `scores.csv` with a row for each evaluated embedding, plots (image against text score, both scores over the
steps, and over the norm), sheets of pictures, `runs/<concept>/<method>-<seed>` and `evaluations/<setting>/<concept>` with
contact sheets.

Sections: 1 options, 2 methods and the paper's results, 3 training, 4 evaluation, 5 report, 6 main.
"""

import argparse
import csv
import datetime
import functools
import io
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers
from evaluate import MEASURES, averages, cell, draw_scatter, interval, miniature, statistics
from export import (
    ENCODERS,
    Embedding,
    UserError,
    make_parser,
    markdown_table,
    read_embedding,
    run,
    write_embedding,
    write_files,
)
from generate import contact_sheet, load_tokenizers, to_png
from generate import number as at_least
from pictures import open_picture
from PIL import Image
from rescale import vocabulary


EXAMPLES = Path(__file__).resolve().parent
SCRIPT = EXAMPLES.parent / "train_dti_sdxl.py"


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every comparison of trainings, shared with reproduce_sd.py and sweep.py."""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Output folder. A repeated run continues in it.")
    add("--models", type=Path, default=EXAMPLES / "miniature", help="Folder with the pipeline, siglip, dinov2 and classifiers.")
    add("--num_vectors", type=at_least(int, 1), default=4, help="Vectors per learned word, except in rows with one vector. A word of this world states one attribute; a subject has up to five.")
    add("--place_seed", type=at_least(int, 0), default=0, help="Seed that chooses the place of each concept's pictures.")
    add("--train_batch_size", type=at_least(int, 1), default=4, help="Paper: 4.")
    add("--guidance_scales", type=at_least(float, 0), nargs="+", default=[5.0, 1.5], help="Guidance scales, one evaluation each.")
    add("--picture_seeds", type=at_least(int, 0), nargs="+", default=[0], help="Seeds of the pictures of each prompt. Paper: four seeds.")
    add("--num_inference_steps", type=at_least(int, 1), default=25, help="Sampling steps of every picture.")
    add("--dtype", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="Precision for sampling, as in evaluate.py. Some processors multiply bf16 matrices far faster.")
    add("--jobs", type=at_least(int, 1), default=1 if torch.cuda.is_available() else os.cpu_count(), help="Parallel processes. Default: one per core, or one on a GPU.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_common_options(parser)
    add = parser.add_argument
    add("--concepts", type=at_least(int, 2), default=8, help="Concepts for Table 2.")
    add("--one_vector_concepts", type=at_least(int, 0), default=8, help="Of these, the concepts that are also trained with one vector.")
    add("--seeds", type=at_least(int, 1), default=3, help="Training seeds for Table 2.")
    add("--ablation_concepts", type=at_least(int, 0), default=4, help="Concepts for Table 3. 0: only Table 2.")
    add("--ablation_seeds", type=at_least(int, 1), default=2, help="Training seeds for Table 3.")
    add("--max_train_steps", type=at_least(int, 1), help="Steps of every run, for a trial. Default: each method's own.")
    add("--prompts", default="world", help="Prompts, as in evaluate.py.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.model, args.pipeline, args.script = "sdxl", check_models(args.models, "sdxl"), SCRIPT
    args.stock_pooling = args.ablation_concepts > 0
    check_concepts(max(args.concepts, args.ablation_concepts))
    return args


def check_concepts(count: int) -> None:
    """Refuse more concepts than the world has. Raises UserError."""
    available = sum(concept.subject is not None for concept in miniature("world").CONCEPTS.values())
    if count > available:
        raise UserError(f"--concepts {count}: the world has {available} subjects among its concepts.")


JUDGES = {
    "siglip": "siglip",
    "dino": "dinov2",
    "classifiers": "classifiers",
}  # evaluate.py's options, folders in --models


def check_models(folder: Path, model: str) -> Path:
    """The pipeline's folder. Raises UserError for a folder that lacks it or a judge."""
    for name in (
        f"{model}/model_index.json",
        "siglip/config.json",
        "dinov2/config.json",
        "classifiers/model.safetensors",
    ):
        if not (folder / name).is_file():
            raise UserError(f"--models {folder} has no {name}: give the output folder of train_models.py.")
    return folder / model


# ----------------------------------------------------------------------------------------------------------------------
# 2. Methods and the paper's results
# ----------------------------------------------------------------------------------------------------------------------

AUTHORS = "--preset=released"
FREE = "--magnitude=free --optimizer=adamw"
CROSSINIT = f"{FREE} --init=contextual --reg_weight=1e-5"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        options: the training script's, as --OPTION=VALUE.
        paper: image and text score on SDXL in the paper, if given there.
        of: the method whose embedding is rescaled, for a method without its own training.
        words: for an untrained method, the concept's attribute (`initializer` or `description`) that replaces the token.
        at: intermediate steps to evaluate, on the concepts and seeds of the ablations.
        ablation: only for Table 3's concepts and seeds.
        several: trained on pictures that each show another place.
        recommended: starts from the two words that recommend.py reads from the pictures, instead of the class word.
    """

    name: str
    options: str = ""
    paper: tuple[float, float] | None = None
    of: str | None = None
    words: str | None = None
    at: tuple[int, ...] = ()
    ablation: bool = False
    several: bool = False
    recommended: bool = False

    @property
    def trained(self) -> bool:
        return self.of is None and self.words is None


TABLE_2 = (
    Method("TI", f"{AUTHORS} {FREE}", (0.561, 0.292), at=(60, 120, 240)),
    Method("TI-rescaled", paper=(0.243, 0.466), of="TI"),
    Method("CrossInit", f"{AUTHORS} {CROSSINIT}", (0.545, 0.464), at=(120,)),
    Method("DTI", AUTHORS, (0.450, 0.522), at=(120,)),
    Method("DTI, our default"),
)
TABLE_3 = (
    Method("AdamW", f"{AUTHORS} --optimizer=adamw", (0.335, 0.463), ablation=True),
    Method("m* min", f"{AUTHORS} --magnitude=min", (0.030, 0.074), ablation=True),
    Method("m* 5 x mean", f"{AUTHORS} --magnitude=5mean", ablation=True),
    # The paper's magnitude 5.0 is 12 times the mean.
    Method("m* 10 x mean", f"{AUTHORS} --magnitude=10mean", (0.383, 0.373), ablation=True),
    Method("kappa 0", f"{AUTHORS} --kappa=0", (0.507, 0.436), ablation=True),
    Method("kappa 5e-4", f"{AUTHORS} --kappa=5e-4", (0.278, 0.688), ablation=True),
)
OTHERS = (
    Method("class word, not trained", words="initializer"),
    Method("described in words, not trained", words="description"),
    Method("DTI, --preset fast", "--preset=fast", ablation=True),
    Method("TI, printed", f"--preset=paper {FREE}", at=(120, 180, 240), ablation=True),
    Method("DTI, printed", "--preset=paper", ablation=True),
    Method("TI, several places", f"{AUTHORS} {FREE}", ablation=True, several=True),
    Method("DTI, several places", AUTHORS, ablation=True, several=True),
    Method("DTI, our default, several places", ablation=True, several=True),
    # Table 6
    Method("TI, recommended words", f"{AUTHORS} {FREE}", ablation=True, recommended=True),
    Method("DTI, recommended words", AUTHORS, (0.520, 0.391), ablation=True, recommended=True),
    Method("DTI, our default, recommended words", ablation=True, recommended=True),
)


def with_one_vector(method: Method) -> Method:
    options = f"{method.options} --num_vectors=1".strip()
    return replace(
        method, name=one_vector(method.name), options=options, of=method.of and one_vector(method.of), at=()
    )


def one_vector(name: str) -> str:
    return f"{name}, one vector"


METHODS = (*TABLE_2, *map(with_one_vector, TABLE_2), *TABLE_3, *OTHERS)
FRONT = ("TI", "TI, printed", "CrossInit", "DTI", "DTI, our default", "DTI, --preset fast")

# The paper's orderings on SDXL: in this measure, the first method is above the second.
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
    ("text", "DTI", "DTI, recommended words"),
    ("image", "DTI, recommended words", "DTI"),
)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training of a method on a concept with a seed. An untrained method has one run, with seed 0."""

    method: Method
    concept: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method.name} #{self.seed}"

    def folder(self, args: argparse.Namespace) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in self.method.name)
        return args.output_dir / "runs" / self.concept / f"{name}-{self.seed}"

    def pictures(self, args: argparse.Namespace) -> Path:
        """Folder of the training pictures."""
        return (
            args.output_dir / "concepts" / (f"{self.concept}-several-places" if self.method.several else self.concept)
        )

    def row(self, args: argparse.Namespace) -> dict[str, str]:
        """The run as a row for train_many.py: its name and its options of the training script."""
        row = {
            "name": self.folder(args).relative_to(args.output_dir / "runs"),
            "instance_data_dir": self.pictures(args),
            "placeholder_token": f"<{self.concept}>",
            "initializer_token": miniature("world").CONCEPTS[self.concept].initializer,
            "num_vectors": args.num_vectors,
            "seed": self.seed,
        }
        if self.method.at:
            row["save_steps"] = math.gcd(*self.method.at)
        if self.method.recommended:
            row["initializer_token"] = recommended_words(self.concept, args.place_seed, args.models)
        words = [word.removeprefix("--").split("=", 1) for word in self.method.options.split()]
        return {k: str(v) for k, v in row.items()} | dict(words)


@functools.cache
def recommended_words(concept: str, place_seed: int, models: Path) -> str:
    """Two words for the concept's pictures in one place, such as "striped fish"."""
    world, classifiers = miniature("world"), miniature("judges").load_classifiers(models / "classifiers")
    look = world.CONCEPTS[concept]
    return miniature("recommend").recommend(
        world.instance_pictures(look, place=world.home(look, place_seed)), classifiers
    )[1]


def subjects() -> list[str]:
    return [name for name, concept in miniature("world").CONCEPTS.items() if concept.subject is not None]


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, grouped by concept: Table 2 with several vectors, the ablations, then Table 2 with one vector."""
    runs, single = [], {one_vector(method.name) for method in TABLE_2}
    several = [m for m in METHODS if not m.ablation and m.name not in single]
    for methods, count, seeds in (
        (several, args.concepts, args.seeds),
        ([m for m in METHODS if m.ablation], args.ablation_concepts, args.ablation_seeds),
        ([m for m in METHODS if m.name in single], min(args.one_vector_concepts, args.concepts), args.seeds),
    ):
        methods = [method for method in methods if method.of is None]
        for concept in subjects()[:count]:
            runs += [Run(m, concept, seed) for seed in range(seeds) for m in methods if m.trained or seed == 0]
    return runs


def call(command: list[str], log: Path) -> None:
    """Run a command on one core. Raises UserError with the last line of its output."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{Path(command[1]).name} failed: {last} (full output: {log})")


def in_parallel(tasks: list, work, jobs: int, what: str) -> None:
    """Run all tasks, `jobs` at a time, and print the estimated time left. A failure cancels the rest."""
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
    for folder, item in {item.pictures(args): item for item in runs}.items():
        folder.mkdir(parents=True, exist_ok=True)
        concept = world.CONCEPTS[item.concept]
        place = None if item.method.several else world.home(concept, args.place_seed)
        for number, picture in enumerate(world.instance_pictures(concept, place=place)):
            picture.save(folder / f"{number}.png")


def keep_options(args: argparse.Namespace, *names: str) -> None:
    """Save the options, and refuse to continue in a folder whose runs had other values. Raises UserError."""
    path, given = args.output_dir / "options.json", {name: getattr(args, name) for name in names}
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in given.items():
        if noted.get(name, value) != value:
            raise UserError(
                f"--{name} {value}: the runs in {path.parent} had {noted[name]}. Give another --output_dir."
            )
    write_files({path: (json.dumps(noted | given) + "\n").encode()})


def train_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Train the unfinished runs with --jobs processes. Raises UserError."""
    write_photographs(runs, args)
    trained = [item for item in runs if item.method.trained]
    subjects, log = (args.output_dir / f"{args.script.stem}.{end}" for end in ("json", "log"))
    write_files({subjects: json.dumps([item.row(args) for item in trained]).encode()})
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.jobs)]
    options = {
        "script": args.script,
        "subjects": subjects,
        "output_dir": args.output_dir / "runs",
        "pretrained_model_name_or_path": args.pipeline,
        "resolution": miniature("world").SIZE,
        "train_batch_size": args.train_batch_size,
        "report_to": "none",
    }
    if getattr(args, "max_train_steps", None):
        options["max_train_steps"] = args.max_train_steps
    command += [str(EXAMPLES / "train_many.py"), *(f"--{name}={value}" for name, value in options.items())]
    print(f"{len(trained)} runs; {log} shows the progress", flush=True)
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if result.returncode:
        raise UserError(f"train_many.py: a run failed; see {log}.")


def write_words(runs: list[Run], args: argparse.Namespace) -> None:
    """Write the vocabulary rows of a concept's words as embeddings, as if they were learned."""
    matrices = {}
    for item in runs:
        if item.method.words:
            matrices = matrices or {
                name: torch.cat(list(vocabulary(str(args.pipeline), name))) for name in ENCODERS[args.model]
            }
            text = getattr(miniature("world").CONCEPTS[item.concept], item.method.words)
            vectors = {}
            for tokenizer, (name, matrix) in zip(
                load_tokenizers(args.pipeline, args.model), matrices.items(), strict=True
            ):
                vectors[name] = matrix[tokenizer(text, add_special_tokens=False).input_ids].float()
            write_embedding(Embedding(f"<{item.concept}>", vectors), item.folder(args))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How pictures are sampled: all methods at each guidance scale, and a few with a stock pipeline's pooling."""

    guidance_scale: float
    pooling: str = "eos"

    @property
    def name(self) -> str:
        return f"guidance-{self.guidance_scale:g}" + ("-stock" if self.pooling == "stock" else "")


POOLING_METHODS = ("TI", "DTI")  # also sampled with stock pooling, at the last guidance scale


def settings_of(args: argparse.Namespace) -> list[Setting]:
    stock = [Setting(args.guidance_scales[-1], "stock")] if args.stock_pooling else []
    return [Setting(scale) for scale in args.guidance_scales] + stock


def evaluation_folder(setting: Setting, concept: str, args: argparse.Namespace) -> Path:
    return args.output_dir / "evaluations" / setting.name / concept


def ablated(item: Run, args: argparse.Namespace) -> bool:
    """Whether the run has a concept and seed of the ablations."""
    return item.concept in subjects()[: args.ablation_concepts] and item.seed < args.ablation_seeds


def at_step(method: str, step: int) -> str:
    return f"{method} @{step}"


def embeddings_of(setting: Setting, item: Run, args: argparse.Namespace) -> dict[str, Path]:
    """The embeddings of a run to evaluate, by label: the final one and those at intermediate steps."""
    folder, method = item.folder(args), item.method
    if setting.pooling == "stock":
        return {item.label: folder} if method.name in POOLING_METHODS and ablated(item, args) else {}
    on_the_way = method.at if ablated(item, args) else ()
    files = {
        f"{at_step(method.name, n)} #{item.seed}": folder / f"learned_embeds-steps-{n}.safetensors" for n in on_the_way
    }
    return {item.label: folder} | {label: file for label, file in files.items() if file.is_file()}


def evaluate_concept(task: tuple[Setting, str, list[Run]], args: argparse.Namespace) -> None:
    """Evaluate all embeddings of a concept by evaluate.py, in one process. Raises UserError."""
    setting, concept, runs = task
    folder = evaluation_folder(setting, concept, args)
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["subject", "method", "path", "instance_data_dir", "class_word"])
    pictures, word = args.output_dir / "concepts" / concept, miniature("world").CONCEPTS[concept].initializer
    rescaled = {method.of for method in METHODS if method.of} if setting.pooling == "eos" else set()
    options = []
    for item in runs:
        for label, path in embeddings_of(setting, item, args).items():
            writer.writerow([concept, label, path, pictures, word])
        options += [f"{item.label}=mean"] * (item.method.name in rescaled)
    write_files({folder / "table.csv": rows.getvalue().encode()})
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), "--seeds", *map(str, args.picture_seeds)]
    command += ["--rescale", *options] if options else []
    judges = {name: args.models / folder for name, folder in JUDGES.items()}
    sampling = {"guidance_scale": setting.guidance_scale, "pooling": setting.pooling, "batch_size": 40}
    sampling |= {name: getattr(args, name) for name in ("num_inference_steps", "dtype", "device", "prompts")}
    files = {"pretrained_model_name_or_path": args.pipeline, "table": folder / "table.csv", "output_dir": folder}
    command += [part for name, value in (files | judges | sampling).items() for part in (f"--{name}", str(value))]
    call(command, folder / "evaluate.log")


RESCALED = {method.of: method.name for method in METHODS if method.of}


def evaluate_all(runs: list[Run], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Evaluate all runs. Returns the pictures' records by setting, each with its method and the training's seed (`run`)."""
    tasks = []
    for setting in settings_of(args):
        chosen = [item for item in runs if embeddings_of(setting, item, args)]
        for concept in dict.fromkeys(item.concept for item in chosen):
            tasks.append((setting, concept, [item for item in chosen if item.concept == concept]))
    in_parallel(tasks, lambda task: evaluate_concept(task, args), args.jobs, "evaluated")
    records = {}
    for setting, concept, _ in tasks:
        report = json.loads((evaluation_folder(setting, concept, args) / "evaluation.json").read_text("utf-8"))
        for record in report["records"]:
            method, _, rest = record["method"].partition(" #")
            record["method"] = RESCALED[method] if rest.endswith("-rescaled") else method
            record["run"] = int(rest.removesuffix("-rescaled"))
            record["file"] = evaluation_folder(setting, concept, args) / record["file"]
            records.setdefault(setting.name, []).append(record)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# 5. Report
# ----------------------------------------------------------------------------------------------------------------------

SHOWN = ("image", "text", "cosine", "said", "kept")


def concept_means(records: list[dict], method: str, measure: str) -> dict[str, float]:
    """The mean of a measure by concept, over seeds, prompts and pictures."""
    values = {}
    for record in records:
        if record["method"] == method and measure in record:
            values.setdefault(record["subject"], []).append(record[measure])
    return {subject: sum(v) / len(v) for subject, v in values.items()}


def scores_by_run(records: dict[str, list[dict]]) -> bytes:
    """Each evaluated embedding's mean scores over its pictures in every setting, as a CSV table."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["setting", "method", "concept", "seed", *SHOWN])
    for setting, mine in records.items():
        means = [averages(mine, measure, "method", "subject", "run") for measure in SHOWN]
        for key in dict.fromkeys(itertools.chain(*means)):
            writer.writerow([setting, *key, *(f"{mean[key]:.4f}" if key in mean else "" for mean in means)])
    return table.getvalue().encode()


def paired(records: list[dict], measure: str, above: str, below: str) -> dict | None:
    """The difference of two methods, with a 95% interval over their common concepts."""
    a, b = concept_means(records, above, measure), concept_means(records, below, measure)
    common = [name for name in a if name in b]
    return interval(a[name] - b[name] for name in common) if common else None


def verdict(difference: dict | None) -> str:
    if difference is None or difference["low"] is None:
        return "not measured"
    if difference["low"] > 0:
        return "**yes**"
    return "**reversed**" if difference["high"] < 0 else "undecided"


def table(records: list[dict], methods: Sequence[str], known: Sequence[Method] = METHODS) -> str:
    """One row per method: number of concepts, measures with intervals, and the two scores that the paper has in `known`."""
    paper = {method.name: method.paper for method in known}
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
    """Check the paper's orderings by the scores, and by the share of correct attributes, which is less noisy."""
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
    """The origin of a report: date, commit, machine, versions and sampling."""
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    seeds = ", ".join(map(str, args.picture_seeds))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": f"{machine}, {platform.machine()}",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}",
        "sampling": f"{args.num_inference_steps} steps of the paper's sampler, seeds {seeds} of each prompt, dtype {args.dtype}",
    }


@dataclass(frozen=True)
class Curve:
    """A method over its steps: share of correct attributes, image score and mean norm of the embeddings at each step."""

    name: str
    steps: list[int]
    said: list[float]
    image: list[float]
    norms: list[float]


def curves(records: list[dict], runs: list[Run], args: argparse.Namespace) -> list[Curve]:
    """The curve of each evaluated method of FRONT, over the ablations' concepts and seeds."""
    found = []
    for name in FRONT:
        mine = [item for item in runs if item.method.name == name and ablated(item, args)]
        if not mine:  # such as all of them with --ablation_concepts 0
            continue
        chosen = [r for r in records if r["subject"] in {item.concept for item in mine}]
        labels = [*((n, at_step(name, n)) for n in mine[0].method.at), (steps_of(mine, args), name)]
        points = []
        for step, label in labels:
            image, said = (concept_means(chosen, label, measure) for measure in ("image", "said"))
            if image and said:  # prompts from a file state no attributes
                norm = [mean_norm(embeddings_of(Setting(0), item, args)[f"{label} #{item.seed}"]) for item in mine]
                points.append([step, *(sum(x) / len(x) for x in (said.values(), image.values(), norm))])
        if points:
            found.append(Curve(name, *map(list, zip(*points, strict=True))))
    return found


def steps_of(runs: list[Run], args: argparse.Namespace) -> int:
    return json.loads((runs[0].folder(args) / "training_options.json").read_text("utf-8"))["options"][
        "max_train_steps"
    ]


def mean_norm(path: Path) -> float:
    """The mean norm of an embedding's vectors over its text encoders."""
    return torch.cat([rows.norm(dim=-1) for rows in read_embedding(path).vectors.values()]).mean().item()


def draw_curves(curves: list[Curve]) -> tuple[bytes, bytes]:
    """Two plots: image score against attributes, one curve per method; and both against the norm of TI's embeddings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    front, norms = (Figure(figsize=(7, 5), layout="constrained") for _ in range(2))
    axes = front.subplots()
    for curve in curves:
        axes.plot(curve.said, curve.image, "o-", label=curve.name)
        for step, x, y in zip(curve.steps, curve.said, curve.image, strict=True):
            axes.annotate(str(step), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="share of the prompt's attributes that are right", ylabel="image score")
    axes.legend(fontsize=8)
    left = norms.subplots()
    right = left.twinx()
    for number, curve in enumerate(curve for curve in curves if curve.name.startswith("TI")):
        left.plot(curve.norms, curve.said, "o-", color=f"C{number}", label=f"attributes right, {curve.name}")
        right.plot(curve.norms, curve.image, "o--", color=f"C{number}", label=f"image score, {curve.name}")
    left.set(xlabel="mean norm of the embedding", ylabel="share of the prompt's attributes that are right (line)")
    right.set(ylabel="image score (dashed)")
    left.legend(loc="lower left", fontsize=8)
    pictures = []
    for figure in (front, norms):
        FigureCanvasAgg(figure).print_png(content := io.BytesIO())
        pictures.append(content.getvalue())
    return tuple(pictures)


def draw_sheet(records: list[dict], concept: str, columns: Sequence[str] = tuple(m.name for m in TABLE_2)) -> bytes:
    """Draw a concept's pictures as PNG: a row for each of at most eight prompts, a column for each method."""
    mine = [r for r in records if r["subject"] == concept and r["method"] in columns]
    prompts = list(dict.fromkeys(r["prompt"] for r in mine))
    prompts = prompts[:: math.ceil(len(prompts) / 8)]
    first = {(r["method"], r["prompt"]): r["file"] for r in reversed(mine)}  # of the first seed
    methods = [name for name in columns if (name, prompts[0]) in first]
    pictures = [[open_picture(first[name, prompt]) for name in methods] for prompt in prompts]
    rows = [[p.resize((2 * p.width, 2 * p.height), Image.NEAREST) for p in row] for row in pictures]
    return to_png(contact_sheet(rows, [prompt.replace("{}", "...") for prompt in prompts], methods), {})


def write_report(records: dict[str, list[dict]], runs: list[Run], args: argparse.Namespace) -> Path:
    facts = facts_of(args) | {
        "training": f"batch {args.train_batch_size}, {args.num_vectors} vectors; pictures in one place"
    }
    parts = ["# The paper's Tables 2, 3 and 6 in miniature", "", *(f"- {k}: {v}" for k, v in facts.items())]
    parts += ["", "Intervals are 95%, over concepts; seeds are averaged first. Differences are paired by concept.", ""]
    found, files, points = {}, {}, {}
    for name, mine in records.items():
        parts += [f"## {name}", ""]
        if name.endswith("-stock"):
            parts += ["Sampled with a stock pipeline's pooling, at the new word.", ""]
            parts += [table(mine, list(POOLING_METHODS)), ""]
            continue
        few = [r for r in mine if r["subject"] in subjects()[: args.ablation_concepts]]
        untrained = [method.name for method in OTHERS if method.words]
        guessed = [method.name for method in OTHERS if method.recommended]
        rest = [method.name for method in OTHERS if not (method.words or method.recommended)]
        known = ["TI", "DTI", "DTI, our default"]  # rows for comparison
        sections = {
            "Table 2": (mine, [], [*(m.name for m in TABLE_2), *untrained]),
            "Table 2, one vector": (mine, [], [one_vector(m.name) for m in TABLE_2]),
            "Table 3": (few, ["DTI"], [m.name for m in TABLE_3]),
            "Table 6": (few, known, guessed),
            "Other settings and photographs": (few, known, rest),
        }
        for title, (rows, beside, methods) in sections.items():
            if {r["method"] for r in rows} & set(methods):
                parts += [f"### {title}", "", table(rows, [*beside, *methods]), ""]
        text, found[name] = orderings(mine)
        points[name] = curves(mine, runs, args)
        parts += ["### The paper's orderings", "", text, ""]
        parts += [f"![image against attributes over the steps](front-{name}.png)", ""]
        parts += [
            f"![scores against the norm](norm-{name}.png)",
            "",
            f"![image against text score](scatter-{name}.png)",
            "",
        ]
        for concept in subjects()[:2]:
            parts += [f"### {concept}", "", f"![{concept} by each method](sheet-{concept}-{name}.png)", ""]
            files[f"sheet-{concept}-{name}.png"] = draw_sheet(mine, concept)
        files[f"scatter-{name}.png"] = draw_scatter(statistics([r for r in mine if "@" not in r["method"]]))
        files[f"front-{name}.png"], files[f"norm-{name}.png"] = draw_curves(points[name])
    curves_by_name = {name: [asdict(curve) for curve in some] for name, some in points.items()}
    content = json.dumps({"facts": facts, "orderings": found, "curves": curves_by_name}, indent=1) + "\n"
    files |= {"report.md": "\n".join(parts).encode(), "report.json": content.encode()}
    files |= {"scores.csv": scores_by_run(records)}
    write_files({args.output_dir / name: data for name, data in files.items()})
    return args.output_dir / "report.md"


# ----------------------------------------------------------------------------------------------------------------------
# 6. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_options(args, "model", "max_train_steps", "train_batch_size", "num_vectors", "place_seed")
    runs = plan(args)
    write_words(runs, args)
    train_all(runs, args)
    path = write_report(evaluate_all(runs, args), runs, args)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
