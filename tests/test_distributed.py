"""Several processes are one run: the same rollouts, gradients, weights; on from any checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from processes import (
    KINDS,
    as_numpy,
    extrapolate,
    fine_tune,
    fine_tune_on,
    free_port,
    learn_pairs,
    together,
    train,
    train_each,
    work_of,
    write_models,
)
from runs import timeless, write_recipe
from srppo import distributed
from srppo.config import SFTConfig
from srppo.errors import ConfigError
from srppo.train.sft import batching


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


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
def test_any_number_of_processes_trains_as_one_does(models):
    """Every kind, five steps; alone, nothing is sharded."""
    kinds = {kind: {"steps": 5, **settings} for kind, settings in KINDS.items()}
    (alone,) = together(1, train_each, models, kinds)
    for n in (2, 4):
        for found in together(n, train_each, models, kinds):
            assert found.keys() == kinds.keys()
            for kind, theirs in alone.items():
                same(found[kind], theirs)


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
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_stage_1_takes_the_same_steps_with_two_processes(models, shard, lora):
    """Twelve demonstrations, four a step."""
    settings = {"batch_size": 4, "micro_batch_size": 1, "epochs": 2, "learning_rate": 1e-4}
    settings |= {"optimizer": "sgd"}  # Adam makes rounding as large as any gradient
    settings |= {"lora": lora, "max_grad_norm": 0.5}
    (alone,) = together(1, fine_tune, models, settings)
    for found in together(2, fine_tune, models, settings | {"shard": shard}):
        close(found, alone, 1e-6)


@pytest.mark.slow
def test_stage_1_goes_on_with_each_process_drawing_its_own_dropout(models):
    """To the bit, with batches of another shape in each."""
    settings = {"batch_size": 4, "micro_batch_size": 2, "epochs": 2, "learning_rate": 1e-2}
    settings |= {"lora": True, "dropout": 0.3}
    for whole, again in together(2, fine_tune_on, models, settings):
        assert all(map(np.array_equal, whole, again))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"shard": True}, {"lora": True}])
def test_pairs_are_learnt_alike_by_two_processes(models, kind):
    """Five pairs, four a step: in every second step one process has nothing to do.

    How many pairs are told apart is left out at a round's first step: the policy is its reference
    there, so that rounding tells.
    """
    settings = {"rounds": 2, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3}
    settings |= {"optimizer": "sgd", "lora": kind.get("lora", False)}
    alone = learn_pairs(models, settings)
    for found in together(2, learn_pairs, models, settings | kind):
        before = 0
        for ours, theirs in zip(found["logged"], alone["logged"], strict=True):
            unsure = {"told_apart"} if theirs["round"] != before else set()
            before = theirs["round"]
            expected = {k: theirs[k] for k in theirs.keys() - unsure}
            assert {k: ours[k] for k in ours.keys() - unsure} == pytest.approx(expected, abs=5e-6)
        close(found["weights"], alone["weights"], 1e-6)


@pytest.mark.slow
def test_weights_in_pieces_are_extrapolated_whole(models):
    alone = extrapolate(models, {})
    for found in together(2, extrapolate, models, {"shard": True}):
        close(found, alone, 0.0)


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size=8 .* 3 processes.* Try sft.batch_size=9"):
        batching(SFTConfig(batch_size=8), 100)
    assert batching(SFTConfig(batch_size=24, micro_batch_size=8), 100) == (8, 1)
    assert batching(SFTConfig(batch_size=24, micro_batch_size=3), 100) == (2, 4)


# --- whole runs -----------------------------------------------------------------------------------


def srppo(*arguments, wait=True, on=(), **environment):
    """`on`: what the command is prefixed with, to run elsewhere."""
    command = [*on, sys.executable, "-m", "srppo", *map(str, arguments)]
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
    """Little evaluation, and enough steps of stage 1 to be ended among them."""
    sections.setdefault("sft", {"epochs": 8})
    sections.setdefault("eval", {"every": None, "temperatures": [0.0], "limit": 4})
    return write_recipe(folder, **sections)


def records(run):
    return timeless(run / "metrics" / "ppo.jsonl")


def same_run(ours, theirs):
    """Metrics to the rounding of sums, the policy to 1e-5."""
    for a, b in zip(records(ours), records(theirs), strict=True):
        assert {**a, "padding": 0} == pytest.approx({**b, "padding": 0}, abs=1e-3, rel=1e-3)
    for name in ("sft", "policy"):
        a, b = (AutoModelForCausalLM.from_pretrained(run / name) for run in (ours, theirs))
        close([as_numpy(x) for x in a.parameters()], [as_numpy(x) for x in b.parameters()], 1e-5)


PPO = {"steps": 4, "learning_rate": 1e-6}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    process, _, err = srppo("run", recipe(folder, ppo=PPO))
    assert process.returncode == 0, err
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "shard"), [("ppo", False), ("ppo", True), ("sft", True)])
def test_a_run_of_two_goes_on_as_one_and_as_four(alone, tmp_path, stage, shard):
    """Stopped after its second step; its pieces become others."""
    path = recipe(tmp_path, ppo=PPO, checkpoint={"every": 1}, model={"shard": shard})
    process = srppo("run", path, "--nproc", 2, wait=False)
    log = tmp_path / "run" / "metrics" / f"{stage}.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    stopped = len(timeless(log))
    assert stopped < {"ppo": 4, "sft": 16}[stage]
    assert (tmp_path / "run" / "sft").exists() == (stage == "ppo")
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
def test_adapters_on_weights_in_pieces_from_stage_1_to_the_end(tmp_path):
    """Two processes beside one, which has nothing in pieces; a control on pairs, too."""
    found = []
    model = {"lora": {"rank": 2}, "shard": True, "shard_sampling": True}
    controls = {"spin": {"pairs": {"optimizer": "sgd", "learning_rate": 1e-4}}}
    for n in (1, 2):
        path = recipe(tmp_path / str(n), ppo={**PPO, "steps": 1}, model=model, controls=controls)
        process, _, err = srppo("run", path, *(["--nproc", n] if n > 1 else []))
        assert process.returncode == 0, err
        run = tmp_path / str(n) / "run"
        places = [run / name / "adapter_model.safetensors" for name in ("sft", "policy")]
        places.append(run / "controls" / "spin" / "adapter_model.safetensors")
        found.append([x.numpy() for place in places for x in load_file(place).values()])
    close(found[1], found[0], 1e-5)


@pytest.fixture
def machines(request, tmp_path):
    """What prefixes a command so that it runs on each of two machines, and the first one's name.

    Launchers on this machine, or two network namespaces with a cable between them, each with a name
    and a hosts file of its own.
    """
    if request.param == "launchers":
        yield ([], []), "localhost"
        return
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces take root and `ip` of iproute2")
    names = [f"srppo{os.getpid()}{k}" for k in "ab"]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
    enter = f'hostname "$0" && mount --bind {hosts} /etc/hosts && exec "$@"'
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [["name", "cable", "netns", name] for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for k, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{k}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        own = ["unshare", "--mount", "--uts", "bash", "-c", enter]
        yield (
            [["ip", "netns", "exec", name, *own, f"node{k}"] for k, name in enumerate(names, 1)],
            "node1",
        )
    finally:
        for name in names:
            ip("netns", "delete", name)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("machines", ["launchers", "namespaces"], indirect=True)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_dies_ends_the_run_and_the_rest_goes_on(alone, tmp_path, machines, victim):
    """Two of them meet over TCP; the first holds the meeting place."""
    path = recipe(tmp_path, ppo=PPO, checkpoint={"every": 1}, model={"shard": True})
    places, first = machines
    meet = ("--nproc", 1, "--nodes", 2, "--rendezvous", f"{first}:{free_port()}")
    nodes = [srppo("run", path, *meet, wait=False, on=on) for on in places]
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
    """The second process fails while the first waits for it, and takes longer to end than that."""
    (tmp_path / "rows.py").write_text(
        "import atexit, os, time\n"
        "from srppo.errors import DataError\n"
        "def prompts(split, seed):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        atexit.register(time.sleep, 10)\n"
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
