"""Sampled responses, each token with the log-ratio that it was paid."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from srppo.report.numbers import fixed, plain
from srppo.report.read import Json, mapping, number, sequence

MOST_SAMPLES = 24
LEVELS = 6
"""Shades on each side of zero."""
MODELS = ("base", "sft", "policy")

_SPECIAL = re.compile(
    r"<\|([^<>|]{1,40})\|>|<(/?s|[beu]os|pad|unk|sep|cls|mask|start_of_turn|end_of_turn)>"
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One sampled token: what is shown, its shade (p1..p6, n1..n6 or empty) and its log-ratio."""

    text: str
    shade: str
    log_ratio: str


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response of one model."""

    model: str
    colour: str
    """CSS variable; never built from the file's text."""
    tokens: list[Token]
    facts: list[tuple[str, str]]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples shown, out of `total`."""

    scale: str
    """Nats at which the strongest shade is reached."""
    rows: list[tuple[str, str, list[Response]]]
    """(group, prompt, responses)."""
    total: int


def view(lines: Sequence[Json]) -> Samples | None:
    """samples.jsonl made ready for the page; None if there are none."""
    if not lines:
        return None
    shown = lines[:MOST_SAMPLES]
    limit = _limit(shown)
    rows = []
    for line in shown:
        responses = mapping(line, "responses")
        order = [m for m in MODELS if m in responses] + [m for m in responses if m not in MODELS]
        rows.append(
            (
                str(line.get("group") or ""),
                visible(str(line.get("prompt", ""))),
                [_response(model, mapping(responses, model), limit) for model in order],
            )
        )
    return Samples(scale=plain(limit, 2), rows=rows, total=len(lines))


def visible(text: str) -> str:
    """Token text that can be seen: ⟨eos⟩ for special tokens, ↵ before a line break, \\x00 for
    control characters, ∅ for no text at all. Spaces stay spaces.

    Not ␤ and its kind: common systems have no font with them and show an empty box.
    """
    special = _SPECIAL.fullmatch(text)
    if special:
        return f"⟨{special[1] or special[2]}⟩"
    return "".join(map(_picture, text)) or "∅"


def _picture(character: str) -> str:
    if character == "\n":
        return "↵\n"
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x20 or 0x7F <= code < 0xA0 else character


def _limit(lines: Sequence[Json]) -> float:
    """Where the colour scale ends: the 98 % quantile of |log-ratio|, up to the next half nat."""
    sizes = sorted(
        abs(ratio)
        for line in lines
        for response in mapping(line, "responses").values()
        for token in sequence(response, "tokens")
        if (ratio := _ratio(token)) is not None
    )
    quantile = sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0
    return max(0.5, math.ceil(2 * quantile) / 2)


def _response(model: str, response: Json, limit: float) -> Response:
    facts = [("reward", f"{fixed(number(response.get('reward')), 2, sign=True)} nats")]
    facts += [
        (name.replace("_", " "), plain(number(value)))
        for name, value in mapping(response, "scores").items()
    ]
    tokens = sequence(response, "tokens")
    facts.append(("length", f"{len(tokens)} tokens"))
    return Response(
        model=model,
        colour=f"--s-{model}" if model in MODELS else "--muted",
        tokens=[_token(token, limit) for token in tokens],
        facts=facts,
        truncated=response.get("truncated") is True,
    )


def _token(token: object, limit: float) -> Token:
    text = token.get("text", "") if isinstance(token, dict) else ""
    ratio = _ratio(token)
    level = 0 if ratio is None else min(LEVELS, round(LEVELS * abs(ratio) / limit))
    sign = "p" if ratio is not None and ratio > 0 else "n"
    return Token(
        text=visible(str(text)),
        shade=f"{sign}{level}" if level else "",
        log_ratio=fixed(ratio, 2, sign=True),
    )


def _ratio(token: object) -> float | None:
    return number(token.get("log_ratio")) if isinstance(token, dict) else None
