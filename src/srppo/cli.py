"""The command line: parse, call one function, turn errors into messages."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srppo import __version__, cli_data, cli_eval, signals
from srppo.cli_compare import compare as compare_models
from srppo.cli_reproduce import reproduce
from srppo.cli_serve import serve_reward
from srppo.errors import ConfigError, SrppoError

if TYPE_CHECKING:
    from srppo.pipeline import Run

app = typer.Typer(
    name="srppo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align a language model from demonstrations alone, with Self-Rewarding PPO.",
    epilog="Exit codes: 0 done, 1 a part failed (one of several runs, a task of an evaluation) or "
    "there was nothing to audit, 2 it cannot go on (the message says why), 130 interrupted, 143 "
    "terminated: what a run has done is kept, the same command goes on.",
)

RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file; recipes/miniature.yaml is one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings on top of the recipe: ppo.kl_coef=0.5"),
]
Source = Annotated[
    str, typer.Argument(metavar="DIR", help="A run directory (its policy) or a model directory.")
]
Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16"})
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; the run that is there is moved aside.")
]
AllowChange = Annotated[
    bool,
    typer.Option(
        "--allow-change",
        help="Go on with a run that was begun by another recipe, data, models or code.",
    ),
]
RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Finished runs.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


VersionFlag = typer.Option(
    "--version", callback=_say_version, is_eager=True, help="Print the version, and nothing else."
)


@app.callback()
def options(version: Annotated[bool, VersionFlag] = False) -> None:
    """Those of no command."""


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would do, take and need.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --dry-run: plan for this one, as H100; else for this machine."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="With --dry-run: what it has to fit into, as 80GB.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="With --dry-run --nodes: bytes/s of each GPU to other machines; 50GB."),
    ] = None,
    fresh: Fresh = False,
    allow_change: AllowChange = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines; give each the same command.")] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --nodes: the first of them.")
    ] = None,
) -> None:
    """Both stages, evaluation and report; one that was interrupted goes on where it was."""
    from srppo.progress import stdout
    from srppo.report.terminal import changed_on_the_way, result_table

    if dry_run:
        _plan(recipe, overrides, gpu, memory, nproc or 1, nodes, network)
        return
    planned = {"--gpu": gpu, "--memory": memory, "--network": network}
    if given := [name for name, value in planned.items() if value]:
        raise ConfigError(
            f"{given[0]} without --dry-run has no effect on a run. Add --dry-run, or leave it out "
            "and set model.device."
        )
    if nproc or nodes > 1:
        flags = ["--fresh"] * fresh + ["--allow-change"] * allow_change
        raise typer.Exit(
            _launch(nproc or 1, ["run", recipe, *(overrides or []), *flags], nodes, rendezvous)
        )
    with signals.listening():
        this = _start(recipe, overrides, fresh, allow_change)
        results = this.all()
    if results["rows"]:
        stdout().print(result_table(results))
    if found := this.benchmarks():
        from srppo.eval.show import show_results

        show_results(found, stdout())
        stdout().print(f"Benchmarks: {this.dir.path / 'evals/comparison.html'}")
    for line in changed_on_the_way(this.dir.record):
        typer.echo(line)
    stdout().print(f"Model:  {this.dir.path / 'policy'}\nReport: {this.dir.path / 'report.html'}")


@app.command()
def sft(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    allow_change: AllowChange = False,
) -> None:
    """Stage 1 alone: fine-tune the base model on the demonstrations."""
    with signals.listening():
        model = _start(recipe, overrides, fresh, allow_change).sft()
    typer.echo(f"Model: {model}")


@app.command()
def audit(
    recipe: RecipePath, overrides: Overrides = None, allow_change: AllowChange = False
) -> None:
    """Is the reward worth climbing? Needs stage 1, or model.sft=DIR."""
    this = _start(recipe, overrides, allow_change=allow_change)
    findings = this.audit()
    if findings is None:
        typer.echo(f"No audit. Report: {this.report()}")
        raise typer.Exit(1)
    for warning in findings["warnings"]:
        typer.echo(f"WARNING: {warning}")
    typer.echo(f"{len(findings['warnings'])} warning(s). Report: {this.report()}")


@app.command()
def ppo(recipe: RecipePath, overrides: Overrides = None, allow_change: AllowChange = False) -> None:
    """Stage 2 alone: audit, then PPO. Needs stage 1, or model.sft=DIR."""
    with signals.listening():
        this = _start(recipe, overrides, allow_change=allow_change)
        model = this.ppo()
    typer.echo(f"Model:  {model}\nReport: {this.report()}")


@app.command()
def sweep(
    recipe: RecipePath,
    settings: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE,VALUE...", help="ppo.kl_coef=0.2,0.5; or one value."),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs.")] = False,
) -> None:
    """Every combination of settings, one run after the other; the same command goes on."""
    from srppo import sweep as grids
    from srppo.progress import stdout

    points = grids.grid(recipe, settings)
    if dry_run:
        grids.show_grid(points, stdout())
        return
    with signals.listening():
        complete = grids.sweep(points, stdout())
    if not complete:
        raise typer.Exit(1)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
) -> None:
    """Write RUN_DIR/report.html and the models' cards anew."""
    from srppo.report import build
    from srppo.report.card import write_cards

    write_cards(run_dir)
    typer.echo(f"Report: {build(run_dir)}")


@app.command()
def summary(run_dirs: RunDirs) -> None:
    """Means and 95% intervals over runs of one recipe with different seeds, as Markdown."""
    from srppo.report.summary import summarise

    typer.echo(summarise(run_dirs), nl=False)


@app.command()
def chat(
    directory: Source,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Another model beside it; may be repeated."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of all models, nothing cut off; 0 is greedy. Default: each its own."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: each its own, or 512.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same answers.")] = 0,
) -> None:
    """Talk to a model, or to several side by side; reads standard input where it is piped."""
    from srppo.chat.terminal import converse

    converse(
        directory,
        compare or [],
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        dtype=dtype.value,
        device=device,
        seed=seed,
    )


@app.command()
def export(
    directory: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Make an adapter part of the weights below it.")
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format. Default: as they are.")
    ] = None,
) -> None:
    """Write a model of its own: safetensors, tokenizer, template, card; adapters merged or not."""
    from srppo.publish import export

    typer.echo(f"Model: {export(directory, out, merge=merge, dtype=dtype and dtype.value)}")


@app.command()
def push(
    directory: Source,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Name on the hub.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
) -> None:
    """Put a model with its card on the Hugging Face hub, in one commit."""
    from srppo.publish import push

    typer.echo(f"Pushed: {push(directory, repository, private=private)}")


app.command("reproduce")(reproduce)
app.command("compare")(compare_models)
app.add_typer(
    cli_eval.app,
    name="eval",
    help="Measure models on IFEval, GSM8K, GPQA and AlpacaEval, or score stored responses.",
)
app.add_typer(cli_data.app, name="data", help="Look at data before anything is trained.")
app.command("serve-reward")(serve_reward)


def _plan(
    recipe: str,
    overrides: list[str] | None,
    gpu: str | None,
    memory: str | None,
    nproc: int,
    nodes: int,
    network: str | None,
) -> None:
    from srppo.config import load_recipe

    checked = load_recipe(recipe, overrides)
    from srppo.plan.device import parse_bytes
    from srppo.plan.exchange import Group
    from srppo.plan.known import NETWORK
    from srppo.plan.show import show_plan
    from srppo.progress import stdout

    speed = parse_bytes(network, "--network") if network else NETWORK
    if not show_plan(checked, stdout(), gpu, memory, Group(nproc, nodes, speed)):
        raise typer.Exit(2)


def _launch(nproc: int, arguments: list[str], nodes: int, rendezvous: str | None) -> int:
    from srppo.distributed import launch

    if nodes > 1 and not rendezvous:
        raise ConfigError(
            f"--nodes {nodes} without --rendezvous: the machines would not find each other. Add "
            "--rendezvous HOST:29500 with the name of the first one, the same on all."
        )
    return launch(nproc, arguments, nodes, rendezvous)


def _start(
    recipe: str, overrides: list[str] | None, fresh: bool = False, allow_change: bool = False
) -> Run:
    import srppo

    return srppo.start(recipe, *(overrides or []), fresh=fresh, allow_change=allow_change)


def _joined() -> AbstractContextManager[None]:
    """One of several processes, if it was started as such."""
    if "WORLD_SIZE" not in os.environ:
        return nullcontext()  # `srppo --help` stays free of torch
    from srppo import distributed

    return distributed.joined()


def _which() -> str:
    if "WORLD_SIZE" not in os.environ:
        return ""
    from srppo import distributed

    return f" in {distributed.name()}"


def _no_path(error: OSError | RuntimeError) -> str | None:
    """What is to be said where no file was looked for, since the system knows no such path."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return (
            f"{str(error.filename)[:60]!r}... is too long for a path: nothing can be read or "
            "written there. Give a shorter one."
        )
    if str(error).startswith("Could not determine home directory"):
        return (
            "a path begins with ~ and the name of a user that there is not: nothing can be read or "
            "written there. Write ~/ for your own directory, or the whole path."
        )
    return None


def main() -> None:
    """Entry point. Errors that a user can meet end with exit code 2 and no traceback."""
    # Threads that wait for each other spin for a while, by default so long that a run beside other
    # work takes 6 to 20 times as long (docs/LOG.md). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with _joined():
            app()
    except SrppoError as e:
        from srppo.progress import VISIBLE

        typer.echo(f"error{_which()}: {str(e).translate(VISIBLE)}", err=True)
        sys.exit(e.exit_code)
    except (OSError, RuntimeError) as e:
        if (said := _no_path(e)) is None:
            raise
        typer.echo(f"error{_which()}: {said}", err=True)
        sys.exit(2)
    except signals.Interrupted as e:
        typer.echo(f"{e}: the same command goes on from here", err=True)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
