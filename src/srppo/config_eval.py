"""The settings of evaluation: after training, and during it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from srppo.config_data import ColumnMap
from srppo.validation import NonNegative, NonNegativeFloat, Positive, Section


class BenchmarkConfig(Section):
    """Which benchmarks base, SFT model and policy are held against; docs/evaluation.md."""

    tasks: list[Literal["ifeval", "gsm8k", "gpqa", "alpaca_eval"]] = []
    """None: none."""
    limit: Positive | None = None
    """The first so many questions of each; null: all."""
    every_limit: NonNegative = 0
    """Questions of each, drawn by the seed, that the policy is asked at the steps of eval.every,
    too; 0: none. Not of alpaca_eval."""
    max_tokens: Positive | None = None
    """Of a response; null: as each task says."""
    data_dir: str | None = None
    """Where questions lie; what is not there comes from the hub or its cache."""
    judge: str | None = None
    """alpaca_eval: a model that judges in this process..."""
    judge_url: str | None = None
    """...or an OpenAI-compatible server..."""
    judge_model: str | None = None
    """...and its model."""

    @model_validator(mode="after")
    def _possible(self) -> BenchmarkConfig:
        if bool(self.judge_url) != bool(self.judge_model) or (self.judge and self.judge_url):
            raise ValueError(
                "who would judge is not clear: a judge is judge_url with judge_model, or judge "
                "alone. Set one of the two in eval.benchmarks."
            )
        if "alpaca_eval" in self.tasks and not (self.judge or self.judge_url):
            raise ValueError(
                "eval.benchmarks.tasks has alpaca_eval, and there is no judge: nobody would "
                "compare the responses. Set judge, or judge_url and judge_model, in "
                "eval.benchmarks."
            )
        return self


class EvalConfig(Section):
    """What is measured after training, and during it."""

    prompts: str | None = None
    """Source of evaluation rows; null: the held-out demonstrations."""
    split: str = "test"
    """Split of that source."""
    columns: ColumnMap | None = None
    """Known name: that source's own column; null: `data.columns`; {}: recognised."""
    limit: Positive | None = None
    """Rows used; null: all."""
    scorer: str | None = None
    """`python:package.module:function` or `python:path/to/file.py:function`, called as
    `score(rows, responses, ended) -> {name: [float, ...]}`; null: length, EOS and reward only."""
    temperatures: list[NonNegativeFloat] = Field(default=[1.0], min_length=1)
    """Sampling temperatures; 0 is greedy."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt at temperatures above 0."""
    every: Positive | None = None
    """Evaluate at temperature 1 every so many PPO steps; null: never."""
    every_split: str = "validation"
    """Split of `prompts` used for that, so that no choice made on the curve touches `split`.
    Without `prompts` both are of the held-out demonstrations."""
    every_limit: Positive = 128
    """Rows used for that."""
    side_by_side: NonNegative = 24
    """Prompts whose responses the report shows side by side."""
    benchmarks: BenchmarkConfig = BenchmarkConfig()
    """IFEval, GSM8K, GPQA, AlpacaEval."""

    @model_validator(mode="after")
    def _possible(self) -> EvalConfig:
        if self.benchmarks.every_limit and not (self.every and self.benchmarks.tasks):
            raise ValueError(
                f"benchmarks.every_limit={self.benchmarks.every_limit} without eval.every and "
                "eval.benchmarks.tasks: nothing would be asked during training. Set both."
            )
        return self
