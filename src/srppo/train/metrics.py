"""Metrics: one JSON object per step, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from srppo.train.checkpoint import writing


class MetricsLog:
    """`log(step, values)`. Keys that start with `time/` differ between equal runs; no others do."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        """Starts metrics/STAGE.jsonl anew."""
        self.path = run_dir / "metrics" / f"{stage}.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
            self._board: Any = None
            if find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(run_dir / "tensorboard" / stage))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line; numbers that JSON cannot hold (nan, inf) are written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                for key, value in finite.items():
                    if value is not None:
                        self._board.add_scalar(key, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with writing(self.path):
            self._file.close()  # tries again to write what a full disk refused
            if self._board is not None:
                self._board.close()
