"""Masks: True marks a response token, everywhere.

Padding may hold anything, so it is dropped with `where`, never with a product: 0 * NaN is NaN.
"""

import torch
from torch import Tensor

from srppo.errors import ShapeError


def require_same_shape(**tensors: Tensor) -> None:
    """Raise `ShapeError`, naming each tensor and its shape, unless all shapes are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(
            f"shapes differ: {shapes}. Broadcasting them would mix tokens of different "
            "responses; give every tensor one entry per token."
        )


def require_right_padded(mask: Tensor) -> None:
    """Raise `ShapeError` unless each row of `mask` (B, T) is a run of True, then only False."""
    restarts = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if restarts.any():
        row = int(restarts.int().argmax())
        raise ShapeError(
            f"mask row {row} has a response token after padding, so 'the next token' is undefined "
            "there. Cut the prompt off and pad responses on the right."
        )


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask`; padding is never read, so it may hold NaN.

    Raises:
        ShapeError: `x` and `mask` differ in shape.
    """
    require_same_shape(x=x, mask=mask)
    return torch.where(mask, x, 0.0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`; NaN where nothing is True, as `torch.mean` of nothing.

    Raises:
        ShapeError: `x` and `mask` differ in shape.
    """
    return masked_sum(x, mask, dim) / mask.sum(dim)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale `x` to mean 0 and variance 1 over all True entries; zero at padding.

    The variance divides by the number of entries (no Bessel correction). Entries that differ by
    no more than rounding, a single one among them, become zero instead of amplified noise.

    Raises:
        ShapeError: `x` and `mask` differ in shape.
    """
    centred = torch.where(mask, x - masked_mean(x, mask), 0.0)
    std = masked_mean(centred.square(), mask).sqrt()
    rounding = 16 * torch.finfo(x.dtype).eps * torch.where(mask, x, 0.0).abs().max()
    return torch.where(std <= rounding, 0.0, centred / std).masked_fill(~mask, 0.0)
