"""Benchmarks of a recipe: checked before anything is trained, asked during it and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srppo.config import Recipe
from srppo.errors import ConfigError
from srppo.eval.compare import compare
from srppo.eval.harness import evaluate
from srppo.eval.judge import Judge
from srppo.eval.judge_local import LocalJudge
from srppo.eval.judge_server import ServerJudge
from srppo.eval.preflight import Settings, prepare
from srppo.eval.subset import Benchmarks
from srppo.progress import Reporter


def judge_of(
    url: str | None, model: str | None, local: str | None, device: str, dtype: str
) -> Judge | None:
    """AlpacaEval's judge: `model` on a server, or a `local` one in this process; None: neither."""
    if url and model:
        return ServerJudge(url, model)
    return LocalJudge(local, device=device, dtype=dtype) if local else None


def check_benchmarks(recipe: Recipe, *, with_base: bool) -> None:
    """Raises ConfigError where `RunBenchmarks` would; without the base if that is not here."""
    settings, judge = _asked(recipe, "auto")
    models = [f"base={recipe.model.base}"] if with_base else []
    prepare(models, settings, judge=judge).require()


def _asked(recipe: Recipe, template: str) -> tuple[Settings, Judge | None]:
    """What the models are asked, and who judges."""
    wanted, model = recipe.eval.benchmarks, recipe.model
    settings = Settings(
        tuple(wanted.tasks),
        limit=wanted.limit,
        max_tokens=wanted.max_tokens,
        seed=recipe.seed,
        data_dir=Path(wanted.data_dir).expanduser() if wanted.data_dir else None,
        chat_template=template,
        batch_tokens=recipe.ppo.max_tokens_per_batch,
        dtype=model.dtype,
        device=model.device,
        shard=model.shard,
        shard_sampling=model.shard_sampling,
    )
    return settings, judge_of(
        wanted.judge_url, wanted.judge_model, wanted.judge, model.device, model.dtype
    )


class RunBenchmarks:
    """Those of one recipe, for its base, SFT model and policy: all through the run's template, the
    base also without."""

    def __init__(self, recipe: Recipe, template: Path, reporter: Reporter) -> None:
        """`template`: a file with the run's chat template.

        Raises:
            ConfigError: all that would fail after training and can be known now.
        """
        wanted = recipe.eval.benchmarks
        self.reporter = reporter
        self.settings, self.judge = _asked(recipe, str(template))
        prepare([f"base={recipe.model.base}"], self.settings, judge=self.judge).require()
        self.during: Benchmarks | None = None
        """Asked while the policy trains."""
        if wanted.every_limit:
            self.during = Benchmarks(
                [task for task in wanted.tasks if task != "alpaca_eval"],
                limit=wanted.every_limit,
                seed=recipe.seed,
                data_dir=self.settings.data_dir,
                max_tokens=wanted.max_tokens,
                max_tokens_per_batch=self.settings.batch_tokens,
            )

    def after(self, models: dict[str, str], out: Path) -> list[dict[str, Any]]:
        """What each model's results.json holds; results lie in `out`/NAME, and are gone on with.

        Raises:
            ConfigError: a task failed; the others are there.
        """
        named = [f"{name}={path}" for name, path in models.items()]
        results = evaluate(named, self.settings, out, self.reporter, judge=self.judge, resume=True)
        records = [found.record for found in results]
        if failed := [f"{r['model']['name']}: {t}" for r in records for t in r["failed"]]:
            raise ConfigError(
                f"benchmarks failed ({', '.join(failed)}; the reasons are above): the others' "
                f"results are in {out}. Mend the cause and run the same command again."
            )
        return records


def comparison_of(names: list[str], out: Path) -> dict[str, Any]:
    """The models of result directories `out`/NAME against the SFT model, as `srppo compare`."""
    return compare({name: out / name for name in names}, against="sft")
