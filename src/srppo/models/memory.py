"""Memory: activation checkpointing that does not depend on train mode, and smaller passes when it
runs out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from srppo import distributed
from srppo.errors import ModelError, TrainingError

T = TypeVar("T")


class Budget:
    """Tokens, or rows, per forward pass; halved whenever memory runs out."""

    def __init__(self, size: int, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` is told when it shrinks."""
        self.size = size
        self.say = say

    @staticmethod
    def of(size: int | Budget) -> Budget:
        """A budget as it is; a number as one of its own."""
        return size if isinstance(size, Budget) else Budget(size)

    def fit(self, work: Callable[[int], T], undo: Callable[[], object] = lambda: None) -> T:
        """`work(size)`; where memory runs out, `undo` what it left and again with half the size.

        Raises:
            TrainingError: not even a size of 1 fits.
        """
        while True:
            try:
                return work(self.size)
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                reason = (str(e) or repr(e)).splitlines()[0]
            # Out of the handler: the error's frames would keep alive what did not fit.
            if distributed.size() > 1:  # they would no longer do the same number of passes
                raise TrainingError(
                    f"memory ran out in {distributed.name()} ({reason}): several processes cannot "
                    "try smaller passes on their own. Lower ppo.max_tokens_per_batch or "
                    "sft.micro_batch_size, or set gradient_checkpointing=true."
                )
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size == 1:
                raise TrainingError(
                    f"memory ran out even for one sequence at a time ({reason}): nothing smaller "
                    "can be tried. Set gradient_checkpointing=true, model.lora.rank=16, or lower "
                    "data.max_response_tokens."
                )
            self.size = max(1, self.size // 2)
            self.say(f"memory ran out ({reason}): passes are half as large from here on")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had no more of it."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in text and "memory" in text
    )


@contextmanager
def activation_checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Inside, layers keep their input for the backward pass and compute the rest again.

    transformers does this in train mode only; the policy is trained in eval mode, for dropout would
    break PPO's ratio. Passes without gradients, cached decoding among them, are as ever.

    Raises:
        ModelError: no layer of the model can.
    """
    layers = [m for m in model.modules() if on and isinstance(m, GradientCheckpointingLayer)]
    if on and not layers:
        raise ModelError(
            f"no layer of {type(model).__name__} can be computed again: gradient_checkpointing "
            "would save nothing. Set gradient_checkpointing=false."
        )
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():
        return forward(layer, *args, **kwargs)
    return checkpoint(forward, layer, *args, use_reentrant=False, **kwargs)
