"""Several machines: each has its own disk, all go on from one checkpoint, and a signal to one stops all of them soon."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train_dti_sdxl as script


# Two processes on one machine in the place of two: each has an output folder of its own.
MACHINE = """
import os, sys
sys.path.insert(0, {root!r})
import train_dti_sdxl
sys.argv[0] = "train_dti_sdxl.py"
sys.argv.append("--output_dir=" + {out!r} + os.environ["RANK"])
original = train_dti_sdxl.Training.resume
def resume(self, checkpoint):
    original(self, checkpoint)
    print("from", checkpoint["step"], flush=True)
train_dti_sdxl.Training.resume = resume
train_dti_sdxl.run(train_dti_sdxl.MODEL_CLASS)
"""


@pytest.fixture
def machines(options, tmp_path):
    """Starts two processes that are one training, as a launcher on each of two machines does, and returns them."""
    started = []

    def start(**changes) -> list[subprocess.Popen]:
        (tmp_path / "machine.py").write_text(MACHINE.format(root=str(ROOT), out=str(tmp_path / "disk")))
        command = [sys.executable, str(tmp_path / "machine.py"), *options(output_dir=None, **changes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        network = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        network |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.extend(
            subprocess.Popen(command, env={**os.environ, **network, "RANK": rank}, **pipes) for rank in ("0", "1")
        )
        return started

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
def test_all_go_on_from_the_first_ones_checkpoint_and_stop_soon(machines, train, tmp_path):
    """The second machine's disk has an older checkpoint, a signal reaches that machine alone, and nothing is logged."""
    first, second = tmp_path / "disk0", tmp_path / "disk1"
    train(output_dir=first, max_train_steps=4, checkpointing_steps=2, train_batch_size=4)
    (first / "checkpoint-2").rename(second.mkdir() or second / "checkpoint-2")
    run = {"max_train_steps": 100_000, "logging_steps": 100_000, "checkpointing_steps": 100_000}
    processes = machines(**run, train_batch_size=2, resume_from_checkpoint="latest")
    assert [process.stdout.readline() for process in processes] == ["from 4\n", "from 4\n"]
    time.sleep(0.5)
    began = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert time.monotonic() - began < 10, errors
    assert [process.returncode for process in processes] == [143, 143], errors
    assert [path.name for path in second.iterdir()] == ["checkpoint-2"]
    step = int(re.search(r"Stopped after step (\d+)", errors[0]).group(1))
    assert step > 4 and (first / f"checkpoint-{step}" / "state.json").is_file()


def test_the_first_ones_refusal_is_everyones(monkeypatch):
    sent = []

    def broadcast(objects: list) -> None:
        sent.append(objects[0]) if objects[0] is not None else objects.__setitem__(0, sent[-1])

    def refuse():
        raise script.UserError("damaged")

    monkeypatch.setattr(script, "broadcast_object_list", broadcast)
    first, other = (SimpleNamespace(is_main_process=main) for main in (True, False))
    assert [script.from_first(lambda: 5, x) for x in (first, other)] == [5, 5]
    for accelerator in (first, other):
        with pytest.raises(script.UserError, match="damaged"):
            script.from_first(refuse, accelerator)


@pytest.mark.parametrize("lengths", [(0.01, 0.01), (0.4, 0.4), (0.01, 2.0), (7.0, 0.02)], ids=str)
@pytest.mark.parametrize("first_step", [1, 501])
def test_a_signal_to_one_process_stops_all_at_one_step_and_soon(monkeypatch, lengths, first_step):
    """Two processes as threads, with a clock that a step moves on: of one length at first, then of another."""
    change, sent = first_step + 20, 100.0
    clock, gathered, barrier = threading.local(), {}, threading.Barrier(2)
    asked, stopped = [0, 0], [None, None]

    def gather(objects: list) -> list:
        gathered[clock.rank] = objects[0]
        barrier.wait(10)
        both = [gathered[0], gathered[1]]
        barrier.wait(10)
        asked[clock.rank] += 1
        return both

    monkeypatch.setattr(script, "gather_object", gather)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def process(rank: int) -> None:
        clock.rank, clock.now, interruption = rank, 50.0, script.Interruption()
        interruption.enter_loop(first_step)
        for step in range(first_step, first_step + 100_000):
            clock.now += lengths[step >= change]
            if rank == 1 and clock.now >= sent:
                interruption.signal = interruption.signal or signal.SIGTERM
            if interruption.agreed(SimpleNamespace(num_processes=2), step):
                stopped[rank] = (step, clock.now, interruption.signal)
                return

    threads = [threading.Thread(target=process, args=[rank]) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert stopped[0] == stopped[1] and stopped[0][2] == signal.SIGTERM
    assert stopped[0][1] - sent < 10
    assert asked[0] < 50  # each time they wait for each other: seldom, where steps are quick
