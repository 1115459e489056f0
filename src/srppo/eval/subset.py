"""Benchmarks while a model trains: a fixed part of the questions, and nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.errors import ConfigError
from srppo.eval.benchmarks import BENCHMARKS, load_questions
from srppo.eval.preflight import require_packages, require_punkt
from srppo.eval.results import entry_of, how_it_went
from srppo.models.roles import Role


class Benchmarks:
    """The same questions for a model at different times."""

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        limit: int,
        seed: int = 0,
        data_dir: Path | None = None,
        max_tokens: int | None = None,
        max_tokens_per_batch: int = 16384,
    ) -> None:
        """`limit` questions of each task, drawn by the seed.

        Args:
            data_dir: where questions lie; what is not there comes from the hub or its cache.
            max_tokens: of a response; None: as the task says.

        Raises:
            ConfigError, DataError: a task that is not known or needs a judge, a package or
                questions that are not there.
        """
        for name in tasks:
            if name not in BENCHMARKS:
                raise ConfigError(
                    f"{name!r} cannot be measured while a model trains. These can: "
                    f"{', '.join(BENCHMARKS)}."
                )
            require_packages(name)
        if "ifeval" in tasks:
            require_punkt(data_dir)
        from srppo.eval.tasks import Task

        self.seed = seed
        self.budget = max_tokens_per_batch
        self.tasks = [
            Task(
                BENCHMARKS[name],
                load_questions(BENCHMARKS[name], data_dir, seed).drawn(limit, seed),
                seed=seed,
                max_tokens=max_tokens,
            )
            for name in tasks
        ]

    def measure(
        self, model: Role | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """`bench/<task>/<metric>`, fractions; for responses also `mean_length` in tokens and
        `eos_rate`. Asked through the tokenizer's chat template if it has one.

        Random numbers, the modules' train or eval mode and gradients stay as they are.
        """
        from srppo.eval.ask import Reader
        from srppo.eval.generate import Engine
        from srppo.eval.tasks import unmoved

        role = Role.of(model)
        reader = Reader(tokenizer, tokenizer.chat_template is not None)
        context = getattr(role.config.get_text_config(), "max_position_embeddings", None)
        measured: dict[str, float] = {}
        with unmoved(), role.active() as active, in_eval_mode(active):
            for task in self.tasks:
                engine = Engine(
                    lambda: role, reader, context=context, max_tokens_per_batch=self.budget
                )
                scores = task.scores(task.run(engine, reader.chat))
                entry = entry_of(task.benchmark, scores, self.seed, **task.facts())
                values = {name: metric["value"] for name, metric in entry["metrics"].items()}
                if "text" in engine.answers[0]:
                    went = how_it_went(engine.answers)
                    values |= {key: went[key] for key in ("mean_length", "eos_rate")}
                measured |= {f"bench/{task.benchmark.name}/{k}": v for k, v in values.items()}
        return measured


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
