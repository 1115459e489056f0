"""The directory of one evaluated model.

results.json  samples/TASK.jsonl  lm_eval/TASK.json  responses/TASK.jsonl  alpaca_eval/
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srppo.errors import RunDirError
from srppo.eval.benchmarks import TASKS, Benchmark, Row, sha256
from srppo.eval.responses import lines_of, write
from srppo.eval.statistics import clustered, proportion
from srppo.provenance import now

SCHEMA = 1
DECISIVE = ("limit", "max_tokens", "seed", "chat_template", "dtype")
"""Settings that a directory's tasks share; tasks may be added."""
PACKAGES = (
    "srppo", "lm_eval", "alpaca_eval", "torch", "transformers", "tokenizers", "nltk", "langdetect",
)  # fmt: skip


class ResultDir:
    """results.json grows task by task; each of its files is written whole or not at all."""

    def __init__(self, path: Path, record: Row, kept: bool) -> None:
        self.path = path
        self.kept = kept
        """False: nothing is written."""
        self.record = record
        """What results.json holds."""

    @staticmethod
    def begin(path: Path, model: Row, config: Row, *, kept: bool = True) -> ResultDir:
        """A new directory, or one to go on with: the tasks of earlier calls stay.

        Raises:
            RunDirError: it is taken, or cannot be written.
        """
        if kept:
            require_free(path, model, config, go_on=True)
        record = {
            "schema": SCHEMA,
            "model": model,
            "created": now(),
            "seed": config["seed"],
            "config": config,
            "packages": {name: _version(name) for name in PACKAGES},
            "tasks": {},
            "failed": {},
        }
        if kept and (path / "results.json").exists():
            before = _read(path)
            record |= {"created": before["created"], "tasks": before["tasks"]}
        results = ResultDir(path, record, kept)
        results._write_record()
        return results

    def add(self, task: str, entry: Row, samples: Sequence[Row], lm_eval: Row | None) -> None:
        """A task that is done; `lm_eval`: lm-eval's own results."""
        if self.kept:
            write(self.path / "samples" / f"{task}.jsonl", lines_of(samples))
        if self.kept and lm_eval is not None:
            from lm_eval.utils import handle_non_serializable

            text = json.dumps(lm_eval, indent=2, default=handle_non_serializable)
            write(self.path / "lm_eval" / f"{task}.json", text + "\n")
        self.record["tasks"][task] = _plain(entry)
        self.record["failed"].pop(task, None)
        self._write_record()

    def fail(self, task: str, message: str) -> None:
        """A task that could not be done; what an earlier call had of it is not shown."""
        self.record["tasks"].pop(task, None)
        self.record["failed"][task] = message
        self._write_record()

    def _write_record(self) -> None:
        tasks = self.record["tasks"]
        self.record["tasks"] = {name: tasks[name] for name in TASKS if name in tasks}
        if self.kept:
            text = json.dumps(self.record, indent=2, ensure_ascii=False)
            write(self.path / "results.json", text + "\n")


def require_free(path: Path, model: Row, config: Row, *, go_on: bool) -> None:
    """Raises RunDirError where results would be mixed with something else."""
    if path.exists() and not path.is_dir():
        raise RunDirError(f"{path} is a file: results cannot be written there. Give another --out.")
    if not path.exists():
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise RunDirError(
                f"{path} cannot be made, for {above} is not a directory that you may write to: "
                "results would be lost. Give another --out."
            )
        return
    if not any(path.iterdir()):
        return
    if not (path / "results.json").is_file():
        raise RunDirError(
            f"{path} holds files that are no evaluation of srppo: writing there could overwrite "
            "them. Give another --out."
        )
    before = _read(path)
    if not go_on:
        whose = before["model"]["path"] or before["model"]["responses"]
        raise RunDirError(
            f"{path} holds an evaluation of {whose} already: two would be mixed. Go on with it: "
            "--resume. Begin anew: another --out."
        )
    pairs = [
        *((key, before["model"].get(key), model[key]) for key in ("path", "sha256")),
        *((key, before["config"].get(key), config[key]) for key in DECISIVE),
    ]
    for key, old, new in pairs:
        if old != new:
            raise RunDirError(
                f"{path} holds an evaluation with {key}={old}, now it is {new}: the two would be "
                "mixed. Give another --out, or what it began with."
            )


def entry_of(
    benchmark: Benchmark,
    scores: Sequence[dict[str, float | list[float]]],
    seed: int,
    **facts: Any,
) -> Row:
    """A task's part of results.json; what is not among the `facts` is not known, so None."""
    unknown = (
        "template", "template_sha256", "data_sha256", "prompts_sha256", "mean_length", "eos_rate",
        "truncated_responses", "truncated_prompts", "empty",
    )  # fmt: skip
    return {
        "version": facts.pop("version"),
        "n": len(scores),
        "headline": benchmark.headline,
        "metrics": {
            name: _metric([s[name] for s in scores], metric.kind, seed)
            for name, metric in benchmark.metrics.items()
        },
        **dict.fromkeys(unknown),
        **facts,
    }


def how_it_went(answers: Sequence[Row]) -> Row:
    """Length in tokens, ends and cuts of generated responses."""
    n = len(answers)
    return {
        "mean_length": sum(a["length"] for a in answers) / n,
        "eos_rate": sum(a["ended"] for a in answers) / n,
        "truncated_responses": sum(not a["ended"] for a in answers),
        "truncated_prompts": sum(a["truncated_prompt"] for a in answers),
        "empty": sum(not a["text"].strip() for a in answers),
    }


def samples_of(prompts: Sequence[str], answers: Sequence[Row], scores: Sequence[Row]) -> list[Row]:
    """A line a question; length and end are None where they are not known."""
    return [
        {
            "doc_id": i,
            "prompt_sha256": sha256(prompt),
            "prompt": prompt,
            "response": answer["text"],
            "length": answer.get("length"),
            "ended": answer.get("ended"),
            "scores": score,
        }
        for i, (prompt, answer, score) in enumerate(zip(prompts, answers, scores, strict=True))
    ]


def _metric(values: list[Any], kind: str, seed: int) -> Row:
    if kind == "clustered":
        estimate = clustered(values, seed)
    else:
        estimate = proportion(int(sum(values)), len(values))
    return {**asdict(estimate), "kind": kind}


def _plain(tree: Any) -> Any:
    """What is not a number becomes null: JSON has no other word for it."""
    if isinstance(tree, dict):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _read(path: Path) -> Row:
    try:
        record = json.loads((path / "results.json").read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']}")
        return {k: record[k] for k in ("model", "config", "created", "tasks")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RunDirError(
            f"{path / 'results.json'} is no evaluation of this srppo ({type(e).__name__}: {e}): "
            "writing there could overwrite somebody's file. Give another --out."
        ) from e


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
