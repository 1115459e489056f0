"""Our engine says what lm-eval's own says, and counts what lm-eval cuts silently."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import bytewise
from srppo.eval.ask import Reader, room
from srppo.eval.generate import CHUNK, Engine
from srppo.models.roles import Role

WORDS = ["the", "a", "pond", "heron", "ten", "10", "costs", "Question:", "Answer:", "of", "it."]


def texts(n: int, longest: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, longest))) for _ in range(n)]


def to_generate(prompts: list[str], until: list[str], most: int) -> list[Instance]:
    settings = {"until": until, "max_gen_toks": most, "do_sample": False, "temperature": 0.0}
    return [
        Instance("generate_until", {}, (text, dict(settings)), 0, metadata=("t", i, 1))
        for i, text in enumerate(prompts)
    ]


def to_score(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, 0, metadata=("t", i, 1)) for i, pair in enumerate(pairs)
    ]


@pytest.fixture(scope="module", params=["bytes", "stories"])
def pair(request):
    """A model with its tokenizer: random over bytes, or one that speaks, with BOS and pieces."""
    if request.param == "bytes":
        return bytewise.byte_llama(), bytewise.tokenizer()
    path = request.getfixturevalue("shared") / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def both(pair, context: int | None = None):
    model, tokenizer = pair
    theirs = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8, max_length=context
    )
    context = context or model.config.max_position_embeddings
    ours = Engine(
        lambda: Role(model), Reader(tokenizer, False), context=context, max_tokens_per_batch=600
    )
    return ours, theirs


@pytest.mark.parametrize("until", [[], [". "], ["e", "Tim"], ["\n", " the "]])
def test_responses_are_those_of_lm_evals_own_model(pair, until):
    ours, theirs = both(pair)
    requests = to_generate(texts(CHUNK + 5, 12), until, 40)
    said = ours.generate_until(requests)
    assert said == theirs.generate_until(copy.deepcopy(requests), disable_tqdm=True)
    assert len(set(said)) > CHUNK / 2
    if until:
        assert any(answer["ended"] and answer["length"] < 40 for answer in ours.answers)
        assert not any(stop in text for stop in until for text in said)


def test_prompts_that_are_too_long_are_cut_as_there_and_counted(pair):
    ours, theirs = both(pair, context=64)
    prompts = ["short", *texts(6, 60, seed=1)]
    assert ours.generate_until(to_generate(prompts, [], 32)) == [
        theirs.generate_until(to_generate([text], [], 32), disable_tqdm=True)[0] for text in prompts
    ]
    lengths = [len(ours.reader.encode(text)) for text in prompts]
    assert [a["truncated_prompt"] for a in ours.answers] == [n > 32 for n in lengths]
    assert any(n > 32 for n in lengths)


def test_likelihoods_are_those_of_lm_evals_own_model(pair):
    ours, theirs = both(pair)
    contexts = texts(CHUNK, 9, seed=2)
    said = ours.generate_until(to_generate(contexts, [], 6))
    pairs = [(context, ending) for context in contexts for ending in (" (A)", " the pond.")]
    pairs += [(context, text) for context, text in zip(contexts, said, strict=True) if text]
    pairs.append(("", "The pond."))
    found = ours.loglikelihood(to_score(pairs))
    expected = theirs.loglikelihood(to_score(pairs), disable_tqdm=True)
    for (p, greedy), (q, likeliest) in zip(found, expected, strict=True):
        assert p == pytest.approx(q, abs=1e-4)
        assert greedy == likeliest
    assert {greedy for _, greedy in found} == {True, False}


def test_likelihoods_of_texts_that_are_too_long_lose_the_beginning_as_there(pair):
    ours, theirs = both(pair, context=48)
    pairs = [(text, " (B)") for text in texts(5, 50, seed=3)]
    found = ours.loglikelihood(to_score(pairs))
    expected = theirs.loglikelihood(to_score(pairs), disable_tqdm=True)
    assert [p for p, _ in found] == pytest.approx([q for q, _ in expected], abs=1e-4)
    assert any(answer["truncated_prompt"] for answer in ours.answers)


def test_a_model_ends_at_every_token_that_its_generation_config_names():
    model, tokenizer = bytewise.byte_llama(), bytewise.tokenizer()
    engine = Engine(
        lambda: Role(model), Reader(tokenizer, False), context=None, max_tokens_per_batch=600
    )
    prompts = texts(20, 5)
    free = "".join(engine.generate_until(to_generate(prompts, [], 30)))
    often = max(filter(str.isascii, set(free)), key=free.count)
    stopped = engine.generate_until(to_generate(prompts, [often], 30))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.encode(often)]
    ended = engine.generate_until(to_generate(prompts, [], 30))
    assert ended == [
        before + often * (often in text) for before, text in zip(stopped, ended, strict=True)
    ]
    assert any(often in text for text in ended)
    assert all(a["ended"] for text, a in zip(ended, engine.answers, strict=True) if often in text)


def test_text_begins_with_one_bos():
    tokenizer = bytewise.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    plain, chat = Reader(tokenizer, False), Reader(tokenizer, True)
    assert plain.encode("a") == plain.encode("<bos>a") == [bos, *chat.encode("a")]
    assert chat.encode("<bos>a") == [bos, *chat.encode("a")]
    assert len(chat.encode("a")) == 1  # the template would have said BOS


@pytest.mark.parametrize(
    ("wanted", "longest", "context", "expected"),
    [
        (100, 50, None, 100),
        (100, 50, 200, 100),
        (100, 120, 200, 100),  # prompts are cut to 100
        (100, 50, 140, 90),
        (100, 130, 140, 70),
    ],
)
def test_how_much_room_a_response_has(wanted, longest, context, expected):
    assert room(wanted, longest, context) == expected


def test_answers_outlive_the_model(tmp_path: Path):
    """A finished request asks no model, and an engine without any loads none."""
    model, tokenizer = bytewise.byte_llama(), bytewise.tokenizer()
    requests = to_generate(texts(CHUNK + 1, 6), [], 8)

    def engine(load):
        return Engine(
            load,
            Reader(tokenizer, False),
            context=None,
            max_tokens_per_batch=600,
            path=tmp_path / "a.jsonl",
            origin={"model": "m"},
        )

    def never():
        raise AssertionError("a model was loaded")

    said = engine(lambda: Role(model)).generate_until(requests)
    assert engine(never).generate_until(requests) == said
