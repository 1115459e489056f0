"""Several processes are one run: the same rollouts, gradients, weights; on from any checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
from safetensors.torch import load_file

import tiny
from processes import fine_tune, free_port, together, train, train_each, work_of, write_models
from runs import timeless, write_recipe
from srppo import distributed
from srppo.config import SFTConfig
from srppo.errors import ConfigError
from srppo.train.sft import batching

PAIRS = {"responses_per_prompt": 2, "rollouts_per_step": 14}
KINDS = {
    "whole models": {},
    "sharded": {"shard": True},
    "adapters": {"lora": True},
    "adapters on sharded weights": {"lora": True, "shard": True},
    "sharded, activations computed again": {"shard": True, "gradient_checkpointing": True},
    "RLOO, sharded": {"shard": True, "estimator": "rloo", **PAIRS},
    "all-action": {"estimator": "all_action", **PAIRS},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def trained(models):
    """What each of n processes found, for every kind; made when first asked for."""

    @cache
    def of(n):
        return together(n, train_each, models, KINDS)

    return of


def close(ours, theirs, size):
    """Equal to `size`, relative to the largest number of all if that is above 1."""
    largest = max([1, *(np.abs(b).max(initial=0) for b in theirs)])
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max(initial=0) <= size * largest


def same(found, alone):
    np.testing.assert_array_equal(found["rollout"], alone["rollout"])
    close([found["logprobs"]], [alone["logprobs"]], 1e-5)
    close(found["gradients"], alone["gradients"], 1e-6)
    close(found["critic"], alone["critic"], 1e-6)
    ours, theirs = ({**x["metrics"], "padding": 0} for x in (found, alone))
    assert ours == pytest.approx(theirs, abs=5e-6)  # padding: they cut other batches
    close(found["weights"], alone["weights"], 1e-5)
    np.testing.assert_array_equal(found["rollout after"], alone["rollout after"])


def test_two_sharded_processes_train_as_one_does(models):
    alone = train(models, {"steps": 3})
    for found in together(2, train, models, {"steps": 3, "shard": True}):
        same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 4])
def test_any_number_of_processes_trains_as_one_does(trained, n, kind):
    """Ten steps; alone, nothing is sharded."""
    (alone,) = trained(1)
    for found in trained(n):
        same(found[kind], alone[kind])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mistral"])
def test_sharded_architectures(tmp_path, architecture):
    """gpt2's embeddings are its output head, too. Weights are not compared: its key biases have no
    gradient but rounding, which Adam makes as large as any."""
    write_models(tmp_path, architecture)
    alone = train(tmp_path, {"steps": 1})
    for found in together(2, train, tmp_path, {"steps": 1, "shard": True}):
        np.testing.assert_array_equal(found["rollout"], alone["rollout"])
        close(found["gradients"], alone["gradients"], 1e-6)


def test_the_work_is_dealt_out_once_and_everybody_has_as_many_batches():
    """More processes than rows: some are idle."""
    y = tiny.sequences(n=3)
    found = together(4, work_of, y, 16)
    assert len({count for count, _ in found}) == 1
    assert sorted(row for _, batches in found for rows in batches for row in rows) == [0, 1, 2]


@pytest.mark.slow
def test_stage_1_takes_the_same_steps_with_two_processes(models):
    """Twelve demonstrations, four a step."""
    settings = {"batch_size": 4, "micro_batch_size": 1, "epochs": 2, "learning_rate": 1e-4}
    settings |= {"optimizer": "sgd"}  # Adam makes rounding as large as any gradient
    (alone,) = together(1, fine_tune, models, settings)
    for found in together(2, fine_tune, models, settings):
        close(found, alone, 1e-6)


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size=8 .* 3 processes.* Try sft.batch_size=9"):
        batching(SFTConfig(batch_size=8), 100)
    assert batching(SFTConfig(batch_size=24, micro_batch_size=8), 100) == (8, 1)
    assert batching(SFTConfig(batch_size=24, micro_batch_size=3), 100) == (2, 4)


# --- whole runs -----------------------------------------------------------------------------------


def srppo(*arguments, wait=True, **environment):
    command = [sys.executable, "-m", "srppo", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # all of them can be ended
        env={**os.environ, **environment},
    )
    return (process, *process.communicate(timeout=300)) if wait else process


def recipe(folder, **sections):
    """Little evaluation."""
    sections.setdefault("eval", {"every": None, "temperatures": [0.0], "limit": 4})
    return write_recipe(folder, **sections)


def records(run):
    return timeless(run / "metrics" / "ppo.jsonl")


def same_run(ours, theirs):
    """Metrics to the rounding of sums, the policy to 1e-5."""
    for a, b in zip(records(ours), records(theirs), strict=True):
        assert {**a, "padding": 0} == pytest.approx({**b, "padding": 0}, abs=1e-3, rel=1e-3)
    a, b = (load_file(run / "policy" / "model.safetensors") for run in (ours, theirs))
    close([x.numpy() for x in a.values()], [b[k].numpy() for k in a], 1e-5)


PPO = {"steps": 4, "learning_rate": 1e-6}
PLAIN_SFT = {"optimizer": "sgd", "learning_rate": 0.01}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    process, _, err = srppo("run", recipe(folder, ppo=PPO))
    assert process.returncode == 0, err
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_run_of_two_goes_on_as_one_and_as_four(alone, tmp_path, shard):
    """Stopped after its second step; its pieces become others."""
    path = recipe(tmp_path, ppo=PPO, checkpoint={"every": 1}, model={"shard": shard})
    process = srppo("run", path, "--nproc", 2, wait=False)
    log = tmp_path / "run" / "metrics" / "ppo.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    stopped = len(records(tmp_path / "run"))
    assert stopped < 4
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    for n in (1, 4):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
        process, _, err = srppo("run", path, "--nproc", n)
        assert process.returncode == 0, err
        assert f"going on after step {stopped}" in err
        same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_dies_ends_the_run_and_the_rest_goes_on(alone, tmp_path, victim):
    """Two launchers that meet over TCP stand for machines; the first holds the meeting place."""
    path = recipe(tmp_path, ppo=PPO, checkpoint={"every": 1}, model={"shard": True})
    meet = ("--nproc", 1, "--nodes", 2, "--rendezvous", f"localhost:{free_port()}")
    nodes = [srppo("run", path, *meet, wait=False) for _ in range(2)]
    log = tmp_path / "run" / "metrics" / "ppo.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, nodes[0])
    for process in family(nodes[victim].pid):
        os.kill(process, signal.SIGKILL)
    survivor = nodes[1 - victim]
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode not in (0, None)
    said = [line for line in err.splitlines() if line.startswith("error")]
    assert any("The same command goes on from the last checkpoint" in line for line in said), err
    assert "Traceback" not in err
    nodes[victim].communicate()
    process, _, err = srppo("run", path)
    assert process.returncode == 0, err
    assert "going on after step" in err
    same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_one_error_ends_all_and_is_said_once(tmp_path):
    """The second process fails while the first waits for it."""
    (tmp_path / "rows.py").write_text(
        "import os\n"
        "from srppo.errors import DataError\n"
        "def prompts(split, seed):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise DataError('rows.csv is not on this machine')\n"
        "    yield {'prompt': 'copy : a b'}\n"
    )
    path = recipe(tmp_path, data={"prompts": "python:rows:prompts"})
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process, _, err = srppo("run", path, "--nproc", 2, PYTHONPATH=places)
    assert process.returncode == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, err
    assert "in process 1 of 2" in errors[0]
    assert "rows.csv is not on this machine" in errors[0]
    assert "Traceback" not in err


def family(pid):
    """A process and all below it."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [pid, *(x for child in found.stdout.split() for x in family(int(child)))]


def until(true, process, seconds=120):
    began = time.monotonic()
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
