"""The steps of a stage, from where its last checkpoint stands; signals end them between two."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from srppo import distributed, signals
from srppo.config_checkpoint import CheckpointConfig
from srppo.errors import EngineError, TrainingError
from srppo.progress import Reporter
from srppo.train.health import Ailment
from srppo.train.metrics import MetricsLog
from srppo.train.state import Checkpoint, Checkpoints, Tree

PATIENCE = 5
"""Steps in a row that teach nothing; to leave them out is then no cure."""
SHARE = 0.01
"""Of the time, for saving, where the recipe does not say how often."""


class Trained(Protocol):
    """What a step changes; all else follows from the step's number, the recipe and the data."""

    def state_dict(self) -> Tree:
        """As it is now, between two steps."""
        ...

    def load_state_dict(self, state: Tree) -> None:
        """As it was; `state` has been to the disk: keys are text, tuples are lists."""
        ...


class Keeper:
    """Where a stage's checkpoints lie, and when there are new ones."""

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        settings: CheckpointConfig,
        reporter: Reporter,
        save_best: Callable[[], object] | None = None,
    ) -> None:
        """Finds what to go on from. `save_best` keeps the policy as it is as the best so far."""
        self.settings = settings
        self.reporter = reporter
        self.save_best = save_best
        self.checkpoints = Checkpoints(run_dir, stage, settings.keep_last, reporter.line)

    @property
    def found(self) -> Checkpoint | None:
        """What to go on from; None: from the beginning."""
        return self.checkpoints.newest

    @property
    def metrics(self) -> str:
        """The log's lines up to there."""
        return self.found.metrics if self.found else ""


class Steps:
    """The place in a stage's steps.

    with Steps(keeper, trained, log) as steps:       # as the last checkpoint was
        for step in range(steps.done + 1, total + 1):
            ...                                      # a signal ends this at once
            steps.begin_update()                     # from here on it waits
            ...
            steps.complete(step, metrics)            # for this: saved, and out
    """

    def __init__(self, keeper: Keeper | None, trained: Trained, log: MetricsLog) -> None:
        """Loads the last checkpoint into `trained`; without a keeper, nothing is kept.

        Raises:
            RunDirError: it was made by another model or optimizer.
        """
        self.keeper = keeper
        self.trained = trained
        self.log = log
        self.done = 0
        """The last step that is complete."""
        self._best: float | None = None
        self._bad: list[int] = []
        self._updating = False
        self._last_save = time.monotonic()
        self._cost: float | None = None
        self.more: Callable[[], dict[str, str]] = dict
        """Further files of a checkpoint by name, with their text."""
        if keeper and keeper.found:
            self._load(keeper.found)

    def begin_update(self) -> None:
        """Weights change from here on: a signal waits for the step to be complete."""
        if self.keeper and distributed.size() == 1:
            signals.hold(self.keeper.settings.grace)
        self._updating = True

    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """The step is done and logged: save if it is time, and end here if a signal waits."""
        self.done, self._updating = step, False
        if not self.keeper:
            return
        stop = distributed.any_of(signals.came())
        writing = self.keeper.checkpoints.is_writing
        self._keep_best(metrics)
        if stop or distributed.from_first(lambda: self._is_time(step, writing)):
            self._save(overlap=False if stop else self.keeper.settings.overlap)
        if stop or distributed.size() == 1:
            signals.release()
        if stop:  # the signal reached another process only, so far
            raise signals.Interrupted(signal.SIGTERM)

    def bad(
        self,
        step: int,
        ailment: Ailment,
        batch: Tree,
        facts: Tree,
        *,
        skip: bool = False,
    ) -> None:
        """The step teaches nothing: its batch is kept for inspection, and the stage stops, or goes
        on where `skip`, unless it is the last of too many in a row.

        Raises:
            TrainingError: the checkpoints are as they were.
        """
        self._bad = [*self._bad, step] if step - 1 in self._bad else [step]
        what = f"step {step}: {ailment.reason}"
        if self.keeper:
            facts = {"step": step, "reason": ailment.reason, **facts}
            what += f"; {self.keeper.checkpoints.save_bad(step, batch, facts)} holds its batch"
        if not skip or len(self._bad) >= PATIENCE:
            raise TrainingError(
                f"{what}. Nothing can be learnt from it{', nor from those before' * skip}. "
                f"{ailment.cure}. ppo.on_bad_numbers=skip leaves single steps of stage 2 out."
            )
        if self.keeper:
            self.keeper.reporter.line(f"{what}. Left out.")

    def __enter__(self) -> Steps:
        # Of several processes none may leave before all have agreed to: a signal waits for that,
        # as long as the launcher does.
        if self.keeper and distributed.size() > 1:
            signals.hold(distributed.ENDING.total_seconds())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.keeper:
            return
        interrupted = isinstance(error, signals.Interrupted | KeyboardInterrupt | EngineError)
        finished = error is None and self.keeper.settings.keep_finished
        if interrupted or finished:
            signals.caught()
        checkpoints = self.keeper.checkpoints
        checkpoints.wait()
        together = finished or (interrupted and distributed.size() == 1)
        if self.done > checkpoints.written and not self._updating and together:
            self._save()
        if interrupted and checkpoints.written:
            self.keeper.reporter.line(
                f"kept at step {checkpoints.written}: the same command goes on from there"
            )
        if error is None and distributed.size() > 1:
            signals.release()

    def _save(self, overlap: bool | None = False) -> None:
        assert self.keeper
        started = time.monotonic()
        tree = {"best": self._best, "bad": self._bad, "trained": self.trained.state_dict()}
        path, more = self.log.path, self.more()
        self.keeper.checkpoints.save(self.done, tree, path, more, overlap=overlap)
        distributed.any_of(False)  # none leaves before it is written
        self._last_save = time.monotonic()
        self._cost = self._last_save - started

    def _is_time(self, step: int, writing: bool) -> bool:
        assert self.keeper
        if self.keeper.settings.every:
            return step % self.keeper.settings.every == 0
        if self._cost is None:
            return True
        return not writing and time.monotonic() - self._last_save > self._cost / SHARE

    def _keep_best(self, metrics: dict[str, float]) -> None:
        assert self.keeper
        value = metrics.get(self.keeper.settings.keep_best or "")
        if value is None or not math.isfinite(value) or not self.keeper.save_best:
            return
        if self._best is None or value > self._best:
            self.keeper.save_best()
            self._best = value

    def _load(self, checkpoint: Checkpoint) -> None:
        assert self.keeper
        tree = checkpoint.read()
        self.trained.load_state_dict(tree["trained"])
        self._best, self._bad = tree["best"], tree["bad"]
        self.done = checkpoint.step
        self.keeper.reporter.line(f"going on after step {self.done}, from {checkpoint.path}")
