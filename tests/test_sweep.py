"""A grid of runs: its combinations, what it keeps, what it says of one that fails."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from runs import srppo_command, write_recipe
from srppo.errors import ConfigError
from srppo.sweep import grid
from srppo.train.lock import own


def test_every_combination_the_last_key_fastest(tmp_path):
    path = write_recipe(tmp_path)
    points = grid(str(path), ["sft.learning_rate=1e-5,5e-6", "seed=7", "ppo.kl_coef=0.2,0.5"])
    found = [(p.recipe.sft.learning_rate, p.recipe.ppo.kl_coef, p.recipe.seed) for p in points]
    assert found == [(1e-5, 0.2, 7), (1e-5, 0.5, 7), (5e-6, 0.2, 7), (5e-6, 0.5, 7)]
    assert points[0].name == "sft.learning_rate=1e-5__ppo.kl_coef=0.2"
    assert [p.recipe.run_dir for p in points] == [tmp_path / "run" / p.name for p in points]


def test_commas_inside_brackets_and_quotes_stay(tmp_path):
    path = str(write_recipe(tmp_path))
    lists = grid(path, ["eval.temperatures=[0.0,1.0],[1.0]"])
    assert [p.recipe.eval.temperatures for p in lists] == [[0.0, 1.0], [1.0]]
    assert [p.recipe.name for p in grid(path, ["name='a,b',c"])] == ["a,b", "c"]
    (one,) = grid(path, ["eval.temperatures=[0.0,0.5,1.0]"])
    assert one.recipe.eval.temperatures == [0.0, 0.5, 1.0]
    loras = grid(path, ["model.lora={rank: 4, alpha: 8},null"])
    assert [p.recipe.model.lora and p.recipe.model.lora.rank for p in loras] == [4, None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["ppo.kl_coef"], "not of the form key=value,value"),
        (["ppo.kl_coef=0.2,"], "not of the form key=value,value"),
        (["ppo.kl_coef=0.2,0.2"], "two runs of the grid would have the directory"),
        (["ppo.kl_coef=0.2,high"], "ppo.kl_coef='high'"),
        (["ppo.kl=0.2,0.5"], "no such setting"),
        (["ppo.kl_coef=0.2,0.5", "seed=1", "ppo.kl_coef=0.1"], "ppo.kl_coef is there twice"),
        (["seed=1,2", "output_dir=a,b"], "output_dir .*cannot be varied. Give one"),
    ],
)
def test_grids_that_are_refused_before_anything_runs(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        grid(str(write_recipe(tmp_path)), settings)


def test_a_dry_run_lists_and_writes_nothing(tmp_path):
    done = srppo_command("sweep", write_recipe(tmp_path), "ppo.kl_coef=0.2,0.5", "--dry-run")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines() if "to do" in line] == [
        "ppo.kl_coef=0.2",
        "ppo.kl_coef=0.5",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_fails_keeps_no_other_from_being_run_and_finished_ones_are_kept(tmp_path):
    path = write_recipe(tmp_path)
    prompts = tmp_path / "later.jsonl"
    setting = f"data.prompts={prompts},python:srppo.miniature.world:prompts"
    first = srppo_command("sweep", path, setting)
    assert first.code == 1
    assert "FAILED data.prompts=" in first.out
    assert "no such file" in " ".join(first.out.split())
    (good,) = (tmp_path / "run").glob("*/report.html")
    assert "policy" in first.out
    made = {p: p.stat().st_mtime_ns for p in good.parent.rglob("*")}

    prompts.write_text('{"prompt": "copy : a b"}\n{"prompt": "copy : b a"}\n')
    second = srppo_command("sweep", path, setting)
    assert second.code == 0
    assert "FAILED" not in second.out
    assert len(list((tmp_path / "run").glob("*/report.html"))) == 2
    assert {p: p.stat().st_mtime_ns for p in good.parent.rglob("*")} == made
    listed = srppo_command("sweep", path, setting, "--dry-run")
    assert listed.out.count("finished, is kept") == 2


def test_a_directory_with_a_run_of_its_own_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run of its own.*Set output_dir"):
        grid(str(path), ["ppo.kl_coef=0.2,0.5"])


@pytest.mark.slow
def test_a_signal_ends_the_run_that_is_going_on_before_the_sweep(tmp_path):
    """Sent to the sweep alone, as `kill` does."""
    path = write_recipe(tmp_path, ppo={"steps": 10_000}, checkpoint={"every": 1})
    command = [sys.executable, "-m", "srppo", "sweep", str(path), "seed=1,2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sweep:
        for line in sweep.stderr:
            if "PPO step 2/" in line:
                break
        sweep.send_signal(signal.SIGTERM)
        said = sweep.communicate()[1]
    assert sweep.returncode == 143, said
    assert own(tmp_path / "run" / "seed=1")  # nobody runs it any more
    assert list((tmp_path / "run" / "seed=1" / "checkpoints" / "ppo").iterdir())
    assert not (tmp_path / "run" / "seed=2").exists()
