"""Matrix products in bfloat16, everything else in float32: where hardware multiplies faster so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from srppo.config import Recipe
from srppo.errors import ConfigError
from srppo.models.load import pick_device

Compute = Literal["float32", "bfloat16"]


def check_compute(recipe: Recipe) -> None:
    """Raises ConfigError where training is asked for bfloat16 of a CPU that has no such products:
    they would be worked out one by one."""
    if pick_device(recipe.model.device).type != "cpu" or multiplies_bfloat16():
        return
    for key, settings in (("sft", recipe.sft), ("ppo", recipe.ppo)):
        if settings.compute == "bfloat16":
            raise ConfigError(
                f"{key}.compute=bfloat16: this processor multiplies no bfloat16, so that training "
                f"would take many times as long. Set {key}.compute=float32."
            )


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has products in bfloat16 for this CPU."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


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
        if func is torch.addmm and not kwargs and torch.is_grad_enabled():  # GPT-2's layers
            bias, x, weight = args
            if bias.dtype == x.dtype == weight.dtype == torch.float32:
                return _Linear.apply(x, weight.T, bias)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """torch.nn.functional.linear with all three of its products in bfloat16.

    Converted here: asked to convert float32 itself, oneDNN multiplies in float32 on some CPUs that
    have bfloat16 (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = linear(x, weight).float()
        return y if bias is None else y + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rounded = grad.bfloat16()
        return (
            (rounded @ weight).float() if ctx.needs_input_grad[0] else None,
            (rounded.flatten(0, -2).T @ x.flatten(0, -2)).float()
            if ctx.needs_input_grad[1]
            else None,
            grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
        )
