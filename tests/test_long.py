"""Many large photographs and many steps: memory stays bounded. Minutes each, so all of it is marked slow.

`-s` shows the figures.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


pytestmark = pytest.mark.slow

# A run of the script that prints its resident memory: at every 500th step, and the most it ever had by a second thread.
WATCHED = """
import sys, threading, time
import psutil, torch
torch.set_num_threads(1)
import train_dti_sdxl as script

process, added, opened = psutil.Process(), script.History.add, script.open_image
peak = {"images": 0, "most": 0}

def resident():
    return process.memory_info().rss / 2**20

def watch():
    while True:
        peak["most"] = max(peak["most"], resident())
        time.sleep(0.002)

def open_image(record, shrink_to=None):
    if shrink_to is None:  # not for the check
        peak["images"] += 1
        if peak["images"] % 100 == 1:
            print("images", peak["images"], resident(), flush=True)
    return opened(record, shrink_to)

def add(self, step, *rest):
    if step % 500 == 0:
        print("step", step, resident(), flush=True)
    return added(self, step, *rest)

def check_images(*args, check=script.check_images):
    before = resident()
    threading.Thread(target=watch, daemon=True).start()
    check(*args)
    print("check", peak["most"] - before, 0, flush=True)

script.History.add, script.open_image, script.check_images = add, open_image, check_images
script.main(sys.argv[1:])
print("most", peak["most"], 0)
"""


def watched(options, *flags: str, **changes) -> list[tuple[str, float, float]]:
    """Runs the job in a process of its own and returns what it printed of its memory, in MiB."""
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, *options(*flags, **changes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    words = [line.split() for line in result.stdout.splitlines()]
    return [(w[0], float(w[1]), float(w[2])) for w in words if w and w[0] in ("images", "step", "check", "most")]


def test_a_thousand_photographs_of_twelve_megapixels(options, tmp_path):
    """They are decoded, cut and encoded one at a time: as much memory for the last hundred as for the first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (750, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((4000, 3000)).save(folder / "0000.jpg", quality=80)
    for index in range(1, 1000):
        os.link(folder / "0000.jpg", folder / f"{index:04d}.jpg")

    figures = watched(options, instance_data_dir=folder, crops_per_image=4, max_train_steps=1)
    resident = {int(count): mib for kind, count, mib in figures if kind == "images"}
    (check,) = (mib for kind, mib, _ in figures if kind == "check")
    (most,) = (mib for kind, mib, _ in figures if kind == "most")
    print(f"\n1000 photographs: checking them +{check:.0f} MiB, caching {resident}, peak of the run {most:.0f} MiB")
    one = 4000 * 3000 * 4 / 2**20  # a decoded picture, of which Pillow keeps four bytes a pixel: 46 MiB
    assert check < 2 * one
    assert resident[901] - resident[101] < 2 * one  # which part of the work it was read in makes that much
    assert most - resident[1] < 6 * one


def test_twenty_thousand_steps(options):
    """What is kept of a step are the log's few numbers; nothing else may grow."""
    figures = watched(options, resolution=32, train_batch_size=1, max_train_steps=20000)
    resident = {int(step): mib for kind, step, mib in figures if kind == "step"}
    print(f"\n20,000 steps: {resident[2000]:.1f} MiB after 2,000, {resident[20000]:.1f} MiB at the end")
    assert resident[20000] - resident[2000] < 16
