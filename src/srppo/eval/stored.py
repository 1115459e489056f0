"""Responses that somebody stored, scored by lm-eval as if a model had just said them.

JSON or JSONL, in any order: the prompt under `prompt`, `instruction` or `question`, the response
under `response`, `output`, `completion` or `generation`; a list of such rows, or one under a key.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from srppo.errors import ConfigError, DataError
from srppo.eval.benchmarks import BENCHMARKS, Row
from srppo.eval.preflight import Settings, prepare_stored
from srppo.eval.responses import lines_of
from srppo.eval.results import ResultDir, entry_of, require_free, samples_of
from srppo.progress import Reporter

if TYPE_CHECKING:
    from srppo.eval.judge import Judge

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "output", "completion", "generation")
NAMED = 3
"""Prompts that a note names."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON or JSONL file.

    Raises:
        DataError: it is not there, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read ({e}): nothing is scored. Check the path.") from e
    rows = _parsed(path, text)
    for number, row in enumerate(rows, start=1):
        try:
            lines_of([row]).encode()
        except UnicodeEncodeError as e:
            raise DataError(
                f"{path}, row {number} holds half a character ({e.object[e.start]!r} alone): it is "
                "no text, so that it could be neither scored nor written. Mend that row."
            ) from e
    return rows


def _parsed(path: Path, text: str) -> list[Row]:
    try:
        return _rows_in(json.loads(text))
    except (ValueError, RecursionError) as whole:
        lines = [line for line in text.split("\n") if line.strip()]
        for number, line in enumerate(lines, start=1):
            try:
                lines[number - 1] = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(
                    f"{path} is neither JSON ({whole}) nor JSONL (line {number}: {e}): nothing is "
                    "scored. Mend it, or write one object per line."
                ) from e
        return _rows_in(lines)


def _rows_in(tree: Any) -> list[Row]:
    """A list of objects, the one list of objects under a key, or a single object."""
    if isinstance(tree, dict):
        lists = [v for v in tree.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        tree = lists[0] if len(lists) == 1 else [tree]
    if not isinstance(tree, list) or not all(isinstance(row, dict) for row in tree):
        raise DataError(
            "the file holds something else than objects with a prompt and a response: nothing is "
            "scored. Write one object per line."
        )
    return tree


@dataclass(frozen=True)
class Matched:
    """Responses by the question they answer; the first of each counts."""

    responses: dict[int, str]
    notes: list[str]


def match(rows: Sequence[Row], prompts: Sequence[str], secondary: Sequence[str]) -> Matched:
    """Finds each row's question by its text; blanks and line breaks do not count.

    Args:
        prompts: the questions as the task words them.
        secondary: the same, as other people store them.

    Raises:
        DataError: no row fits.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for texts in (prompts, secondary):
        for i, text in enumerate(texts):
            if i not in places[_key(text)]:
                places[_key(text)].append(i)
    found: dict[int, str] = {}
    unknown, again, unusable = [], [], []
    for number, row in enumerate(rows, start=1):
        prompt, response = _text(row, PROMPTS), _text(row, RESPONSES)
        if prompt is None or response is None:
            unusable.append(f"row {number}")
            continue
        fits = next((places[key] for key in _keys(prompt) if key in places), None)
        if fits is None:
            unknown.append(repr(_short(prompt)))
        elif free := [i for i in fits if i not in found]:
            found[free[0]] = response
        else:
            again.append(repr(_short(prompt)))
    missing = [repr(_short(text)) for i, text in enumerate(prompts) if i not in found]
    total = len(prompts)
    notes = [] if len(found) == total else [f"scored over {len(found)} of {total} questions"]
    notes += _counted(missing, "question(s) without a response")
    notes += _counted(again, "more response(s) to a question that has one; the first counts")
    notes += _counted(unknown, "response(s) to prompts that are none of the questions")
    notes += _counted(unusable, f"row(s) without text under {_or(PROMPTS)} or {_or(RESPONSES)}")
    if not found:
        raise DataError(
            f"none of {len(rows)} rows answers one of the {total} questions, so there is nothing "
            f"to score: {'; '.join(notes[1:])}. Give the benchmark's own prompts, and the right "
            "--task and --data-dir."
        )
    return Matched(dict(sorted(found.items())), notes)


def score_stored(path: Path, task: str, settings: Settings) -> tuple[Row, list[Row], Row]:
    """The task's part of results.json, its samples, and lm-eval's own results.

    Raises:
        ConfigError: what the checks found.
        DataError: the file cannot be read, or nothing in it fits.
    """
    rows = read_rows(path)
    plan = prepare_stored(task, settings)
    plan.require()
    whole = plan.tasks[task]
    questions = whole.questions
    matched = match(rows, whole.prompts, [_question(doc) for doc in questions.docs])
    ids = list(matched.responses)

    from srppo.eval.tasks import Replay, Task

    present = Task(BENCHMARKS[task], questions.only(ids), seed=settings.seed, shots=False)
    texts = list(matched.responses.values())
    found = present.run(Replay(texts), chat=False)
    scores = present.scores(found)
    found.pop("samples")
    entry = entry_of(
        present.benchmark,
        scores,
        settings.seed,
        **present.facts(),
        empty=sum(not text.strip() for text in texts),
        settings={**present.settings(), "responses": str(path)},
        notes=matched.notes + present.notes(),
    )
    samples = samples_of(present.prompts, [{"text": text} for text in texts], scores)
    for i, sample in zip(ids, samples, strict=True):
        sample["doc_id"] = i
    return entry, samples, found


def evaluate_stored(
    responses: str,
    settings: Settings,
    out: Path | None,
    reporter: Reporter,
    *,
    judge: Judge | None = None,
    resume: bool = False,
) -> ResultDir:
    """Scores `FILE` or `NAME=FILE`; its results go to `out`/NAME, or nowhere.

    A directory that holds other tasks' stored responses gets this one beside them.

    Raises: as `score_stored`; ConfigError: a task that responses cannot be scored on.
    """
    task = settings.tasks[0]
    if len(settings.tasks) > 1:
        raise ConfigError(
            f"--task {','.join(settings.tasks)}: a file holds responses to the questions of one "
            "task. Name that one."
        )
    name, equals, file = responses.partition("=")
    path = Path(file if equals and "/" not in name else responses)
    name = name if equals and "/" not in name else path.stem
    model = {"name": name, "path": None, "sha256": None, "responses": str(path)}
    if task != "alpaca_eval" and (task not in BENCHMARKS or BENCHMARKS[task].by_likelihood):
        raise ConfigError(
            f"--task {task}: stored responses cannot be scored on it, for it is decided by "
            "likelihoods. Give ifeval, gsm8k or alpaca_eval."
        )
    if out:
        require_free(out / name, model, settings.record(), go_on=True)
    if task == "alpaca_eval":
        from srppo.eval.annotate import score_stored as score_alpaca

        entry, samples = score_alpaca(
            read_rows(path),
            settings.data_dir,
            constants.HF_HUB_OFFLINE,
            judge=judge,
            out_dir=out and out / name / "alpaca_eval",
            seed=settings.seed,
            reporter=reporter,
            resume=resume,
            limit=settings.limit,
        )
        found = None
    else:
        entry, samples, found = score_stored(path, task, settings)
    results = ResultDir.begin((out or Path()) / name, model, settings.record(), kept=bool(out))
    results.add(task, entry, samples, found)
    return results


def _question(doc: Row) -> str:
    """Without what the task puts around it."""
    return str(doc.get("question") or doc.get("prompt"))


def _keys(prompt: str) -> list[str]:
    """What a stored prompt may be matched by: itself, or the last question of GSM8K's form."""
    _, found, last = prompt.rpartition("Question:")
    return [_key(prompt)] + ([_key(last.strip().removesuffix("Answer:"))] if found else [])


def _key(text: str) -> str:
    return " ".join(text.split())


def _text(row: Row, names: Sequence[str]) -> str | None:
    """The first of these that is there; a list of one text stands for it."""
    value = next((row[name] for name in names if name in row), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None


def _counted(what: Sequence[str], kind: str) -> list[str]:
    if not what:
        return []
    more = ", ..." if len(what) > NAMED else ""
    return [f"{len(what)} {kind}: {', '.join(what[:NAMED])}{more}"]


def _or(names: Sequence[str]) -> str:
    return "/".join(names)


def _short(text: str) -> str:
    text = _key(text)
    return text if len(text) <= 60 else text[:57] + "..."
