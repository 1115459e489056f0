"""Every model at every temperature: what results.json and samples.jsonl hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from srppo.config_eval import EvalConfig
from srppo.data.chat import Example
from srppo.eval.evaluate import Evaluator, Row, held_out_nll
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler


def evaluate_models(
    names: list[str],
    sampler_of: Callable[[str], HFSampler],
    evaluator: Evaluator,
    held_out: list[Example],
    settings: EvalConfig,
    reporter: Reporter,
) -> tuple[dict[str, Any], list[Row]]:
    """Results, JSON-ready, and the responses to show side by side.

    Args:
        sampler_of: loads the model of that name; each is asked for once.
        held_out: demonstrations whose NLL is measured; none, no NLL.
    """
    draws = [1 if t == 0 else settings.samples_per_prompt for t in settings.temperatures]
    total = len(names) * len(evaluator.prompts) * sum(draws)
    rows: list[Row] = []
    nll: dict[str, float] = {}
    budget = evaluator.max_tokens_per_batch
    shown: dict[str, HFSampler] = {}
    with reporter.bar("evaluation", total, "responses") as advance:
        for name in names:
            sampler = sampler_of(name)
            for temperature in settings.temperatures:
                measured = evaluator.measure(
                    sampler, temperature, settings.samples_per_prompt, advance
                )
                decoding = f"T={temperature:g}" if temperature else "greedy"
                rows += [{"model": name, "decoding": decoding, **row} for row in measured]
            if held_out and len(sampler.models) == 1:
                nll[name] = held_out_nll(sampler.models[0], held_out, budget)
            if name in ("base", "sft", "policy"):
                shown[name] = sampler
    scores = list(rows[0]["scores"])
    results = {
        "groups": evaluator.groups,
        "primary": scores[0] if scores else None,
        "held_out_nll": nll or None,
        "rows": rows,
    }
    return results, evaluator.side_by_side(shown, settings.side_by_side)
