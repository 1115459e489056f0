"""Matrix products in bfloat16, everything else in float32: where hardware multiplies faster so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

Compute = Literal["float32", "bfloat16"]


@contextmanager
def computing(compute: Compute, device: torch.device) -> Iterator[None]:
    """Forward and backward passes inside multiply in this format; weights stay as they are, and
    must not change inside.

    On CUDA it is autocast. On a CPU only linear layers change, and only while training: attention
    kernels are slower in bfloat16 there, and converting weights for the small products of decoding
    costs what it gains (docs/LOG.md).
    """
    if compute == "float32":
        yield
    elif device.type == "cpu":
        with _LinearInBFloat16():
            yield
    else:
        with torch.autocast(device.type, torch.bfloat16):
            yield


class _LinearInBFloat16(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (
            func is linear
            and torch.is_grad_enabled()
            and args[0].dtype == args[1].dtype == torch.float32
        ):
            return _Linear.apply(*args, **(kwargs or {}))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """torch.nn.functional.linear with all three of its products in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        with _bfloat16_products():
            return linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
        with _bfloat16_products():
            return (
                grad @ weight if ctx.needs_input_grad[0] else None,
                flat.T @ rows if ctx.needs_input_grad[1] else None,
                flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
            )


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
