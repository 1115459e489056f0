"""Seconds by phase, and rates made of them."""

import pytest
import torch

import tiny
from srppo.config import PPOConfig
from srppo.models.roles import Roles
from srppo.rollout.hf import HFSampler
from srppo.train import pace as module
from srppo.train.cost import Shape, step_flops
from srppo.train.pace import Pace, Stopwatch, matmul_rate


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_lap_is_divided_among_its_phases_and_what_none_claims(clock):
    watch = Stopwatch()
    with watch("rollout"):
        clock[0] += 3
    clock[0] += 0.5
    with watch("update"):
        clock[0] += 2
    with watch("rollout"):
        clock[0] += 1
    assert watch.lap() == pytest.approx({"rollout": 4.0, "update": 2.0, "other": 0.5})
    clock[0] += 0.25
    assert watch.lap() == pytest.approx({"other": 0.25})


def test_the_share_is_what_the_step_needs_over_what_the_machine_could_do_meanwhile(monkeypatch):
    monkeypatch.setattr(module, "matmul_rate", lambda device: 1e9)
    roles = Roles.begin(tiny.model(seed=0), tiny.model(seed=1), critic=False)
    rollout = HFSampler(roles.policy, eos_token_id=0, max_new_tokens=6).sample([[1, 2]] * 5, 0)
    pace = Pace(roles, PPOConfig(epochs=3))
    seconds = {"rollout": 1.0, "scoring": 2.0, "update": 5.0, "evaluation": 50.0, "other": 7.0}
    found = pace.of(rollout, seconds)
    lengths = rollout.sequences.lengths.tolist()
    needed = step_flops(Shape.of(roles.policy.model), [2] * 5, lengths, epochs=3).total
    assert found["time/attainable_share"] == pytest.approx(needed / 8.0 / 1e9)
    assert found["time/tokens_per_second"] == pytest.approx(sum(lengths) / 8.0)
    assert found["time/evaluation"] == 50.0


def test_the_rate_of_a_product_grows_until_it_can_be_timed(monkeypatch):
    """A machine that multiplies 1024 x 1024 in 0.1 s does 2 * 1024^3 operations in that time."""
    monkeypatch.setattr(module, "_timed", lambda x: 0.1 * (len(x) / 1024) ** 3)
    assert matmul_rate(torch.device("cpu")) == pytest.approx(2 * 1024**3 / 0.1)
