#!/usr/bin/env python
"""Kill a training run with SIGKILL at random moments, resume it each time, and compare the end with an undisturbed run.

    python tests/kill_test.py --kills 20

The moments are spread over a whole run: start, encoding, steps, checkpoints, validation, final save.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]


def results(folder: Path) -> dict:
    """What a run leaves for its user, but for times: all embedding files and the logged curves."""
    tensors = {
        f"{path.name}/{key}": rows.tolist()
        for path in sorted(folder.glob("*.safetensors"))
        for key, rows in load_file(path).items()
    }
    state = json.loads(
        max(folder.glob("checkpoint-*/state.json"), key=lambda p: json.loads(p.read_text())["step"]).read_text()
    )
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["entries"]]
    return {"tensors": tensors, "entries": entries}


def command(small: Path, folder: Path) -> list[str]:
    options = (
        f"--pretrained_model_name_or_path {small}/sdxl --instance_data_dir {small}/photos --placeholder_token <my-pot>"
    )
    options += f" --initializer_token teapot --output_dir {folder} --resolution 64 --max_train_steps 60 --seed 0"
    options += (
        " --checkpointing_steps 2 --logging_steps 3 --save_steps 20 --validation_steps 15 --num_validation_images 1"
    )
    options += " --train_batch_size 1 --report_to none --resume_from_checkpoint latest --validation_prompt {}"
    return [sys.executable, str(ROOT / "train_dti_sdxl.py"), *options.split()]


def run(words: list[str], seconds: float | None = None) -> int:
    """Run a command, killed after so many seconds. Returns its exit status."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--small", type=Path, default=None, help="Folder with `sdxl` and `photos`; made where none is given."
    )
    parser.add_argument(
        "--work_dir", type=Path, default=None, help="Where the runs are written; default: a temporary folder."
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    work = args.work_dir or Path(tempfile.mkdtemp())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.small is None:
        args.small = work / "small"
        subprocess.run(
            [sys.executable, ROOT / "examples" / "make_small_sdxl.py", "--output_dir", args.small], check=True
        )

    start = time.monotonic()
    assert run(command(args.small, work / "undisturbed")) == 0
    whole = time.monotonic() - start
    # Steps advance with every resumption, so that later moments are reached though no single run gets far.
    chance = random.Random(args.seed)
    for kill in range(args.kills):
        seconds = chance.uniform(0.1, 1.1) * whole
        status = run(command(args.small, work / "killed"), seconds)
        steps = sorted(int(path.name.split("-")[1]) for path in (work / "killed").glob("checkpoint-*"))
        print(
            f"kill {kill + 1} after {seconds:.1f} s: status {status}, last checkpoint {steps[-1] if steps else 'none'}"
        )
        if status == 0:  # it was done first: begin another run to kill
            assert results(work / "killed") == results(work / "undisturbed")
            (work / "killed").rename(work / f"finished-{kill}")
    assert run(command(args.small, work / "killed")) == 0
    assert results(work / "killed") == results(work / "undisturbed")
    left = [path.name for path in (work / "killed").rglob(".*")]
    print(f"after {args.kills} kills the result is the undisturbed run's; left lying about: {left or 'nothing'}")


if __name__ == "__main__":
    main()
