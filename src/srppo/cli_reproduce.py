"""`srppo reproduce`: a committed study, or some of its rows, run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srppo import signals
from srppo.errors import ConfigError


def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="miniature-table, for one; or a study's file.")
    ],
    rows: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ROW|KEY=VALUE]...",
            help="VARIANT, VARIANT/MODEL or MODEL; all if there is none. Settings of all runs.",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="As 0,1,2. Default: the study's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Of its runs and tables. Default: runs/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the runs and what they will take.")
    ] = False,
) -> None:
    """A committed study: its runs, over seeds, its table and figure; goes on where it stopped."""
    from srppo.progress import stdout
    from srppo.study import Study, reproduce, show_study

    overrides = [row for row in rows or [] if "=" in row]
    study = Study.load(name, overrides, out)
    points = study.points([row for row in rows or [] if "=" not in row], _numbers(seeds))
    show_study(study, points, jobs, stdout())
    if dry_run:
        return
    with signals.listening():
        complete = reproduce(study, points, jobs, stdout())
    if not complete:
        raise typer.Exit(1)


def _numbers(seeds: str | None) -> list[int]:
    try:
        return [int(seed) for seed in seeds.split(",")] if seeds is not None else []
    except ValueError as e:
        raise ConfigError(
            f"--seeds {seeds}: not whole numbers with commas between them, so there is nothing to "
            "run. Write, for example, --seeds 0,1,2."
        ) from e
