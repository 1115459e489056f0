"""All that a run reads before it trains: demonstrations, prompts, evaluation rows."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.config import Recipe
from srppo.config_data import SourceConfig
from srppo.data.chat import Example
from srppo.data.demonstrations import Report, load_demonstrations
from srppo.data.mixture import Source
from srppo.data.overlap import shared
from srppo.data.prompts import Prompt, load_prompts
from srppo.data.sources import open_source
from srppo.data.store import Picked


@dataclass(frozen=True)
class Data:
    """Everything that is read before training."""

    train: Sequence[Example]
    """Lies on disk; the turns of a conversation stand together."""
    held_out: list[Example]
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    curve_prompts: list[Prompt]
    none_held_out: str = ""
    """Why there are no demonstrations held out; empty where there are."""
    reports: dict[str, Any] = field(default_factory=dict)


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Demonstrations, prompts and evaluation rows, with the counts of what was dropped.

    Raises:
        DataError: a source cannot be read, or nothing of it can be used.
    """
    settings = recipe.data
    reports: dict[str, Any] = {}
    train: Sequence[Example] = []
    held_out: list[Example] = []
    none_held_out = "there are no demonstrations"
    asked: Source | None = None
    skip = 0
    if settings.demonstrations:
        source = _open(recipe, settings.demonstrations)
        train, held_out, none_held_out, report = _demonstrations(recipe, tokenizer, source)
        reports["demonstrations"] = report.to_json()
        if settings.overlap == "disjoint":
            asked, skip = source, report.looked_at
    if settings.prompts:
        asked = _open(recipe, settings.prompts)
    if asked:
        prompts, found = load_prompts(
            asked,
            tokenizer,
            max_prompt_tokens=settings.max_prompt_tokens,
            limit=settings.prompts_limit,
            seed=recipe.seed,
            skip=skip,
        )
        reports["prompts"] = found.to_json()
    else:
        prompts = _prompts_of(train, tokenizer, settings.prompts_limit)
    eval_prompts = _prompts_of(held_out, tokenizer)
    curve_prompts = eval_prompts[: recipe.eval.every_limit]
    if recipe.eval.prompts:
        eval_prompts, curve_prompts = _evaluation(recipe, tokenizer, reports)
    else:
        eval_prompts = eval_prompts[: recipe.eval.limit]
    reports["overlap"] = {"setting": settings.stage_2_prompts} | _overlap(
        train, prompts, eval_prompts
    )
    return Data(train, held_out, prompts, eval_prompts, curve_prompts, none_held_out, reports)


def fingerprint(data: Data) -> str:
    """sha256 of all token ids that a run trains on or holds out."""
    digest = hashlib.sha256()
    for examples in (data.train, data.held_out):
        for e in examples:
            digest.update(json.dumps([e.prompt_ids, e.response_ids]).encode())
        digest.update(b"|")
    for prompt in data.prompts:
        digest.update(json.dumps(prompt.ids).encode())
    return digest.hexdigest()


def _open(recipe: Recipe, sources: list[SourceConfig]) -> Source:
    data = recipe.data
    return open_source(sources, seed=recipe.seed, split=data.split, columns=data.columns)


def _demonstrations(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source
) -> tuple[Sequence[Example], list[Example], str, Report]:
    """What is trained on, what is held out, by whole conversations, and why that is nothing."""
    settings = recipe.data
    limit = settings.demonstrations_limit
    examples, report = load_demonstrations(
        source,
        tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        limit=limit and limit + settings.held_out,
        seed=recipe.seed,
        turns=settings.assistant_turns,
    )
    n = report.used
    kept_out = min(settings.held_out, max(n - (limit or n), n // 10))
    bounds, begins = [0], []
    for i, example in enumerate(examples):
        if bounds[-1] == i:
            begins.append(_key(example.prompt_ids))
        if example.final:
            bounds.append(i + 1)
    held = _last_alike(begins, kept_out)
    trained = [c for c in range(n) if c not in held][:limit]
    turns = array("Q", (i for c in trained for i in range(bounds[c], bounds[c + 1])))
    train, held_out = Picked(examples, turns), [examples[bounds[c + 1] - 1] for c in sorted(held)]
    return train, held_out, "" if held_out else _why_none(settings.held_out, kept_out), report


def _last_alike(begins: list[bytes], most: int) -> set[int]:
    """The last conversations, `most` at best: those that begin with the same prompt stay together,
    so that no prompt that is held out is trained on."""
    alike = defaultdict(list)
    for conversation, prompt in enumerate(begins):
        alike[prompt].append(conversation)
    held: set[int] = set()
    for prompt in reversed(begins):
        if len(held) + len(alike[prompt]) <= most:
            held.update(alike[prompt])
    return held


def _why_none(asked: int, possible: int) -> str:
    said = "none of the demonstrations are held out: "
    if not asked:
        return f"{said}data.held_out is 0. Set data.held_out=200 or more for it to mean something"
    if not possible:
        return (
            f"{said}where all others are trained on, a tenth is at most, and there are fewer than "
            "ten. Give more, or set data.demonstrations_limit to less than all"
        )
    return (
        f"{said}a prompt is held out with all of its "
        f"demonstrations, and each prompt here has more than the {possible} that may be. Give "
        "demonstrations of more prompts, or set data.held_out and data.demonstrations_limit so "
        "that more are left"
    )


def _evaluation(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reports: dict[str, Any]
) -> tuple[list[Prompt], list[Prompt]]:
    """Rows of `eval.prompts` to measure after training, and during it."""
    assert recipe.eval.prompts
    given = SourceConfig(source=recipe.eval.prompts, columns=recipe.eval.columns)
    splits = {"eval": (recipe.eval.split, recipe.eval.limit)}
    if recipe.eval.every:
        splits["curve"] = (recipe.eval.every_split, recipe.eval.every_limit)
    loaded = {}
    for role, (split, limit) in splits.items():
        loaded[role], report = load_prompts(
            open_source([given], seed=0, split=split, columns=recipe.data.columns),
            tokenizer,
            max_prompt_tokens=recipe.data.max_prompt_tokens,
            limit=limit,
            seed=0,  # the same rows whatever the run's seed
        )
        reports[role] = report.to_json()
    return loaded["eval"], loaded.get("curve", [])


def _overlap(
    train: Sequence[Example],
    prompts: list[Prompt],
    eval_prompts: list[Prompt],
) -> dict[str, Any]:
    """How many prompts of stage 2, and of the evaluation, were seen before, and where."""
    demonstrated = {_key(e.prompt_ids) for e in train}
    prompted = {_key(p.ids) for p in prompts}
    evaluated = {_key(p.ids) for p in eval_prompts}
    asked, measured = [p.user for p in prompts], [p.user for p in eval_prompts]
    return {
        "of": len(prompts),
        "exact": sum(_key(p.ids) in demonstrated for p in prompts),
        "ngram": sum(shared(asked, (e.user for e in train))),
        "evaluated": sum(_key(p.ids) in evaluated for p in prompts),
        "contamination": {
            "of": len(eval_prompts),
            "demonstrations": {
                "exact": sum(_key(p.ids) in demonstrated for p in eval_prompts),
                "ngram": sum(shared(measured, (e.user for e in train))),
            },
            "prompts": {
                "exact": sum(_key(p.ids) in prompted for p in eval_prompts),
                "ngram": sum(shared(measured, asked)),
            },
        },
    }


def _key(ids: list[int]) -> bytes:
    """A hash of token ids: many prompts in little memory."""
    return hashlib.blake2b(array("I", ids).tobytes(), digest_size=16).digest()


def _prompts_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """The prompts of `limit` conversations: those of their last turns."""
    final = islice((e for e in examples if e.final), limit)
    return [Prompt(e.prompt_ids, tokenizer.decode(e.prompt_ids), e.meta, e.user) for e in final]
