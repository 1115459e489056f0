"""One JSON line a step, readable while the run goes on, and an error that says so if it is not."""

import json
import math
import shutil
import threading
from pathlib import Path

import pytest

from srppo.errors import RunDirError
from srppo.train.metrics import MetricsLog


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_as_soon_as_they_are_logged(tmp_path):
    with MetricsLog(tmp_path, "ppo") as log:
        log.log(1, {"reward": 0.5})
        assert lines_of(tmp_path / "metrics/ppo.jsonl") == [{"step": 1, "reward": 0.5}]
        log.log(2, {"reward": 0.75})
    assert [line["step"] for line in lines_of(tmp_path / "metrics/ppo.jsonl")] == [1, 2]


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    with MetricsLog(tmp_path, "ppo") as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300})
    text = (tmp_path / "metrics/ppo.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": None, "b": None, "c": None, "d": 1e-300}


def test_a_stage_that_starts_again_starts_its_log_again(tmp_path):
    for value in (1.0, 2.0):
        with MetricsLog(tmp_path, "controls/longer") as log:
            log.log(1, {"loss": value})
    assert lines_of(tmp_path / "metrics/controls/longer.jsonl") == [{"step": 1, "loss": 2.0}]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, "ppo") as log:
        log.log(3, {"reward": 0.5, "broken": math.nan})
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert board.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(3, 0.5)]


def test_a_full_disk_is_named_with_the_file_and_the_cure(tmp_path):
    """/dev/full takes no byte; closing the file would try again, and fail again."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/ppo.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(RunDirError, match=r"ppo\.jsonl.*No space left.*Free space"),
        MetricsLog(tmp_path, "ppo") as log,
    ):
        log.log(1, {"reward": 0.5})


@pytest.mark.parametrize("taken", ["metrics", "tensorboard"])
def test_a_place_that_is_taken_is_named(tmp_path, taken):
    if taken == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / taken).write_text("a file where a directory has to be")
    with pytest.raises(RunDirError, match="metrics"):
        MetricsLog(tmp_path, "ppo")


def test_tensorboard_shows_steps_that_are_done_again_once(tmp_path):
    """Two sittings; the second goes on after step 2, though step 3 had been logged."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, "ppo") as log:
        for step in (1, 2, 3):
            log.log(step, {"reward": float(step)})
    begun = "".join((tmp_path / "metrics/ppo.jsonl").read_text().splitlines(True)[:2])
    with MetricsLog(tmp_path, "ppo", begun) as log:
        log.log(3, {"reward": 30.0})
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(1, 1), (2, 2), (3, 30)]


def test_in_a_removed_directory_nothing_is_said_behind_our_back_and_nothing_made_anew(
    tmp_path, capfd
):
    """Who writes a file next says what happened; threads that write could only print it."""
    pytest.importorskip("tensorboard")
    run, threads = tmp_path / "run", set(threading.enumerate())
    run.mkdir()
    with MetricsLog(run, "ppo") as log:
        shutil.rmtree(run)
        for step in (1, 2):
            log.log(step, {"reward": 0.5})
        assert set(threading.enumerate()) <= threads
    assert not run.exists()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RunDirError, match="the run directory was removed"):
        MetricsLog(run, "sft")
