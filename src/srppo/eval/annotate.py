"""AlpacaEval from responses to figures: pairs are put to a judge, its verdicts kept and scored.

    OUT/judgements.jsonl    who judged and how, then each verdict as it came
    OUT/annotations.json    alpaca-eval's own format, in the order of the benchmark

A pair of equal outputs is a draw and not asked about. Which output is shown first is drawn from
instruction and seed, as alpaca-eval draws it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.data.schemas import Message
from srppo.errors import ConfigError, DataError
from srppo.eval.alpaca import Scored, score_annotations
from srppo.eval.judge import Form, Judge, Verdict
from srppo.eval.ledger import Ledger, write_whole
from srppo.eval.references import (
    References,
    Row,
    load_references,
    place,
    require_alpaca_eval,
    sha256_of,
)
from srppo.progress import Reporter


@dataclass(frozen=True)
class Pair:
    """A question about two outputs."""

    row: Row
    """The annotation to be: instruction, output_1, output_2, ..."""
    switched: bool
    """Whether output_2 is shown first."""

    @property
    def key(self) -> str:
        """Hash of the texts: the same pair has the same verdict."""
        texts = [self.row[k] for k in ("instruction", "output_1", "output_2")]
        return sha256_of(json.dumps(texts))

    @staticmethod
    def of(output: Row, reference: Row, seed: int) -> Pair:
        """The reference's output and the model's. Raises DataError where that is no text."""
        from alpaca_eval.utils import random_seeded_choice

        text = output.get("output", output.get("response"))
        instruction = reference["instruction"]
        if not isinstance(text, str):
            raise DataError(
                f"the response to {instruction[:60]!r} is {text!r:.40}, no text: it cannot be "
                "judged. Put text under `output` or `response`; an empty one is text, too."
            )
        switched = random_seeded_choice(f"is_switched_outputs{instruction}{seed}", [False, True])
        row = {
            "instruction": instruction,
            "output_1": reference["output"],
            "generator_1": reference.get("generator"),
            "output_2": text,
            "generator_2": output.get("generator"),
        }
        return Pair(row, bool(switched))

    def annotated(self, label: str, verdict: Verdict | None) -> Row:
        """The row with its preference; without a verdict, because equal, a draw."""
        preference = verdict.preference if verdict else 1.5
        if preference is not None and self.switched:
            preference = 3 - preference
        return {
            **self.row,
            "annotator": label,
            "preference": preference,
            "raw_completion": verdict and verdict.answer,
        }

    def question(self, form: Form) -> list[Message]:
        """As the judge reads it."""
        first, second = self.row["output_1"], self.row["output_2"]
        if self.switched:
            first, second = second, first
        return form.question(self.row["instruction"], first, second)


@dataclass(frozen=True)
class Judged:
    """Annotations in alpaca-eval's format, and how they came about."""

    annotations: list[Row]
    notes: list[str]
    settings: dict[str, Any]
    """Judge, form, seed: whatever the verdicts depend on."""
    counts: Counter[str]
    """`judged`, `equal`, `resumed`, `failed`; of a server `requests`, answers by status."""


def problems(data_dir: Path | None, offline: bool, judge: Judge | None) -> list[str]:
    """Whatever would keep responses from being judged and scored, each with its cure."""
    found: list[str] = []
    try:
        require_alpaca_eval()
        load_references(data_dir, offline)
    except (ConfigError, DataError) as e:
        found.append(str(e))
    if judge is None:
        found.append(
            "AlpacaEval needs a judge, there is none: responses cannot be compared. Give "
            "--judge-url URL and --judge-model NAME, or --judge DIR for a model in this process."
        )
    elif not found:
        found += judge.problems()
    return found


def score_stored(
    rows: Sequence[Row],
    data_dir: Path | None = None,
    offline: bool = False,
    *,
    judge: Judge | None = None,
    out_dir: Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    resume: bool = False,
    limit: int | None = None,
) -> Scored:
    """Stored annotations (rows with a `preference`), or stored responses put to a judge.

    Raises:
        DataError: responses without a judge; and as `score_annotations` and `score_outputs`.
    """
    if any("preference" in row for row in rows):
        try:
            references = load_references(data_dir, offline).first(limit)
        except DataError as e:  # the win rate needs none
            task, samples = score_annotations(rows, None, data_dir, offline)
            task["notes"].append(str(e))
            return task, samples
        return score_annotations(rows, references, data_dir, offline)
    if judge is None:
        raise DataError(
            "these rows have no `preference`, and there is no judge: responses alone have no win "
            "rate. Give --judge-url and --judge-model, or --judge DIR, or annotations as "
            "alpaca-eval writes them."
        )
    references = load_references(data_dir, offline).first(limit)
    return score_outputs(
        rows, references, judge, out_dir, seed, reporter, resume, data_dir, offline
    )


def score_outputs(
    outputs: Sequence[Row],
    references: References,
    judge: Judge,
    out_dir: Path | None,
    seed: int = 0,
    reporter: Reporter | None = None,
    resume: bool = False,
    data_dir: Path | None = None,
    offline: bool = False,
) -> Scored:
    """Judges responses and scores the verdicts. Raises as the two do."""
    judged = judge_outputs(outputs, references, judge, out_dir, seed, reporter, resume)
    task, samples = score_annotations(judged.annotations, references, data_dir, offline)
    task["notes"] = list(dict.fromkeys([*judged.notes, *task["notes"]]))
    task["settings"] |= judged.settings
    return task, samples


def judge_outputs(
    outputs: Sequence[Row],
    references: References,
    judge: Judge,
    out_dir: Path | None,
    seed: int = 0,
    reporter: Reporter | None = None,
    resume: bool = False,
) -> Judged:
    """Puts each response, beside the reference's, to the judge.

    Args:
        outputs: `instruction` (or `prompt`), `output` (or `response`), `generator`; in any order.
        references: what they are compared with.
        judge: is asked once about each pair.
        out_dir: where verdicts are kept; None: nowhere.
        seed: of the order in which a pair is shown.
        reporter: shows a bar.
        resume: verdicts that `out_dir` has are not asked for again; failed ones are.

    Raises:
        DataError: outputs that are not AlpacaEval's, or no texts.
        JudgeError: the judge cannot be asked; finished verdicts are kept.
        RunDirError: `out_dir` cannot be written, or holds another judge's verdicts.
    """
    require_alpaca_eval()
    reporter = reporter or Reporter(quiet=True)
    placed = place(outputs, references)
    pairs = {i: Pair.of(row, references.outputs[i], seed) for i, row in placed.rows.items()}
    equal = {i for i, p in pairs.items() if p.row["output_1"] == p.row["output_2"]}
    with Ledger.open(out_dir, judge, seed, resume) as ledger:
        form, known = ledger.form, ledger.known
        verdicts = {i: known[p.key] for i, p in pairs.items() if p.key in known}
        counts = Counter(equal=len(equal), resumed=len(verdicts))
        left = [i for i in pairs if i not in equal and i not in verdicts]
        label = judge.label(form)
        with reporter.bar(f"judging, {label}", len(left), "pairs") as advance:

            def note(k: int, verdict: Verdict) -> None:
                verdicts[left[k]] = verdict
                ledger.add(pairs[left[k]].key, verdict)
                advance(1)

            if left:
                counts += judge.ask(form, [pairs[i].question(form) for i in left], note)
    annotations = [p.annotated(label, verdicts.get(i)) for i, p in pairs.items()]
    if out_dir:
        write_whole(out_dir / "annotations.json", json.dumps(annotations, indent=2))
    failed = Counter(v.reason for v in verdicts.values() if v.preference is None)
    counts += Counter(judged=len(pairs) - failed.total(), failed=failed.total())
    counts["asked_again"] = sum(v.asked - 1 for i, v in verdicts.items() if i in set(left))
    reporter.line(_summary(label, counts))
    notes = placed.notes + [
        f"{n} pair(s) without a verdict: {reason}" for reason, n in failed.most_common()
    ]
    return Judged(annotations, notes, ledger.head, counts)


def _summary(label: str, counts: Counter[str]) -> str:
    """What judging took, and what went wrong on the way."""
    statuses = {k: n for k, n in counts.items() if k.isdigit()}
    wrong = {f"status {k}": n for k, n in statuses.items() if k != "200"}
    wrong["no answer"] = counts["requests"] - sum(statuses.values())
    wrong["unreadable, asked again"] = counts["asked_again"]
    parts = [
        f"{counts['judged']} pairs judged by {label}",
        f"{counts['equal']} equal, {counts['resumed']} from before, {counts['failed']} failed",
        f"{counts['requests']} requests",
        *(f"{n} x {what}" for what, n in wrong.items() if n),
    ]
    return "; ".join(parts)
