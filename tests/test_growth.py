"""How cost grows: one quantity at a time, measured once, and said in words that fit the figures."""

import json

import growth
import pytest
from export import UserError


def measured(seconds: float, latents: float = 0.0) -> dict:
    step = {"median": seconds, "quartiles": [seconds, seconds]}
    return {"step": step, "set_up": {"latents": latents, "total": 1.0}, "device": "a device"}


def test_one_quantity_grows_at_a_time():
    args = growth.parse_args(["--size", "small", "--vectors", "4", "1"])
    rows = growth.rows_of("vectors", args)
    assert list(rows) == [1, 4]
    assert [(row.batch, row.resolution, row.photographs, row.processes) for row in rows.values()] == [
        (4, 64, 5, 1)
    ] * 2
    assert rows[1] == growth.rows_of("batch", args)[4]  # the same row, which is measured once


def test_the_words_say_what_was_measured():
    said = growth.sentence("photographs", {1: measured(0.1, latents=0.5), 20: measured(0.1, latents=9.0)})
    assert "1.00 times as long" in said and "9.0 s instead of 0.5" in said
    said = growth.sentence("processes", {1: measured(0.1), 4: measured(0.2)})
    assert "2.00 times as long, and training sees 2.00 times as many pictures" in said


@pytest.mark.slow
def test_rows_are_runs_of_the_script(tmp_path):
    argv = ["--work_dir", str(tmp_path), "--size", "small", "--only", "photographs", "--photographs", "2", "7"]
    growth.main([*argv, "--steps", "2"])
    assert len(list((tmp_path / "photos-small-7").iterdir())) == 7
    results = json.loads((tmp_path / "growth.json").read_text())["results"]["photographs"]
    assert [len(results[count]["step_seconds"]) for count in ("2", "7")] == [2, 2]
    for name in ("growth.md", "growth.png"):
        assert (tmp_path / name).stat().st_size > 500
    log = tmp_path / "runs" / "sdxl-small" / "4-64-2-1-1" / "log.txt"
    log.write_text("")
    growth.main([*argv, "--steps", "2"])
    assert log.read_text() == ""  # not measured again


def test_what_the_script_refuses_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="--resolution 60"):
        growth.main(["--work_dir", str(tmp_path / "new"), "--size", "small", "--resolution", "64", "60"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_are_a_row(tmp_path):
    options = ["--only", "processes", "--processes", "2", "--steps", "2"]
    growth.main(["--work_dir", str(tmp_path), "--size", "small", *options])
    assert json.loads((tmp_path / "growth.json").read_text())["results"]["processes"]["2"]["status"] == "measured"
