"""A grid of runs, each in a process and a directory of its own."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from srppo import signals
from srppo.config import Recipe, load_recipe
from srppo.errors import ConfigError
from srppo.report.read import mapping, read
from srppo.report.terminal import result_table

_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    """Its directory, made of the values that vary."""
    recipe: Recipe
    arguments: list[str]
    """Of `srppo run`: a recipe's file and the overrides."""

    @property
    def command(self) -> list[str]:
        """What runs it."""
        return [sys.executable, "-m", "srppo", "run", *self.arguments]

    @property
    def state(self) -> str:
        """In words."""
        begun = (self.recipe.run_dir / "run.json").is_file()
        return "finished, is kept" if self.finished else "goes on" if begun else "to do"

    @property
    def finished(self) -> bool:
        """Whether this very run is there, to its end."""
        if not (self.recipe.run_dir / "run.json").is_file():
            return False
        record = read(self.recipe.run_dir).run or {}
        wanted = self.recipe.model_dump(mode="json")
        return bool(record.get("finished")) and record.get("recipe") == wanted


def grid(source: str, settings: list[str]) -> list[Point]:
    """Every combination of `key=v1,v2` as a checked recipe, the last key varying fastest.

    Commas inside brackets and quotes belong to the value. The runs' directories lie in the recipe's
    output_dir.

    Raises:
        ConfigError: a setting without values or twice, a combination that is no recipe, two with
            one name.
    """
    keys = [_split(item) for item in settings]
    fixed = [f"{key}={values[0]}" for key, values in keys if len(values) == 1]
    varied = [(key, values) for key, values in keys if len(values) > 1]
    names = [key for key, _ in keys]
    if twice := [key for key in names if names.count(key) > 1]:
        raise ConfigError(
            f"{twice[0]} is there twice: the later values would hide the former. Write them as "
            f"one: {twice[0]}=value,value."
        )
    if "output_dir" in dict(varied):
        raise ConfigError(
            "output_dir is where all runs of the grid lie, each in a directory of its own: it "
            "cannot be varied. Give one."
        )
    root = load_recipe(source, fixed + [f"{key}={values[0]}" for key, values in varied]).run_dir
    if (root / "run.json").is_file():
        raise ConfigError(
            f"{root} holds a run of its own: the sweep's would lie between its files. Set "
            "output_dir to a new directory."
        )
    points: dict[str, Point] = {}
    for values in itertools.product(*(values for _, values in varied)):
        chosen = [f"{key}={value}" for (key, _), value in zip(varied, values, strict=True)]
        name = "__".join(re.sub(r"[^\w.=+-]+", "_", item) for item in chosen) or "only"
        if name in points:
            raise ConfigError(
                f"two runs of the grid would have the directory {name!r}: one would be lost. Leave "
                "out the value that is there twice."
            )
        overrides = [*fixed, *chosen, f"output_dir={root / name}"]
        points[name] = Point(name, load_recipe(source, overrides), [source, *overrides])
    return list(points.values())


def show_grid(points: list[Point], console: Console) -> None:
    """What would be run, and what is there already."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for point in points:
        table.add_row(point.name, point.state)
    console.print(table)
    console.print(f"{len(points)} runs in {points[0].recipe.run_dir.parent}")


def sweep(points: list[Point], console: Console) -> bool:
    """Run what is not finished, then one table of all; whether every run came to its end.

    A run that fails does not keep the others from being run.
    """
    failed = run_points(points)
    done = [point for point in points if point.name not in failed]
    _show_results(done, console)
    for point in done:
        console.print(f"{point.name}: {point.recipe.run_dir / 'report.html'}")
    show_failed(failed, console)
    return not failed


def run_points(points: list[Point], jobs: int = 1, **environment: str) -> dict[str, str]:
    """Run what is not finished, `jobs` at a time; name and reason of those that failed.

    `environment` is set in each run's process.
    """
    todo = {point.name: point.command for point in points if not point.finished}
    for name in (point.name for point in points if point.name not in todo):
        _say(f"{name}: finished, is kept")
    return run_commands(todo, jobs, **environment)


def run_commands(commands: dict[str, list[str]], jobs: int, **environment: str) -> dict[str, str]:
    """Name -> command, `jobs` at a time, each in a process of its own, so that whatever happens to
    it stays there; name and reason of those that failed."""
    return _Processes(jobs, environment).run(commands)


def show_failed(failed: dict[str, str], console: Console) -> None:
    """Which, why and what to do."""
    for name, reason in failed.items():
        console.print(f"FAILED {name}: {reason}", style="bold")
    if failed:
        console.print("Once the cause is mended, the same command runs them again, and no other.")


@dataclass
class _Processes:
    """Several at a time."""

    jobs: int
    environment: dict[str, str]
    going: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    interrupted: bool = False

    def run(self, commands: dict[str, list[str]]) -> dict[str, str]:
        """Name and reason of those that failed. A signal goes on to all that are running: they
        save, and end before this process does."""
        with ThreadPoolExecutor(self.jobs) as pool:
            names = {
                pool.submit(self._one, name, command, f"{i}/{len(commands)}"): name
                for i, (name, command) in enumerate(commands.items(), 1)
            }
            try:
                reasons = {names[done]: done.result() for done in as_completed(names)}
            except signals.Interrupted as e:
                signals.caught()
                with self.lock:
                    self.interrupted = True
                    for process in self.going:
                        process.send_signal(e.number)
                raise
        return {name: reason for name in commands if (reason := reasons[name])}

    def _one(self, name: str, command: list[str], place: str) -> str | None:
        """Its messages are passed on; the last one is the reason if it fails."""
        with self.lock:
            if self.interrupted:
                return "not begun"
            _say(f"[{place}] {name}")
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | self.environment,
            )
            self.going.add(process)
        last = ""
        with process:
            assert process.stderr
            for line in process.stderr:
                sys.stderr.write(line if self.jobs == 1 else f"{name}: {line}")
                last = line.strip() or last
        with self.lock:
            self.going.remove(process)
        code = process.returncode
        return None if code == 0 else f"exit code {code}, {last or 'nothing said'}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show_results(points: list[Point], console: Console) -> None:
    """SFT model and policy of each run; one table, or several where runs measured other things."""
    tables: dict[Any, list[dict[str, Any]]] = {}
    for point in points:
        results = read(point.recipe.run_dir).results or {}
        for row in results.get("rows", []):
            if row["model"] in ("sft", "policy"):
                measured = tuple(results["groups"]), tuple(mapping(row, "scores"))
                named = {**row, "model": f"{point.name} {row['model']}"}
                tables.setdefault(measured, []).append(named)
    for (groups, _), rows in tables.items():
        console.print(result_table({"groups": list(groups), "rows": rows}))


def _split(item: str) -> tuple[str, list[str]]:
    """`key=v1,v2` as key and values."""
    key, equals, text = item.partition("=")
    values, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (c in _OPENING) - (c in _CLOSING) if not quote else 0
        if c == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += c
    if not key or not equals or not all(value.strip() for value in values):
        raise ConfigError(
            f"{item!r} is not of the form key=value,value: nothing can be varied. Write, for "
            "example, ppo.kl_coef=0.2,0.5."
        )
    return key, values
