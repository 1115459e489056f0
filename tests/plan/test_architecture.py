"""Sizes against the published ones; what is kept for a backward pass, against real tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config

import tiny
from srppo.config import LoRAConfig, ModelConfig
from srppo.errors import ModelError
from srppo.plan.architecture import Blueprint
from srppo.plan.known import MODELS

PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
}
"""Parameters, as published."""


@pytest.mark.parametrize("name", list(MODELS))
def test_known_models_have_their_published_number_of_weights(name):
    sizes = Blueprint.find(name).sizes(ModelConfig(base=name))
    assert sizes.weights == sizes.trained == PUBLISHED[name]


def test_a_config_on_this_machine_counts_and_no_weights_are_needed(tmp_path):
    config = GPT2Config()
    config.save_pretrained(tmp_path)
    sizes = Blueprint.find(str(tmp_path)).sizes(ModelConfig(base=str(tmp_path)))
    assert sizes.weights == 124_439_808
    assert sizes.quantizable == 12 * (4 + 8) * 768**2
    assert sizes.cached_per_token == 2 * 12 * 768


def test_a_model_that_is_neither_here_nor_known():
    assert Blueprint.find("somebody/something") is None
    with pytest.raises(ModelError, match="does not exist"):
        Blueprint.find("./nowhere")


def test_adapters_by_hand():
    """Mistral: q and o are 4096 x 4096, k and v 4096 x 1024, the other three 4096 x 14336."""
    name = "mistralai/Mistral-7B-v0.1"
    sizes = Blueprint.find(name).sizes(ModelConfig(base=name, lora=LoRAConfig(rank=8)))
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert sizes.trained == 8 * 32 * per_layer
    assert sizes.weights == PUBLISHED[name]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_what_is_kept_for_the_backward_pass_is_what_real_tensors_keep(architecture):
    model = tiny.model(architecture)
    found = Blueprint(model.config, "").saved(ModelConfig(base="x"), "float32")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    tokens = 48
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model.base_model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    real = sum(x.nbytes() for place, x in kept.items() if place not in own)
    assert output.last_hidden_state.shape[1] == tokens
    assert found.per_token * tokens + found.constant == pytest.approx(real, rel=0.01)


def test_products_in_bfloat16_keep_copies_of_the_weights():
    """Of every matrix that is trained, two bytes a weight; embeddings are looked up, not copied."""
    blueprint = Blueprint(tiny.model("llama").config, "")
    model = ModelConfig(base="x")
    matrices = blueprint.sizes(model).quantizable
    assert blueprint.saved(model, "float32").constant < 0.2 * matrices
    assert blueprint.saved(model, "bfloat16").constant == pytest.approx(2 * matrices, rel=0.2)
