"""`srppo data check`: parse, call one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True)


@app.command("check")
def data_check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Preset, file, directory, glob, hub name owner/name:config@revision, generator; "
            "or a recipe, for all that its run would read.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings on top of a recipe."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its tokenizer and template; none: lengths in bytes.")
    ] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="As prompts of stage 2.")] = False,
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    columns: Annotated[
        list[str],
        typer.Option("--column-map", metavar="KNOWN=OWN", help="prompt=Question; once for each."),
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Stop after so many usable rows.")] = None,
    turns: Annotated[Literal["all", "last"], typer.Option(help="Turns with loss.")] = "all",
    max_prompt_tokens: Annotated[int, typer.Option(help="As in a recipe, with --model.")] = 1024,
    max_response_tokens: Annotated[int, typer.Option(help="As in a recipe, with --model.")] = 1024,
    dropped: Annotated[
        Path | None, typer.Option(help="Write place and reason of every dropped row here.")
    ] = None,
) -> None:
    """What a run would use of SOURCE, what not and why, and what the model will see."""
    from srppo.data_check import check

    settings = {
        "split": split,
        "assistant_turns": turns,
        "max_prompt_tokens": max_prompt_tokens,
        "max_response_tokens": max_response_tokens,
    }
    options = {"model": model, "prompts": prompts, "limit": limit, "dropped": dropped}
    check(source, settings, columns, overrides, **options)
