"""`srppo compare`: result directories in, a comparison out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from srppo.errors import ConfigError, RunDirError

Form = Literal["table", "md", "json", "csv", "html"]
SUFFIXES: dict[str, Form] = {".md": "md", ".json": "json", ".csv": "csv", ".html": "html"}


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME=DIR...", help="Result directories of `srppo eval`."),
    ],
    form: Annotated[
        Form | None,
        typer.Option("--format", help="Default: by the suffix of --out, else a table."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file; default: standard output.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compared with. Default: the first.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="As ifeval,gsm8k. Default: all that every model has.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Models asked differently, on the questions that both have."),
    ] = False,
) -> None:
    """Models on benchmarks, paired by question: differences, intervals, tests, what is noise."""
    from srppo.eval.compare import compare
    from srppo.progress import stdout
    from srppo.report.comparison import render, show

    form = form or SUFFIXES.get(out.suffix if out else "", "table")
    chosen = tasks.split(",") if tasks else None
    comparison = compare(_directories(models), against, chosen, force)
    if out is not None:
        try:
            out.write_text(render(comparison, form), encoding="utf-8")
        except OSError as e:
            raise RunDirError(
                f"{out} cannot be written ({e}): there is no comparison. Give --out another file."
            ) from e
        typer.echo(f"Comparison: {out}")
    elif form == "table":
        show(comparison, stdout())
    else:
        typer.echo(render(comparison, form), nl=False)


def _directories(models: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for model in models:
        name, _, directory = model.partition("=")
        if not name or not directory:
            raise ConfigError(
                f"{model!r} is not of the form NAME=DIR: the model has no name in the comparison. "
                f"Write, for example, sft={model.strip('=')}."
            )
        if name in found:
            raise ConfigError(
                f"{name} is there twice, {found[name]} and {directory}: one would hide the other. "
                "Give each model its own name."
            )
        found[name] = Path(directory)
    return found
