"""The plan in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

from srppo.config import Recipe
from srppo.plan.architecture import Architecture, Blueprint
from srppo.plan.device import find_device
from srppo.plan.exchange import Group
from srppo.plan.known import Device
from srppo.plan.memory import FLOAT, Phase, phases
from srppo.plan.obstacles import obstacles
from srppo.plan.remedies import first_that_fits
from srppo.plan.work import SHARE, Clock, Hours, Work, work

RESERVE = 0.05
"""Of a device's memory, left for the process, CUDA's context and what fragments."""


def show_plan(
    recipe: Recipe,
    console: Console,
    gpu: str | None,
    memory: str | None,
    group: Group | None = None,
) -> bool:
    """Print what the recipe's run would do and need; whether it would start, whatever its memory.
    Nothing is trained or written, and nothing downloaded but questions of the recipe's benchmarks.

    Args:
        gpu: a name in `known.GPUS`; None: the recipe's device on this machine.
        memory: of the device, as `80GB`; None: what it has.
        group: several processes; None: one.

    Raises:
        SrppoError: a recipe, model or data that is here and cannot be used.
    """
    group = group or Group()
    device = find_device(recipe, gpu, memory, group.nproc)
    amount = work(recipe)
    blueprint = Blueprint.find(recipe.model.base)
    sizes = blueprint.sizes(recipe.model) if blueprint else None
    found = obstacles(recipe, sizes, group, here=gpu is None)
    console.print(f"{recipe.name}, not run: this is what it would do.", style="bold")
    for obstacle in found:
        console.print(obstacle)
    if blueprint is None or sizes is None:
        console.print(_unknown_model(recipe.model.base))
        console.print(_stages(recipe, amount, None))
    else:
        console.print(_describe(recipe, blueprint, sizes, group))
        clock = Clock(recipe, sizes, amount, device, group)
        console.print(_stages(recipe, amount, clock))
        console.print(_rates(device))
        if group.size > 1:
            console.print(_together(recipe, amount, clock))
    console.print(f"Data: {amount.origin}.")
    if recipe.rollout.engine != "transformers":
        console.print(
            f"Rollouts: by rollout.engine={recipe.rollout.engine}, whose time and memory are not "
            "known here; the table has what transformers would take."
        )
    if blueprint is not None:
        console.print()
        _memory(recipe, blueprint, amount, device, group.size, console)
    for obstacle in found:
        console.print(obstacle, style="bold")
    return not found


def _unknown_model(name: str) -> str:
    return (
        f"{name} is not on this machine and not among the models that srppo knows, so its memory "
        f"and hours cannot be told. Run: hf download {name} config.json"
    )


def _describe(recipe: Recipe, blueprint: Blueprint, sizes: Architecture, group: Group) -> str:
    model = recipe.model
    trained = f"adapters of {_short(sizes.trained)}" if model.lora else "all of them"
    lines = [
        f"{model.base}: {_short(sizes.weights)} weights by {blueprint.origin}; trained: "
        f"{trained}, in float32; frozen models in {model.quantize or model.dtype}."
    ]
    if group.size > 1:
        how = "each with a share of every layer" if model.shard else "each with whole models"
        lines.append(f"{group}, {how}.")
    return "\n".join(lines)


def _stages(recipe: Recipe, amount: Work, clock: Clock | None) -> Table:
    """Steps, rows, tokens and time of each part."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    shown = ["rollout", "scoring", "training"]
    shown += ["exchange"] * (clock is not None and clock.group.size > 1)
    for name in ("steps", "rows", "tokens", "time", *shown):
        table.add_column(name, justify="right")
    each = amount.prompt_tokens + amount.response_tokens
    total: list[Hours | None] = []

    def add(name: str, steps: int | None, rows: int | None, hours: Hours | None) -> None:
        total.append(hours)
        parts = [getattr(hours, key) for key in ("total", *shown)] if hours else []
        table.add_row(
            name,
            "" if name.startswith("evaluation") else _count(steps),
            _count(rows),
            _short(None if rows is None else rows * each),
            *(_time(part) for part in parts or (None,) * (1 + len(shown))),
        )

    parts = [("stage 1", "stage 2", recipe)] + [
        (name, name, recipe.with_control(control))
        for name, control in recipe.controls.items()
        if control.is_trained
    ]
    for first, second, variant in parts:
        control = recipe.controls.get(first)
        if (control.sft is not None) if control else not recipe.model.sft:
            steps, n = amount.sft_steps(variant.sft), amount.demonstrations
            rows = None if n is None else n * variant.sft.epochs
            add(first, steps, rows, clock.sft(variant.sft) if clock else None)
        if control and control.pairs:
            steps, n = amount.pair_steps(control.pairs), amount.demonstrations
            rows = None if n is None else 2 * n * control.pairs.epochs * control.pairs.rounds
            add(first, steps, rows, clock.pairs(control.pairs) if clock else None)
        if control is None or control.ppo is not None:
            steps = amount.ppo_steps(variant.ppo)
            rows = None if steps is None else steps * variant.ppo.rollouts_per_step
            add(second, steps, rows, clock.ppo(variant.ppo) if clock else None)
    models = 3 + len(recipe.controls)
    temperatures = recipe.eval.temperatures
    draws = sum(1 if t == 0 else recipe.eval.samples_per_prompt for t in temperatures)
    rows = None if amount.evaluated is None else models * draws * amount.evaluated
    hours = clock.evaluation(models) if clock else None
    add(f"evaluation of {models} models", None, rows, hours)
    known = [hours.total for hours in total if hours]
    if clock and len(known) == len(total):
        table.add_section()
        table.add_row("together", "", "", "", _time(sum(known)), style="bold")
    return table


def _rates(device: Device) -> str:
    how = "measured" if device.measured else "by its data sheet"
    return (
        f"Time on {device.name}: {SHARE:.0%} of its products' rate assumed, which {how} is "
        f"{_short(device.float32)} operations/s in float32 and {_short(device.bfloat16)} in "
        "bfloat16; models below 10 M weights reach half of that. Sampling reads all weights for "
        "each token, and a batch lasts as long as data.max_response_tokens. Loading, audit and "
        "evaluation during training are left out."
    )


def _together(recipe: Recipe, amount: Work, clock: Clock) -> str:
    """A step of stage 2, of all processes."""
    config, group = recipe.ppo, clock.group
    step = clock.ppo(config, steps=1)
    assert step  # for the number of steps is given
    rate = config.rollouts_per_step * amount.response_tokens / (3600 * step.total)
    return (
        f"A step of stage 2, estimated: {_time(step.total)}, {_short(rate)} response tokens/s of "
        f"all {group.size} together, {_short(rate / group.size)} of each. In it each sends "
        f"{_short(clock.sent(config))} bytes and receives as many, at "
        f"{_short(group.bandwidth(clock.device))} bytes/s: {_time(step.exchange)}, as if nothing "
        "of it happened during the work."
    )


def _memory(
    recipe: Recipe,
    blueprint: Blueprint,
    amount: Work,
    device: Device,
    processes: int,
    console: Console,
) -> None:
    """The table, and what to change where it does not fit."""
    limit = device.memory * (1 - RESERVE)

    def plan(variant: Recipe) -> list[Phase]:
        return phases(variant, blueprint, amount.longest, device.gpu, processes)

    def peak(variant: Recipe) -> float:
        return max(phase.total for phase in plan(variant))

    found = plan(recipe)
    names = [f.name for f in fields(Phase) if f.name != "name"]
    names = [name for name in names if any(getattr(phase, name) for phase in found)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    unit, name = (1e9, "GB") if max(phase.total for phase in found) >= 2e9 else (1e6, "MB")
    table.add_column(name, no_wrap=True)
    for name in (*names, "total", f"of {device.memory / unit:,.0f}"):
        table.add_column(name, justify="right")
    for phase in found:
        sizes = [f"{getattr(phase, name) / unit:.1f}" for name in names]
        fits = phase.total <= limit
        table.add_row(
            phase.name,
            *("" if size == "0.0" else size for size in sizes),
            f"{phase.total / unit:.1f}",
            "fits" if fits else "does not fit",
            style=None if fits else "bold",
        )
    console.print(table)
    most = max(found, key=lambda phase: phase.total)
    if most.total <= limit:
        console.print(f"It fits: {_of(most.total, device)}, {RESERVE:.0%} of it kept free.")
        return
    part = max(names, key=lambda name: float(getattr(most, name)))
    console.print(
        f"It does not fit: {most.name} needs {_of(most.total, device)}, {RESERVE:.0%} of "
        f"it kept free. Its largest part is {part}: {getattr(most, part) / 1e9:.1f} GB."
    )
    longest = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    _say_remedy(recipe, blueprint.sizes(recipe.model), longest, device, processes, console, peak)


def _say_remedy(
    recipe: Recipe,
    sizes: Architecture,
    longest: int,
    device: Device,
    processes: int,
    console: Console,
    peak: Callable[[Recipe], float],
) -> None:
    """The first settings with which it fits, and why the whole model does not, if so."""
    limit = device.memory * (1 - RESERVE)
    remedy = first_that_fits(recipe, longest, limit, peak, processes)
    whole = 4 * FLOAT * sizes.weights
    cut = processes if recipe.model.shard else 1
    if not recipe.model.lora and whole / cut > limit:
        console.print(
            f"With all weights trained it cannot: weights, gradients and AdamW's averages alone "
            f"are {whole / 1e9:.1f} GB. That takes at least {math.ceil(whole / limit)} of these "
            "devices: --nproc, --nodes and model.shard=true."
        )
    if not remedy.fits:
        console.print(
            f"Nothing that srppo can change makes it fit: with {remedy.overrides} it still needs "
            f"{remedy.peak / 1e9:.1f} GB. Take a larger device, or a smaller model."
        )
        return
    console.print(f"What fits, {_of(remedy.peak, device)}: {remedy.overrides}")
    if "model.lora" in remedy.changes:
        console.print("Adapters usually want learning rates ten times as high or more.")


def _of(size: float, device: Device) -> str:
    return f"{size / 1e9:.1f} of {device.memory / 1e9:.1f} GB"


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _time(hours: float | None) -> str:
    """Two figures in the unit that suits."""
    if hours is None:
        return "?"
    if hours == 0:
        return ""
    for size, name in ((1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:,.{0 if hours >= 10 * size else 1}f} {name}"
    return f"{hours * 3600:.2g} s"


def _short(number: float | None) -> str:
    """1.2 M."""
    if number is None:
        return "?"
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"
