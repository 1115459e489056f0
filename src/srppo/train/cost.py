"""How many floating-point operations a step needs at least: counted from shapes, nothing measured.

A product of (m, k) and (k, n) is 2 m k n operations. Counted are the products of the layers, of
attention and of the output head; norms, activations and softmaxes are not. docs/cost.md has the
formula in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What a dense decoder's products depend on."""

    block: int
    """Weights of all layers' matrices: each token meets each of them once."""
    attention: int
    """Layers times heads times channels per head."""
    head: int
    """Width times vocabulary."""

    @staticmethod
    def of(model: PreTrainedModel) -> Shape:
        """From a model's matrices and its config."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings().weight
        inside = [
            weight
            for module in model.modules()
            if not isinstance(module, nn.Embedding)
            for weight in module.parameters(recurse=False)
            if weight.dim() == 2 and weight is not head
        ]
        per_head = getattr(config, "head_dim", None)
        channels = per_head or config.hidden_size // config.num_attention_heads
        return Shape(
            block=sum(weight.numel() for weight in inside),
            attention=config.num_hidden_layers * config.num_attention_heads * channels,
            head=head.numel(),
        )


@dataclass(frozen=True)
class Flops:
    """Operations of a step by phase."""

    rollout: int
    scoring: int
    update: int

    @property
    def total(self) -> int:
        """All phases."""
        return self.rollout + self.scoring + self.update


def forward_flops(shape: Shape, tokens: int, pairs: int, predicted: int) -> int:
    """One forward pass.

    Args:
        tokens: that go through the layers.
        pairs: of a token and one that it attends to, itself included.
        predicted: positions whose next token's distribution is computed.
    """
    return 2 * shape.block * tokens + 4 * shape.attention * pairs + 2 * shape.head * predicted


def step_flops(
    shape: Shape,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    epochs: int = 1,
    train_weights: bool = True,
) -> Flops:
    """The least that a step can do with these responses, each with a prompt of its own.

    One forward pass F over a prompt with its response but the last token, whose logits nobody
    needs, is n = P + T - 1 tokens, n (n + 1) / 2 pairs and T predictions. The rollout is one F,
    with a cache; it gives the policy's log-probabilities, too. Scoring is two: sft and base. The
    update is F and a backward pass of 2 F, in every epoch. The critic shares the policy's trunk.

    Args:
        prompt_lengths: tokens, one per response.
        response_lengths: tokens, EOS included.
        train_weights: False with adapters, where the large matrices need no gradient: backward
            through their products is then F, not 2 F; the adapters' own products are left out.
    """
    sizes = list(zip(prompt_lengths, response_lengths, strict=True))
    tokens = sum(P + T - 1 for P, T in sizes)
    pairs = sum((P + T - 1) * (P + T) // 2 for P, T in sizes)
    forward = forward_flops(shape, tokens, pairs, sum(response_lengths))
    attention = forward_flops(shape, 0, pairs, 0)
    backward = 2 * forward if train_weights else forward + attention
    return Flops(rollout=forward, scoring=2 * forward, update=epochs * (forward + backward))
