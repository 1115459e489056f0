"""Committed studies: a recipe, seeds, and what is varied; their runs, and one table over seeds."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

import srppo
from srppo.config import load_recipe, parse_recipe
from srppo.errors import ConfigError
from srppo.report.numbers import duration
from srppo.report.study import Result, write_study
from srppo.sweep import Point, run_commands, run_points, show_failed
from srppo.train.files import writing
from srppo.validation import PositiveFloat, Section, Seed, validate

OWN = ("base", "sft", "policy")
"""Models that every run has, whatever its controls."""
BASE_MINUTES = 4
"""That the miniature's base model takes from scratch on one core, measured."""


class StudyConfig(Section):
    """What a study's file holds."""

    recipe: str
    """What all runs begin with; the path is relative to this file's folder."""
    seeds: list[Seed] = Field(min_length=1)
    """Each variant is run once with each."""
    minutes: PositiveFloat
    """That a run takes on one core, measured; for the listing only."""
    base: str | None = None
    """`model.base` of each run, `{seed}` replaced; the miniature's is pretrained from scratch where
    there is none. null: the recipe's."""
    settings: dict[str, Any] = {}
    """Of all runs, on top of the recipe: key.sub: value. A group replaces the recipe's."""
    variants: dict[str, dict[str, Any]] = Field({"main": {}}, min_length=1)
    """Name: settings, on top of those."""


@dataclass(frozen=True)
class Study:
    """A study's file, read, and where its runs lie."""

    name: str
    folder: Path
    """Of the file."""
    config: StudyConfig
    out: Path
    overrides: list[str]
    """Settings of all runs, on top of everything."""

    @staticmethod
    def load(name: str, overrides: list[str], out: Path | None = None) -> Study:
        """One that comes with the package, by name, or any, by the path of its file.

        Args:
            overrides: as `key=value`.
            out: of its runs and tables; None: runs/NAME.

        Raises:
            ConfigError: no such study, unknown keys.
        """
        path = Path(name) if name.endswith(".yaml") else _shipped() / f"{name}.yaml"
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise ConfigError(
                f"study {str(path)!r} cannot be read ({e}): nothing to reproduce. Give a name of: "
                f"{', '.join(sorted(p.stem for p in _shipped().glob('*.yaml')))}; or a file."
            ) from e
        config: StudyConfig = validate(StudyConfig, tree)
        return Study(path.stem, path.parent, config, out or Path("runs") / path.stem, overrides)

    def points(self, rows: list[str], seeds: list[int]) -> list[Point]:
        """The runs that the rows need, seed by seed.

        A row is VARIANT, VARIANT/MODEL or, where there is one variant, MODEL: `base`, `sft`,
        `policy` or a control. A run of some controls only is a run of its own, unless the whole
        one is there already.

        Raises:
            ConfigError: a row that there is not, a variant that is no recipe.
        """
        wanted = self._wanted(rows)
        return [
            self._point(variant, seed, models)
            for seed in seeds or self.config.seeds
            for variant, models in wanted.items()
        ]

    def variant(self, point: Point) -> str:
        """Which of them a run is of."""
        before = point.name.partition("seed=")[0].removesuffix("__")
        return before or next(iter(self.config.variants))

    def bases(self, points: list[Point]) -> dict[str, list[str]]:
        """What pretrains the base models that are not there."""
        if self.config.base is None:
            return {}
        recipes = [point.recipe for point in points if not point.finished]
        wanted = {r.seed: self._base(r.seed) for r in recipes if r.model.base == self._base(r.seed)}
        missing = {seed: path for seed, path in wanted.items() if not Path(path).is_dir()}
        command = [sys.executable, "-m", "srppo.miniature.pretrain"]
        return {
            f"base model {path}": [*command, "--seed", str(seed), "--out", path]
            for seed, path in missing.items()
        }

    def _base(self, seed: int) -> str:
        assert self.config.base
        return self.config.base.replace("{seed}", str(seed))

    def _wanted(self, rows: list[str]) -> dict[str, set[str] | None]:
        """Variant -> its models; None: all."""
        variants = self.config.variants
        only = next(iter(variants)) if len(variants) == 1 else None
        wanted: dict[str, set[str] | None] = {}
        for row in rows or variants:
            variant, slash, model = row.partition("/")
            if not slash and variant not in variants and only:
                variant, model = only, row
            known = variants.keys() if variant not in variants else self._models(variant)
            if variant not in variants or (model and model not in known):
                raise ConfigError(
                    f"study {self.name} has no row {row!r}: there is nothing to run. Known: "
                    f"{', '.join(sorted(known))}."
                )
            before = wanted.setdefault(variant, set())
            wanted[variant] = None if not model or before is None else {*before, model}
        return wanted

    def _models(self, variant: str) -> set[str]:
        return {*OWN, *parse_recipe(self._tree(variant, 0)).controls}

    def _point(self, variant: str, seed: int, models: set[str] | None) -> Point:
        """The whole run where all is wanted or there; else one with the wanted controls alone."""
        tree = self._tree(variant, seed)
        name = f"{variant}__seed={seed}" if len(self.config.variants) > 1 else f"seed={seed}"
        whole = self._named(name, tree)
        if models is None or whole.finished:
            return whole
        controls = {k: v for k, v in (tree.get("controls") or {}).items() if k in models}
        if len(controls) == len(whole.recipe.controls):
            return whole
        some = "+".join(controls) or "no-controls"
        return self._named(f"{name}__{some}", tree | {"controls": controls})

    def _named(self, name: str, tree: dict[str, Any]) -> Point:
        tree = tree | {"name": f"{self.name}, {name}", "output_dir": str(self.out / name)}
        return Point(name, parse_recipe(tree), [str(self.out / f"{name}.yaml")])

    def _tree(self, variant: str, seed: int) -> dict[str, Any]:
        """The recipe of a run, not yet checked."""
        source = self.folder / self.config.recipe
        load_recipe(source)  # for its messages
        tree = OmegaConf.load(source)
        own = {"model.base": self._base(seed)} if self.config.base else {}
        changes = {**self.config.settings, **self.config.variants[variant], **own, "seed": seed}
        for key, value in changes.items():
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        try:
            merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(self.overrides))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as e:
            raise ConfigError(
                f"the settings {' '.join(self.overrides)} do not fit a recipe of study {self.name} "
                f"({' '.join(str(e).split())}): nothing is run. Write key.sub=value, brackets and "
                "quotes closed."
            ) from e
        plain: Any = OmegaConf.to_container(merged, resolve=True)
        return plain

    def save_recipes(self, points: list[Point]) -> None:
        """Each run's recipe as a file beside its directory: `srppo run` takes it, too."""
        for point in points:
            (path,) = map(Path, point.arguments)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                tree = point.recipe.model_dump(mode="json", exclude_defaults=True)
                path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _shipped() -> Path:
    """The folder of the studies that come with the package: inside it where it was installed from
    a wheel, beside src/ in a checkout."""
    package = Path(srppo.__file__).parent
    inside, beside = package / "recipes", package.parents[1] / "recipes"
    return (inside if inside.is_dir() else beside) / "studies"


def reproduce(study: Study, points: list[Point], jobs: int, console: Console) -> bool:
    """Run what is not finished, then tables and figure of all; whether all runs are there.

    Each run has one thread, so that its numbers do not depend on how many run side by side.
    """
    study.save_recipes(points)
    failed = run_commands(study.bases(points), jobs, OMP_NUM_THREADS="1")
    if not failed:
        failed = run_points(points, jobs, OMP_NUM_THREADS="1")
    results = [
        Result(study.variant(point), point.recipe.seed, point.recipe.run_dir)
        for point in points
        if point.finished
    ]
    if results:
        console.print(write_study(study.name, results, study.out))
        console.print(f"Tables and figure: {study.out}/table.md, .csv, .json, .svg")
    show_failed(failed, console)
    return not failed


def show_study(study: Study, points: list[Point], jobs: int, console: Console) -> None:
    """Which runs there are, which are to do, and what they will take."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("models", overflow="fold")
    table.add_column("state")
    for point in points:
        table.add_row(point.name, ", ".join((*OWN, *point.recipe.controls)), point.state)
    bases = study.bases(points)
    for base in bases:
        table.add_row(base, "", "to do")
    console.print(table)
    todo = sum(not point.finished for point in points)
    minutes = study.config.minutes * math.ceil(todo / jobs)
    minutes += BASE_MINUTES * math.ceil(len(bases) / jobs)  # all of them before any run
    first = f" after {len(bases)} base model{'s' * (len(bases) > 1)}" if bases else ""
    console.print(
        f"{len(points)} runs in {study.out}, {todo} to do{first}: about {duration(60 * minutes)} "
        f"with {jobs} at a time."
    )
