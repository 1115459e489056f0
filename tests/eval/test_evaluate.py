"""Measuring: the same prompts and seed for every model, scores by the user's function."""

import pytest
import torch

import tiny
from enumerable import fine_tuned, tiny_llama
from srppo.data.chat import Example
from srppo.data.prompts import Prompt
from srppo.errors import ConfigError, DataError
from srppo.eval.evaluate import Evaluator, decode, held_out_nll, load_scorer
from srppo.models.batching import Sequences

WORDS = tiny.tokenizer("a b c d e f")  # ids 2..7; 0 is <eos>, 1 <unk>
PROMPTS = [
    Prompt([1 + i % 5], f"prompt {i}", {"group": "odd" if i % 2 else "even", "i": i})
    for i in range(9)
]


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


def evaluator_of(pair, **settings):
    base, sft = pair
    defaults = {
        "tokenizer": WORDS,
        "prompts": PROMPTS,
        "max_new_tokens": 4,
        "seed": 0,
        "base": base,
        "sft": sft,
        "max_tokens_per_batch": 10**6,
    }
    return Evaluator(**{**defaults, **settings})


def recording_scorer(calls):
    def scorer(rows, responses, ended):
        calls.append((rows, responses, ended))
        return {"words": [len(r.split()) for r in responses], "i": [row["i"] for row in rows]}

    return scorer


# --- measure --------------------------------------------------------------------------------------


def test_a_row_for_each_group_with_means_over_its_own_prompts(pair):
    calls = []
    evaluator = evaluator_of(pair, scorer=recording_scorer(calls))
    rows = evaluator.measure(evaluator.sampler(pair[1]), temperature=1.0)
    assert [row["group"] for row in rows] == evaluator.groups == ["even", "odd"]
    assert [row["n"] for row in rows] == [5, 4]
    assert [row["scores"]["i"] for row in rows] == [4.0, 4.0]  # means of 0 2 4 6 8 and 1 3 5 7
    ((given, responses, ended),) = calls
    assert [row["prompt"] for row in given] == [p.text for p in PROMPTS]
    by_hand = [len(r.split()) for r in responses]
    assert rows[0]["scores"]["words"] == pytest.approx(sum(by_hand[::2]) / 5)
    assert rows[1]["eos_rate"] == pytest.approx(sum(ended[1::2]) / 4)
    # EOS is a token and no word
    lengths = [n + e for n, e in zip(by_hand, ended, strict=True)]
    assert rows[0]["response_length"] == pytest.approx(sum(lengths[::2]) / 5)


def test_the_reward_is_the_log_ratio_of_whole_responses(pair):
    base, sft = pair
    evaluator = evaluator_of(pair, prompts=PROMPTS[:1])
    sampler = evaluator.sampler(sft)
    (row,) = evaluator.measure(sampler, temperature=1.0)
    prompt, response = tiny.row(sampler.sample([PROMPTS[0].ids], seed=0).sequences, 0)
    expected = tiny.plain_logprobs(sft, prompt, response) - tiny.plain_logprobs(
        base, prompt, response
    )
    assert row["reward"] == pytest.approx(float(expected.sum()), abs=1e-5)


def test_several_samples_count_as_one_prompt(pair):
    """They are not independent; greedy needs one only."""
    calls = []
    evaluator = evaluator_of(pair, scorer=recording_scorer(calls))
    sampler = evaluator.sampler(pair[1])
    sampled = evaluator.measure(sampler, temperature=1.0, samples=3)
    greedy = evaluator.measure(sampler, temperature=0.0, samples=3)
    assert [row["n"] for row in sampled] == [row["n"] for row in greedy] == [5, 4]
    assert [len(responses) for _, responses, _ in calls] == [27, 9]
    three = [calls[0][1][k : k + 3] for k in range(0, 27, 3)]
    assert any(len(set(responses)) > 1 for responses in three)


def test_measuring_twice_gives_the_same_numbers(pair):
    evaluator = evaluator_of(pair)
    sampler = evaluator.sampler(pair[1])
    assert evaluator.measure(sampler, 1.0) == evaluator.measure(sampler, 1.0)


def test_prompts_without_group_are_one_group(pair):
    evaluator = evaluator_of(pair, prompts=[Prompt([1], "x"), Prompt([2], "y")])
    (row,) = evaluator.measure(evaluator.sampler(pair[0]), temperature=0.0)
    assert row["group"] == "all"
    assert row["scores"] == {}


def test_without_prompts_there_is_nothing_to_measure(pair):
    evaluator = evaluator_of(pair, prompts=[])
    sampler = evaluator.sampler(pair[0])
    assert evaluator.measure(sampler, 1.0) == []
    assert evaluator.side_by_side({"base": sampler}, 5) == []


# --- side by side ---------------------------------------------------------------------------------


def test_side_by_side_takes_groups_in_turn_and_adds_up_to_the_reward(pair):
    evaluator = evaluator_of(pair, scorer=recording_scorer([]))
    models = {"base": evaluator.sampler(pair[0]), "sft": evaluator.sampler(pair[1])}
    rows = evaluator.side_by_side(models, 4)
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"]
    assert [row["group"] for row in rows] == ["even", "odd", "even", "odd"]
    for row in rows:
        assert row["responses"].keys() == {"base", "sft"}
        for response in row["responses"].values():
            total = sum(token["log_ratio"] for token in response["tokens"])
            assert response["reward"] == pytest.approx(total, abs=1e-3)
            last = response["tokens"][-1]["text"]
            assert last.endswith("<eos>") != response["truncated"]
            assert set(response["scores"]) == {"words", "i"}


def test_a_group_that_runs_out_does_not_end_the_others(pair):
    prompts = [PROMPTS[1], *(p for p in PROMPTS if p.meta["group"] == "even")]
    evaluator = evaluator_of(pair, prompts=prompts)
    rows = evaluator.side_by_side({"base": evaluator.sampler(pair[0])}, 99)
    assert [row["group"] for row in rows] == ["even", "odd", "even", "even", "even", "even"]


def test_side_by_side_of_no_prompts_is_empty(pair):
    evaluator = evaluator_of(pair)
    assert evaluator.side_by_side({"base": evaluator.sampler(pair[0])}, 0) == []


# --- pieces ---------------------------------------------------------------------------------------


def test_held_out_nll_is_per_response_in_nats(pair):
    base, _ = pair
    examples = [Example([1], [2, 0]), Example([3], [4, 5, 6])]
    by_hand = [-tiny.plain_logprobs(base, e.prompt_ids, e.response_ids).sum() for e in examples]
    expected = float(sum(by_hand)) / 2
    assert held_out_nll(base, examples, 10**6) == pytest.approx(expected, rel=1e-5)


def test_decoded_responses_hold_no_special_tokens_and_no_padding():
    y = Sequences.of([[1], [1]], [[2, 3, 0], [4]])
    y.response_ids[1, 1:] = 5  # garbage in padding
    assert decode(WORDS, y) == ["a b", "c"]


# --- scorers --------------------------------------------------------------------------------------


def test_a_scorer_from_a_module():
    scorer = load_scorer("python:srppo.miniature.world:score")
    found = scorer([{"answer": "a b"}], ["answer : [ a b ]"], [True])
    assert found == {"accuracy": [1.0], "format": [1.0]}


def test_a_scorer_from_a_file_may_define_dataclasses_and_be_named_like_a_module(tmp_path):
    """Dataclasses look their module up; json stays json."""
    file = tmp_path / "json.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    weight: float\n"
        "def score(rows, responses, ended):\n"
        "    return {'x': [Rule(2.0).weight for _ in rows]}\n"
    )
    assert load_scorer(f"python:{file}:score")([{}], [""], [True]) == {"x": [2.0]}
    import json

    assert json.loads("[1]") == [1]


@pytest.mark.parametrize(
    "name",
    [
        "my_scores.score",
        "python:score",
        "python::score",
        "python:module:",
        "python:no_such_module:score",
        "python:srppo.miniature.world:no_such_function",
        "python:srppo.miniature.world:GROUPS",
        "python:.relative:score",
        "python:/no/such/file.py:score",
    ],
)
def test_scorers_that_are_not_there_are_named_with_a_cure(name):
    with pytest.raises(ConfigError) as error:
        load_scorer(name)
    assert f"eval.scorer={name!r}" in str(error.value)
    assert any(cure in str(error.value) for cure in ("Write, for example", "Give ", "Name a"))


@pytest.mark.parametrize("code", ["def score(:", "import no_such_module", "1 / 0"])
def test_a_scorer_file_that_cannot_be_imported(tmp_path, code):
    file = tmp_path / "scores.py"
    file.write_text(code)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_scorer(f"python:{file}:score")


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (lambda rows, responses, ended: {"x": [1.0]}, "1 values of 'x' for 9 responses"),
        (lambda rows, responses: {}, "TypeError"),
        (lambda rows, responses, ended: [1.0] * len(rows), "AttributeError"),
        (lambda rows, responses, ended: {"x": ["high"] * len(rows)}, "'high'"),
        (lambda rows, responses, ended: {"x": [row["gold"] for row in rows]}, "KeyError: 'gold'"),
    ],
)
def test_scorers_that_do_not_keep_their_promise(pair, scorer, said):
    evaluator = evaluator_of(pair, scorer=scorer)
    with pytest.raises(ConfigError, match=r"eval\.scorer") as error:
        evaluator.measure(evaluator.sampler(pair[0]), temperature=0.0)
    assert said in str(error.value)


def test_a_scorers_own_message_reaches_the_user_as_it_is(pair):
    scorer = load_scorer("python:srppo.miniature.world:score")
    evaluator = evaluator_of(pair, scorer=scorer)
    with pytest.raises(DataError, match="column 'answer'"):
        evaluator.measure(evaluator.sampler(pair[0]), temperature=0.0)


def test_extrapolating_samplers_use_both_models(pair):
    base, sft = pair
    evaluator = evaluator_of(pair)
    ids = [p.ids for p in PROMPTS] * 10
    plain = evaluator.sampler(sft).sample(ids, seed=0).sequences.response_ids
    far = evaluator.sampler(sft, base, 8.0).sample(ids, seed=0).sequences.response_ids
    assert plain.shape != far.shape or not torch.equal(plain, far)
