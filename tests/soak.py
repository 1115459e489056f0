"""Bad days, many of them: `make soak` runs all of it, `tests/test_soak.py` a little.

    python tests/soak.py [kills] [faults] [damage] [recipes] [data] [--share 0.1] [--seed 0]

kills     SIGKILL, at random moments and in each phase; what comes out is compared to the byte
faults    a full or broken disk, missing rights, a removed directory, at the writes of a run
damage    bits flipped and ends cut off in checkpoints
recipes   recipes that are none; data: files that are none; a message, never a traceback

Prints a line for each and ends with code 1 if anything was lost. Runs are forked from this process,
which has imported all that a run imports, and a few are interpreters of their own; `--processes` go
on side by side. It needs Linux.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on it, and a forked process has one thread
os.environ["HF_HUB_OFFLINE"] = "1"  # a fuzzed name is not looked up
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads are not forked along

import argparse
import builtins
import errno
import gc
import io
import itertools
import json
import logging
import multiprocessing
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import srppo.cli
import srppo.miniature.world
import srppo.pipeline
import srppo.train.sft
from runs import SMALL, srppo_command, write_recipe
from sittings import (
    LORA,
    SETTINGS,
    at_call,
    differences,
    only_what_is_compared,
    result_of,
    stages_of,
)
from srppo.train.state import Checkpoints

PAIRS = {"rounds": 2, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
KINDS: dict[str, dict[str, Any]] = {
    "whole weights": SETTINGS,
    "adapters, dropout, written meanwhile": {
        **LORA,
        "controls": {"spin": {"pairs": PAIRS}},
        "checkpoint": {**SETTINGS["checkpoint"], "overlap": True},
    },
    "all-action": {**SETTINGS, "ppo": {**SETTINGS["ppo"], "estimator": "all_action"}},
}
PHASES = {
    "rollout": ("srppo.rollout.hf.HFSampler._decode", 18),
    "update": ("srppo.train.update.accumulate", 24),
    "evaluation": ("srppo.eval.evaluate.Evaluator.measure", 8),
    "checkpointing": ("os.fsync", 90),
    "renaming": ("os.replace", 30),
    "stage 1": ("srppo.train.sft._Trainer.training_step", 4),
    "change of stages": ("srppo.train.checkpoint.RunDir.mark_done", 5),
}
"""A function that the phase consists of, and about how often a run calls it."""


@dataclass(frozen=True)
class Ended:
    """How a sitting ended."""

    code: int
    """Negative: the signal that killed it."""
    said: str


def sitting(
    recipe: Path,
    prepare: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
    seconds: float | None = None,
    *,
    new: bool = False,
) -> Ended:
    """`srppo run` in a forked process, or in a `new` interpreter, killed after so many seconds."""
    said = recipe.with_name("said.txt")
    with said.open("w") as file:
        if new:
            command = [sys.executable, "-m", "srppo", "run", str(recipe)]
            said_by = [(os.POSIX_SPAWN_DUP2, file.fileno(), descriptor) for descriptor in (1, 2)]
            child = os.posix_spawn(command[0], command, os.environ, file_actions=said_by)
        else:
            child = os.fork()
            if child == 0:
                _run(recipe, prepare, file.fileno())
    if seconds is not None:
        ending = os.pidfd_open(child)
        if not select.select([ending], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ending)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"))


def _run(recipe: Path, prepare: Callable[[pytest.MonkeyPatch], None], file: int) -> None:
    """What a forked process does; it does not return."""
    code = 70
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        patch = pytest.MonkeyPatch()
        only_what_is_compared(patch)
        prepare(patch)
        sys.argv = ["srppo", "run", str(recipe)]
        srppo.cli.main()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- what all parts start from --------------------------------------------------------------------


def warm_up(folder: Path) -> None:
    """Run each kind once, left alone, in this process: all else is held against that, and what is
    forked from here need not import and prepare what these runs did."""
    write_data(folder)
    for kind in KINDS:
        recipe = recipe_of(folder, kind, folder / kind)
        faulty = Faulty(recipe.parent / "run", None, "")
        with pytest.MonkeyPatch.context() as patch:
            only_what_is_compared(patch)
            faulty.install(patch)
            started = time.monotonic()
            done = srppo_command("run", recipe)
            seconds = time.monotonic() - started
        assert done.code == 0, done.err
        recipe.with_name("facts.json").write_text(
            json.dumps({"writes": faulty.count, "seconds": seconds})
        )
    gc.collect()
    gc.freeze()
    for thread in threading.enumerate()[1:]:  # of a checkpoint that was written meanwhile
        thread.join()
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    ours = [name for name in threads if not name.startswith("jemalloc")]  # pyarrow's can be forked
    assert len(ours) == 1, f"{len(ours)} threads: what is forked from here could hang"


def write_data(folder: Path) -> None:
    """Rows of the miniature's world in files: to make them up anew takes a third of a run."""
    for name, count in (("demonstrations", 24), ("prompts", 16), ("evaluation", 48)):
        rows = itertools.islice(getattr(srppo.miniature.world, name)(0), count)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(folder: Path, kind: str, place: Path) -> Path:
    """A recipe of this kind whose run is `place`/run."""
    files = {name: str(folder / f"{name}.jsonl") for name in ("demonstrations", "prompts")}
    data = {**files, "max_response_tokens": 6}
    questions = {"prompts": str(folder / "evaluation.jsonl"), "limit": 12, "temperatures": [1.0]}
    return write_recipe(place, **{**KINDS[kind], "data": data, "eval": questions})


def facts_of(folder: Path, kind: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / kind / "facts.json").read_text())
    return facts


@cache
def expected(folder: Path, kind: str) -> dict[str, Any]:
    """What a run that is left alone ends with."""
    return result_of(folder / kind / "run")


# --- killed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Killed:
    """What became of some kills."""

    where: Counter[str]
    runs: int
    resumes: int
    losses: list[str]


def kills(share: float, seed: int, folder: Path, side_by_side: SideBySide) -> list[str]:
    """100 kills; half after a random time, half at a random call of a random phase. Four runs are
    in new interpreters."""
    rng = random.Random(seed)
    wanted = max(1, round(100 * share))
    jobs = []
    while left := wanted - sum(number for _, _, number, *_ in jobs):
        new = len(jobs) < round(4 * share)
        kind = list(KINDS)[(seed + len(jobs)) % len(KINDS)]
        number = min(left, rng.randint(1, 5))
        jobs.append((folder, kind, number, f"{seed}.{len(jobs)}", new))
    found = list(side_by_side(_kill_runs, jobs))
    where = sum((k.where for k in found), Counter())
    losses = [line for k in found for line in k.losses]
    print(
        f"kills: {where.total()} of {sum(k.runs for k in found)} runs {dict(where)}, of them "
        f"{sum(j[2] for j in jobs if j[4])} in new interpreters; resumed from within a stage "
        f"{sum(k.resumes for k in found)} times, losses: {len(losses)}"
    )
    return losses


def _kill_runs(folder: Path, kind: str, wanted: int, seed: str, new: bool) -> Killed:
    """Kill a run so many times, or another one where it came to its end before."""
    rng = random.Random(seed)
    where: Counter[str] = Counter()
    losses: list[str] = []
    runs = resumes = 0
    seconds = facts_of(folder, kind)["seconds"]
    while where.total() < wanted:
        runs += 1
        recipe = recipe_of(folder, kind, folder / f"killed {seed}.{runs}")
        code = None
        while code != 0:
            phase = rng.choice(["any time", *PHASES]) if rng.random() < 0.5 else "any time"
            if where.total() == wanted:
                done = sitting(recipe, new=new)
            elif new:
                phase = "any time, new interpreter"
                done = sitting(recipe, seconds=rng.uniform(0, 3 * seconds), new=True)
            else:
                done = _killed(recipe, rng, phase, seconds)
            code = done.code
            resumes += done.said.count("going on after step")
            if code == -signal.SIGKILL:
                where[phase] += 1
            elif code:
                losses.append(f"run {seed}.{runs}: exit code {code}: {done.said[-500:]}")
                break
        else:
            if other := differences(recipe.parent / "run", expected(folder, kind)):
                losses.append(f"run {seed}.{runs}: {', '.join(other)}")
        if losses:
            break
        shutil.rmtree(recipe.parent)
    return Killed(where, runs, resumes, losses)


def _killed(recipe: Path, rng: random.Random, phase: str, seconds: float) -> Ended:
    if phase == "any time":
        return sitting(recipe, seconds=rng.uniform(0, seconds))
    target, calls = PHASES[phase]
    number = rng.randint(1, calls)
    return sitting(
        recipe,
        lambda patch: at_call(patch, target, number, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    )


# --- a file system that fails ---------------------------------------------------------------------

FAULTY = "whole weights"
"""The kind of the runs that faults happen to."""
FAULTS = {
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "EACCES": errno.EACCES,
    "removed": 0,
}


class Faulty:
    """Counts what a run does to its directory, and lets one of it fail."""

    def __init__(self, run: Path, number: int | None, kind: str) -> None:
        self.run, self.number, self.kind = run, number, kind
        self.count = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name, place in (
            (os, "replace", 1),
            (os, "mkdir", 0),
            (shutil, "copyfile", 1),
            (srppo.train.state, "save_file", 1),
            (safetensors.torch, "save_file", 1),
        ):
            patch.setattr(owner, name, self._wrap(getattr(owner, name), place))
        patch.setattr("transformers.modeling_utils.safe_save_file", self._wrap(_save_file, 1))
        real_open = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+"):
                self._step(file)
            return real_open(file, mode, *args, **kwargs)

        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        real_sync = os.fsync

        def synced(descriptor: int) -> None:
            self._step(os.readlink(f"/proc/self/fd/{descriptor}"))
            real_sync(descriptor)

        patch.setattr(os, "fsync", synced)

    def _wrap(self, real: Any, place: int) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._step(args[place] if len(args) > place else kwargs.get("filename"))
            return real(*args, **kwargs)

        return wrapped

    def _step(self, path: Any) -> None:
        if not isinstance(path, str | Path) or not Path(path).is_relative_to(self.run):
            return
        self.count += 1
        if self.count != self.number:
            return
        if self.kind == "removed":
            shutil.rmtree(self.run, ignore_errors=True)
            return
        code = FAULTS[self.kind]
        raise OSError(code, os.strerror(code), str(path))


_save_file = safetensors.torch.save_file


def faults(share: float, seed: int, folder: Path, side_by_side: SideBySide) -> list[str]:
    """One write of a run fails; the message names path and cure; the same command then ends as
    ever. All writes, or a share of them; another seed gives each another fault."""
    writes = facts_of(folder, FAULTY)["writes"]
    chosen = random.Random(seed).sample(range(1, writes + 1), max(1, round(writes * share)))
    kinds = list(FAULTS)
    jobs = [(folder, number, kinds[(number + seed) % len(kinds)]) for number in sorted(chosen)]
    found = list(side_by_side(_fault, jobs))
    losses = [line for _, lines in found for line in lines]
    ended = Counter(end for end, _ in found)
    print(f"faults: {len(jobs)} of {writes} writes {dict(ended)}, losses: {len(losses)}")
    return losses


def _fault(folder: Path, number: int, fault: str) -> tuple[str, list[str]]:
    """How it ended, and losses."""
    losses = []
    recipe = recipe_of(folder, FAULTY, folder / f"fault {number}")
    run = recipe.parent / "run"
    failed = sitting(recipe, Faulty(run, number, fault).install)
    named = str(run) in failed.said and ("again" in failed.said or "output_dir" in failed.said)
    if failed.code not in (0, 2) or "Traceback" in failed.said or (failed.code and not named):
        losses.append(f"write {number}, {fault}: code {failed.code}: {failed.said[-600:]}")
    done = sitting(recipe)
    if done.code:
        losses.append(f"write {number}, {fault}, again: {done.said[-600:]}")
    elif other := differences(run, expected(folder, FAULTY)):
        losses.append(f"write {number}, {fault}, again: {', '.join(other)}")
    shutil.rmtree(recipe.parent)
    return f"{fault}: exit code {failed.code}", losses


# --- damage ---------------------------------------------------------------------------------------


def damage(share: float, seed: int, folder: Path, side_by_side: SideBySide) -> list[str]:
    """Bits flipped and ends cut off, anywhere in a real checkpoint: each is noticed."""
    each = max(2, round(200 * share)) // len(KINDS) + 1
    jobs = [(folder, kind, each, f"{seed}.{kind}") for kind in KINDS]
    losses = [line for lines in side_by_side(_damage, jobs) for line in lines]
    tried = each * len(jobs)
    print(f"damage: {tried} tried, {tried - len(losses)} noticed, losses: {len(losses)}")
    return losses


def _damage(folder: Path, kind: str, number: int, seed: str) -> list[str]:
    rng = random.Random(seed)
    run = folder / f"damaged {kind}"
    shutil.copytree(folder / kind / "run", run)
    losses = []
    for i in range(number):
        stage = rng.choice(stages_of(run))
        newest = max((run / "checkpoints" / stage).iterdir())
        file = rng.choice(sorted(newest.iterdir()))
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed if i % 2 else whole[:place])
        said: list[str] = []
        found = Checkpoints(run, stage, 2, said.append).newest
        if not (found and found.path != newest and len(said) == 1 and str(newest) in said[0]):
            losses.append(f"{file.relative_to(run)}, byte {place}: {said}")
        file.write_bytes(whole)
        assert Checkpoints(run, stage, 2, said.append).newest.path == newest
    return losses


# --- garbage --------------------------------------------------------------------------------------

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(codec="utf-8", exclude_characters="/~."), max_size=8).filter(
        lambda s: "python:" not in s
    ),
)
_TREES = st.recursive(
    _LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3)
)
_KEYS = [
    (section, key)
    for section, content in SMALL.items()
    if isinstance(content, dict)
    for key in content
]
_WRONG: dict[type, st.SearchStrategy[Any]] = {
    str: st.one_of(st.integers(), st.lists(st.integers(), min_size=1), st.booleans()),
    int: st.one_of(st.integers(max_value=-1), st.text(min_size=1), st.floats(0.1, 0.9)),
    float: st.one_of(st.floats(max_value=-0.1), st.just(float("nan")), st.lists(st.none())),
    list: st.one_of(st.integers(), st.text(min_size=1), st.just([None])),
}
"""Of another kind, or of no possible value."""


@st.composite
def garbage_recipes(draw: Any, folder: Path) -> bytes:
    """A recipe that cannot be run, whatever its other settings are."""
    tree = json.loads(json.dumps({**SMALL, "output_dir": str(folder / "run")}))
    kind = draw(st.sampled_from(["unknown", "wrong", "missing", "no tree", "bytes"]))
    section, key = draw(st.sampled_from(_KEYS))
    if kind == "unknown":
        tree[section][draw(st.text(min_size=1, max_size=9)) + "_"] = draw(_TREES)
    elif kind == "wrong":
        tree[section][key] = draw(_WRONG[type(tree[section][key])])
    elif kind == "missing":
        del tree[draw(st.sampled_from(["name", "output_dir", "model"]))]
    elif kind == "no tree":
        tree[draw(st.sampled_from(["model", "data", "sft", "ppo", "eval"]))] = draw(_LEAVES)
    else:
        return draw(st.binary(max_size=200))
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", errors="replace")


_ROWS = st.dictionaries(
    st.one_of(
        st.sampled_from(["prompt", "response", "messages", "instruction", "output", "text"]),
        st.text(max_size=6),
    ),
    _TREES,
    max_size=4,
)


@st.composite
def garbage_data(draw: Any) -> tuple[str, bytes]:
    """A file in which no row has both a prompt and a response that are text."""
    name = draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.txt"]))
    if draw(st.booleans()):
        return name, draw(st.binary(max_size=300))
    rows = draw(st.lists(_ROWS | _TREES, max_size=4))
    for row in rows:
        if isinstance(row, dict):
            row.pop(draw(st.sampled_from(["prompt", "response"])), None)
            row.pop("output", None)
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    return name, "\n".join(lines).encode("utf-8", errors="replace")


def _fuzz(strategy: Any, examples: int, seed: int, check: Callable[[Any], str]) -> list[str]:
    """Losses; `check` says what is wrong with how a command took an example, or nothing."""
    losses: list[str] = []
    tried = 0

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal tried
        tried += 1
        if wrong := check(example):
            losses.append(f"{example!r:.300}: {wrong}")

    run()
    assert tried >= examples, f"only {tried} of {examples} examples"
    return losses


def _wrong(*command: Any) -> str:
    """What is wrong with how a command that cannot succeed ended."""
    try:
        done = srppo_command(*command)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    if done.code != 2:
        return f"exit code {done.code}"
    return "" if "error: " in done.err and "Traceback" not in done.err else done.err[-300:]


def _garbage(name: str, work: Any, share: float, seed: int, folder: Path, beside: Any) -> list[str]:
    """2000 examples in eight portions, each of another seed."""
    each = max(3, round(2000 * share / 8))
    jobs = [(folder / f"{name} {i}", each, 8 * seed + i) for i in range(8)]
    losses = [line for lines in beside(work, jobs) for line in lines]
    print(f"{name}: {8 * each} tried, losses: {len(losses)}")
    return losses


def recipes(share: float, seed: int, folder: Path, side_by_side: SideBySide) -> list[str]:
    """Recipes that cannot be run."""
    return _garbage("recipes", _recipes, share, seed, folder, side_by_side)


def _recipes(folder: Path, examples: int, seed: int) -> list[str]:
    folder.mkdir()
    path = folder / "recipe.yaml"

    def check(content: bytes) -> str:
        path.write_bytes(content)
        return _wrong("run", path)

    found = _fuzz(garbage_recipes(folder), examples, seed, check)
    return found + ([f"{folder / 'run'} was made"] if (folder / "run").exists() else [])


def data(share: float, seed: int, folder: Path, side_by_side: SideBySide) -> list[str]:
    """Files of which no row can be used, as demonstrations."""
    return _garbage("data", _data, share, seed, folder, side_by_side)


def _data(folder: Path, examples: int, seed: int) -> list[str]:
    folder.mkdir()
    logging.disable(logging.CRITICAL)  # a library's own words about each file

    def check(example: tuple[str, bytes]) -> str:
        path = folder / example[0]
        path.write_bytes(example[1])
        return _wrong("data", "check", path)

    return _fuzz(garbage_data(), examples, seed, check)


# --- all of it ------------------------------------------------------------------------------------

SideBySide = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""What a function returns for each tuple of arguments, called in several processes."""
PARTS = {f.__name__: f for f in (kills, faults, damage, recipes, data)}


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    work, arguments = job
    return work(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.share:.0%} of all, {arguments.processes} processes")
    losses = []
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        warm_up(folder)
        print(f"    {time.monotonic() - started:.0f} s to warm up", flush=True)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(arguments.processes, fork) as pool:
            for part in arguments.parts or PARTS:
                started = time.monotonic()
                losses += PARTS[part](
                    arguments.share,
                    arguments.seed,
                    folder,
                    lambda work, jobs: pool.map(_call, [(work, job) for job in jobs]),
                )
                print(f"    {time.monotonic() - started:.0f} s", flush=True)
    print(*losses, sep="\n")
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
