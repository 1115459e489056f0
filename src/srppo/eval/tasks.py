"""lm-eval's tasks over questions that are already here, scored the same way each time.

Imports lm-eval: import this file late.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from srppo.errors import DataError
from srppo.eval.benchmarks import Benchmark, Questions, Row, sha256


def _require_known(docs: Sequence[Row]) -> None:
    """Raises DataError where lm-eval has no checker for one of IFEval's instructions."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT  # wants punkt_tab

    for doc in docs:
        if unknown := [name for name in doc["instruction_id_list"] if name not in INSTRUCTION_DICT]:
            raise DataError(
                f"question {doc['key']} of ifeval has the instruction {unknown[0]!r}, which "
                "lm-eval cannot check: it could not be scored, after all responses are made. Give "
                "the benchmark's own file."
            )


class _Docs(list[Row]):
    """What lm-eval asks of a split beside its rows."""

    @property
    def features(self) -> Row:
        """Its columns."""
        return self[0]


class Task:
    """A benchmark with its questions, ready for one model after another."""

    def __init__(
        self,
        benchmark: Benchmark,
        questions: Questions,
        *,
        seed: int = 0,
        shots: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        """`seed` decides what IFEval's scorer draws; `max_tokens` replaces the task's own bound on
        a response; without `shots` no example is in the prompt."""
        self.benchmark = benchmark
        self.questions = questions
        if benchmark.name == "ifeval":
            _require_known(questions.docs)
        self.at_random: list[int] = []
        """Keys of IFEval's questions whose scoring drew random numbers."""
        with quiet(), unmoved():
            self.lm_eval = _load(benchmark, questions)
        if not shots:
            self.lm_eval.set_config("num_fewshot", 0)
        config = self.lm_eval.config
        if max_tokens and config.output_type == "generate_until":
            self.lm_eval.set_config("generation_kwargs", {"max_gen_toks": max_tokens}, update=True)
        if benchmark.name == "ifeval":
            self.lm_eval.set_config(
                "process_results", _seeded(config.process_results, seed, self.at_random)
            )

    @property
    def prompts(self) -> list[str]:
        """The questions as the task words them, without examples and template."""
        with quiet():
            return [self.lm_eval.doc_to_text(doc) for doc in self.questions.docs]

    def facts(self) -> Row:
        """Version and hashes, as results.json has them."""
        return {
            "version": self.lm_eval.VERSION,
            "data_sha256": self.questions.sha256,
            "prompts_sha256": sha256("".join(map(sha256, self.prompts))),
        }

    def settings(self) -> Row:
        """What else the scores depend on, as results.json has it."""
        return {
            "lm_eval_task": self.benchmark.task,
            "shots": self.lm_eval.config.num_fewshot,
            "floor": self.benchmark.floor,
            "questions": self.questions.source,
        }

    def requests(self, chat: Callable[..., str] | None) -> list[Any]:
        """lm-eval's instances: what a model is asked; `chat` turns messages into text."""
        task = self.lm_eval
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        with quiet(), unmoved():
            task.build_all_requests(
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=chat is not None,
                chat_template=chat,
            )
        return list(task.instances)

    def run(self, lm: LM, chat: bool) -> Row:
        """lm-eval's results, with its `samples`."""
        self.at_random.clear()
        self.lm_eval.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the examples that others get, too
        tasks = {"tasks": {self.benchmark.task: self.lm_eval}}
        with quiet(), unmoved():
            return dict(evaluate(lm, tasks, apply_chat_template=chat, fewshot_as_multiturn=chat))

    def scores(self, results: Row) -> list[dict[str, float | list[float]]]:
        """Each question's, by our names."""
        logged = {(s["filter"], s["doc_id"]): s for s in results["samples"][self.benchmark.task]}
        return [
            {
                name: _number(logged[metric.filter, i][metric.lm_eval])
                for name, metric in self.benchmark.metrics.items()
            }
            for i in range(len(self.questions.docs))
        ]

    def notes(self) -> list[str]:
        """What to know of the last run's scores."""
        if not self.at_random:
            return []
        keys = ", ".join(map(str, sorted(set(self.at_random))))
        return [
            f"lm-eval scores IFEval's question(s) with key {keys} at random (they ask for a "
            "letter that is none); here the seed decides."
        ]


class Replay(LM):
    """A model that says what it is told to."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = list(texts)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The texts, in the order of the questions."""
        return self.texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """A text has none."""
        raise NotImplementedError("likelihoods of stored responses")

    loglikelihood_rolling = loglikelihood


def _load(benchmark: Benchmark, questions: Questions) -> ConfigurableTask:
    splits = {"train": _Docs(questions.shots), benchmark.split: _Docs(questions.docs)}

    def given(**metadata: Any) -> dict[str, _Docs]:
        return splits

    overrides = {"task": benchmark.task, "custom_dataset": given, "process_docs": None}
    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    manager = TaskManager(include_path=folder, include_defaults=False)
    # Overrides are merged into a task's own settings only where it is a member of a group.
    return manager.load([{"group": "srppo", "task": [overrides]}])["tasks"][benchmark.task]


def _seeded(
    score: Callable[[Row, list[str]], Row], seed: int, at_random: list[int]
) -> Callable[[Row, list[str]], Row]:
    """IFEval's scorer with every random number decided by seed and question; langdetect's, too."""
    from langdetect import DetectorFactory

    def process_results(doc: Row, results: list[str]) -> Row:
        random.seed(f"{seed} {doc['key']}")
        before = random.getstate()
        with mock.patch.object(DetectorFactory, "seed", seed):
            scores = score(doc, results)
        if random.getstate() != before:
            at_random.append(doc["key"])
        return scores

    return process_results


def _number(value: Any) -> float | list[float]:
    return [float(v) for v in value] if isinstance(value, list) else float(value)


_compiled = cache(lm_eval.utils.env.from_string)
"""A Jinja template. lm-eval compiles its own anew for every question and example."""


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no messages of lm-eval, some of which hold a question's text."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            mock.patch.object(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)),
            mock.patch.object(lm_eval.utils.env, "from_string", _compiled),
        ):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def unmoved() -> Iterator[None]:
    """Global random numbers go on afterwards as if nothing had been in between."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
