"""Metrics: one JSON object per step, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from srppo import distributed
from srppo.train.files import make_folder, writing


class MetricsLog:
    """`log(step, values)`. Keys that start with `time/` differ between equal runs; no others do.

    Of several processes the first one writes.
    """

    def __init__(self, run_dir: Path, stage: str, begun: str = "") -> None:
        """Starts metrics/STAGE.jsonl anew, with the lines of `begun`, which TensorBoard has."""
        self.path = run_dir / "metrics" / f"{stage}.jsonl"
        self._writes = distributed.is_first()
        if not self._writes:
            return
        with writing(self.path):
            make_folder(self.path.parent, run_dir)
            self._file = self.path.open("w", encoding="utf-8")
            self._file.write(begun)
            self._file.flush()
            self._board: _Board | None = None
            if find_spec("tensorboard"):
                next_step = json.loads(begun.splitlines()[-1])["step"] + 1 if begun else 0
                self._board = _Board(run_dir / "tensorboard" / stage, run_dir, next_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line; numbers that JSON cannot hold (nan, inf) are written as null."""
        if not self._writes:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.write({k: v for k, v in finite.items() if v is not None}, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes:
            return
        with writing(self.path):
            try:
                self._file.close()  # tries again to write what a full disk refused
            finally:
                if self._board is not None:
                    self._board.close()


def lines_up_to(step: int, path: Path) -> str:
    """What a log holds of a step and those before it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if json.loads(line)["step"] <= step)


class _Board:
    """Events for TensorBoard, written as they come: its own writer does that in a thread, whose
    errors are printed and not raised, and which makes a removed directory anew."""

    def __init__(self, folder: Path, run_dir: Path, first: int) -> None:
        """What was logged of step `first` and later, before the run was cut off, is not shown."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        make_folder(folder, run_dir)
        # By their names TensorBoard knows which file is newer.
        path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._writer = RecordWriter(path.open("wb"))
        self._event(file_version="brain.Event:2")
        self._event(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: dict[str, float], step: int) -> None:
        """The numbers of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._event(step=step, summary=Summary(value=shown))

    def close(self) -> None:
        """No more will come."""
        self._writer.close()

    def _event(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()
