"""From measurements to the table: medians over rounds and steps, and ratios of medians."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from case import SIZES

PPO, RLOO = "trl-ppo", "trl-rloo"
"""The peers that speed and memory are compared with."""


@dataclass(frozen=True)
class Row:
    """One engine on one case."""

    engine: str
    cpu_seconds: float
    """Per step, median."""
    fastest: float
    slowest: float
    responses_per_second: float
    """Per CPU second."""
    tokens_per_second: float
    """Response tokens per CPU second."""
    peak_mb: float
    """The largest of all rounds."""
    mean_length: float
    share: float | None = None
    """Operations needed at least, per CPU second, over those of a large float32 product."""
    log_ratio_error: float | None = None
    """Nats per response, the largest of a rollout."""
    phases: dict[str, float] | None = None
    """Share of the step's wall time."""


def summary(lines: list[dict[str, Any]], size: str, ends: str) -> list[Row]:
    """A row per engine, in the order of their first appearance."""
    chosen = [line for line in lines if (line["size"], line["ends"]) == (size, ends)]
    return [
        row([line for line in chosen if line["engine"] == engine], SIZES[size].prompts)
        for engine in dict.fromkeys(line["engine"] for line in chosen)
    ]


def row(lines: list[dict[str, Any]], responses: int) -> Row:
    """All measurements of one engine on one case."""
    seconds = [s for line in lines for s in line["cpu_seconds"]]
    length = sum(line["mean_length"] for line in lines) / len(lines)
    shares = [
        gflop / cpu / line["attainable_gflops"]
        for line in lines
        for gflop, cpu in zip(line.get("gflop_needed", []), line["cpu_seconds"], strict=False)
    ]
    errors = [line["log_ratio_error"]["max"] for line in lines if "log_ratio_error" in line]
    phases: dict[str, float] = {}
    if "phases" in lines[0]:
        sums = {name: sum(sum(x["phases"][name]) for x in lines) for name in lines[0]["phases"]}
        phases = {name: s / sum(sums.values()) for name, s in sums.items()}
    return Row(
        engine=lines[0]["engine"],
        cpu_seconds=median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        responses_per_second=responses / median(seconds),
        tokens_per_second=responses * length / median(seconds),
        peak_mb=max(line["peak_mb"] for line in lines),
        mean_length=length,
        share=median(shares) if shares else None,
        log_ratio_error=max(errors) if errors else None,
        phases=phases or None,
    )


def table(rows: list[Row], size: str, ends: str) -> str:
    """Markdown."""
    by_name = {row.engine: row for row in rows}
    case = SIZES[size]
    lines = [
        "",
        f"### {size}, {'ends at random' if ends == 'early' else 'no early end'}",
        "",
        f"Width {case.width}, {case.layers} layers, vocabulary {case.vocab:,}; {case.prompts} "
        f"prompts of {case.prompt_tokens} tokens, responses of at most {case.response_tokens}.",
        "",
        "| engine | CPU s a step | from-to | responses/s | × TRL PPO | × TRL RLOO "
        "| tokens/s | mean length | peak MB | of TRL PPO's | of attainable | log-ratio error |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        cells = [
            row.engine,
            f"{row.cpu_seconds:.2f}",
            f"{row.fastest:.2f}-{row.slowest:.2f}",
            f"{row.responses_per_second:.2f}",
            times(row, by_name.get(PPO)),
            times(row, by_name.get(RLOO)),
            f"{row.tokens_per_second:.0f}",
            f"{row.mean_length:.1f}",
            f"{row.peak_mb:.0f}",
            f"{row.peak_mb / by_name[PPO].peak_mb:.2f}" if PPO in by_name else "",
            f"{row.share:.0%}" if row.share is not None else "",
            f"{row.log_ratio_error:.0e}" if row.log_ratio_error is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in rows:
        if row.phases:
            parts = ", ".join(f"{name} {share:.0%}" for name, share in row.phases.items())
            lines.append(f"{row.engine}: {parts}")
    return "\n".join(lines)


def times(row: Row, peer: Row | None) -> str:
    """How many times the peer's responses per second."""
    return f"{row.responses_per_second / peer.responses_per_second:.2f}" if peer else ""
