"""What processes send: by hand, and against what torch gathers and sums in a real step."""

from __future__ import annotations

import pytest

from processes import gathered_bytes, together, write_models
from srppo.config import parse_recipe
from srppo.plan.architecture import Blueprint
from srppo.plan.exchange import Exchange, Group
from srppo.plan.known import GPUS
from srppo.plan.work import Clock, work

LLAMA = "meta-llama/Meta-Llama-3-8B"
W = 8_030_261_248
OUTSIDE = 2 * 128256 * 4096 + 4096
INSIDE = W - OUTSIDE


def made(model=None, **sections):
    tree = {
        "name": "a",
        "output_dir": "b",
        "model": {"base": LLAMA, "dtype": "bfloat16", **(model or {})},
        "data": {"demonstrations": "gsm8k", "held_out": 0, "max_response_tokens": 1000},
    }
    return parse_recipe({**tree, **sections})


def exchange(recipe, n, tokens=1000.0):
    return Exchange(recipe, Blueprint.find(recipe.model.base).sizes(recipe.model), n, tokens)


def test_whole_models_sum_their_gradients_once_a_minibatch():
    """A ring sends each number twice, but for a process's own share."""
    recipe = made(ppo={"rollouts_per_step": 1024, "minibatch_size": 128})
    parts = exchange(recipe, 4)
    assert parts.update(recipe.ppo) == 8 * 2 * 4 * W * 3 / 4
    assert parts.rollout(recipe.ppo, 1024) == parts.scoring(recipe.ppo, 1024) == 0
    assert parts.sft(recipe.sft, steps=10) == 10 * 2 * 4 * W * 3 / 4


def test_layers_in_pieces_are_gathered_twice_and_summed_in_every_pass():
    """A minibatch of 128 responses of 1000 tokens: 16 of each process, in four passes of 4096."""
    ppo = {"minibatch_size": 128, "max_tokens_per_batch": 4096, "compute": "bfloat16"}
    recipe = made({"shard": True}, ppo=ppo | {"rollouts_per_step": 128})
    parts = exchange(recipe, 8)
    each = (2 * 2 + 4) * INSIDE + (4 + 4) * OUTSIDE
    assert parts.update(recipe.ppo) == 4 * each * 7 / 8
    assert parts.rollout(recipe.ppo, 128) == (2 * INSIDE + 4 * OUTSIDE) * 7 / 8
    frozen = 2 * (4 * INSIDE + OUTSIDE)
    policy = 2 * 4 * INSIDE + 4 * OUTSIDE  # sampled in bfloat16, so scored once more
    assert parts.scoring(recipe.ppo, 128) == pytest.approx((2 * frozen + policy) * 7 / 8)


def test_sampling_from_pieces_gathers_for_every_token():
    recipe = made({"shard": True, "shard_sampling": True}, ppo={"compute": "bfloat16"})
    sent = exchange(recipe, 8).rollout(recipe.ppo, 8 * 8)  # 8 rows of 2024 tokens fit 16384
    assert sent == (1000 * 2 * INSIDE + 4 * OUTSIDE) * 7 / 8


def test_the_slowest_link_decides():
    assert Group(8).bandwidth(GPUS["H100"]) == 450e9
    assert Group(8, 2).bandwidth(GPUS["H100"]) == 50e9
    assert Group(8, 2, network=1e9).bandwidth(GPUS["H100"]) == 1e9


def test_work_is_divided_and_what_is_sent_comes_on_top():
    recipe = made(ppo={"steps": 1, "rollouts_per_step": 64, "minibatch_size": 64})
    sizes = Blueprint.find(LLAMA).sizes(recipe.model)
    alone, four = (
        Clock(recipe, sizes, work(recipe), GPUS["H100"], Group(n)).ppo(recipe.ppo) for n in (1, 4)
    )
    assert four.training == pytest.approx(alone.training / 4)
    assert four.rollout == pytest.approx(alone.rollout / 4)  # 16 rows are two batches of 8
    assert alone.exchange == 0
    assert four.exchange * 3600 == pytest.approx(2 * 4 * W * 3 / 4 / 450e9)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_torch_gathers_and_sums_as_much(tmp_path, lora):
    """Of weights in pieces; adapters are summed by ourselves."""
    write_models(tmp_path)
    ppo = {"rollouts_per_step": 8, "minibatch_size": 4, "max_tokens_per_batch": 4096, "steps": 1}
    recipe = made({"base": str(tmp_path / "base"), "shard": True, "dtype": "float32",
                   "lora": {"rank": 2} if lora else None}, ppo=ppo)  # fmt: skip
    parts = exchange(recipe, 2, tokens=10)
    config = recipe.ppo
    planned = parts.rollout(config, 8) + parts.scoring(config, 8) + parts.update(config)
    if lora:  # two minibatches
        planned -= 2 * 2 * 4 * parts.sizes.trained / 2
    for sent in together(2, gathered_bytes, tmp_path, {**ppo, "shard": True, "lora": lora}):
        assert sent == pytest.approx(planned, rel=0.1)
