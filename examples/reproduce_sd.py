#!/usr/bin/env python
"""Reproduce the paper's Table 7 in the miniature world: P+, NeTI and CoRe beside TI and DTI, on Stable Diffusion.

    python examples/reproduce_sd.py --output_dir reproduction-sd

reproduce.py does the work. The concepts, their photographs in one place, the prompts and the scores are the same. TI and DTI
are trained by train_dti_sd.py with the settings of DTI's authors, P+, NeTI and CoRe by baselines.py with the settings of each
method. A word has four vectors. P+ has one for each cross-attention layer instead, and NeTI a network that gives one for each
layer and timestep; so TI and DTI also have rows with a single vector. A repeated run skips finished work.

Written to --output_dir: `report.md` with the table beside the paper's, and DTI's differences from every rival, `report.json`,
`scores.csv` with a row for each evaluated embedding, sheets of pictures, `runs/<concept>/<method>-<seed>` and
`evaluations/<setting>/<concept>`.
"""

import argparse
import json
from pathlib import Path

from evaluate import cell
from export import make_parser, markdown_table, run, write_files
from generate import number as at_least
from reproduce import (
    AUTHORS,
    EXAMPLES,
    FREE,
    OTHERS,
    Method,
    Run,
    add_common_options,
    check_concepts,
    check_models,
    draw_sheet,
    evaluate_all,
    facts_of,
    keep_options,
    paired,
    scores_by_run,
    subjects,
    table,
    train_all,
    verdict,
    with_one_vector,
    write_words,
)


# The paper's scores on Stable Diffusion 1.5.
SEVERAL = (
    Method("TI", f"{AUTHORS} {FREE}"),
    Method("TI-rescaled", of="TI"),
    Method("CoRe", "--method=core --train_batch_size=6", (0.340, 0.661)),
    Method("DTI", AUTHORS, (0.418, 0.554)),
    Method("DTI, our default"),
)
BY_LAYER = (
    Method("P+", "--method=plus --train_batch_size=8 --num_vectors=1", (0.273, 0.719)),
    Method("NeTI", "--method=neti --train_batch_size=8 --num_vectors=1", (0.408, 0.579)),
)
SINGLE = tuple(with_one_vector(method) for method in SEVERAL if method.name != "CoRe")
UNTRAINED = tuple(method for method in OTHERS if method.words)
METHODS = (*SEVERAL, *BY_LAYER, *SINGLE, *UNTRAINED)
OURS = ("DTI", "DTI, our default")
SHOWN = ("TI", "TI-rescaled", "P+", "NeTI", "CoRe", *OURS)


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_common_options(parser)
    add = parser.add_argument
    add("--concepts", type=at_least(int, 2), default=4)
    add("--seeds", type=at_least(int, 1), default=2, help="Training seeds.")
    add("--one_vector_seeds", type=at_least(int, 0), default=1, help="Training seeds of the rows with one vector.")
    add("--max_train_steps", type=at_least(int, 1), help="Steps of every run, for a trial. Default: each method's own.")
    add("--prompts", default="world", help="Prompts, as in evaluate.py.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.model, args.pipeline = "sd", check_models(args.models, "sd")
    check_concepts(args.concepts)
    args.stock_pooling = False
    args.ablation_concepts = args.ablation_seeds = 0  # no run is evaluated at intermediate steps
    return args


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, grouped by concept. An untrained method has one."""
    seeds = {method: args.one_vector_seeds if method in SINGLE else args.seeds for method in METHODS if method.trained}
    seeds |= dict.fromkeys(UNTRAINED, 1)
    return [
        Run(method, concept, seed)
        for concept in subjects()[: args.concepts]
        for method, count in seeds.items()
        for seed in range(count)
    ]


def script_of(method: Method) -> Path:
    return EXAMPLES / ("baselines.py" if "--method=" in method.options else "train_dti_sd.py")


def train_by_script(runs: list[Run], args: argparse.Namespace) -> None:
    """Train every run with its method's script. Raises UserError."""
    trained = [item for item in runs if item.method.trained]
    for script in dict.fromkeys(script_of(item.method) for item in trained):
        train_all(
            [item for item in trained if script_of(item.method) == script],
            argparse.Namespace(**{**vars(args), "script": script}),
        )


def differences(records: list[dict]) -> tuple[str, list[dict]]:
    """Both of DTI's settings against every other method, by the image score and by the share of right attributes."""
    rows, found = [], []
    for ours in OURS:
        for other in (name for name in SHOWN if name not in OURS):
            pair = {measure: paired(records, measure, ours, other) for measure in ("image", "said", "kept")}
            if all(pair.values()):
                found.append({"above": ours, "below": other, **pair})
                rows.append([f"{ours} - {other}", *(f"{cell(x, '+')} {verdict(x)}" for x in pair.values())])
    heads = ["difference", "image score", "prompt's attributes right", "subject's attributes right"]
    return markdown_table(heads, rows), found


def write_report(records: dict[str, list[dict]], args: argparse.Namespace) -> Path:
    training = (
        f"batch {args.train_batch_size}, CoRe 6, P+ and NeTI 8; {args.num_vectors} vectors; pictures in one place"
    )
    facts = facts_of(args) | {"training": training}
    parts = ["# The paper's Table 7 in miniature", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    parts += ["Intervals are 95%, over concepts; seeds are averaged first. Differences are paired by concept.", ""]
    found, files = {}, {}
    for name, mine in records.items():
        text, found[name] = differences(mine)
        parts += [f"## {name}", "", table(mine, [*SHOWN, *(m.name for m in (*SINGLE, *UNTRAINED))], METHODS), ""]
        parts += ["**yes**: DTI's is larger; **reversed**: it is smaller.", "", text, ""]
        for concept in subjects()[:2]:
            parts += [f"![{concept} by each method](sheet-{concept}-{name}.png)", ""]
            files[f"sheet-{concept}-{name}.png"] = draw_sheet(mine, concept, SHOWN)
    content = json.dumps({"facts": facts, "differences": found}, indent=1) + "\n"
    files |= {"report.md": "\n".join(parts).encode(), "report.json": content.encode()}
    files |= {"scores.csv": scores_by_run(records)}
    write_files({args.output_dir / name: data for name, data in files.items()})
    return args.output_dir / "report.md"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_options(args, "model", "max_train_steps", "train_batch_size", "num_vectors", "place_seed")
    runs = plan(args)
    write_words(runs, args)
    train_by_script(runs, args)
    path = write_report(evaluate_all(runs, args), args)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
