"""Activation checkpointing that does not depend on train mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from srppo.errors import ModelError


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
