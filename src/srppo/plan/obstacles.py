"""What a run would end with before its first step, told without it."""

from __future__ import annotations

import math
from pathlib import Path

from srppo.config import Recipe
from srppo.errors import SrppoError
from srppo.eval.evaluate import load_scorer
from srppo.eval.in_run import check_benchmarks
from srppo.models.load import require_quantizer, resolve
from srppo.models.precision import check_compute
from srppo.models.start import start_tokenizer
from srppo.plan.architecture import Architecture
from srppo.plan.exchange import Group
from srppo.train.checkpoint import RunDir


def obstacles(recipe: Recipe, sizes: Architecture | None, group: Group, here: bool) -> list[str]:
    """Each with its cure. What a run checks first is checked in the same way; models that are not
    on this machine are taken to be what their names say.

    Args:
        here: the run is to be on this machine, so that what is installed and lies on it counts.
    """
    found = [*_too_long(recipe, sizes), *_indivisible(recipe, group)]
    checks = [_check_models, _check_scorer]
    if here:
        checks += [_check_quantizer, check_compute, _check_benchmarks, RunDir.check]
    for check in checks:
        try:
            check(recipe)
        except SrppoError as e:
            found.append(str(e))
    return [f"It would not start: {reason}" for reason in found]


def _too_long(recipe: Recipe, sizes: Architecture | None) -> list[str]:
    longest = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    positions = sizes.positions if sizes else None
    if not positions or longest <= positions:
        return []
    return [
        f"data.max_prompt_tokens + data.max_response_tokens = {longest}, and the model has "
        f"{positions} positions. Try {positions // 2} for each."
    ]


def _indivisible(recipe: Recipe, group: Group) -> list[str]:
    batch = recipe.sft.batch_size
    if not batch % group.size or recipe.model.sft:
        return []
    return [
        f"sft.batch_size={batch} cannot be divided among {group.size} processes. Try "
        f"sft.batch_size={group.size * math.ceil(batch / group.size)}."
    ]


def _check_quantizer(recipe: Recipe) -> None:
    if recipe.model.quantize:
        require_quantizer(recipe.model.quantize)


def _check_models(recipe: Recipe) -> None:
    whole = [_is_whole(name) for name in (recipe.model.base, recipe.model.sft) if name]
    if all(whole):
        start_tokenizer(recipe.model)


def _is_whole(name: str) -> bool:
    """Whether a model lies in a directory of this machine with its weights: to plan, a
    configuration is enough. Raises ModelError if it is none."""
    return any(Path(resolve(name)).glob("*.safetensors"))


def _check_scorer(recipe: Recipe) -> None:
    if recipe.eval.scorer:
        load_scorer(recipe.eval.scorer)


def _check_benchmarks(recipe: Recipe) -> None:
    if recipe.eval.benchmarks.tasks:
        check_benchmarks(recipe, with_base=_is_whole(recipe.model.base))
