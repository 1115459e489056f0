from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srppo.data.overlap import SHARED, N, shared

WORDS = ["the", "quick", "fox"]


def text(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


@pytest.mark.parametrize(
    ("one", "others", "expected"),
    [
        (text(*range(20)), [text(*range(20))], True),
        (text(*range(20)).upper(), [text(*range(20))], True),
        (text(*range(20)), [], False),
        (text(*range(20)), [text(*range(7)), text(*range(100, 120))], False),
        (text(*range(20)), [text(*range(14))], True),  # 7 of 13 grams
        (text(*range(20)), [text(*range(13))], False),  # 6 of 13
        (text(*range(20)), [text(*range(11)), text(*range(5, 15))], True),  # 4 + 4, one of both
        (text(*range(20)), ["before " + text(*range(20)) + " behind"], True),
        ("1 + 2", ["1 + 2"], True),
        ("1 + 2", ["1 - 2"], False),
        ("1 + 2", ["what is 1 + 2 ?"], False),  # shorter than a gram: counts whole
        ("", ["a"], False),
        ("Hello, world!", ["hello , world !"], True),
    ],
)
def test_by_hand(one: str, others: list[str], expected: bool):
    assert shared([one], others) == [expected]


def plain(texts: list[str], others: list[str]) -> list[bool]:
    """The same with sets of tuples of words."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        width = min(N, len(words))
        return [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]

    known = {gram for other in others for gram in grams(other)}
    found = [[gram in known for gram in grams(text)] for text in texts]
    return [sum(f) >= SHARED * len(f) for f in found]


TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=24).map(" ".join)


@settings(max_examples=100)
@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5))
def test_equals_a_count_with_sets(texts: list[str], others: list[Any]):
    assert shared(texts, others) == plain(texts, others)
