"""`srppo serve-reward`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Directory = Annotated[str, typer.Option(metavar="DIR", help="A model directory or a hub name.")]


def serve_reward(
    base: Directory,
    sft: Annotated[
        str, typer.Option(metavar="DIR", help="Likewise, or a LoRA adapter over the base.")
    ],
    host: Annotated[str, typer.Option(help="Other machines need --token-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the token to ask for."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number format of the weights.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Scored together: memory and speed.")
    ] = 16384,
    max_queue_tokens: Annotated[
        int, typer.Option(min=1, help="Waiting, and of one request; beyond it clients wait.")
    ] = 262144,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds from a request to its answer.")
    ] = 120.0,
) -> None:
    """The coherent reward over HTTP, for TRL, OpenRLHF and verl (docs/plugins.md)."""
    from srppo.serve.limits import Limits
    from srppo.serve.server import serve

    serve(
        base,
        sft,
        host=host,
        port=port,
        token_env=token_env,
        dtype=dtype,
        device=device,
        limits=Limits(max_batch_tokens, max_queue_tokens, timeout),
        say=lambda address: typer.echo(f"Scoring at {address}"),
    )
