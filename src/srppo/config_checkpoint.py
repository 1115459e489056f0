"""The settings of checkpoints: what a run that is interrupted goes on from."""

from __future__ import annotations

from srppo.validation import NonNegativeFloat, Positive, Section


class CheckpointConfig(Section):
    """Checkpoints of the stage that is being trained. They may change between the sittings of a
    run, for they change nothing that it computes."""

    every: Positive | None = None
    """Steps; null: after the first step, so that a disk that is too small is known early, and then
    as often as takes 1% of the time. A signal saves in any case."""
    overlap: bool | None = None
    """Training goes on while one is written, from a copy in the CPU's memory: 12 bytes per trained
    weight. null: where the weights are on a GPU, for then they are copied anyway. A run of several
    processes, a signal and the end of a stage wait until it is written."""
    keep_last: Positive = 2
    """So many of the stage; the one before the last is used should the last be damaged."""
    keep_best: str | None = None
    """Stage 2: a metric, as eval/accuracy/all. The policy of the step after which it was highest is
    kept as a model, best/policy/. null: none is."""
    keep_finished: bool = False
    """Keep those of a finished stage, too: its optimizers' state, three times the policy's size."""
    grace: NonNegativeFloat = 10.0
    """Seconds that a step may still take after SIGINT or SIGTERM once its update has begun; then it
    is abandoned, and done again by the same command. Kubernetes kills 30 s after SIGTERM."""
