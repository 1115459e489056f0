"""Rows and steps, counted or known; times by hand."""

from __future__ import annotations

import pytest

from runs import SMALL
from srppo.config import parse_recipe
from srppo.errors import ConfigError
from srppo.plan.architecture import Blueprint
from srppo.plan.device import find_device, parse_bytes
from srppo.plan.known import GPUS
from srppo.plan.work import CALL, SHARE, Clock, work


def recipe(data, **sections):
    return parse_recipe(
        {"name": "a", "output_dir": "b", "model": {"base": "mistralai/Mistral-7B-v0.1"}}
        | {"data": data}
        | sections
    )


def test_what_is_here_is_counted():
    tree = {**SMALL, "output_dir": "x"}
    found = work(parse_recipe(tree))
    assert (found.demonstrations, found.prompts, found.evaluated) == (16, 16, 24)
    assert found.sft_steps(parse_recipe(tree).sft) == 2
    assert found.ppo_steps(parse_recipe(tree).ppo) == 2
    assert 1 < found.prompt_tokens <= 24
    assert found.longest is not None
    assert found.longest[1] <= 24


MIXTURE = [{"source": "gsm8k", "weight": 1}, {"source": "dolly", "weight": 1}]
SUM = ["gsm8k", {"source": "dolly", "limit": 27}]
BY_HUB = "allenai/tulu-v2-sft-mixture@main"


@pytest.mark.parametrize(
    ("data", "demonstrations", "prompts"),
    [
        ({"demonstrations": "tulu-v2-mix", "held_out": 154}, 326_000, 326_000),
        ({"demonstrations": BY_HUB, "prompts": "ultrafeedback"}, 326_026, 63_967),
        (
            {"demonstrations": "gsm8k", "demonstrations_limit": 1000, "overlap": "disjoint"},
            *(1000, 6345),
        ),
        ({"demonstrations": SUM, "held_out": 0}, 7500, 7500),
        ({"demonstrations": MIXTURE}, None, None),
        ({"demonstrations": "gsm8k", "prompts": "somebody/set"}, 7345, None),
        ({"demonstrations": "somebody/set", "prompts": "gsm8k", "prompts_limit": 5}, None, 5),
    ],
)
def test_what_is_not_here_has_the_rows_of_its_card(data, demonstrations, prompts):
    found = work(recipe(data))
    assert (found.demonstrations, found.prompts) == (demonstrations, prompts)
    assert "not known here" in found.origin


def test_steps_of_the_papers_settings():
    made = recipe({"demonstrations": "tulu-v2-mix", "held_out": 0, "prompts": "ultrafeedback"})
    assert work(made).sft_steps(made.sft) == 2 * 2549  # 326,154 / 128, rounded up
    assert work(made).ppo_steps(made.ppo) == 63  # 63,967 / 1024


def test_times_by_hand():
    """Training costs three forward passes, each two operations a weight; sampling, a call of all
    layers or a reading of all weights for each token."""
    data = {"demonstrations": "gsm8k", "held_out": 0, "max_prompt_tokens": 200}
    made = recipe(
        data | {"max_response_tokens": 200}, ppo={"steps": 1, "max_tokens_per_batch": 4000}
    )
    sizes = Blueprint.find(made.model.base).sizes(made.model)
    clock = Clock(made, sizes, work(made), GPUS["H100"])
    tokens = 2 * 7473 * 200  # epochs, rows, half of what is allowed
    hours = tokens * 6 * sizes.weights / (SHARE * 67e12) / 3600
    assert clock.sft(made.sft).total == pytest.approx(hours, rel=0.05)  # embeddings, attention
    batches = -(-1024 // 10)
    reading = batches * 200 * max(4 * sizes.weights / 3.35e12, 32 * CALL) / 3600
    passing = 1024 * 200 * 2 * sizes.weights / (SHARE * 67e12) / 3600
    assert clock.ppo(made.ppo).rollout == pytest.approx(reading + passing, rel=0.05)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5T", 1.5e12), ("500mb", 5e8)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "--memory") == size


def test_what_is_no_size_and_no_gpu_is_refused():
    for text in ("much", "0GB", "0.0T"):
        with pytest.raises(ConfigError, match=rf"--memory '{text}' is not a size.*80GB"):
            parse_bytes(text, "--memory")
    with pytest.raises(ConfigError, match=r"--gpu B9000 is not in srppo's table.*H100"):
        find_device(recipe({"demonstrations": "gsm8k"}), "B9000", None)
    found = find_device(recipe({"demonstrations": "gsm8k"}), "H100", "40GB")
    assert (found.memory, found.bfloat16) == (40e9, GPUS["H100"].bfloat16)
