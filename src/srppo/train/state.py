"""Checkpoints: a stage's training as it was between two steps, whole or not there.

    checkpoints/STAGE/step-000012/
        tensors.safetensors   weights, optimizers, random states
        state.json            everything else, and where each tensor belongs
        pieces/               of tensors that several processes share
        metrics.jsonl         the log up to that step
        manifest.json         sha256 of each of them

Nothing is unpickled. A directory is written aside, flushed to the disk and renamed, so a crash at
any moment leaves the checkpoints that were there before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from srppo import distributed
from srppo.errors import RunDirError
from srppo.train.files import flush, make_folder, writing
from srppo.train.metrics import lines_up_to
from srppo.train.pieces import as_held, load_pieces, save_pieces

Tree = dict[str, Any]
"""Nested dictionaries and lists of tensors and of what JSON holds."""
TENSORS, PIECES, STATE, METRICS, MANIFEST = (
    "tensors.safetensors",
    "pieces",
    "state.json",
    "metrics.jsonl",
    "manifest.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    step: int
    path: Path

    @property
    def metrics(self) -> str:
        """The log's lines up to the step."""
        return (self.path / METRICS).read_text(encoding="utf-8")

    def read(self) -> Tree:
        """What was saved; whole tensors on the CPU."""
        tree = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        tensors = load_file(self.path / TENSORS)
        if (self.path / PIECES).is_dir():
            tensors |= load_pieces(self.path / PIECES)
        joined: Tree = _join(tree, tensors)
        return joined


class Checkpoints:
    """Those of one stage."""

    def __init__(self, run_dir: Path, stage: str, keep: int, say: Callable[[str], None]) -> None:
        """Looks for the newest that is whole; `say` is told of newer ones that are not.

        `keep`: how many there are at most.
        """
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints" / stage
        self.keep = keep
        self.newest = distributed.from_first(lambda: self._find(say))
        """What to go on from; None: the stage begins."""
        self.written = self.newest.step if self.newest else 0
        """The last step that is on the disk."""
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        tree: Tree,
        log: Path,
        more: dict[str, str] | None = None,
        *,
        overlap: bool | None = False,
    ) -> None:
        """Write the checkpoint of a step, then remove those that are too many.

        Args:
            log: the metrics file, which holds the step by now; lines of later ones are left out.
            more: further files by name.
            overlap: write from a copy of the tensors in the CPU's memory, in a thread; None: where
                they are on a GPU and have to be copied anyway. Several processes never do.

        Raises:
            RunDirError: the file system refuses, now or when the one before was written; the
                checkpoints from before are as they were.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        plain = json.dumps(_split(tree, "", tensors))
        pieces = {k: x for k, x in tensors.items() if isinstance(x, DTensor)}
        if overlap is None:
            overlap = any(x.device.type != "cpu" for x in tensors.values())
        overlap = overlap and distributed.size() == 1
        whole = {
            k: x.to("cpu", copy=overlap).contiguous() for k, x in tensors.items() if k not in pieces
        }
        aside = self._aside(step)
        with writing(self._of(step)):
            if distributed.is_first():
                shutil.rmtree(aside, ignore_errors=True)  # of a crash
                make_folder(aside / PIECES if pieces else aside, self.run_dir)
            if pieces:
                distributed.any_of(False)  # the folder is there
                save_pieces(pieces, aside / PIECES)
            texts = {STATE: plain, METRICS: lines_up_to(step, log), **(more or {})}
        if not distributed.is_first():
            self.written = step
        elif overlap:
            self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
            self._pending = self._writer.submit(self._write, step, whole, texts)
        else:
            self._write(step, whole, texts)

    def wait(self) -> None:
        """Until nothing is being written. Raises RunDirError if that failed."""
        if self._writer is None:
            return
        self._writer.submit(int).result()  # it does one thing after the other
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    @property
    def is_writing(self) -> bool:
        """Whether a thread is. Raises RunDirError if it was, and failed."""
        if self._pending and self._pending.done():
            self.wait()
        return self._pending is not None

    def _write(self, step: int, whole: dict[str, Tensor], texts: dict[str, str]) -> None:
        target, aside = self._of(step), self._aside(step)
        with writing(target):
            try:
                save_file(whole, aside / TENSORS)
                for name, text in texts.items():
                    (aside / name).write_text(text, encoding="utf-8")
                (aside / MANIFEST).write_text(manifest(aside), encoding="utf-8")
                flush(aside)
                shutil.rmtree(target, ignore_errors=True)  # damaged, else nobody came here again
                os.replace(aside, target)
                flush(self.folder, deep=False)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
                raise
            there = self._all()
            earlier = [other for other in there if other <= step]
            for other in earlier[: -self.keep] + [x for x in there if x > step]:
                shutil.rmtree(self._of(other))  # one of a later step is damaged
        self.written = step

    def save_bad(self, step: int, batch: Tree, facts: Tree) -> Path:
        """Something to look at, never loaded: bad/STAGE/step-000012.safetensors and .json; the
        latter's path."""
        folder = self.run_dir / "bad" / self.folder.relative_to(self.run_dir / "checkpoints")
        path = folder / f"step-{step:06d}.json"
        if not distributed.is_first():
            return path
        with writing(path):
            make_folder(folder, self.run_dir)
            tensors: dict[str, Tensor] = {}
            content = json.dumps({**facts, "batch": _split(batch, "", tensors)}, indent=1)
            tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
            save_file(tensors, path.with_suffix(".safetensors"))
            path.write_text(content + "\n", encoding="utf-8")
        return path

    def _find(self, say: Callable[[str], None]) -> Checkpoint | None:
        for step in reversed(self._all()):
            path = self._of(step)
            if damage := damage_of(path):
                say(f"checkpoint {path} is damaged ({damage}): it is not used, but the one before")
                continue
            return Checkpoint(step, path)
        return None

    def _all(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _aside(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.part"


def manifest(directory: Path) -> str:
    """The sha256 of every file in it but the manifest, as JSON."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digests[str(path.relative_to(directory))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return json.dumps(digests, indent=1) + "\n"


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: nothing."""
    try:
        there, wanted = manifest(directory), (directory / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        return f"{getattr(e, 'filename', None) or MANIFEST} cannot be read"
    if there == wanted:
        return None
    try:
        expected = dict(json.loads(wanted))
    except (ValueError, TypeError):
        return f"{MANIFEST} cannot be read"
    found = json.loads(there)
    names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return f"{names[0] if names else MANIFEST} is not what was written"


def _split(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors`, and leave their place there."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach()
        return {"tensor": place}
    if isinstance(value, dict):
        return {str(k): _split(v, f"{place}.{k}".lstrip("."), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_split(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse; keys are text, tuples are lists."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {k: _join(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value


def load_tensors(into: Iterable[Tensor], saved: list[Tensor]) -> None:
    """Copy values over. Raises RunDirError where number or shapes differ."""
    into = list(into)
    shapes, wanted = [list(x.shape) for x in saved], [list(x.shape) for x in into]
    if shapes != wanted:
        raise misfit(f"{len(saved)} tensors, {len(into)} are wanted, or of other shapes")
    with torch.no_grad():
        for ours, theirs in zip(into, saved, strict=True):
            ours.copy_(as_held(theirs, ours))


def optimizer_state(optimizer: Optimizer) -> Tree:
    """What it remembers of each weight; its rates and the like are the recipe's."""
    return {"kind": type(optimizer).__name__, "state": optimizer.state_dict()["state"]}


def load_optimizer(optimizer: Optimizer, saved: Tree) -> None:
    """The inverse. Raises RunDirError where it was another kind of optimizer."""
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise misfit(f"its optimizer is {saved['kind']}, {kind} is wanted")
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        int(place): {
            name: as_held(x, weights[int(place)]) if isinstance(x, Tensor) and x.dim() else x
            for name, x in values.items()
        }
        for place, values in saved["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def misfit(reason: str) -> RunDirError:
    """The error for a checkpoint of something else."""
    return RunDirError(
        f"the last checkpoint does not fit what the recipe trains now ({reason}): the stage cannot "
        "go on from it. Undo the change of the recipe, or start over with --fresh."
    )
