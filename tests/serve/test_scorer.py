"""The scorer against plain forward passes, one row at a time."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import tiny
from serving import BASE, SFT, columns, expected, pairs, scorer
from srppo.config import LoRAConfig
from srppo.data.chat import encode
from srppo.data.schemas import RowError
from srppo.errors import DataError, ModelError
from srppo.models.lora import Backbone
from srppo.serve.scorer import CoherentScorer


@pytest.mark.parametrize("max_tokens_per_batch", [1, 16384])
def test_scores_are_those_of_plain_forwards(max_tokens_per_batch):
    rows = pairs()
    scores = scorer(max_tokens_per_batch=max_tokens_per_batch).score(*columns(rows))
    for (prompt, response), score in zip(rows, scores, strict=True):
        assert score == pytest.approx(expected(prompt, response), abs=1e-5)


def test_nothing_of_the_models_is_trained():
    scorer()
    assert not any(p.requires_grad for model in (BASE, SFT) for p in model.parameters())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A base model, and an adapter over it with random numbers in both factors."""
    folder = tmp_path_factory.mktemp("models")
    base, adapter = folder / "base", folder / "adapter"
    tiny.model(seed=0).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = tiny.model(seed=0)
    model.name_or_path = str(base)
    role = Backbone(model, LoRAConfig(rank=2), seed=0).new()
    torch.manual_seed(5)
    for p in role.parameters():
        torch.nn.init.normal_(p, std=0.3)
    role.save_pretrained(adapter)
    return str(base), str(adapter)


def test_an_adapter_over_the_base_shares_its_weights(directories):
    base, adapter = directories
    found = CoherentScorer.load(base, adapter, device="cpu")
    assert found.base.model is found.sft.model

    whole = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().eval()
    prompt, response = pairs()[3]
    exact = tiny.plain_logprobs(whole, prompt, response) - tiny.plain_logprobs(
        tiny.model(seed=0), prompt, response
    )
    (score,) = found.score([prompt], [response])
    assert score == pytest.approx(exact.tolist(), abs=1e-5)
    assert max(map(abs, score)) > 0.1


def test_models_with_other_tokens_are_refused(directories, tmp_path):
    base, _ = directories
    shutil.copytree(base, tmp_path / "other")
    tiny.tokenizer("a c b").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="would compare different texts"):
        CoherentScorer.load(base, str(tmp_path / "other"), device="cpu")


@pytest.mark.parametrize(
    ("prompt", "response", "told"),
    [
        ([], [1], "empty prompt"),
        ([1], [], "empty response"),
        ([1, 24], [1], "token id 24 is not in the vocabulary of 24"),
        ([1], [-1], "token id -1"),
        ([1] * 40, [1] * 25, "65 tokens .* 64 positions"),
    ],
)
def test_what_the_models_cannot_read_is_refused(prompt, response, told):
    with pytest.raises(DataError, match=told):
        scorer().score([prompt], [response])


def test_the_longest_sequence_is_scored():
    (score,) = scorer().score([[1] * 40], [[2] * 24])
    assert score == pytest.approx(expected([1] * 40, [2] * 24), abs=1e-5)


def test_scores_that_are_no_numbers_are_refused():
    broken = tiny.model(seed=1)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="not a number"):
        CoherentScorer(BASE, broken, tiny.tokenizer()).score([[1]], [[2]])


def test_conversations_become_the_ids_of_training():
    ours = scorer()
    messages = [{"role": "user", "content": "a b"}]
    example = encode(ours.tokenizer, messages, "c d")
    assert ours.encode_chat(messages, "c d", ended=True) == (
        example.prompt_ids,
        example.response_ids,
    )
    assert ours.encode_chat(messages, "c d", ended=False) == ([2, 3], [4, 5])


def test_plain_text_is_read_as_it_stands():
    ours = scorer()
    assert ours.encode_plain("a <eos> b", " c", ended=True) == ([2, 0, 3], [4, 0])
    assert ours.encode_plain("a <eos> b", " c", ended=False) == ([2, 0, 3], [4])
    assert ours.encode_plain("a b", "", ended=True) == ([2, 3], [0])


def test_text_is_split_where_its_prompt_ends():
    ours = scorer()
    assert ours.split("a b c <eos>", "a b") == ([2, 3], [4, 0])
    # One token spans the boundary: "b" and "c" are read as written in the prompt.
    assert ours.split("a bc", "a b") == ([2, 3], [4])
    with pytest.raises(DataError, match="does not begin with its prompt"):
        ours.split("b c", "a b")


def test_text_that_needs_control_tokens_is_refused():
    with pytest.raises(RowError):
        scorer().encode_chat([{"role": "user", "content": "a"}], "b <eos>", ended=True)
