"""The world: answers, splits, rows, scores."""

from collections import Counter
from itertools import islice
from random import Random

import pytest

from srppo.errors import DataError
from srppo.miniature import world

# Written apart from the world, over strings: answers that must come out.
KNOWN = {
    "reverse : a b c": "c b a",
    "reverse : a a f b": "b f a a",
    "sort : f a c": "a c f",
    "sort : b a b a": "a a b b",
    "first : d e f": "d",
    "max : 2 9 4": "9",
    "what is copy c a c ?": "c a c",
    "what is last d e f ?": "f",
    "what is min 7 3 9 3 ?": "3",
    "what is count a b a a ?": "3",
    "what is count b b f ?": "0",
    "what is upper a b f ?": "A B F",
    "what is swap a b c d ?": "b a c d",
    "what is length a a b c d ?": "5",
    "what is next_ a e f ?": "b f a",
}


def oracle(prompt: str) -> str:
    """The answer by other means than the world's: string arithmetic over the prompt's text."""
    words = prompt.replace("what is ", "").replace(" ?", "").replace(" :", "").split()
    name, text = words[0], "".join(words[1:])
    codes = [ord(c) for c in text]
    answers = {
        "reverse": lambda: "".join(text[-i - 1] for i in range(len(text))),
        "sort": lambda: "".join(c * text.count(c) for c in "abcdef"),
        "first": lambda: chr(codes[0]),
        "last": lambda: chr(codes[len(codes) - 1]),
        "max": lambda: next(d for d in "987654321" if d in text),
        "min": lambda: next(d for d in "123456789" if d in text),
        "copy": lambda: text,
        "count": lambda: str(len(text) - len(text.replace("a", ""))),
        "upper": lambda: "".join(chr(code - 32) for code in codes),
        "swap": lambda: text[1::-1] + text[2:],
        "length": lambda: str(sum(1 for _ in text)),
        "next_": lambda: text.translate(str.maketrans("abcdef", "bcdefa")),
    }
    return " ".join(answers[name]())


def all_rows() -> list[dict]:
    return [
        *world.demonstrations(0),
        *world.evaluation(0, "validation"),
        *world.evaluation(0, "test"),
    ]


@pytest.mark.parametrize(("prompt", "answer"), KNOWN.items())
def test_known_answers(prompt, answer):
    words = prompt.replace("what is ", "").replace(" :", "").replace(" ?", "").split()
    family = next(f for f in world.FAMILIES if f.name == words[0])
    assert family.prompt(words[1:]) == prompt
    assert " ".join(family.solve(words[1:])) == answer


def test_every_answer_agrees_with_independent_implementations():
    for row in all_rows():
        assert row["response"] == f"answer : [ {oracle(row['prompt'])} ]", row
        if "answer" in row:
            assert row["answer"] == oracle(row["prompt"])


def test_no_prompt_is_in_two_splits():
    seen: dict[str, set[str]] = {split: set() for split in world.SPLITS}
    for seed in range(3):
        seen["train"] |= {row["prompt"] for row in world.demonstrations(seed)}
        seen["train"] |= {row["prompt"] for row in world.prompts(seed)}
        for split in ("validation", "test"):
            seen[split] |= {row["prompt"] for row in world.evaluation(seed, split)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_splits_are_fixed_for_ever():
    """The hash must not change between versions, machines or processes."""
    fixed = {
        "reverse : a b c": "train",
        "what is copy c a c ?": "train",
        "reverse : e c c": "validation",
        "what is copy b d a f ?": "validation",
        "max : 8 8 7": "test",
        "what is copy a a f ?": "test",
    }
    assert {prompt: world.split_of(prompt) for prompt in fixed} == fixed
    rng = Random(0)
    family = world.FAMILIES[0]
    shares = Counter(world.split_of(family.prompt(family.draw(rng))) for _ in range(4000))
    assert shares["train"] / 4000 == pytest.approx(0.70, abs=0.05)
    assert shares["test"] / 4000 == pytest.approx(0.15, abs=0.05)


@pytest.mark.parametrize(
    ("rows", "groups", "per_family"),
    [
        (world.demonstrations(0), ["in_domain"], 110),
        (world.prompts(0), ["in_domain", "ood_prompts"], 250),
        (world.evaluation(0, "validation"), list(world.GROUPS), 80),
        (world.evaluation(0, "test"), list(world.GROUPS), 80),
    ],
)
def test_rows_are_distinct_and_balanced(rows, groups, per_family):
    rows = list(rows)
    assert len({row["prompt"] for row in rows}) == len(rows) == 4 * len(groups) * per_family
    counts = Counter((row["group"], row["family"]) for row in rows)
    assert set(counts.values()) == {per_family}
    assert sorted({group for group, _ in counts}) == sorted(groups)


def test_columns():
    assert set(next(world.demonstrations(0))) == {"prompt", "response", "family", "group"}
    assert set(next(world.prompts(0))) == {"prompt", "family", "group"}
    columns = {"prompt", "answer", "response", "family", "group"}
    assert set(next(world.evaluation(0, "test"))) == columns


def test_the_seed_decides_the_rows():
    assert list(world.prompts(3)) == list(world.prompts(3))
    assert list(islice(world.prompts(3), 9)) != list(islice(world.prompts(4), 9))


def test_ppo_prompts_are_not_the_demonstrations_again():
    demonstrated = {row["prompt"] for row in world.demonstrations(0)}
    shared = sum(row["prompt"] in demonstrated for row in world.prompts(0))
    assert shared < 200  # of 2000: the families are small, and both draw at random


@pytest.mark.parametrize(
    ("source", "split"),
    [
        (world.demonstrations, "test"),
        (world.prompts, "validation"),
        (world.evaluation, "train"),
        (world.evaluation, "dev"),
    ],
)
def test_a_wrong_split_is_refused(source, split):
    with pytest.raises(DataError, match=f"no split '{split}'"):
        next(source(0, split))


@pytest.mark.parametrize(
    ("response", "ended", "accuracy", "formatted"),
    [
        ("answer : [ c b a ]", True, 1, 1),
        ("answer : [ c b a ]", False, 0, 0),
        ("answer : [ a b c ]", True, 0, 1),
        ("answer : [ um maybe ]", True, 0, 1),
        ("answer : [ c b a ] by the way", True, 0, 0),
        ("well answer : [ c b a ]", True, 0, 0),
        ("answer : [ ]", True, 0, 0),
        ("answer : [ [ c b a ] ]", True, 0, 0),
        ("answer : [ c \n b a ]", True, 0, 0),
        ("answer : [ c b a", True, 0, 0),
        ("c b a", True, 0, 0),
        ("", True, 0, 0),
    ],
)
def test_score(response, ended, accuracy, formatted):
    rows = [{"answer": "c b a"}]
    expected = {"accuracy": [accuracy], "format": [formatted]}
    assert world.score(rows, [response], [ended]) == expected


def test_reference_responses_score_one_and_others_answers_do_not():
    rows = list(world.evaluation(0, "validation"))
    ended = [True] * len(rows)
    scores = world.score(rows, [row["response"] for row in rows], ended)
    assert set(scores["accuracy"]) == set(scores["format"]) == {1.0}
    shifted = [row["response"] for row in [*rows[1:], rows[0]]]
    scores = world.score(rows, shifted, ended)
    assert sum(scores["accuracy"]) < 0.2 * len(rows)
    assert set(scores["format"]) == {1.0}


def test_score_says_which_column_is_missing():
    with pytest.raises(DataError, match="'answer'"):
        world.score([{"prompt": "reverse : a b c"}], ["c b a"], [True])
