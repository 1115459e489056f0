"""The parts that are exact, by hand; the whole, against the measured peak of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from runs import write_recipe
from srppo.config import load_recipe, parse_recipe
from srppo.miniature import BASE
from srppo.plan.architecture import Blueprint
from srppo.plan.memory import phases
from srppo.plan.work import work

LLAMA = "meta-llama/Meta-Llama-3-8B"
W = 8_030_261_248
LAYERS = 6_979_321_856
"""Weights in the matrices of its layers: 32 (2 4096^2 + 2 4096 1024 + 3 4096 14336)."""


def plan(model=None, processes=1, **sections):
    model = {"base": LLAMA, **(model or {})}
    tree = {"name": "a", "output_dir": "b", "data": {"demonstrations": "c"}, "model": model}
    recipe = parse_recipe({**tree, **sections})
    found = phases(recipe, Blueprint.find(model["base"]), processes=processes)
    return {p.name: p for p in found}


def test_weights_gradients_and_averages_of_full_fine_tuning():
    found = plan()
    assert list(found) == [
        *("stage 1: passes", "stage 1: optimizer", "rollout", "scoring"),
        *("update: passes", "update: optimizer"),
    ]
    first, update = found["stage 1: passes"], found["update: passes"]
    assert (first.frozen, first.trained, first.gradients, first.optimizer) == (
        0,
        4 * W,
        4 * W,
        8 * W,
    )
    assert (update.frozen, update.trained) == (8 * W, 4 * W)
    assert (update.gradients, update.optimizer) == (4 * W, 8 * W)
    assert found["update: optimizer"].optimizer == 12 * W  # temporaries of all weights at once
    assert found["rollout"].gradients == 0


def test_offloaded_models_are_there_only_to_score():
    found = plan({"dtype": "bfloat16", "offload": True})
    assert (found["rollout"].frozen, found["scoring"].frozen) == (0, 2 * W)
    assert found["update: passes"].frozen == 0


def test_adapters_share_one_copy():
    found = plan({"dtype": "bfloat16", "lora": {"rank": 16}})["update: passes"]
    adapter = 4 * 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert found.frozen == 2 * W + adapter  # and that of the SFT model
    assert (found.trained, found.gradients, found.optimizer) == (adapter, adapter, 2 * adapter)


@pytest.mark.parametrize(("bits", "each"), [("8bit", 1.0), ("4bit", 0.5 + 4 / 64)])
def test_quantised_weights(bits, each):
    model = {"dtype": "bfloat16", "lora": {"rank": 16}, "quantize": bits}
    expected = each * LAYERS + 2 * (W - LAYERS)
    assert plan(model)["stage 1: passes"].frozen == expected


def test_sgd_has_one_average_and_no_temporaries():
    found = plan(sft={"optimizer": "sgd"})
    assert found["stage 1: passes"].optimizer == found["stage 1: optimizer"].optimizer == 4 * W


def test_an_sft_model_made_elsewhere_leaves_stage_1_out():
    assert "stage 1: passes" not in plan({"sft": "some/sft"})


def test_the_cache_of_a_rollout():
    """Keys and values of 32 layers with 8 heads of 128: 16 responses of 2048 tokens."""
    found = plan(ppo={"max_tokens_per_batch": 16 * 2048})["rollout"]
    numbers = 2 * 32 * 8 * 128 * 16 * 2048
    assert found.cache == pytest.approx(4 * numbers, rel=0.1)  # and room for new tokens


def test_checkpointing_keeps_a_fraction():
    less = plan(ppo={"gradient_checkpointing": True})["update: passes"].activations
    assert less < 0.25 * plan()["update: passes"].activations


# --- of several processes -------------------------------------------------------------------------

OUTSIDE = 2 * 128256 * 4096 + 4096
"""Embeddings, output head, last norm."""
LAYER = (W - OUTSIDE) // 32


def test_each_of_eight_holds_an_eighth():
    bf16 = {"compute": "bfloat16"}
    found = plan({"dtype": "bfloat16", "shard": True}, 8, ppo=bf16, sft=bf16)
    update = found["update: passes"]
    assert (update.frozen, update.trained) == (4 * W / 8, 4 * W / 8)
    assert (update.gradients, update.optimizer) == (4 * W / 8, 8 * W / 8)
    assert found["stage 1: optimizer"].optimizer == 12 * W / 8
    assert found["rollout"].gathered == 4 * OUTSIDE + 2 * (W - OUTSIDE)
    assert update.gathered == 8 * OUTSIDE + (3 * 2 + 4) * LAYER
    assert found["update: optimizer"].gathered == 0


def test_pieces_stay_pieces_while_responses_are_sampled():
    model = {"dtype": "bfloat16", "shard": True, "shard_sampling": True}
    found = plan(model, 8, ppo={"compute": "bfloat16"})["rollout"]
    assert found.gathered == 4 * OUTSIDE + 2 * 2 * LAYER


def test_offloaded_pieces_come_a_layer_at_a_time():
    found = plan({"dtype": "bfloat16", "shard": True, "offload": True}, 8)
    assert found["scoring"].frozen == 0
    assert found["scoring"].gathered > 0


def test_adapters_are_not_cut():
    model = {"dtype": "bfloat16", "lora": {"rank": 16}, "shard": True}
    found, alone = plan(model, 8)["update: passes"], plan(model)["update: passes"]
    assert found.trained == alone.trained
    assert found.frozen == 2 * W / 8 + found.trained
    assert found.gathered == 2 * (OUTSIDE + 2 * LAYER)


def test_whole_models_are_as_large_beside_others_but_for_the_trainers_copy_of_gradients():
    found, alone = plan(processes=2), plan()
    for name in alone:
        assert found[name].gathered == 0
        assert found[name].frozen == alone[name].frozen
        copies = 2 if name.startswith("stage 1") else 1
        assert found[name].gradients == copies * alone[name].gradients


# --- measured ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Large enough that its passes, not the process, are what is measured."""
    to = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=683,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["sft.gradient_checkpointing=true", "ppo.gradient_checkpointing=true"],
        ["model.lora.rank=16"],
    ],
    ids=["whole", "recomputed", "adapters"],
)
def test_the_peak_of_a_run_is_as_planned_within_a_third(changes, model, tmp_path):
    path = write_recipe(
        tmp_path,
        model={"base": str(model)},
        data={"demonstrations_limit": 64, "prompts_limit": 256, "max_response_tokens": 16},
        sft={"optimizer": "adamw", "batch_size": 64, "micro_batch_size": 64},
        ppo={
            "rollouts_per_step": 128,
            "minibatch_size": 128,
            "max_tokens_per_batch": 1024,
            "max_kl": 1e9,
        },
        eval={"every": None},
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peak.py")), str(path), *changes],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = [int(line) for line in done.stdout.split()]
    recipe = load_recipe(path, changes)
    found = phases(recipe, Blueprint.find(str(model)), work(recipe).longest, gpu=False)
    first = max(p.total for p in found if p.name.startswith("stage 1"))
    second = max(p.total for p in found if not p.name.startswith("stage 1"))
    for planned, peak in zip((first, second), measured, strict=True):
        assert 0.75 < planned / peak < 1.33
