"""A world of twelve small tasks whose answers can be checked.

A prompt asks for a transformation of a short list, a good response is
`answer : [ X ]` and then stops. The families fall into three groups:

    in_domain    reverse sort first max      demonstrated, and among the PPO prompts
    ood_prompts  copy last min count         no demonstration, but among the PPO prompts
    ood_unseen   upper swap length next_     in neither

In-domain prompts read `reverse : a b c`, all others `what is copy a b c ?`, so that the wording of
the demonstrations does not give the format away elsewhere.

Every prompt belongs to one split for ever, by a hash of its text: `train` (pretraining,
demonstrations, PPO prompts), `validation` (settings are chosen on it), `test` (nothing is).

`demonstrations`, `prompts` and `evaluation` are row sources, named in a recipe like
`python:srppo.miniature.world:prompts`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from srppo.errors import DataError

GROUPS = ("in_domain", "ood_prompts", "ood_unseen")
SPLITS = ("train", "validation", "test")

DEMONSTRATIONS_PER_FAMILY = 110
"""Enough for 200 to train on and 240 to hold out."""
PROMPTS_PER_FAMILY = 250
EVALUATION_PER_FAMILY = 80

LETTERS = "abcdef"
DIGITS = "123456789"


@dataclass(frozen=True)
class Family:
    """One task: what its inputs look like and what the right answer is."""

    name: str
    group: str
    solve: Callable[[list[str]], list[str]]
    symbols: str = LETTERS
    """Inputs are drawn from these with repetition; a symbol given twice is twice as likely."""
    sizes: tuple[int, ...] = (3, 4)
    """Lengths of the input list, equally likely."""

    def draw(self, rng: Random) -> list[str]:
        """A random input."""
        return rng.choices(self.symbols, k=rng.choice(self.sizes))

    def prompt(self, items: Sequence[str]) -> str:
        """The question, as a user would type it."""
        if self.group == "in_domain":
            return f"{self.name} : {' '.join(items)}"
        return f"what is {self.name} {' '.join(items)} ?"


FAMILIES = (
    Family("reverse", "in_domain", lambda items: items[::-1]),
    Family("sort", "in_domain", lambda items: sorted(items)),
    Family("first", "in_domain", lambda items: items[:1]),
    Family("max", "in_domain", lambda items: [max(items)], symbols=DIGITS),
    Family("copy", "ood_prompts", lambda items: items[:]),
    Family("last", "ood_prompts", lambda items: items[-1:]),
    Family("min", "ood_prompts", lambda items: [min(items)], symbols=DIGITS),
    # How often the letter a occurs; it is drawn more often, or most answers would be 0.
    Family("count", "ood_prompts", lambda items: [str(items.count("a"))], symbols="aaaa" + LETTERS),
    Family("upper", "ood_unseen", lambda items: [item.upper() for item in items]),
    # Exchanges the first two.
    Family("swap", "ood_unseen", lambda items: [items[1], items[0], *items[2:]]),
    Family("length", "ood_unseen", lambda items: [str(len(items))], sizes=(3, 4, 5)),
    # The letter after each, a after f.
    Family(
        "next_",
        "ood_unseen",
        lambda items: [LETTERS[(LETTERS.index(item) + 1) % len(LETTERS)] for item in items],
    ),
)


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to: 70% train, 15% validation, 15% test."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 100
    return "train" if bucket < 70 else "validation" if bucket < 85 else "test"


def draw_input(family: Family, split: str, rng: Random) -> list[str]:
    """A random input whose prompt belongs to `split`."""
    while True:
        items = family.draw(rng)
        if split_of(family.prompt(items)) == split:
            return items


def format_answer(answer: str) -> str:
    """The response that the demonstrations teach."""
    return f"answer : [ {answer} ]"


def demonstrations(seed: int, split: str = "train") -> Iterator[dict[str, Any]]:
    """110 demonstrations for each in-domain family: prompt, response, family, group.

    Raises:
        DataError: any split but train.
    """
    _require_split("demonstrations", split, ("train",))
    for row in _rows("demonstrations", seed, split, GROUPS[:1], DEMONSTRATIONS_PER_FAMILY):
        yield {key: row[key] for key in ("prompt", "response", "family", "group")}


def prompts(seed: int, split: str = "train") -> Iterator[dict[str, Any]]:
    """250 prompts for each family of in_domain and ood_prompts: prompt, family, group.

    Raises:
        DataError: any split but train: PPO must not see what is evaluated.
    """
    _require_split("prompts", split, ("train",))
    for row in _rows("prompts", seed, split, GROUPS[:2], PROMPTS_PER_FAMILY):
        yield {key: row[key] for key in ("prompt", "family", "group")}


def evaluation(seed: int, split: str = "validation") -> Iterator[dict[str, Any]]:
    """80 prompts for each of the twelve families: prompt, answer, response, family, group.

    `answer` is X alone, `response` the reference demonstration `answer : [ X ]`.

    Raises:
        DataError: split is neither validation nor test.
    """
    _require_split("evaluation", split, ("validation", "test"))
    yield from _rows("evaluation", seed, split, GROUPS, EVALUATION_PER_FAMILY)


def score(
    rows: Sequence[dict[str, Any]], responses: Sequence[str], ended: Sequence[bool]
) -> dict[str, list[float]]:
    """1 or 0 for each response to a row of `evaluation`.

    Args:
        rows: N rows with an `answer`.
        responses: N decoded responses, without special tokens.
        ended: N flags, True where the model emitted EOS. A response cut off counts as wrong.

    Returns:
        `accuracy`: exactly `answer : [ X ]` with the right X, then EOS.
        `format`: the same with any X that is not empty.

    Raises:
        DataError: a row has no answer.
    """
    if not all("answer" in row for row in rows):
        raise DataError(
            "The miniature's scorer was given a row without the column 'answer', so it cannot tell "
            "right from wrong. Evaluate on python:srppo.miniature.world:evaluation, or choose "
            "another scorer."
        )
    accuracy, formatted = [], []
    for row, response, stopped in zip(rows, responses, ended, strict=True):
        text = response.strip(" ")
        accuracy.append(float(stopped and text == format_answer(row["answer"])))
        formatted.append(float(stopped and _FORMAT.fullmatch(text) is not None))
    return {"accuracy": accuracy, "format": formatted}


_FORMAT = re.compile(r"answer : \[( [^ \[\]\n]+)+ \]")


def _rows(
    source: str, seed: int, split: str, groups: Sequence[str], per_family: int
) -> Iterator[dict[str, Any]]:
    """Distinct prompts with their answers, the families in turn.

    The source's name enters the seed, or the PPO prompts would begin with the demonstrations.
    """
    rng = Random(f"{source} {split} {seed}")
    families = [family for family in FAMILIES if family.group in groups]
    taken: set[str] = set()
    for _ in range(per_family):
        for family in families:
            items = draw_input(family, split, rng)
            while family.prompt(items) in taken:
                items = draw_input(family, split, rng)
            taken.add(family.prompt(items))
            answer = " ".join(family.solve(items))
            yield {
                "prompt": family.prompt(items),
                "answer": answer,
                "response": format_answer(answer),
                "family": family.name,
                "group": family.group,
            }


def _require_split(source: str, split: str, allowed: tuple[str, ...]) -> None:
    if split not in allowed:
        raise DataError(
            f"The miniature's {source} has no split {split!r}: the splits keep training and "
            f"evaluation prompts apart. Use split={' or '.join(allowed)}."
        )
