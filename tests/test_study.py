"""Committed studies: which runs they need, what is kept, and that a row comes out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from runs import srppo_command, write_recipe
from srppo.config import load_recipe
from srppo.errors import ConfigError
from srppo.study import Study

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "recipes" / "studies").glob("*.yaml"))
CONTROLS = {"longer": {"sft": {"epochs": 2}}, "loo": {"ppo": {"estimator": "all_action"}}}


def write_study(folder: Path, **keys: object) -> Path:
    """A study of runs that take a second each."""
    write_recipe(folder, controls=CONTROLS, eval={"every": None, "limit": 12})
    tree = {"recipe": "recipe.yaml", "seeds": [1, 2], "minutes": 0.1, **keys}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def load(folder: Path, *overrides: str, **keys: object) -> Study:
    return Study.load(str(write_study(folder, **keys)), list(overrides), folder / "out")


VARIANTS = {
    "low": {"ppo.kl_coef": 0.1},
    "high": {"ppo.kl_coef": 1.0, "controls": {"x": {"extrapolate": 2.0}}},
}


def test_runs_are_variants_by_seed_and_settings_lie_on_each_other(tmp_path):
    study = load(
        tmp_path, "sft.epochs=3", settings={"ppo.kl_coef": 0.7, "ppo.steps": 1}, variants=VARIANTS
    )
    points = study.points([], [])
    assert [p.name for p in points] == [
        "low__seed=1",
        "high__seed=1",
        "low__seed=2",
        "high__seed=2",
    ]
    assert [p.recipe.ppo.kl_coef for p in points[:2]] == [0.1, 1.0]
    assert {(p.recipe.ppo.steps, p.recipe.sft.epochs) for p in points} == {(1, 3)}
    assert list(points[1].recipe.controls) == ["x"]  # not added to the recipe's
    assert [study.variant(p) for p in points] == ["low", "high", "low", "high"]
    assert points[0].recipe.run_dir == tmp_path / "out" / "low__seed=1"


@pytest.mark.parametrize(
    ("rows", "names", "controls"),
    [
        ([], ["seed=1", "seed=2"], {"longer", "loo"}),
        (["loo"], ["seed=1__loo", "seed=2__loo"], {"loo"}),
        (["loo", "longer"], ["seed=1", "seed=2"], {"longer", "loo"}),
        (["policy"], ["seed=1__no-controls", "seed=2__no-controls"], set()),
        (["main/loo", "main"], ["seed=1", "seed=2"], {"longer", "loo"}),
    ],
)
def test_rows_of_a_study_without_variants_are_models(rows, names, controls, tmp_path):
    points = load(tmp_path).points(rows, [])
    assert [p.name for p in points] == names
    assert set(points[0].recipe.controls) == controls
    assert {load(tmp_path).variant(p) for p in points} == {"main"}


def test_rows_of_a_study_with_variants_name_them(tmp_path):
    study = load(tmp_path, variants=VARIANTS)
    assert [p.name for p in study.points(["high"], [5])] == ["high__seed=5"]
    (point,) = study.points(["low/loo"], [5])
    assert point.name == "low__seed=5__loo"
    for row in ("loo", "middle", "low/nothing", "high/loo"):
        with pytest.raises(ConfigError, match=f"has no row '{row}'.*Known: "):
            study.points([row], [])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_is_one(name):
    study = Study.load(name, [])
    points = study.points([], [])
    assert len(points) == len(study.config.variants) * len(study.config.seeds)
    assert len(
        {
            json.dumps(p.recipe.model_dump(mode="json", exclude={"name", "output_dir"}))
            for p in points
        }
    ) == len(points)
    head = (ROOT / "recipes" / "studies" / f"{name}.yaml").read_text().split("\nrecipe:")[0]
    for word in ("Hardware:", "Time:", "Expected:"):
        assert word in head


def test_the_recipe_beside_a_run_is_the_run(tmp_path):
    points = load(tmp_path, variants=VARIANTS).points([], [])
    load(tmp_path, variants=VARIANTS).save_recipes(points)
    for point in points:
        assert load_recipe(point.arguments[0]) == point.recipe


def test_base_models_that_are_not_there_are_pretrained_first(tmp_path):
    study = load(tmp_path, base=str(tmp_path / "base-{seed}"))
    (tmp_path / "base-1").mkdir()
    points = study.points([], [])
    assert [p.recipe.model.base for p in points] == [str(tmp_path / f"base-{s}") for s in (1, 2)]
    ((name, command),) = study.bases(points).items()
    assert name.endswith("base-2")
    assert command[2:] == [
        "srppo.miniature.pretrain",
        "--seed",
        "2",
        "--out",
        str(tmp_path / "base-2"),
    ]
    other = load(tmp_path, "model.base=another", base=str(tmp_path / "base-{seed}"))
    assert other.bases(other.points([], [])) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "miniature-table"),
        (["miniature-table", "nonsense"], "has no row 'nonsense'"),
        (["miniature-table", "--seeds", "a"], "not whole numbers"),
        (["miniature-table", "ppo.kl=2"], "no such setting"),
        (["miniature-table", "ppo.kl_coef=[1"], "ppo.kl_coef=[1 do not fit a recipe"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(arguments, words, tmp_path):
    done = srppo_command("reproduce", *arguments, "--dry-run", "--out", tmp_path / "out")
    assert done.code == 2
    assert words in " ".join(done.err.split())


def test_a_study_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(b"recipe: \xff.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read .*utf-8.*Give a name"):
        Study.load(str(path), [])


@pytest.mark.parametrize(
    ("there", "jobs", "said"),
    [
        (0, 2, "5 to do after 5 base models: about 27 min"),  # 3 x 4 + 3 x 5
        (4, 1, "5 to do after 1 base model: about 29 min"),
        (5, 5, "5 to do: about 5 min"),
    ],
)
def test_a_dry_run_lists_runs_and_cost_and_writes_nothing(there, jobs, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(there):
        (tmp_path / f"runs/table/base-{seed}").mkdir(parents=True)
    done = srppo_command("reproduce", "miniature-table", "--dry-run", "--jobs", jobs)
    assert done.code == 0
    assert done.out.count("to do") == 11 - there
    assert said in " ".join(done.out.split())
    assert not (tmp_path / "runs/miniature-table").exists()


@pytest.mark.slow
def test_a_row_run_again_has_the_same_numbers(tmp_path):
    """The whole study two runs at a time, and one row of one seed in another place."""
    path = write_study(tmp_path)
    first = srppo_command("reproduce", path, "--jobs", "2", "--out", tmp_path / "one")
    assert first.code == 0, first.err
    again = srppo_command("reproduce", path, "loo", "--seeds", "2", "--out", tmp_path / "two")
    assert again.code == 0, again.err

    def rows(folder: str, model: str) -> list[dict]:
        found = json.loads((tmp_path / folder / "results.json").read_text())["rows"]
        return [row for row in found if row["model"] == model]

    for model in ("base", "sft", "policy", "loo"):
        assert rows("one/seed=2", model) == rows("two/seed=2__loo", model) != []
    assert rows("one/seed=1", "loo") != rows("one/seed=2", "loo")
    files = [
        p.read_bytes() for p in sorted((tmp_path / "one").glob("*/controls/loo/model.safetensors"))
    ]
    (only,) = (tmp_path / "two").glob("*/controls/loo/model.safetensors")
    assert only.read_bytes() == files[1] != files[0]

    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*/*.safetensors")}
    third = srppo_command("reproduce", path, "loo", "--out", tmp_path / "one")
    assert third.code == 0
    assert third.out.count("finished, is kept") == 2  # the whole runs hold that row
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*/*.safetensors")} == kept
    assert "| main | loo | T=1 | 2 |" in (tmp_path / "one" / "table.md").read_text()
    for suffix in ("md", "csv", "json", "svg"):
        assert (tmp_path / "one" / f"table.{suffix}").is_file()


@pytest.mark.slow
def test_a_wheel_brings_the_studies(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "from srppo.study import Study\n"
        "print(len(Study.load('miniature-table', []).points([], [])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "5"
