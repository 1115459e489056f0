"""Metrics: one JSON object per step, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
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
            self._board: Any = None
            if find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                next_step = json.loads(begun.splitlines()[-1])["step"] + 1 if begun else 0
                # What was logged of later steps, before the run was cut off, is not shown.
                self._board = SummaryWriter(
                    str(run_dir / "tensorboard" / stage), purge_step=next_step
                )

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line; numbers that JSON cannot hold (nan, inf) are written as null."""
        if not self._writes:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                for key, value in finite.items():
                    if value is not None:
                        self._board.add_scalar(key, value, step)

    def flush(self) -> None:
        """What was logged is in files, TensorBoard's too."""
        if not self._writes:
            return
        with writing(self.path):
            self._file.flush()
            if self._board is not None:
                self._board.flush()

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
            self._file.close()  # tries again to write what a full disk refused
            if self._board is not None:
                self._board.close()
