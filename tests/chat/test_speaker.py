"""A model in a conversation: ids as in training, answers as plain transformers gives them."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import tiny
from srppo.chat.speaker import Speaker, _Voice
from srppo.config import LoRAConfig
from srppo.data.chat import DEFAULT_TEMPLATE, encode
from srppo.data.schemas import RowError
from srppo.errors import ModelError, RunDirError
from srppo.models.load import load_model, load_tokenizer
from srppo.models.lora import Backbone


def saved(path, architecture="llama", generation=None):
    """A tiny model directory without chat template."""
    model = tiny.model(architecture)
    if generation:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def speaker(source="srppo:miniature", **options):
    return Speaker.load("m", source, "float32", "cpu", **options)


def said(someone, text, seed=0):
    pieces = []
    answer = someone.answer(text, pieces.append, seed)
    assert "".join(pieces) == answer.text
    return answer


def greedy(model, ids, eos, most):
    """Token by token from whole passes; no generate, no cache."""
    out = []
    while len(out) < most and out[-1:] != [eos]:
        with torch.no_grad():
            out.append(int(model(torch.tensor([ids + out])).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_greedy_answers_are_the_likeliest_tokens_over_the_ids_of_training(architecture, tmp_path):
    source = saved(tmp_path / "model", architecture)
    one = speaker(source, max_tokens=6)
    assert not one.own_template
    model, tokenizer = load_model(source), load_tokenizer(source)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    turns = []
    for text in ("a b", "c", "d e f"):
        turns.append({"role": "user", "content": text})
        prompt = encode(tokenizer, turns, "a").prompt_ids
        assert one.hear(text) == prompt
        expected = greedy(model, prompt, tiny.EOS, 6)
        answer = said(one, text)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
        assert answer.end == ("eos" if expected[-1] == tiny.EOS else "length")
        turns.append({"role": "assistant", "content": answer.text})
    one.forget()
    assert one.hear("c") == encode(tokenizer, [{"role": "user", "content": "c"}], "a").prompt_ids


def test_at_temperature_1_answers_follow_the_model_s_distribution():
    """First tokens of many answers against the softmax; a token's count within five deviations."""
    one = speaker(max_tokens=1)
    one.sample_at(1.0)
    with torch.no_grad():
        ids = torch.tensor([one.hear("copy : a b")])
        expected = load_model("srppo:miniature")(ids).logits[0, -1].softmax(-1)
    n, counts = 600, torch.zeros(len(expected))
    for seed in range(n):
        one.forget()
        answer = said(one, "copy : a b", seed)
        word = one.tokenizer.convert_tokens_to_ids(answer.text) if answer.text else 2
        counts[word] += 1
    for p, count in zip(expected.tolist(), counts.tolist(), strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1


def test_the_seed_decides_the_answer():
    answers = []
    for seed in (1, 1, 2, 3):
        one = speaker()
        one.sample_at(1.0)
        answers.append(said(one, "copy : a b c d", seed).text)
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_how_it_samples_is_said_whatever_the_model_leaves_open(tmp_path):
    whole = {"do_sample": True, "top_k": 0}
    cases = {
        "greedy": {},
        "temperature 1, top-k 50": {"do_sample": True},
        "temperature 0.6, top-p 0.9": {**whole, "temperature": 0.6, "top_p": 0.9},
        "temperature 1, repetition penalty 1.05": {**whole, "repetition_penalty": 1.05},
    }
    for i, (words, own) in enumerate(cases.items()):
        one = speaker(saved(tmp_path / str(i), generation=own))
        assert one.sampling() == words
        assert f"; {words}, up to 64 tokens or <eos>; no chat template" in one.describe()
        one.sample_at(0.5)
        assert one.sampling() == "temperature 0.5"
        one.sample_at(0)
        assert one.sampling() == "greedy"
    assert speaker(saved(tmp_path / "x", generation={"max_new_tokens": 7})).max_tokens == 7


def test_a_second_end_that_the_model_names_ends_answers_too(tmp_path):
    source = saved(tmp_path / "model")
    ids = speaker(source).hear("a b")
    first = greedy(load_model(source), ids, tiny.EOS, 1)[0]
    assert first != tiny.EOS
    named = saved(tmp_path / "named", generation={"eos_token_id": [first, 9]})
    answer = said(speaker(named), "a b")
    assert (answer.tokens, answer.end) == (1, "eos")


def test_characters_of_several_tokens_are_said_whole():
    """Bytes as tokens: half a character is held back, and never shown as a replacement mark."""
    bytes_only = ByteLevelBPETokenizer()
    bytes_only.train_from_iterator([], vocab_size=256, special_tokens=["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only._tokenizer, eos_token="<eos>")
    text = "über 愛 🙂 é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces = []
    voice = _Voice(tokenizer, pieces.append)
    voice.put(torch.tensor([[1, 2]]))  # the prompt
    for i in ids[:-1]:
        voice.put(torch.tensor([i]))
    assert "".join(pieces) == text[:-1]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    voice.put(torch.tensor([ids[-1]]))
    voice.end()
    assert "".join(pieces) == text
    assert len(pieces) == len(text)


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_went(tmp_path):
    one = speaker(saved(tmp_path / "model"))
    pieces = []
    answer = one.answer("a b", pieces.append, 0, stop=lambda: len(pieces) == 3)
    assert (answer.end, answer.text) == ("stopped", "".join(pieces))
    assert len(pieces) == 3
    assert one.messages == [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": answer.text},
    ]
    assert said(one, "c").text


def test_a_conversation_that_is_too_long_is_refused_and_not_remembered():
    one = speaker()
    with pytest.raises(ModelError, match=r"is \d+ tokens long and m has 64 positions.*/reset"):
        one.answer("a " * 70, print, 0)
    assert one.messages == []
    answer = said(one, "a " * 55)  # the answer gets what room there is
    assert answer.tokens <= 64 - len(encode(one.tokenizer, one.messages[:1], "a").prompt_ids)


def test_a_system_message_that_the_template_does_not_know(tmp_path):
    one = speaker()
    said(one, "copy : a")
    before = list(one.messages)
    with pytest.raises(RowError, match="roles user and assistant only"):
        one.be_told("be brief")
    assert one.messages == before
    other = speaker(saved(tmp_path / "model"))
    other.be_told("a")
    text = other.tokenizer.decode(other.hear("b"))
    said(other, "b")
    other.forget()
    assert other.messages == [{"role": "system", "content": "a"}]
    assert other.tokenizer.decode(other.hear("b")) == text
    other.be_told("")
    assert other.messages == []


def test_a_model_that_diverged(tmp_path):
    model = load_model("srppo:miniature")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    load_tokenizer("srppo:miniature").save_pretrained(tmp_path)
    one = speaker(str(tmp_path))
    one.sample_at(1.0)
    with pytest.raises(ModelError, match=r"m cannot answer: .*not numbers.*learning rate"):
        one.answer("copy : a", print, 0)
    assert one.messages == []


def test_directories_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no config"):
        speaker(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunDirError, match="has no policy yet"):
        speaker(str(tmp_path))


def test_an_adapter_without_tokenizer_speaks_with_that_of_its_base(tmp_path):
    Backbone(load_model("srppo:miniature"), LoRAConfig(rank=2), 0).new().save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer_config.json").exists()
    plain, adapted = speaker(), speaker(str(tmp_path))  # a fresh adapter changes nothing
    assert adapted.hear("copy : a") == plain.hear("copy : a")
    assert said(adapted, "copy : a b") == said(plain, "copy : a b")


def test_what_it_says_is_what_plain_transformers_says(tmp_path):
    source = saved(tmp_path / "model", "qwen2")
    model, tokenizer = (
        kind.from_pretrained(source) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    tokenizer.chat_template = DEFAULT_TEMPLATE
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=False,
    )  # fmt: skip
    out = model.generate(inputs, max_new_tokens=9, do_sample=False)[0, inputs.shape[1] :]
    assert said(speaker(source, max_tokens=9), "a b").text == tokenizer.decode(
        out, skip_special_tokens=True
    )
