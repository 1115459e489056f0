"""recipes/slurm.sh on one machine that plays two: `srun` and `scontrol` are small scripts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import json_lines, write_recipe

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm.sh"
SRUN = """#!/bin/bash
# The same command on each node, at once; signals go to all of them, as Slurm's own srun has it.
while [[ $1 == --* ]]; do shift; done
nodes=()
for ((k = 0; k < SLURM_JOB_NUM_NODES; k++)); do
  SLURM_NODEID=$k SLURM_PROCID=$k "$@" &
  nodes+=($!)
done
trap 'kill -TERM "${nodes[@]}"' TERM
worst=0
for node in "${nodes[@]}"; do
  while kill -0 "$node" 2>/dev/null; do wait "$node"; done
  wait "$node" || { status=$?; ((status > worst)) && worst=$status; }
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then
  [[ $3 == "node[1-2]" ]] && printf 'localhost\\nlocalhost\\n'
else
  echo "$@" >> requeued
fi
"""
STEPS = 12


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job's batch script, in `tmp_path`."""
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "srppo": f'#!/bin/bash\nexec {sys.executable} -m srppo "$@"\n',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def submit(tmp_path, environment, recipe):
    return subprocess.Popen(
        ["bash", SCRIPT, str(recipe), f"ppo.steps={STEPS}"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_two_nodes_train_are_told_to_end_and_the_same_job_goes_on(cluster, tmp_path, number):
    """Before the time limit the job is queued again; a job that is cancelled is not."""
    recipe = write_recipe(
        tmp_path,
        model={"shard": True},
        ppo={"learning_rate": 1e-6},
        eval={"every": None, "temperatures": [0.0], "limit": 4},
    )
    log = tmp_path / "run" / "metrics" / "ppo.jsonl"
    job = submit(tmp_path, cluster, recipe)
    began = time.monotonic()
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    job.send_signal(number)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 143, out
    assert "the same command goes on" in out
    assert "Traceback" not in out
    done = len(json_lines(log))
    assert 2 <= done < STEPS
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (number == signal.SIGUSR1)
    if requeued.exists():
        assert requeued.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
        requeued.unlink()
    job = submit(tmp_path, cluster, recipe)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert f"going on after step {done}" in out, out
    assert [line["step"] for line in json_lines(log)] == list(range(1, STEPS + 1))
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    assert not requeued.exists()


def test_the_script_has_no_faults_that_a_linter_finds():
    linter = shutil.which("shellcheck")
    if not linter:
        subprocess.run(["bash", "-n", SCRIPT], check=True)
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    subprocess.run([linter, SCRIPT], check=True)
