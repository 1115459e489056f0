"""Bad days, many of them: `make soak` runs all of it, `tests/test_soak.py` a little.

    python tests/soak.py [kills] [faults] [damage] [recipes] [data] [--share 0.1] [--seed 0]

kills     SIGKILL, at random moments and in each phase; what comes out is compared to the byte
faults    a full or broken disk, missing rights, a removed directory, at the writes of a run
damage    bits flipped and ends cut off in checkpoints
recipes   recipes that are none; data: files that are none; a message, never a traceback

Prints one line each and ends with code 1 if anything was lost. Runs are forked from this process,
which has imported everything; it needs a system with `fork`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on it, and a forked process has one thread
os.environ["HF_HUB_OFFLINE"] = "1"  # a fuzzed name is not looked up

import argparse
import builtins
import errno
import io
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import srppo.cli
import srppo.pipeline
import srppo.train.sft
from runs import SMALL, srppo_command, write_recipe
from sittings import LORA, SETTINGS, at_call, differences, only_what_is_compared, result_of
from srppo.train.state import Checkpoints

KINDS: dict[str, dict[str, Any]] = {
    "whole weights": SETTINGS,
    "adapters, dropout": LORA,
    "all-action": {**SETTINGS, "ppo": {**SETTINGS["ppo"], "estimator": "all_action"}},
}
PHASES = {
    "rollout": ("srppo.rollout.hf.HFSampler._decode", 30),
    "update": ("srppo.train.update.accumulate", 16),
    "evaluation": ("srppo.eval.evaluate.Evaluator.measure", 10),
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
) -> Ended:
    """`srppo run` in a forked process, killed after so many seconds."""
    said = recipe.with_name("said.txt")
    child = os.fork()
    if child == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        patch = pytest.MonkeyPatch()
        only_what_is_compared(patch)
        prepare(patch)
        sys.argv = ["srppo", "run", str(recipe)]
        code = 0
        try:
            srppo.cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"))


def reference(folder: Path, kind: str) -> tuple[dict[str, Any], float]:
    """What a run that is left alone ends with, and the seconds that it takes."""
    started = time.monotonic()
    done = sitting(write_recipe(folder, **KINDS[kind]))
    assert done.code == 0, done.said
    return result_of(folder / "run"), time.monotonic() - started


# --- killed ---------------------------------------------------------------------------------------


def kills(share: float, seed: int, folder: Path) -> list[str]:
    """100 kills; half after a random time, half at a random call of a random phase. Losses."""
    rng = random.Random(seed)
    wanted = max(1, round(100 * share))
    kinds = list(KINDS)[: max(1, round(len(KINDS) * min(1, 4 * share)))]
    expected = {kind: reference(folder / f"whole {kind}", kind) for kind in kinds}
    losses: list[str] = []
    where: Counter[str] = Counter()
    resumes = runs = 0
    while sum(where.values()) < wanted:
        kind = kinds[runs % len(kinds)]
        runs += 1
        recipe = write_recipe(folder / f"killed {runs}", **KINDS[kind])
        for _ in range(rng.randint(1, 5)):  # kills of one run
            if sum(where.values()) == wanted:
                break
            phase = rng.choice(["any time", *PHASES]) if rng.random() < 0.5 else "any time"
            killed = _killed(recipe, rng, phase, expected[kind][1])
            resumes += killed.said.count("going on after step")
            if killed.code == -signal.SIGKILL:
                where[phase] += 1
            elif killed.code:
                losses.append(f"run {runs}: {killed.said[-500:]}")
        done = sitting(recipe)
        resumes += done.said.count("going on after step")
        if done.code:
            losses.append(f"run {runs}: exit code {done.code}: {done.said[-500:]}")
        elif other := differences(recipe.parent / "run", expected[kind][0]):
            losses.append(f"run {runs}: {', '.join(other)}")
        shutil.rmtree(recipe.parent)
    print(
        f"kills: {sum(where.values())} of {runs} runs {dict(where)}, resumed from within a stage "
        f"{resumes} times, losses: {len(losses)}"
    )
    return losses


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


def faults(share: float, seed: int, folder: Path) -> list[str]:
    """One write of a run fails; the message names path and cure; the same command then ends as
    ever. All writes, or a share of them."""
    rng = random.Random(seed)
    kind = "whole weights"
    expected, _ = reference(folder / "whole", kind)
    counted = folder / "count.txt"
    recipe = write_recipe(folder / "counted", **KINDS[kind])

    def count(patch: pytest.MonkeyPatch) -> None:
        faulty = Faulty(recipe.parent / "run", None, "")
        faulty.install(patch)
        real = srppo.cli.main

        def main() -> None:
            try:
                real()
            finally:  # it ends by SystemExit
                counted.write_text(str(faulty.count))

        patch.setattr(srppo.cli, "main", main)

    done = sitting(recipe, count)
    assert done.code == 0, done.said
    writes = int(counted.read_text())
    chosen = sorted(rng.sample(range(1, writes + 1), max(1, round(writes * share))))
    losses, ended = [], Counter()
    for i, number in enumerate(chosen):
        fault = list(FAULTS)[i % len(FAULTS)]
        recipe = write_recipe(folder / f"fault {number}", **KINDS[kind])
        run = recipe.parent / "run"
        failed = sitting(recipe, Faulty(run, number, fault).install)
        ended[f"{fault}: exit code {failed.code}"] += 1
        named = str(run) in failed.said and ("again" in failed.said or "output_dir" in failed.said)
        if failed.code not in (0, 2) or "Traceback" in failed.said or (failed.code and not named):
            losses.append(f"write {number}, {fault}: code {failed.code}: {failed.said[-600:]}")
        done = sitting(recipe)
        if done.code:
            losses.append(f"write {number}, {fault}, again: {done.said[-600:]}")
        elif other := differences(run, expected):
            losses.append(f"write {number}, {fault}, again: {', '.join(other)}")
        shutil.rmtree(recipe.parent)
    print(f"faults: {len(chosen)} of {writes} writes {dict(ended)}, losses: {len(losses)}")
    return losses


# --- damage ---------------------------------------------------------------------------------------


def damage(share: float, seed: int, folder: Path) -> list[str]:
    """Bits flipped and ends cut off, anywhere in a real checkpoint: each is noticed."""
    rng = random.Random(seed)
    reference(folder, "whole weights")
    run = folder / "run"
    losses, noticed = [], 0
    for i in range(max(2, round(200 * share))):
        stage = rng.choice(["sft", "ppo", "controls/rloo"])
        newest = max((run / "checkpoints" / stage).iterdir())
        file = rng.choice(sorted(newest.iterdir()))
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed if i % 2 else whole[:place])
        said: list[str] = []
        found = Checkpoints(run, stage, 2, said.append).newest
        if found and found.path != newest and len(said) == 1 and str(newest) in said[0]:
            noticed += 1
        else:
            losses.append(f"{file.relative_to(run)}, byte {place}: {said}")
        file.write_bytes(whole)
        assert Checkpoints(run, stage, 2, said.append).newest.path == newest
    print(f"damage: {noticed} noticed, losses: {len(losses)}")
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


def _fuzz(name: str, strategy: Any, examples: int, seed: int, check: Callable[[Any], str]) -> Any:
    """`check` says what is wrong with how a command took an example, or nothing."""
    losses: list[str] = []
    codes: Counter[int] = Counter()

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
        wrong = check(example)
        codes[0 if not wrong else 1] += 1
        if wrong:
            losses.append(f"{example!r:.300}: {wrong}")

    run()
    print(f"{name}: {codes.total()} tried, losses: {len(losses)}")
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


def recipes(share: float, seed: int, folder: Path) -> list[str]:
    """Recipes that cannot be run."""
    path = folder / "recipe.yaml"

    def check(content: bytes) -> str:
        path.write_bytes(content)
        return _wrong("run", path)

    found = _fuzz("recipes", garbage_recipes(folder), max(20, round(2000 * share)), seed, check)
    return found + ([f"{folder / 'run'} was made"] if (folder / "run").exists() else [])


def data(share: float, seed: int, folder: Path) -> list[str]:
    """Files of which no row can be used, as demonstrations."""
    logging.disable(logging.CRITICAL)  # a library's own words about each file

    def check(example: tuple[str, bytes]) -> str:
        path = folder / example[0]
        path.write_bytes(example[1])
        return _wrong("data", "check", path)

    return _fuzz("data", garbage_data(), max(20, round(2000 * share)), seed, check)


PARTS = {f.__name__: f for f in (kills, faults, damage, recipes, data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of tries")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    losses = []
    for name in arguments.parts:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            losses += PARTS[name](arguments.share, arguments.seed, Path(folder))
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    print(*losses, sep="\n")
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
