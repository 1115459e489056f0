"""The benchmarks: where their questions are and which scores they give.

| task | questions | shots | decided by | headline |
|---|---|---|---|---|
| ifeval | 541 | 0 | programs that check each instruction | all instructions of a prompt |
| gsm8k | 1319 | 5 | the last number of the response | the same |
| gpqa | 448 (main) | 0 | the likeliest of "(A)" to "(D)" | the same |
| alpaca_eval | 805 | 0 | a judge (`srppo.eval.alpaca`) | length-controlled win rate |

GPQA by likelihood (lm-eval's gpqa_main_zeroshot) and not by generated answers: base models can be
compared with it, no answer is lost to its format, and chance is exactly 25%.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srppo.data.files import READERS
from srppo.data.sources import open_source
from srppo.errors import DataError

Row = dict[str, Any]

LETTERS = "ABCD"
SHOTS = 5
"""Examples in a prompt, of the tasks that have any."""


@dataclass(frozen=True)
class Metric:
    """One of our scores as lm-eval has it."""

    lm_eval: str
    """Its name there, and that of the filter that the response passes first."""
    filter: str = "none"
    kind: Literal["proportion", "clustered"] = "proportion"


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval."""

    name: str
    task: str
    """lm-eval's name of it, and the folder of its files there."""
    folder: str
    hub: str
    """owner/name:config."""
    split: str
    columns: tuple[str, ...]
    files: tuple[str, ...]
    """Where a data directory may have the questions: the first pattern that matches."""
    metrics: dict[str, Metric]
    """The headline first."""
    shots_files: tuple[str, ...] = ()
    """The same for the examples in the prompt, split `train` on the hub; none: no examples."""
    floor: float | None = None
    """What guessing gives."""
    by_likelihood: bool = False
    """Decided by the likeliest of four letters, not by a response."""
    secret: bool = False
    """Its authors ask that questions never appear in plain text."""

    @property
    def headline(self) -> str:
        """The metric to look at."""
        return next(iter(self.metrics))


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark(
            "ifeval",
            task="ifeval",
            folder="ifeval",
            hub="google/IFEval",
            split="train",
            columns=("key", "prompt", "instruction_id_list", "kwargs"),
            files=("ifeval/input_data.jsonl", "ifeval/*.jsonl", "ifeval.*"),
            metrics={
                "prompt_strict": Metric("prompt_level_strict_acc"),
                "prompt_loose": Metric("prompt_level_loose_acc"),
                "inst_strict": Metric("inst_level_strict_acc", kind="clustered"),
                "inst_loose": Metric("inst_level_loose_acc", kind="clustered"),
            },
        ),
        Benchmark(
            "gsm8k",
            task="gsm8k",
            folder="gsm8k",
            hub="openai/gsm8k:main",
            split="test",
            columns=("question", "answer"),
            files=("gsm8k/test.*", "gsm8k_test.*", "gsm8k.*"),
            shots_files=("gsm8k/train.*", "gsm8k_train.*"),
            metrics={
                "flexible": Metric("exact_match", "flexible-extract"),
                "strict": Metric("exact_match", "strict-match"),
            },
        ),
        Benchmark(
            "gpqa",
            task="gpqa_main_zeroshot",
            folder="gpqa/zeroshot",
            hub="Idavidrein/gpqa:gpqa_main",
            split="train",
            columns=("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))),
            files=("gpqa/gpqa_main.*", "gpqa/*.jsonl", "gpqa/*.csv", "gpqa_main.*", "gpqa.*"),
            metrics={"accuracy": Metric("acc")},
            floor=0.25,
            by_likelihood=True,
            secret=True,
        ),
    )
}
TASKS = (*BENCHMARKS, "alpaca_eval")
TEXT_FILES = (".jsonl", ".json", ".csv")
"""Of other files a copy gets into the cache of `datasets`."""
PRESETS = {"quick": 100, "full": None}
"""Questions of each task, the first so many, as lm-eval's `--limit` takes them."""


@dataclass(frozen=True)
class Questions:
    """A benchmark's questions as lm-eval's task takes them."""

    docs: list[Row]
    shots: list[Row]
    """What examples in the prompt are drawn from."""
    source: str
    """Where they are from, in words."""

    @property
    def sha256(self) -> str:
        """Of the questions and the examples."""
        return sha256(json.dumps([self.docs, self.shots], sort_keys=True))

    def first(self, n: int | None) -> Questions:
        """The first n of them."""
        return Questions(self.docs[:n], self.shots, self.source)

    def drawn(self, n: int, seed: int) -> Questions:
        """n of them at random, in their order."""
        total = len(self.docs)
        return self.only(sorted(random.Random(seed).sample(range(total), min(n, total))))

    def only(self, ids: Sequence[int]) -> Questions:
        """Those with these numbers."""
        return Questions([self.docs[i] for i in ids], self.shots, self.source)


def load_questions(
    benchmark: Benchmark, data_dir: Path | None, seed: int, shots: bool = True
) -> Questions:
    """From the data directory, or else from the hub or its cache.

    Args:
        seed: orders GPQA's choices, each question's by itself.
        shots: whether examples for the prompt are needed.

    Raises:
        DataError: not there, or not the benchmark's.
    """
    rows, source = _rows(benchmark, data_dir, benchmark.files, benchmark.split)
    examples: list[Row] = []
    if shots and benchmark.shots_files:
        examples, found = _rows(benchmark, data_dir, benchmark.shots_files, "train")
        if len(examples) < SHOTS:
            raise DataError(
                f"{found} has {len(examples)} of the {SHOTS} examples that a prompt of "
                f"{benchmark.name} begins with: no prompt could be made. Get the file anew."
            )
    docs, pool = (
        [_SHAPES[benchmark.name]({c: row[c] for c in benchmark.columns}, seed) for row in some]
        for some in (rows, examples)
    )
    return Questions(docs, pool, source)


def _rows(
    benchmark: Benchmark, data_dir: Path | None, patterns: tuple[str, ...], split: str
) -> tuple[list[Row], str]:
    suffixes = TEXT_FILES if benchmark.secret else tuple(READERS)
    path = _find_file(data_dir, patterns, suffixes) if data_dir else None
    where = str(path) if path else benchmark.hub
    try:
        source = open_source(where, seed=0, split=split)
    except DataError as e:
        if path:
            raise
        raise DataError(_not_there(benchmark, data_dir, patterns, e)) from e
    for place, reason in source.unreadable():
        raise DataError(
            f"{where}, row {place}: {reason}. The benchmark would not be whole: get the file anew."
        )
    rows = [row for part in source.parts for _, file in part.files for row in file.rows]
    for number, row in enumerate(rows, start=1):
        if missing := [c for c in benchmark.columns if row.get(c) is None]:
            raise DataError(
                f"{where}, row {number} has no {missing[0]!r}: these are not the questions of "
                f"{benchmark.name}, which have {', '.join(benchmark.columns)}. Give its own file."
            )
    if not rows:
        raise DataError(f"{where} is empty: {benchmark.name} has no questions. Get the file anew.")
    return rows, where


def _find_file(data_dir: Path, patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    """The file that the first pattern with any match names.

    Raises:
        DataError: several match.
    """
    for pattern in patterns:
        found = sorted(p for p in data_dir.glob(pattern) if p.suffix.lower() in suffixes)
        if len(found) > 1:
            raise DataError(
                f"{data_dir} has {' and '.join(p.name for p in found[:2])} for {pattern}: which "
                f"one is meant is not clear. Keep one, or name it {patterns[0]}."
            )
        if found:
            return found[0]
    return None


def _not_there(
    benchmark: Benchmark, data_dir: Path | None, patterns: tuple[str, ...], error: DataError
) -> str:
    reason = str(error.__cause__ or error).splitlines()[0]
    first = patterns[0].replace(".*", ".jsonl")
    where = f"{data_dir} has no {first}" if data_dir else "no --data-dir is given"
    cure = f"Put it there as {first}" if data_dir else f"Give a directory with {first}"
    if benchmark.secret:
        page = f"https://huggingface.co/datasets/{benchmark.hub.partition(':')[0]}"
        cure += f", or accept the conditions at {page}, run `hf auth login` and go online"
    else:
        cure += ", or go online"
    return (
        f"the questions of {benchmark.name} are not there: {where}, and "
        f"{benchmark.hub.partition(':')[0]} cannot be loaded from the hub or its cache ({reason}). "
        f"{cure}."
    )


def _ifeval(row: Row, seed: int) -> Row:
    """Arguments that are null left out: a table has them wherever another question has them."""
    given, names = row["kwargs"], row["instruction_id_list"]
    lists = isinstance(given, list) and isinstance(names, list) and len(given) == len(names)
    if not lists or not all(isinstance(a, dict) for a in given):
        raise DataError(
            f"question {row['key']} of ifeval: kwargs is {given!r:.60}, not a list with one object "
            f"for each of instruction_id_list, {names!r:.60}: its responses could not be checked. "
            "Give the benchmark's own file."
        )
    return row | {"kwargs": [{k: v for k, v in a.items() if v is not None} for a in row["kwargs"]]}


def _gpqa(row: Row, seed: int) -> Row:
    """Choices as lm-eval cleans them; their order is the question's own, whatever is around it."""
    from lm_eval.tasks.gpqa.zeroshot.utils import preprocess  # late: the extra

    texts = [preprocess(row[f"Incorrect Answer {i}"]) for i in (1, 2, 3)]
    texts.append(preprocess(row["Correct Answer"]))
    order = list(range(4))
    random.Random(f"{seed} {row['Question']}").shuffle(order)
    choices = {f"choice{i}": texts[k] for i, k in enumerate(order, start=1)}
    return {"Question": row["Question"], **choices, "answer": f"({LETTERS[order.index(3)]})"}


def _gsm8k(row: Row, seed: int) -> Row:
    return row


_SHAPES = {"ifeval": _ifeval, "gsm8k": _gsm8k, "gpqa": _gpqa}


def sha256(text: str) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
