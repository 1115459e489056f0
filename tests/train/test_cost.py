"""Against torch's own counter, on a real model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.train.cost import Shape, forward_flops, step_flops


@pytest.fixture(params=[(4, False), (2, True)], ids=["plain", "grouped-query, tied"])
def model(request):
    kv_heads, tied = request.param
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )


def counted(run) -> int:
    """Operations of `run` without those of the rotary angles, which are no product of the model."""
    with FlopCounterMode(display=False, depth=None) as counter:
        run()
    by_module = counter.get_flop_counts()
    angles = {sum(ops.values()) for name, ops in by_module.items() if "rotary" in name}
    return counter.get_total_flops() - max(angles, default=0)


def test_a_forward_pass_over_a_batch(model):
    """Without a cache every token meets every token: the mask comes after the products."""
    ids = torch.zeros(2, 5, dtype=torch.int64)
    expected = forward_flops(Shape.of(model), tokens=10, pairs=2 * 25, predicted=2 * 3)
    assert counted(lambda: model(ids, use_cache=False, logits_to_keep=3)) == expected


def test_backward_is_twice_forward(model):
    ids = torch.zeros(2, 5, dtype=torch.int64)
    forward = forward_flops(Shape.of(model), tokens=10, pairs=50, predicted=10)
    assert counted(lambda: model(ids, use_cache=False).logits.sum().backward()) == 3 * forward


def test_backward_through_frozen_matrices_leaves_their_gradients_out(model):
    """Only the embeddings' output asks for a gradient, as it would below an adapter."""
    model.requires_grad_(False)
    inputs = torch.zeros(1, 1, 32, requires_grad=True)
    run = counted(lambda: model(inputs_embeds=inputs, use_cache=False).logits.sum().backward())
    assert run == step_flops(Shape.of(model), [1], [1], train_weights=False).update


def test_sampling_with_a_cache_meets_each_pair_once(model):
    """The first call reads a prompt of one token; each later one a token that was sampled."""
    T = 6

    def sample():
        cache = None
        for _ in range(T):
            out = model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
            cache = out.past_key_values

    assert counted(sample) == step_flops(Shape.of(model), [1], [T]).rollout


def test_a_step_is_six_forward_passes_and_three_more_for_each_further_epoch(model):
    shape = Shape.of(model)
    once, twice = (step_flops(shape, [3, 4], [5, 2], epochs=e) for e in (1, 2))
    forward = forward_flops(shape, tokens=7 + 5, pairs=28 + 15, predicted=7)
    assert (once.rollout, once.scoring, once.update) == (forward, 2 * forward, 3 * forward)
    assert twice.total - once.total == 3 * forward
