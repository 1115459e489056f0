"""The scoring server's counters as Prometheus reads them."""

from __future__ import annotations

from collections import Counter

from srppo.serve.batcher import Batcher


def exposition(batcher: Batcher, answers: Counter[int]) -> str:
    """Counters and gauges; https://prometheus.io/docs/instrumenting/exposition_formats."""
    tally = batcher.tally
    single: list[tuple[str, str, str, float]] = [
        ("batches_total", "counter", "Batches scored.", tally.batches),
        ("sequences_total", "counter", "Sequences scored.", tally.sequences),
        ("tokens_total", "counter", "Tokens of prompts and responses scored.", tally.tokens),
        ("scoring_seconds_total", "counter", "Time spent scoring.", tally.seconds),
        ("queue_tokens", "gauge", "Tokens that wait to be scored.", batcher.waiting_tokens),
    ]
    lines = [
        line
        for name, kind, text, value in single
        for line in (
            f"# HELP srppo_{name} {text}",
            f"# TYPE srppo_{name} {kind}",
            f"srppo_{name} {value}",
        )
    ]
    lines += ["# HELP srppo_answers_total Answers by HTTP status."]
    lines += ["# TYPE srppo_answers_total counter"]
    lines += [f'srppo_answers_total{{status="{s}"}} {n}' for s, n in sorted(answers.items())]
    return "\n".join(lines) + "\n"
