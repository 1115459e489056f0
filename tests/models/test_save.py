"""Saved models: plain transformers samples from them as training did, and ends where it ended."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny
from srppo.models.save import as_trained, save


def saved(path, model, tokenizer=None, most=6):
    tokenizer = tokenizer or tiny.tokenizer()
    save(model, tokenizer, path, as_trained(tokenizer, most))
    return AutoModelForCausalLM.from_pretrained(path)


def test_generate_ends_at_the_tokenizer_s_eos_whatever_the_base_named(tmp_path):
    model = tiny.model()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        likeliest = int(model(ids).logits[0, -1].argmax())
    model.generation_config = GenerationConfig(eos_token_id=[likeliest, 7], do_sample=False)
    model.config.eos_token_id = likeliest
    assert model.generate(ids, max_new_tokens=6).shape[1] == 4  # the base would end here
    loaded = saved(tmp_path, model)
    response = loaded.generate(ids, do_sample=False)[0, 3:].tolist()
    assert response[0] == likeliest
    assert len(response) == 6 or response[-1] == tiny.EOS
    with torch.no_grad():
        loaded.lm_head.weight[tiny.EOS] = 9 * loaded.lm_head.weight[likeliest]
    assert loaded.generate(ids, do_sample=False)[0, 3:].tolist() == [tiny.EOS]


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_generate_samples_from_the_whole_distribution_at_temperature_1(architecture, tmp_path):
    """What it samples from is the softmax of the logits: nothing cut off, nothing sharpened."""
    model = tiny.model(architecture)
    loaded = saved(tmp_path, model)
    ids = torch.tensor([[3, 4, 5]])
    out = loaded.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(out.scores[0].softmax(-1), expected.softmax(-1))
    assert loaded.generation_config.do_sample


def test_a_base_whose_generation_config_contradicts_itself_can_be_saved(tmp_path):
    """A temperature without sampling, as some models of the hub have; transformers refuses it."""
    model = tiny.model()
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    assert saved(tmp_path / "ours", model).generation_config.temperature == 1.0


def test_padding_is_said_even_where_the_tokenizer_has_none(tmp_path):
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id is None
    assert saved(tmp_path, tiny.model()).generation_config.pad_token_id == tiny.EOS
    tokenizer.pad_token = "h"
    assert as_trained(tokenizer).pad_token_id == tokenizer.convert_tokens_to_ids("h")
    assert as_trained(tokenizer).max_new_tokens is None


def test_the_template_goes_with_it(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    saved(tmp_path, tiny.model(), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
