"""A recipe, run: each stage is one method, leaves its output in the run directory and is done once.

demonstrations -> sft -> audit -> ppo -> controls -> evaluate -> report
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers

from srppo import distributed
from srppo.config import PPOConfig, Recipe
from srppo.data.chat import apply_template, closing, set_date
from srppo.data.describe import describe_all, describe_used
from srppo.data.load import fingerprint as data_fingerprint
from srppo.data.load import read_data
from srppo.data.prompts import Prompt
from srppo.errors import ConfigError, RunDirError
from srppo.eval.evaluate import Evaluator, load_scorer
from srppo.eval.in_run import RunBenchmarks, comparison_of
from srppo.eval.models import evaluate_models
from srppo.models.load import fingerprint as model_fingerprint
from srppo.models.load import require_quantizer
from srppo.models.memory import Budget
from srppo.models.precision import check_compute
from srppo.models.roles import Role
from srppo.models.start import check_context, start_frozen, start_tokenizer
from srppo.progress import Reporter
from srppo.provenance import now, provenance
from srppo.report import build
from srppo.report.card import write_cards
from srppo.report.comparison import render
from srppo.rollout.hf import HFSampler
from srppo.train.audit import audit, beta_at, describe_audit, with_found_beta
from srppo.train.checkpoint import RunDir, move_aside
from srppo.train.files import read_json
from srppo.train.reward import bounds_of
from srppo.train.update import Metrics
from srppo.training import Training


class Run:
    """One recipe on its way through the stages. A stage that is done already is left out."""

    def __init__(
        self,
        recipe: Recipe,
        reporter: Reporter | None = None,
        source: str = "",
        *,
        fresh: bool = False,
        allow_change: bool = False,
    ) -> None:
        """Reads the data and opens the run directory; nothing is trained yet.

        Args:
            fresh: start over; a run that is there is moved aside.
            allow_change: go on with one that was begun by another recipe, data, models or code.

        Raises:
            SrppoError: whatever would fail later and can be known now.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.recipe = recipe
        self.reporter = reporter or Reporter(quiet=not distributed.is_first())
        self.budget = Budget(recipe.ppo.max_tokens_per_batch, self.reporter.line)
        """Of passes that train nothing: audit and evaluation."""
        if recipe.model.quantize:
            require_quantizer(recipe.model.quantize)
        check_compute(recipe)
        self.tokenizer = start_tokenizer(recipe.model)
        apply_template(self.tokenizer)
        began = distributed.from_first(lambda: (None if fresh else RunDir.began(recipe)) or now())
        set_date(self.tokenizer, datetime.fromisoformat(began).astimezone())
        check_context(recipe.model, recipe.data)
        self.scorer = load_scorer(recipe.eval.scorer) if recipe.eval.scorer else None
        self.data = read_data(recipe, self.tokenizer)
        if recipe.finds_beta and not self.data.held_out:
            raise ConfigError(
                "ppo.kl_coef=auto needs held-out demonstrations, for it is found on their curve, "
                f"and {self.data.none_held_out}. Or set ppo.kl_coef=0.2."
            )
        inputs = self._inputs()
        if fresh and (old := distributed.from_first(lambda: move_aside(recipe))):
            self.reporter.line(f"starting over: the run that was there is now {old}")
        made_by = {"name": recipe.name, **provenance(recipe, source), "started": began}
        self.dir = RunDir.open(recipe, made_by, inputs, allow_change=allow_change)
        self.benchmarks_wanted = self._benchmarks() if recipe.eval.benchmarks.tasks else None
        self.dir.write_json("data.json", self.data.reports)
        self.dir.write_text("data.txt", describe_all(self.data.reports))
        self.reporter.line(describe_used(self.data, recipe.data.held_out, closing(self.tokenizer)))

    # --- the stages -----------------------------------------------------------------------------

    def sft(self) -> Path:
        """Stage 1; the directory of pi_sft."""
        if self.recipe.model.sft:
            return Path(self.recipe.model.sft)
        with self._stage("sft") as todo:
            if todo:
                self._training.sft("sft", self.recipe.sft)
        return self.dir.path / "sft"

    def audit(self) -> dict[str, Any] | None:
        """The reward audit; None without held-out demonstrations."""
        self._require_sft("audit")
        if not self.data.held_out:
            self.reporter.line(f"audit: left out, for {self.data.none_held_out}")
            return None
        with self._stage("audit") as todo:
            if todo:
                found = self.budget.fit(
                    lambda tokens: audit(
                        self.base,
                        self.pi_sft,
                        self.tokenizer,
                        self.data.held_out[: self.recipe.audit.prompts],
                        self.recipe.ppo.model_copy(update={"max_tokens_per_batch": tokens}),
                        max_response_tokens=self.recipe.data.max_response_tokens,
                        seed=self.recipe.seed,
                        reporter=self.reporter,
                    )
                )
                self.dir.write_json("audit.json", found)
                self.reporter.line(describe_audit(found))
        findings: dict[str, Any] = self.dir.read_json("audit.json")
        return findings

    def ppo(self) -> Path:
        """Stage 2, after the audit; the directory of the aligned model."""
        self._require_sft("ppo")
        self._require_engine()
        self.audit()
        with self._stage("ppo") as todo:
            if todo:
                self._train_ppo("policy", self.recipe.ppo, curve=self._curve)
        return self.dir.path / "policy"

    def controls(self) -> None:
        """The same parts used otherwise, each trained as the recipe says."""
        for name, control in self.recipe.controls.items():
            if control.extrapolate is not None:
                continue
            place = f"controls/{name}"
            changed = self.recipe.with_control(control)
            if control.ppo is not None and self._has_no_beta(changed.ppo):
                self.reporter.line(
                    f"{name}: left out, for the audit finds nothing to extrapolate: with "
                    "ppo.kl_coef=auto the SFT model is what is kept"
                )
                continue
            with self._stage(place) as todo:
                if not todo:
                    continue
                if control.sft is not None:
                    self._training.sft(place, changed.sft)
                elif control.ppo is not None:
                    base = self._halfway() if control.against == "halfway" else self.base
                    self._train_ppo(place, changed.ppo, base)
                else:
                    self._training.baseline(place, self.base, self.pi_sft, control)

    def evaluate(self) -> dict[str, Any]:
        """Every model there is at every temperature; results.json and samples.jsonl.

        Done again when there are other models than the last time.
        """
        names = self._measurable()
        with self._stage("eval", models=names) as todo:
            if todo:
                self._evaluate(names)
        results: dict[str, Any] = self.dir.read_json("results.json")
        return results

    def benchmarks(self) -> list[dict[str, Any]]:
        """Base, SFT model and policy on `eval.benchmarks`: what evals/NAME/results.json hold.

        evals/comparison.html compares them, question by question.
        """
        if not self.benchmarks_wanted:
            return []
        models = {"base": self.recipe.model.base, "sft": str(self.sft())}
        if self.dir.is_done("ppo"):
            models["policy"] = str(self.dir.path / "policy")
        out = self.dir.path / "evals"
        with self._stage("benchmarks", models=list(models)) as todo:
            if todo:
                self.benchmarks_wanted.after(models, out)
                page = distributed.from_first(
                    lambda: render(comparison_of(list(models), out), "html")
                )
                self.dir.write_text("evals/comparison.html", page)
        found = [self.dir.path.glob(f"evals/{name}*/results.json") for name in models]
        return [read_json(path) for paths in found for path in sorted(paths)]

    def report(self) -> Path:
        """The HTML page, and the cards of the models."""
        distributed.from_first(lambda: write_cards(self.dir.path))
        return distributed.from_first(lambda: build(self.dir.path))

    def all(self) -> dict[str, Any]:
        """All stages; the results."""
        self._require_engine()
        self.sft()
        self.ppo()
        self.controls()
        results = self.evaluate()
        self.benchmarks()
        if self.dir.record["finished"] is None:
            self.dir.record["finished"] = now()
            self.dir.save_record()
        self.report()
        return results

    # --- how they are done ----------------------------------------------------------------------

    @cached_property
    def _training(self) -> Training:
        return Training(self.recipe, self.tokenizer, self.data, self.dir, self.reporter)

    def _train_ppo(
        self,
        name: str,
        config: PPOConfig,
        base: Role | None = None,
        curve: Callable[[Role], Metrics] | None = None,
    ) -> None:
        if config.kl_coef == "auto" and (findings := self.audit()):
            config = with_found_beta(config, findings)
            self.reporter.line(f"{name}: ppo.kl_coef=auto is {config.beta:.3g}")
        self._training.ppo(name, base or self.base, self.pi_sft, config, curve)

    def _has_no_beta(self, config: PPOConfig) -> bool:
        """Whether `auto` would find none."""
        findings = self.audit() if config.kl_coef == "auto" else None
        if findings is None:
            return False
        return beta_at(findings["curve"]["lam_star"], config.kl_ref) is None

    def _halfway(self) -> Role:
        """Stage 1 on the first half of the demonstrations, frozen."""
        with self._stage("halfway") as todo:
            if todo:
                self._training.sft("halfway", self.recipe.sft, share=0.5)
        return self.base.sibling(self.dir.path / "halfway")

    def _evaluate(self, names: list[str]) -> None:
        if not self.data.eval_prompts:
            self.reporter.line("evaluation: left out, for no demonstrations were held out for it")
            self.dir.write_json("results.json", {"groups": [], "primary": None, "rows": []})
            return

        def measure(tokens: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            evaluator = self._evaluator(self.data.eval_prompts, tokens)
            return evaluate_models(
                names,
                lambda name: self._sampler(name, evaluator),
                evaluator,
                self.data.held_out,
                self.recipe.eval,
                self.reporter,
            )

        results, samples = self.budget.fit(measure)
        self.dir.write_json("results.json", results)
        self.dir.write_jsonl("samples.jsonl", samples)

    def _measurable(self) -> list[str]:
        """Names of the models that there are by now."""
        names = ["base", "sft"] + (["policy"] if self.dir.is_done("ppo") else [])
        return names + [
            name
            for name, control in self.recipe.controls.items()
            if control.extrapolate is not None or self.dir.is_done(f"controls/{name}")
        ]

    def _sampler(self, name: str, evaluator: Evaluator) -> HFSampler:
        """Loads the model of that name, unless it is base or sft, which stay loaded."""
        if name in ("base", "sft"):
            return evaluator.sampler(self.base if name == "base" else self.pi_sft)
        control = self.recipe.controls.get(name)
        if control and control.extrapolate is not None:
            bounds = bounds_of(self.recipe.ppo)
            return evaluator.sampler(self.pi_sft, self.base, control.extrapolate, bounds)
        path = self.dir.path / ("policy" if name == "policy" else f"controls/{name}")
        like = self.base if control and control.sft is not None else self.pi_sft
        return evaluator.sampler(like.sibling(path))

    def _curve(self, policy: Role) -> Metrics:
        """The evaluation curve's point: `eval/<score>/<group>` at temperature 1."""
        if not self.recipe.eval.every:
            return {}

        def measure(tokens: int) -> list[dict[str, Any]]:
            evaluator = self._evaluator(self.data.curve_prompts, tokens)
            return evaluator.measure(evaluator.sampler(policy), temperature=1.0)

        rows = self.budget.fit(measure)
        curve = {
            f"eval/{name}/{row['group']}": value
            for row in rows
            for name, value in {**row["scores"], "reward": row["reward"]}.items()
        }
        if self.benchmarks_wanted and (benchmarks := self.benchmarks_wanted.during):
            curve |= benchmarks.measure(policy, self.tokenizer)
        return curve

    def _benchmarks(self) -> RunBenchmarks:
        template = str(self.tokenizer.chat_template)
        distributed.from_first(lambda: self.dir.write_text("evals/template.jinja", template))
        return RunBenchmarks(self.recipe, self.dir.path / "evals/template.jinja", self.reporter)

    def _evaluator(self, prompts: list[Prompt], tokens: int) -> Evaluator:
        return Evaluator(
            tokenizer=self.tokenizer,
            prompts=prompts,
            max_new_tokens=self.recipe.data.max_response_tokens,
            seed=self.recipe.seed,
            base=self.base,
            sft=self.pi_sft,
            max_tokens_per_batch=tokens,
            scorer=self.scorer,
        )

    # --- models ---------------------------------------------------------------------------------

    @property
    def base(self) -> Role:
        """pi_base, frozen."""
        return self._frozen[0]

    @property
    def pi_sft(self) -> Role:
        """pi_sft, frozen."""
        return self._frozen[1]

    @cached_property
    def _frozen(self) -> tuple[Role, Role]:
        return start_frozen(self.recipe.model, self.sft(), self.recipe.seed)

    def _inputs(self) -> dict[str, str]:
        """What the run reads, and a hash of it: it goes on only with what it began with, else
        demonstrations that were held out may have been trained on."""
        model = self.recipe.model
        names = [self.data.reports.get(r, {}).get("source") for r in ("demonstrations", "prompts")]
        data = " and ".join(filter(None, names))
        models = filter(None, dict.fromkeys([model.base, model.sft]))
        return {data: data_fingerprint(self.data)} | distributed.from_first(
            lambda: {m: model_fingerprint(m) for m in models}
        )

    def _require_sft(self, stage: str) -> None:
        if not self.recipe.model.sft and not self.dir.is_done("sft"):
            raise RunDirError(
                f"{stage} needs an SFT model, and {self.dir.path} has none yet. Run `srppo sft` "
                "with this recipe first, or set model.sft to a checkpoint that you have."
            )

    def _require_engine(self) -> None:
        """A vLLM server that is absent, or does not fit, is told before hours of other work."""
        settings, data = self.recipe.rollout, self.recipe.data
        if settings.engine == "vllm" and not self.dir.is_done("ppo"):
            from srppo.rollout.vllm_server import VLLMServer  # late: few runs have one

            longest = data.max_prompt_tokens + data.max_response_tokens
            distributed.from_first(lambda: VLLMServer(settings).check(longest))

    # --- record and messages --------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, **facts: Any) -> Iterator[bool]:
        """True if the stage is still to do; remembered as done when the block ends well.

        `facts` are remembered with it; a stage that was done with others is to do again.
        """
        self.dir.require()
        todo = not self.dir.is_done(name, **facts)
        started = time.monotonic()
        yield todo
        if todo:
            gc.collect()  # trainers and models refer to themselves: their weights would stay
            self.dir.mark_done(name, time.monotonic() - started, **facts)
        if not self.recipe.checkpoint.keep_finished:
            self.dir.remove(f"checkpoints/{name}")
