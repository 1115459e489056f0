"""The pretraining text: questions of the world, answered in many manners, mostly not as wanted.

A document is `<bos> question \\n response <eos>`. The base model so learns the skills of all twelve
families, while the answer format stays rare, above all outside the demonstrated group.
"""

from random import Random

from srppo.miniature.world import FAMILIES, Family, draw_input, format_answer

BOS, EOS, NEWLINE = "<bos>", "<eos>", "\n"

WINDOW = 28
"""Tokens of a document; longer ones are cut. The longest prompt (11) and 16 more fit."""

MANNERS = ("target", "target_ramble", "bare", "bare_ramble", "casual", "explain", "junk", "ask")
_IN_DOMAIN = (0.06, 0.08, 0.24, 0.14, 0.20, 0.12, 0.10, 0.06)
_ELSEWHERE = (0.01, 0.02, 0.24, 0.14, 0.36, 0.12, 0.07, 0.04)
WEIGHTS = {"in_domain": _IN_DOMAIN, "ood_prompts": _ELSEWHERE, "ood_unseen": _ELSEWHERE}
"""How often each manner follows a prompt of each group."""

CORRECT = {
    "target": 0.98,
    "target_ramble": 0.98,
    "bare": 0.95,
    "bare_ramble": 0.95,
    "casual": 0.4,
    "explain": 0.97,
}
"""P(the answer is right) in each manner that answers at all."""

_FILLER = "by the way that was fun and now let us see more of this later ok then"
FILLER = tuple(_FILLER.split())
"""What rambling is made of."""


def document(rng: Random) -> list[str]:
    """A random document of the pretraining text as tokens; prompts are of the train split."""
    family = rng.choice(FAMILIES)
    items = draw_input(family, "train", rng)
    manner = rng.choices(MANNERS, WEIGHTS[family.group])[0]
    answer = _answer(family, items, CORRECT.get(manner, 1.0), rng)
    response = _respond(manner, items, answer, rng)
    return [BOS, *family.prompt(items).split(), NEWLINE, *response, EOS][:WINDOW]


def _answer(family: Family, items: list[str], p_correct: float, rng: Random) -> str:
    """The right answer, or one that is right for another input."""
    right = " ".join(family.solve(items))
    if rng.random() < p_correct:
        return right
    while True:
        wrong = " ".join(family.solve(family.draw(rng)))
        if wrong != right:
            return wrong


def _respond(manner: str, items: list[str], answer: str, rng: Random) -> list[str]:
    match manner:
        case "target":
            return format_answer(answer).split()
        case "target_ramble":
            return [*format_answer(answer).split(), *_ramble(rng)]
        case "bare":
            return answer.split()
        case "bare_ramble":
            return [*answer.split(), *_ramble(rng)]
        case "casual":
            return f"um i think maybe {answer} ?".split()
        case "explain":
            text = f"well , we take {' '.join(items)} so it is {answer} ."
            return [*text.split(), *_ramble(rng)]
        case "junk":
            return rng.choices([*FILLER, *items], k=rng.randint(2, 6))
        case "ask":
            family = rng.choice(FAMILIES)
            return [*family.prompt(draw_input(family, "train", rng)).split(), NEWLINE]
    raise AssertionError(manner)


def _ramble(rng: Random) -> list[str]:
    return rng.choices(FILLER, k=rng.randint(2, 5))
