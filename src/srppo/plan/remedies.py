"""What would make a run fit: settings tried in order, each variant's peak computed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from srppo.config import Recipe, parse_recipe

Changes = dict[str, Any]
"""Setting: value, as `ppo.gradient_checkpointing: True`."""
Peak = Callable[[Recipe], float]
"""Bytes."""


@dataclass(frozen=True)
class Remedy:
    """Settings with which a recipe fits, or the nearest there is."""

    changes: Changes
    peak: float
    """Bytes, with them."""
    fits: bool

    @property
    def overrides(self) -> str:
        """As they stand on a command line."""
        return " ".join(_override(key, value) for key, value in self.changes.items())


def alternatives(recipe: Recipe, longest: int, processes: int = 1) -> list[list[Changes]]:
    """What could be changed, what changes the run least first; each mild to strong.

    Memory only: recomputed activations, smaller batches; weights in pieces, where there are
    several processes. Then the number format of the frozen models, and where they wait; sampling
    from pieces. Then what is trained, and last the weights themselves.
    """
    model, sft, ppo = recipe.model, recipe.sft, recipe.ppo
    found: list[list[Changes]] = []
    if not (sft.gradient_checkpointing and ppo.gradient_checkpointing):
        found.append([{"sft.gradient_checkpointing": True, "ppo.gradient_checkpointing": True}])
    smaller: list[Changes] = []
    rows, tokens = min(sft.micro_batch_size, sft.batch_size), ppo.max_tokens_per_batch
    while rows > 1 or tokens > longest:
        rows, tokens = max(1, rows // 2), max(min(tokens, longest), tokens // 2)
        if sft.batch_size % rows == 0:
            smaller.append({"sft.micro_batch_size": rows, "ppo.max_tokens_per_batch": tokens})
    if smaller:
        found.append(smaller)
    can_shard = processes > 1 and not recipe.uses_all_action and not model.quantize
    if can_shard and not model.shard:
        found.append([{"model.shard": True}])
    if model.dtype == "float32":
        found.append([{"model.dtype": "bfloat16"}])
    if not model.offload and not recipe.uses_all_action:  # which cannot be combined
        found.append([{"model.offload": True}])
    if (model.shard or can_shard) and not model.shard_sampling:
        found.append([{"model.shard_sampling": True, "model.shard": True}])
    if not model.lora:
        found.append([{"model.lora": {"rank": 16}}])
    if not model.quantize:
        whole: Changes = {"model.shard": False, "model.shard_sampling": False}  # cannot be cut
        found.append([whole | {"model.quantize": bits} for bits in ("8bit", "4bit")])
    return found


def first_that_fits(
    recipe: Recipe, longest: int, limit: float, peak: Peak, processes: int = 1
) -> Remedy:
    """Adds one alternative after the other, each at its strongest, until the peak is below `limit`;
    then takes back, last added first, whatever turns out not to be needed."""
    chosen: list[tuple[list[Changes], Changes]] = []

    def result() -> Remedy:
        together = {key: value for _, level in chosen for key, value in level.items()}
        changes = {k: v for k, v in together.items() if v != _of(recipe, k)}
        bytes_ = peak(changed(recipe, changes))
        return Remedy(changes, bytes_, bytes_ <= limit)

    for levels in alternatives(recipe, longest, processes):
        chosen.append((levels, levels[-1]))
        if result().fits:
            break
    if not result().fits:
        return result()
    for place in reversed(range(len(chosen))):
        levels, _ = chosen[place]
        for level in ({}, *levels):
            chosen[place] = (levels, level)
            if result().fits:
                break
    return result()


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with these settings."""
    tree = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    return parse_recipe(tree)


def _of(recipe: Recipe, key: str) -> Any:
    """What the recipe has there."""
    return reduce(getattr, key.split("."), recipe)


def _override(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_override(f"{key}.{k}", v) for k, v in value.items())
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
