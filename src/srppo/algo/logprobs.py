"""log pi(y_t | x, y_<t) from logits, in chunks: no float32 copy of all of [B, T, V] ever exists."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from srppo.errors import ShapeError

CPU_CHUNK_ELEMENTS = 1 << 21
"""Logits in hand at a time: 8 MiB in float32 stay in cache, twice as fast as 64 MiB."""
GPU_CHUNK_ELEMENTS = 1 << 24
"""64 MiB in float32, 128 tokens of a vocabulary of 128k: few enough kernel launches."""


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32 for half precision; float32 and float64 stay what they are."""
    return torch.promote_types(logits.dtype, torch.float32)


def chunk_size(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits make one chunk."""
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(1, elements // vocab_size)


def token_chunks(*logits: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk tensors of one shape (..., V) side by side, in chunks of tokens, without copying them.

    Yields:
        The chunk's place among the flattened tokens, and each tensor's view (n, V) of it.
    """
    first = logits[0]
    vocab_size = first.shape[-1]
    size = chunk_size(vocab_size, first.device)
    # `logits[:, :-1]` has no flat view, but each of its rows has.
    flat = first.dim() < 3 or all(x.is_contiguous() for x in logits)
    start = 0
    for sheets in [logits] if flat else zip(*logits, strict=True):
        parts = (torch.split(sheet.reshape(-1, vocab_size), size) for sheet in sheets)
        for rows in zip(*parts, strict=True):
            yield slice(start, start + len(rows[0])), list(rows)
            start += len(rows[0])


class _TokenLogprobs(torch.autograd.Function):
    """Recomputes each chunk's softmax in the backward pass instead of saving it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        flat_ids = ids.reshape(-1, 1)
        out = torch.empty(flat_ids.shape, dtype=working_dtype(logits), device=logits.device)
        for place, (rows,) in token_chunks(logits):
            logprobs = torch.log_softmax(rows, dim=-1, dtype=out.dtype)
            out[place] = logprobs.gather(1, flat_ids[place])
        return out.view(ids.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """d log p(y) / d logits = onehot(y) - p, and exactly zero where nothing flows back."""
        logits, ids = ctx.saved_tensors
        flat_ids, grad = ids.reshape(-1, 1), grad_output.reshape(-1, 1)
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        flat_grad_logits = grad_logits.view(-1, logits.shape[-1])
        for place, (rows,) in token_chunks(logits):
            part = torch.softmax(rows, dim=-1, dtype=grad.dtype).mul_(-grad[place])
            part.scatter_add_(1, flat_ids[place], grad[place])
            flat_grad_logits[place] = part.masked_fill_(grad[place] == 0, 0.0)
        return grad_logits, None


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token: log softmax(logits)[id].

    Args:
        logits: (..., V) of any float type; the softmax is taken in float32 (float64 for float64).
        ids: (...) int64 in [0, V), padding included; a padding token's logits may be NaN.

    Returns:
        (...) nats, float32 (float64 for float64), differentiable once. Beyond the logits and
        their gradient, both passes need memory for one chunk only. A token whose
        log-probability is not used sends back zeros, not NaN.

    Raises:
        ShapeError: `ids` is not one id per row of `logits`.
    """
    if logits.shape[:-1] != ids.shape:
        raise ShapeError(
            f"logits {tuple(logits.shape)} need ids of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(ids.shape)}. Are the logits shifted by one against the ids?"
        )
    result: Tensor = _TokenLogprobs.apply(logits, ids)  # type: ignore[no-untyped-call]
    return result


def token_margins(logits: Tensor, ids: Tensor) -> Tensor:
    """How far each token is from the likeliest: log pi(id) - max log pi. No gradient.

    Args:
        logits: (..., V) of any float type.
        ids: (...) int64 in [0, V).

    Returns:
        (...) nats, at most 0, float32 (float64 for float64).
    """
    with torch.no_grad():
        chosen, largest = logits.gather(-1, ids[..., None]).squeeze(-1), logits.amax(-1)
        return chosen.to(working_dtype(logits)) - largest


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution. A measurement: no gradient flows through it.

    Args:
        logits: (..., V) of any float type; -inf marks an impossible token.

    Returns:
        (...) nats in [0, log V], float32 (float64 for float64).
    """
    with torch.no_grad():
        out = torch.empty(logits[..., 0].numel(), dtype=working_dtype(logits), device=logits.device)
        for place, (rows,) in token_chunks(logits):
            out[place] = torch.special.entr(torch.softmax(rows, dim=-1, dtype=out.dtype)).sum(-1)
        return out.view(logits.shape[:-1])
