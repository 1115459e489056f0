"""What cannot be scored or sampled is known beforehand; hybrid models can be."""

import pytest
import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import tiny
from srppo.errors import ModelError
from srppo.models.roles import Role
from srppo.rollout import hf
from srppo.rollout.check import check_passes
from srppo.rollout.hf import HFSampler

HYBRID = {
    "qwen3.5": lambda: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **{**tiny.SHAPE, "num_hidden_layers": 4},
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(**{**tiny.SHAPE, "num_hidden_layers": 3}, full_attn_idxs=[1])
    ),
}
"""Some layers attend, others carry a state."""
UNSOUND = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=2)),
        "Mamba.* cannot be sampled from here: .* nats a token away",
    ),
    "recurrent_gemma": (
        lambda: RecurrentGemmaForCausalLM(
            RecurrentGemmaConfig(
                **{**tiny.SHAPE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=4
            )
        ),
        "RecurrentGemma.* cannot be sampled from here: .* nats a token away",
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=24,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=64,
            )
        ),
        "OPT.* does not keep its layers and its output head apart",
    ),
}


def made(make):
    """Weights large enough for architectures to differ."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.normal_(0, 0.25)
    return model


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_what_is_sound_passes(architecture):
    check_passes(Role(tiny.model(architecture)))


@pytest.mark.parametrize("architecture", list(HYBRID))
def test_states_of_hybrid_models_leave_with_their_rows(architecture):
    model = made(HYBRID[architecture])
    check_passes(Role(model))
    prompts = tiny.sequences().prompt_ids
    y = HFSampler(model, eos_token_id=tiny.EOS, max_new_tokens=12).sample(prompts, seed=1)
    lengths = y.sequences.lengths
    assert lengths.min() < lengths.max()  # rows have left
    for i in range(len(prompts)):
        own = tiny.plain_logprobs(model, *tiny.row(y.sequences, i))
        torch.testing.assert_close(y.logprobs[i][y.sequences.mask[i]], own, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", list(UNSOUND))
def test_what_is_not_is_refused(architecture):
    make, words = UNSOUND[architecture]
    with pytest.raises(ModelError, match=words):
        check_passes(Role(made(make)))


def test_a_cache_that_keeps_the_wrong_rows_is_found(monkeypatch):
    def first_rows(cache, rows):
        for layer in cache.layers:
            layer.batch_select_indices(torch.arange(len(rows)))

    monkeypatch.setattr(hf, "keep_rows", first_rows)
    with pytest.raises(ModelError, match="cannot be sampled from"):
        check_passes(Role(tiny.model()))
