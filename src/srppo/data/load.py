"""All that a run reads before it trains: demonstrations, prompts, evaluation rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.config import Recipe
from srppo.data.chat import Example
from srppo.data.demonstrations import load_demonstrations
from srppo.data.prompts import Prompt, load_prompts
from srppo.errors import DataError


@dataclass(frozen=True)
class Data:
    """Everything that is read before training."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    curve_prompts: list[Prompt]
    reports: dict[str, Any] = field(default_factory=dict)


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Demonstrations, prompts and evaluation rows, with the counts of what was dropped."""
    settings, seed = recipe.data, recipe.seed
    reports: dict[str, Any] = {}
    train: list[Example] = []
    held_out: list[Example] = []
    if settings.demonstrations:
        limit = settings.demonstrations_limit
        examples, report = load_demonstrations(
            settings.demonstrations,
            tokenizer,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_response_tokens=settings.max_response_tokens,
            limit=limit and limit + settings.held_out,
            seed=seed,
            split=settings.split,
        )
        n = len(examples)
        kept_out = min(settings.held_out, max(n - (limit or n), n // 10))
        train = examples[: n - kept_out][:limit]
        trained = {tuple(e.prompt_ids) for e in train}
        # One prompt can have several demonstrations; those of a trained prompt are not held out.
        held_out = [e for e in examples[n - kept_out :] if tuple(e.prompt_ids) not in trained]
        reports["demonstrations"] = report.to_json()
    if settings.prompts:
        prompts, report = load_prompts(
            settings.prompts,
            tokenizer,
            max_prompt_tokens=settings.max_prompt_tokens,
            limit=settings.prompts_limit,
            seed=seed,
            split=settings.split,
            skip=settings.prompts_skip,
        )
        reports["prompts"] = report.to_json()
    else:
        prompts = _prompts_of(train, tokenizer)[settings.prompts_skip :][: settings.prompts_limit]
    if not prompts:
        raise DataError(
            f"data.prompts_skip={settings.prompts_skip} leaves none of the {len(train)} prompts of "
            "the demonstrations for stage 2. Set it to 0, or set data.prompts."
        )
    eval_prompts = _prompts_of(held_out, tokenizer)
    curve_prompts = eval_prompts[: recipe.eval.every_limit]
    if recipe.eval.prompts:
        splits = {"eval": (recipe.eval.split, recipe.eval.limit)}
        if recipe.eval.every:
            splits["curve"] = (recipe.eval.every_split, recipe.eval.every_limit)
        loaded = {}
        for role, (split, limit) in splits.items():
            loaded[role], report = load_prompts(
                recipe.eval.prompts,
                tokenizer,
                max_prompt_tokens=settings.max_prompt_tokens,
                limit=limit,
                seed=0,  # the same rows whatever the run's seed
                split=split,
            )
            reports[role] = report.to_json()
        eval_prompts, curve_prompts = loaded["eval"], loaded.get("curve", [])
    else:
        eval_prompts = eval_prompts[: recipe.eval.limit]
    seen = {tuple(e.prompt_ids) for e in train}
    evaluated = {tuple(p.ids) for p in eval_prompts}
    reports["overlap"] = {
        "exact": sum(tuple(p.ids) in seen for p in prompts),
        "evaluated": sum(tuple(p.ids) in evaluated for p in prompts),
        "of": len(prompts),
    }
    return Data(train, held_out, prompts, eval_prompts, curve_prompts, reports)


def fingerprint(data: Data) -> str:
    """sha256 of all token ids that a run trains on or holds out."""
    ids = [
        [(e.prompt_ids, e.response_ids) for e in (*data.train, *data.held_out)],
        [p.ids for p in data.prompts],
    ]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _prompts_of(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    return [Prompt(e.prompt_ids, tokenizer.decode(e.prompt_ids), e.meta) for e in examples]
