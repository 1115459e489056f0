"""A run that was cut off goes on by the same command, to the same bytes.

`finished` was never cut off; every other run here is held against it. Checkpoints of finished
stages are kept, so weights, both optimizers' states, the critic and the log are compared.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from runs import srppo_command, timeless, write_recipe
from sittings import LORA, SETTINGS, at_call, differences, only_what_is_compared, result_of
from srppo.train.state import Checkpoints


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be done about it."""


def require_same(run: Path, expected) -> None:
    assert differences(run, expected) == []


def whole(folder: Path, settings):
    done = srppo_command("run", write_recipe(folder, **settings))
    assert done.code == 0, done.err
    return result_of(folder / "run")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        only_what_is_compared(patch)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("whole"), SETTINGS)


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, **SETTINGS)


def kill(monkeypatch, recipe, target, number, *overrides):
    def do():
        raise Killed

    with monkeypatch.context() as patch:
        at_call(patch, target, number, do)
        with pytest.raises(Killed):
            srppo_command("run", recipe, *overrides)


def interrupt(monkeypatch, recipe, target, number, *overrides, signals=(signal.SIGTERM,)):
    def do():
        for number in signals:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        at_call(patch, target, number, do)
        return srppo_command("run", recipe, *overrides)


# --- killed ---------------------------------------------------------------------------------------

BEGIN = "srppo.train.steps.Steps.begin_update"
MOMENTS = {
    "stage 1 before its first step": (BEGIN, 1),
    "stage 1 within an epoch": (BEGIN, 2),
    "stage 1 between two epochs": (BEGIN, 3),
    "stage 1 after its last step": ("srppo.train.checkpoint.RunDir.save_model", 1),
    "the change of stages": ("srppo.pipeline.audit", 1),
    "a rollout": ("srppo.rollout.hf.HFSampler.sample", 9),
    "an update": ("srppo.train.update.Optimizers.step", 6),
    "an evaluation during stage 2": ("srppo.pipeline.Run._curve", 3),
    "a control": (BEGIN, 10),
    "the last evaluation": ("srppo.pipeline.evaluate_models", 1),
    **{f"write {n}": ("os.replace", n) for n in (5, 9, 14, 18)},
    **{f"flush {n}": ("os.fsync", n) for n in (20, 45, 70, 95)},
}
FAST = ("stage 1 within an epoch", "an update")


@pytest.mark.parametrize(
    "moment",
    [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_end(
    recipe, tmp_path, finished, monkeypatch, moment
):
    kill(monkeypatch, recipe, *MOMENTS[moment])
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    require_same(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["write 14", "flush 45", "a control"])
def test_killed_while_a_checkpoint_is_written_meanwhile(
    recipe, tmp_path, finished, monkeypatch, moment
):
    kill(monkeypatch, recipe, *MOMENTS[moment], "checkpoint.overlap=true")
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    require_same(tmp_path / "run", finished)


@pytest.mark.slow
def test_killed_again_and_again(recipe, tmp_path, finished, monkeypatch):
    """Each sitting makes one step."""
    sittings = 0
    while True:
        try:
            kill(monkeypatch, recipe, BEGIN, 2)
        except pytest.fail.Exception:  # nothing was left to be killed
            break
        sittings += 1
    assert sittings == 4 + 4 + 2 - 1
    require_same(tmp_path / "run", finished)


@pytest.mark.slow
def test_adapters_and_dropout_go_on_to_the_same_end(tmp_path, monkeypatch):
    expected = whole(tmp_path / "whole", LORA)
    recipe = write_recipe(tmp_path / "cut", **LORA)
    for number in (3, 4, 4):  # once in each stage
        kill(monkeypatch, recipe, BEGIN, number)
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    require_same(tmp_path / "cut" / "run", expected)


@pytest.mark.slow
def test_it_says_where_it_goes_on(recipe, monkeypatch, tmp_path):
    kill(monkeypatch, recipe, BEGIN, 7)
    done = srppo_command("run", recipe)
    assert f"going on after step 2, from {tmp_path}/run/checkpoints/ppo/step-000002" in done.err
    assert "PPO step 3/4" in done.err
    assert "PPO step 2/4" not in done.err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    recipe, monkeypatch, tmp_path, finished
):
    kill(monkeypatch, recipe, BEGIN, 8)
    newest = tmp_path / "run/checkpoints/ppo/step-000003"
    with (newest / "tensors.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = srppo_command("run", recipe)
    assert f"checkpoint {newest} is damaged (tensors.safetensors" in done.err
    assert "going on after step 2" in done.err
    require_same(tmp_path / "run", finished)


@pytest.mark.slow
def test_checkpoints_of_finished_stages_are_removed_unless_asked_for(tmp_path):
    changed = {**SETTINGS, "checkpoint": {"every": 1}}
    assert srppo_command("run", write_recipe(tmp_path, **changed)).code == 0
    assert not list((tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert not (tmp_path / "run/best").exists()


def test_the_best_policy_is_that_of_the_step_after_which_the_metric_was_highest(finished):
    scores = [line["eval/accuracy/in_domain"] for line in finished["metrics/ppo"]]
    best, last = finished["best/policy"], finished["policy"]
    assert (best == last) == (scores.index(max(scores)) == len(scores) - 1)


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(recipe, monkeypatch, tmp_path, finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kill(monkeypatch, recipe, BEGIN, 8)
    # As if one more step had been logged, and not been kept.
    newest = tmp_path / "run/checkpoints/ppo/step-000003"
    (newest / "manifest.json").write_text("")
    assert srppo_command("run", recipe).code == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "ppo")).Reload()
    shown = [(e.step, e.value) for e in board.Scalars("reward")]
    logged = [(line["step"], pytest.approx(line["reward"])) for line in finished["metrics/ppo"]]
    assert shown == logged


# --- signals --------------------------------------------------------------------------------------

NEVER = "checkpoint.every=1000"


@pytest.mark.parametrize(
    ("target", "number", "stage", "step"),
    [
        pytest.param("srppo.train.sft._Trainer.end_step", 2, "sft", 2, marks=pytest.mark.slow),
        pytest.param("srppo.train.sft._Trainer.training_step", 3, "sft", 2, marks=pytest.mark.slow),
        (
            "srppo.rollout.hf.HFSampler.sample",
            10,
            "ppo",
            2,
        ),  # four to check, three for the audit, one a curve
        ("srppo.train.ppo.update", 3, "ppo", 3),
        pytest.param("srppo.pipeline.Run._curve", 2, "ppo", 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_what_is_complete_and_the_run_goes_on(
    recipe, tmp_path, finished, monkeypatch, target, number, stage, step
):
    done = interrupt(monkeypatch, recipe, target, number, NEVER)
    assert done.code == 143
    assert "SIGTERM: the same command goes on from here" in done.err
    assert "Traceback" not in done.err
    kept = [p.name for p in (tmp_path / "run" / "checkpoints" / stage).iterdir()]
    assert kept == [f"step-{step:06d}"]
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    require_same(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["srppo.pipeline.read_data", "srppo.pipeline.evaluate_models"])
def test_where_nothing_is_trained_it_ends_at_once(recipe, tmp_path, finished, monkeypatch, target):
    done = interrupt(monkeypatch, recipe, target, 1, signals=[signal.SIGINT])
    assert done.code == 130
    assert srppo_command("run", recipe).code == 0
    require_same(tmp_path / "run", finished)


def test_a_step_that_takes_longer_than_the_grace_is_abandoned_and_done_again(
    recipe, tmp_path, finished, monkeypatch
):
    """In the midst of the update of step 3, whose weights are then nobody's."""
    done = interrupt(
        monkeypatch,
        recipe,
        "srppo.train.update.Optimizers.step",
        11,
        "checkpoint.grace=0",
    )
    assert done.code == 143
    assert "kept at step 2" in done.err
    assert srppo_command("run", recipe).code == 0
    require_same(tmp_path / "run", finished)


def test_a_signal_waits_for_what_is_being_written_meanwhile(
    recipe, tmp_path, finished, monkeypatch
):
    """It comes in the rollout of step 3, while step 2 goes to a slow disk."""
    written, real = [], Checkpoints._write

    def slow(self, step, *args):
        if self.folder.name == "ppo" and step == 2:
            time.sleep(1)
        real(self, step, *args)
        written.append(step)

    monkeypatch.setattr(Checkpoints, "_write", slow)
    target = "srppo.rollout.hf.HFSampler.sample"
    done = interrupt(monkeypatch, recipe, target, 10, "checkpoint.overlap=true")
    assert done.code == 143
    assert written == [1, 2, 3, 4, 1, 2]
    assert "kept at step 2" in done.err
    assert srppo_command("run", recipe, "checkpoint.overlap=true").code == 0
    require_same(tmp_path / "run", finished)


# --- another run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_fresh_starts_over_and_keeps_what_was_there(recipe, tmp_path, monkeypatch, finished):
    kill(monkeypatch, recipe, BEGIN, 7)
    done = srppo_command("run", recipe, "--fresh")
    assert done.code == 0, done.err
    assert f"the run that was there is now {tmp_path}/run.old-1" in done.err
    assert "going on" not in done.err
    assert (tmp_path / "run.old-1/checkpoints/ppo").is_dir()
    require_same(tmp_path / "run", finished)


def test_fresh_without_a_run_is_a_run(tmp_path):
    done = srppo_command("sft", write_recipe(tmp_path), "--fresh")
    assert done.code == 0
    assert "starting over" not in done.err


def test_a_changed_recipe_goes_on_from_the_checkpoint_if_that_is_allowed(
    recipe, tmp_path, monkeypatch
):
    kill(monkeypatch, recipe, BEGIN, 7)
    changed = "ppo.learning_rate=1e-5"
    done = srppo_command("run", recipe, changed)
    assert done.code == 2
    assert re.search(r"ppo\.learning_rate was 0\.001 and is now 1e-05.*--allow-change", done.err)
    done = srppo_command("run", recipe, changed, "--allow-change")
    assert done.code == 0, done.err
    assert "going on after step 2" in done.err
    rates = [line["learning_rate"] for line in timeless(tmp_path / "run/metrics/ppo.jsonl")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5 * 2 / 3, 1e-5 / 3])
    record = json.loads((tmp_path / "run/run.json").read_text())
    changed = "ppo.learning_rate was 0.001 and is now 1e-05"
    assert record["changes"][0]["changed"] == [changed]
    assert f"changed on the way, {record['changes'][0]['at']}: {changed}" in done.out


@pytest.mark.parametrize("number", [3, 7])
def test_a_change_that_the_checkpoint_does_not_fit_is_refused(recipe, monkeypatch, number):
    kill(monkeypatch, recipe, BEGIN, number)
    changed = ["ppo.estimator=all_action", "sft.optimizer=sgd", "--allow-change"]
    done = srppo_command("run", recipe, *changed)
    assert done.code == 2
    assert "does not fit" in done.err
    assert "Traceback" not in done.err


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_that_runs_out_while_measuring_changes_no_number(
    recipe, tmp_path, finished, monkeypatch
):
    """In the audit, in the curve and in the last evaluation; what is measured fits into less."""
    for module in ("srppo.train.audit", "srppo.eval.evaluate"):
        real = resolve_name(f"{module}.score")

        def limited(model, sequences, max_tokens, real=real):
            if max_tokens > 5000:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(model, sequences, max_tokens)

        monkeypatch.setattr(f"{module}.score", limited)
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    assert done.err.count("memory ran out (CUDA out of memory.)") == 2  # 16384, 8192, 4096
    require_same(tmp_path / "run", finished)
