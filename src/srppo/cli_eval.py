"""`srppo eval` and `srppo eval doctor`: parse, call one function."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from srppo.errors import ConfigError

if TYPE_CHECKING:
    from srppo.eval.judge import Judge
    from srppo.eval.preflight import Settings


class ModelsUnlessNamed(TyperGroup):
    """`srppo eval MODEL` is `srppo eval models MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the command in where none is named."""
        named = args[:1] and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["models", *args])


app = typer.Typer(cls=ModelsUnlessNamed)

Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16"})
Preset = Enum("Preset", {"quick": "quick", "full": "full"})

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]MODEL",
        help="Run directory (its policy), model or adapter directory, hub name. One that is "
        "called base is asked through its template and without.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="TASK,...",
        help="ifeval, gsm8k, gpqa, alpaca_eval. Default: the first three, and alpaca_eval where a "
        "judge is given.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Where questions lie; what is not there comes from the hub or its cache."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub.")]
Template = Annotated[
    str, typer.Option(metavar="auto|none|PATH", help="auto: the tokenizer's, if it has one.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Of a response. Default: as each task says.")
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible server that judges AlpacaEval.")
]
JudgeModel = Annotated[str | None, typer.Option(help="Its model.")]
LocalJudgeDir = Annotated[
    str | None, typer.Option("--judge", metavar="MODEL", help="A model that judges in process.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="The first so many questions of a task.")]


@app.command(
    "models",
    epilog="`srppo eval doctor` looks whether all is there that an evaluation needs. Exit codes: 0 "
    "done, 1 a task failed, 2 unusable input (the message says why), 130 interrupted.",
)
def models(
    models: Models = None,
    tasks: Tasks = None,
    preset: Annotated[
        Preset, typer.Option(help="quick: the first 100 questions of each task.")
    ] = Preset.full,
    limit: Limit = None,
    data_dir: DataDir = None,
    offline: Offline = False,
    chat_template: Template = "auto",
    max_tokens: MaxTokens = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge: LocalJudgeDir = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="GPQA's order of choices, and intervals.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Results go to OUT/NAME. Default: evals; stored responses: nowhere."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in OUT; nothing finished is asked again.")
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a forward pass, padding included.")
    ] = 16384,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    responses: Annotated[
        str | None,
        typer.Option(metavar="[NAME=]FILE", help="Stored responses, JSON or JSONL; no model."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What they answer: ifeval, gsm8k or alpaca_eval.")
    ] = None,
) -> None:
    """Measure models on IFEval, GSM8K, GPQA and AlpacaEval; or score stored responses."""
    _go_offline(offline)
    if bool(responses) != bool(task) or bool(responses) == bool(models):
        raise ConfigError(
            "it is not clear what to measure: give models (--tasks A,B: some benchmarks only), "
            "or --responses FILE with --task TASK."
        )
    from srppo.eval.benchmarks import PRESETS

    chosen = _judge(judge_url, judge_model, judge, device, dtype.value)
    settings = _settings(
        task or tasks,
        chosen,
        limit=limit if limit is not None else PRESETS[preset.value],
        max_tokens=max_tokens,
        seed=seed,
        data_dir=data_dir,
        chat_template=chat_template,
        batch_tokens=batch_tokens,
        dtype=dtype.value,
        device=device,
    )
    from srppo.eval.show import show_results, written
    from srppo.progress import Reporter, stdout

    if responses:
        from srppo.eval.stored import evaluate_stored

        found = [evaluate_stored(responses, settings, out, Reporter(), judge=chosen, resume=resume)]
    else:
        from srppo.eval.harness import evaluate

        found = evaluate(
            models or [], settings, out or Path("evals"), Reporter(), judge=chosen, resume=resume
        )
    show_results([results.record for results in found], stdout())
    if out or not responses:
        typer.echo(written([results.path for results in found]))
    if any(results.record["failed"] for results in found):
        raise typer.Exit(1)


@app.command()
def doctor(
    models: Models = None,
    tasks: Tasks = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    offline: Offline = False,
    chat_template: Template = "auto",
    max_tokens: MaxTokens = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge: LocalJudgeDir = None,
) -> None:
    """Is all there that an evaluation needs? Packages, questions, models, prompts, judge."""
    _go_offline(offline)
    chosen = _judge(judge_url, judge_model, judge, "auto", "float32")
    settings = _settings(
        tasks,
        chosen,
        limit=limit,
        max_tokens=max_tokens,
        data_dir=data_dir,
        chat_template=chat_template,
    )
    from srppo.eval.preflight import prepare
    from srppo.eval.show import show_checks
    from srppo.progress import stdout

    plan = prepare(models or [], settings, judge=chosen)
    show_checks(plan.checks, stdout())
    if plan.problems:
        raise typer.Exit(2)


def _go_offline(offline: bool) -> None:
    """Before anything reads it."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _settings(tasks: str | None, judge: Judge | None, **others: Any) -> Settings:
    from srppo.eval.preflight import Settings

    default = "ifeval,gsm8k,gpqa" + (",alpaca_eval" if judge else "")
    return Settings(tuple((tasks or default).split(",")), **others)


def _judge(
    url: str | None, model: str | None, local: str | None, device: str, dtype: str
) -> Judge | None:
    if bool(url) != bool(model) or (url and local):
        raise ConfigError(
            "a judge is --judge-url with --judge-model, or --judge alone: who would judge is not "
            "clear."
        )
    from srppo.eval.in_run import judge_of

    return judge_of(url, model, local, device, dtype)
