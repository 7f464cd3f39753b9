#!/usr/bin/env python
"""Measure how the cost of a step grows with batch, resolution, photographs, vectors and processes. Draws one plot.

    python examples/growth.py --work_dir growth
    python examples/growth.py --work_dir growth --size small --only photographs vectors

One quantity grows at a time from a common base (batch 4, five photographs, one vector, one process). The rest is as in
benchmark.py, including the model with random weights. The photographs' latents are cached before the first step. Only this
cost may grow with their number, so it is reported beside the steps.

Written to --work_dir: `growth.md`, `growth.json` and `growth.png`. Existing measurements are reused, so more values can be
added later.

Sections: 1 options, 2 rows, 3 report, 4 main.
"""

import argparse
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import benchmark
from benchmark import Job, about_machine, amount, job_command, last_line, run_process, summarise
from export import UserError, make_parser, markdown_table, run, write_files
from generate import number as at_least
from PIL import Image


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------

QUANTITIES = ("batch", "resolution", "photographs", "vectors", "processes")


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("growth"), help="Folder for model, photographs, runs and results. Default: growth.")
    add("--model", choices=benchmark.MODELS, default="sdxl", help="The model, which also decides the script. Default: sdxl.")
    add("--size", choices=["full", "small"], default="full", help="The published size, or a small model that trains on a CPU in seconds.")
    add("--only", nargs="+", choices=QUANTITIES, default=list(QUANTITIES), help="Quantities to measure. Default: all.")
    add("--batch", type=at_least(int, 1), nargs="+", default=[1, 2, 4, 8], help="Images per step.")
    add("--resolution", type=at_least(int, 8), nargs="+", default=None, help="Pixels. The first value applies to all other quantities. Default: 512 768 1024, small: 64 128 192 256.")
    add("--photographs", type=at_least(int, 1), nargs="+", default=[1, 5, 20, 80], help="Number of photographs.")
    add("--vectors", type=at_least(int, 1), nargs="+", default=[1, 2, 4, 8], help="Vectors per new word.")
    add("--processes", type=at_least(int, 1), nargs="+", default=[1, 2], help="Processes, one per GPU or core. On a CPU, set OMP_NUM_THREADS=1 to give each one thread.")
    add("--steps", type=at_least(int, 2), default=20, help="Timed steps per row. Default: 20.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = command_line().parse_args(argv)
    args.resolution = args.resolution or ([64, 128, 192, 256] if args.size == "small" else [512, 768, 1024])
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Rows
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row: the value of every quantity."""

    batch: int
    resolution: int
    photographs: int = 5
    vectors: int = 1
    processes: int = 1

    @property
    def name(self) -> str:
        return "-".join(str(getattr(self, q)) for q in QUANTITIES)


def rows_of(quantity: str, args: argparse.Namespace) -> dict[int, Row]:
    base = Row(4, args.resolution[0])
    return {value: Row(**{**vars(base), quantity: value}) for value in sorted(getattr(args, quantity))}


def photographs(count: int, args: argparse.Namespace, base: argparse.Namespace) -> Path:
    """A folder of `count` pictures: benchmark.py's five repeated, slightly brighter each time."""
    folder = args.work_dir / f"photos-{args.size}-{count}"
    if not folder.is_dir():
        sources, temporary = sorted(benchmark.prepare_photographs(base).iterdir()), folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for number in range(count):
            source = sources[number % len(sources)]
            with Image.open(source) as image:
                image.point(lambda x, n=number: min(255, x + n)).save(temporary / f"{number:03d}{source.suffix}")
        temporary.replace(folder)
    return folder


def launcher(processes: int) -> list[str]:
    own = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return own if processes > 1 else [sys.executable]


def script_options(row: Row, model: Path, photos: Path, base: argparse.Namespace) -> list[str]:
    options = {"resolution": row.resolution, "train_batch_size": row.batch, "num_vectors": row.vectors}
    options["mixed_precision"] = base.mixed_precision[0]
    return benchmark.script_options(options, model, photos, 0, [])


def measure(row: Row, model: Path, args: argparse.Namespace, base: argparse.Namespace) -> dict:
    """Run a row, or read its earlier result. Raises UserError if it fails."""
    folder = args.work_dir / "runs" / f"{args.model}-{args.size}" / row.name
    if not (folder / "result.json").is_file():
        argv = script_options(row, model, photographs(row.photographs, args, base), base)
        job = Job(str(base.script), argv, str(folder / "out"), (5, args.steps, 0), 500, base.weights)
        process = run_process(launcher(row.processes) + job_command(job, folder)[1:], folder / "log.txt")
        if process["status"]:
            raise UserError(f"{row}: {last_line(folder / 'log.txt')}")
        shutil.rmtree(folder / "out", ignore_errors=True)
    result = summarise(json.loads((folder / "result.json").read_text()), 500, 5)
    if result["status"] != "measured":
        raise UserError(f"{row}: {result['status']}. Leave out this value.")
    print(f"{row}: {result['step']['median']:.4f} s per step", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# 3. Report
# ----------------------------------------------------------------------------------------------------------------------


def sentence(quantity: str, found: dict[int, dict]) -> str:
    """One line: how much longer a step takes at the largest value than at the smallest."""
    (least, first), (most, last) = list(found.items())[0], list(found.items())[-1]
    ratio = last["step"]["median"] / first["step"]["median"]
    line = f"{quantity}: from {least} to {most} ({most / least:.3g} times), a step takes {ratio:.2f} times as long"
    if quantity == "photographs":
        before, after = (result["set_up"]["latents"] for result in (first, last))
        line += f"; caching before the first step takes {after:.1f} s instead of {before:.1f}"
    if quantity == "processes":
        line += f", and training sees {most / least / ratio:.2f} times as many pictures per second"
    return line + "."


def draw(results: dict[str, dict[int, dict]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(results), 3), layout="constrained")
    for axes, (quantity, found) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        rates = [1 / result["step"]["median"] for result in found.values()]
        slow, fast = zip(*([1 / x for x in r["step"]["quartiles"][::-1]] for r in found.values()), strict=True)
        axes.plot(list(found), rates, "o-")
        axes.fill_between(list(found), slow, fast, alpha=0.2)
        axes.set(xlabel=quantity, ylabel="steps per second", ylim=(0, None), xticks=list(found))
    FigureCanvasAgg(figure).print_png(content := io.BytesIO())
    return content.getvalue()


def write_report(results: dict[str, dict[int, dict]], args: argparse.Namespace) -> str:
    names = ["", "value", "steps per second", "s per step, median", "quartiles", "caching, s", "set-up, s"]
    table = []
    for quantity, found in results.items():
        for value, result in found.items():
            step, before = result["step"], result["set_up"]
            quartiles = " to ".join(amount(x, digits=4) for x in step["quartiles"])
            cells = [amount(1 / step["median"]), amount(step["median"], digits=4), quartiles]
            cells += [amount(before[name], digits=1) for name in ("latents", "total")]
            table.append([quantity, str(value), *cells])
    device = next(iter(next(iter(results.values())).values()))["device"] or "CPU"
    facts = {**about_machine(), "device": device, "model": args.model, "size": args.size}
    lines = ["# How the cost of a step grows", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    lines += [*(f"- {sentence(*pair)}" for pair in results.items()), "", "![growth](growth.png)", ""]
    text = "\n".join([*lines, markdown_table(names, table)]) + "\n"
    content = json.dumps({"facts": facts, "results": results}, indent=1) + "\n"
    files = {"growth.md": text.encode(), "growth.json": content.encode(), "growth.png": draw(results)}
    write_files({args.work_dir / name: data for name, data in files.items()})
    return text


# ----------------------------------------------------------------------------------------------------------------------
# 4. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    base, _ = benchmark.parse_args(["--work_dir", str(args.work_dir), "--model", args.model, "--size", args.size])
    script, wanted = benchmark.load_script(base.script), {quantity: rows_of(quantity, args) for quantity in args.only}
    nowhere, rows = args.work_dir / "unused", [row for found in wanted.values() for row in found.values()]
    benchmark.check_configurations(script, [script_options(row, nowhere, nowhere, base) for row in rows])
    model = benchmark.prepare_model(base, script.built_in_templates("object"))
    results = {q: {v: measure(row, model, args, base) for v, row in found.items()} for q, found in wanted.items()}
    print(f"\n{write_report(results, args)}\nWritten to {args.work_dir}: growth.md, growth.json, growth.png")


if __name__ == "__main__":
    run(main)
