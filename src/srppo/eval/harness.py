"""Models through benchmarks: asked, scored, written down."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import transformers
from huggingface_hub import constants

from srppo import distributed
from srppo.errors import SrppoError
from srppo.eval.benchmarks import BENCHMARKS, LETTERS, Row, sha256
from srppo.eval.preflight import Plan, Settings, prepare
from srppo.eval.results import ResultDir, entry_of, how_it_went, samples_of
from srppo.eval.subjects import Subject
from srppo.models.roles import Role
from srppo.progress import Reporter

if TYPE_CHECKING:
    from srppo.eval.generate import Engine
    from srppo.eval.judge import Judge
    from srppo.eval.tasks import Task

T = TypeVar("T")


def evaluate(
    models: Sequence[str],
    settings: Settings,
    out: Path,
    reporter: Reporter,
    *,
    judge: Judge | None = None,
    resume: bool = False,
) -> list[ResultDir]:
    """Every model on every task, each model's results in `out`/NAME.

    A task that fails is written down as failed, and the others go on; not so with several
    processes, which share the work and have to fail together.

    Args:
        models: `NAME=DIR` or `DIR`: run or model directories, adapters, hub names.
        judge: AlpacaEval's.
        resume: go on in directories that are there; no finished chunk is asked again.

    Raises:
        ConfigError: all that the checks found, before any model is loaded.
    """
    transformers.logging.disable_progress_bar()  # ours is enough
    plan = prepare(models, settings, judge=judge, out=out, go_on=resume)
    plan.require()
    for check in plan.checks:
        if check.state == "note":
            reporter.line(f"note: {check.what}: {check.says}")
    distributed.any_of(False)  # nobody writes before all have looked
    return [_evaluate(subject, plan, settings, out, reporter, judge) for subject in plan.subjects]


def _evaluate(
    subject: Subject,
    plan: Plan,
    settings: Settings,
    out: Path,
    reporter: Reporter,
    judge: Judge | None,
) -> ResultDir:
    record = settings.record()
    kept = distributed.is_first()
    results = ResultDir.begin(out / subject.name, subject.identity, record, kept=kept)
    cut = settings.shard, settings.shard_sampling
    load = cache(partial(subject.load, settings.dtype, settings.device, *cut))
    job = _Job(subject, plan, settings, results, reporter, load)
    for name in settings.tasks:
        try:
            if name in plan.tasks:
                _benchmark(job, plan.tasks[name])
            else:
                assert judge  # or the checks found a problem
                _alpaca(job, judge)
        except KeyboardInterrupt:
            reporter.line(f"{subject.name}: {name} is not finished; --resume goes on where it was")
            raise
        except Exception as e:  # the other tasks and models may do
            if distributed.size() > 1:
                raise
            message = _why(e, name in BENCHMARKS and BENCHMARKS[name].secret)
            results.fail(name, message)
            reporter.line(f"{subject.name}: {name} failed: {message}")
    return results


@dataclass(frozen=True)
class _Job:
    """One model and what all its tasks share."""

    subject: Subject
    plan: Plan
    settings: Settings
    results: ResultDir
    reporter: Reporter
    load: Callable[[], Role]

    def ask(self, task: str, requests: int, ask: Callable[[Engine], T]) -> tuple[Engine, T]:
        """What `ask` gets from the model, whose answers are kept as they come."""
        from srppo.eval.ask import Reader
        from srppo.eval.generate import Engine

        subject, settings = self.subject, self.settings
        origin = {
            **{k: self.results.record["model"].get(k) for k in ("path", "sha256", "revision")},
            "task": task,
            "template_sha256": subject.template_sha256,
            "dtype": settings.dtype,
        }
        with self.reporter.bar(f"{subject.name}: {task}", requests, "requests") as advance:
            engine = Engine(
                self.load,
                Reader(subject.tokenizer, subject.chat),
                context=subject.context,
                max_tokens_per_batch=settings.batch_tokens,
                path=self.results.path / "responses" / f"{task}.jsonl",
                origin=origin,
                progress=advance,
            )
            return engine, ask(engine)

    def facts(self, task: str, engine: Engine) -> Row:
        """What results.json says beside scores: template, lengths, cuts, notes."""
        subject = self.subject
        what = f"{subject.name}: {task}"
        went = how_it_went(engine.answers) if "text" in engine.answers[0] else {}
        return {
            "template": subject.template,
            "template_sha256": subject.template_sha256,
            **went,
            "notes": [c.says for c in self.plan.checks if (c.what, c.state) == (what, "note")],
        }


def _benchmark(job: _Job, task: Task) -> None:
    benchmark, chat = task.benchmark, job.subject.chat
    requests = len(task.questions.docs) * (len(LETTERS) if benchmark.by_likelihood else 1)
    engine, found = job.ask(benchmark.name, requests, lambda engine: task.run(engine, chat))
    scores = task.scores(found)
    logged = found.pop("samples")[benchmark.task]
    facts = job.facts(benchmark.name, engine)
    entry = entry_of(
        benchmark,
        scores,
        job.settings.seed,
        **facts | {"notes": facts["notes"] + task.notes()},
        **task.facts(),
        settings={**task.settings(), **engine.settings},
    )
    if benchmark.by_likelihood:
        per_question = [
            engine.answers[i : i + len(LETTERS)] for i in range(0, requests, len(LETTERS))
        ]
        entry["truncated_prompts"] = sum(
            any(a["truncated_prompt"] for a in answers) for answers in per_question
        )
    if benchmark.secret:
        samples = _without_texts(task, logged, scores)
    else:
        samples = samples_of(task.prompts, engine.answers, scores)
    job.results.add(benchmark.name, entry, samples, found)


def _without_texts(task: Task, logged: Sequence[Row], scores: Sequence[Row]) -> list[Row]:
    """Letters and hashes alone: what was chosen, what is right."""
    samples = []
    rows = zip(task.questions.docs, task.prompts, logged, scores, strict=True)
    for i, (doc, prompt, sample, score) in enumerate(rows):
        likelihoods = [float(logprob) for logprob, _ in sample["filtered_resps"]]
        samples.append(
            {
                "doc_id": i,
                "prompt_sha256": sha256(prompt),
                "choice": LETTERS[likelihoods.index(max(likelihoods))],
                "answer": doc["answer"].strip("()"),
                "scores": score,
            }
        )
    return samples


def _alpaca(job: _Job, judge: Judge) -> None:
    from srppo.eval.annotate import score_outputs
    from srppo.eval.ask import Reader

    subject, references = job.subject, job.plan.references
    assert references  # or the checks found a problem
    reader = Reader(subject.tokenizer, subject.chat)
    requests = job.plan.requests("alpaca_eval", reader, job.settings.max_tokens)
    engine, texts = job.ask(
        "alpaca_eval", len(requests), lambda engine: engine.generate_until(requests)
    )
    outputs = [
        {"instruction": row["instruction"], "output": text, "generator": subject.name}
        for row, text in zip(references.outputs, texts, strict=False)
    ]
    entry, samples = distributed.from_first(
        lambda: score_outputs(
            outputs,
            references,
            judge,
            job.results.path / "alpaca_eval",
            job.settings.seed,
            job.reporter,
            True,
            job.settings.data_dir,
            constants.HF_HUB_OFFLINE,
        )
    )
    facts = job.facts("alpaca_eval", engine)
    entry |= facts | {"notes": facts["notes"] + entry["notes"]}
    entry["settings"] |= engine.settings
    for sample in samples:
        answer = engine.answers[sample["doc_id"]]
        sample |= {"length": answer["length"], "ended": answer["ended"]}
    job.results.add("alpaca_eval", entry, samples, None)


def _why(error: Exception, secret: bool) -> str:
    """In one line; of a bug, the places that it came through go to stderr."""
    if isinstance(error, SrppoError):
        return str(error)
    traceback.print_tb(error.__traceback__, file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        return "no memory is left. Try a smaller --batch-tokens, or --dtype bfloat16."
    name = type(error).__name__
    return f"{name}, in code that had a question's text" if secret else f"{name}: {error}"
