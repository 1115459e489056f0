"""The place in a stage's steps: which signal ends it where."""

import json
import math
import os
import signal

import pytest

from srppo import distributed, signals
from srppo.config_checkpoint import CheckpointConfig
from srppo.progress import Reporter
from srppo.train.metrics import MetricsLog
from srppo.train.steps import Keeper, Steps


class Nothing:
    """Trains nothing."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def keeper(path):
    return Keeper(path, "ppo", CheckpointConfig(every=100), Reporter())


@pytest.mark.parametrize("other", [False, True], ids=["to this process", "to the other one"])
def test_of_several_processes_none_leaves_before_all_have_agreed(tmp_path, monkeypatch, other):
    """A signal that comes just after they asked each other waits until they ask again."""
    asked = []

    def any_of(here):
        asked.append(here)
        if len(asked) == 1:
            if not other:
                os.kill(os.getpid(), signal.SIGTERM)
            return here
        return here or other

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "any_of", any_of)
    monkeypatch.setattr(distributed, "from_first", lambda make: make())
    log = MetricsLog(tmp_path, "ppo")
    steps = Steps(keeper(tmp_path), Nothing(), log)

    def train():
        with signals.listening(), steps:
            for step in range(1, 5):
                steps.complete(step, {})

    with pytest.raises(signals.Interrupted):
        train()
    assert steps.done == 2
    assert keeper(tmp_path).found.step == 2


def test_a_step_of_several_processes_is_kept_however_little_grace_there_is(tmp_path, monkeypatch):
    """Abandoned, it could not be saved by all together."""
    waits = []
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "any_of", lambda here: here)
    monkeypatch.setattr(distributed, "from_first", lambda make: make())
    monkeypatch.setattr(signals, "hold", waits.append)
    impatient = Keeper(tmp_path, "ppo", CheckpointConfig(grace=0.1), Reporter())
    with Steps(impatient, Nothing(), MetricsLog(tmp_path, "ppo")):
        pass
    assert waits == [distributed.ENDING.total_seconds()]


def test_a_checkpoint_holds_no_line_of_a_later_step(tmp_path):
    """Step 2 is logged and then not done, as where `max_kl` ends the stage."""
    keep = Keeper(tmp_path, "ppo", CheckpointConfig(every=100, keep_finished=True), Reporter())
    log = MetricsLog(tmp_path, "ppo")
    with Steps(keep, Nothing(), log) as steps:
        log.log(1, {})
        steps.complete(1, {})
        log.log(2, {})
    assert [json.loads(line)["step"] for line in keeper(tmp_path).metrics.splitlines()] == [1]


def test_the_best_is_never_a_number_that_is_none(tmp_path):
    kept = []
    keep = Keeper(tmp_path, "ppo", CheckpointConfig(keep_best="x"), Reporter())
    log = MetricsLog(tmp_path, "ppo")
    with Steps(keep, Nothing(), log) as steps:
        keep.save_best = lambda: kept.append(steps.done)
        for step, value in enumerate([math.nan, 0.5, math.inf, 0.4, 0.9], start=1):
            log.log(step, {})
            steps.complete(step, {"x": value})
    assert kept == [2, 5]
