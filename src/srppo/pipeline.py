"""A recipe, run: each stage is one method, leaves its output in the run directory and is done once.

demonstrations -> sft -> audit -> ppo -> controls -> evaluate -> report
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers

from srppo import distributed
from srppo.config import PPOConfig, Recipe, SFTConfig
from srppo.data.chat import apply_template, closing
from srppo.data.describe import describe_all, describe_overlap
from srppo.data.load import fingerprint as data_fingerprint
from srppo.data.load import read_data
from srppo.data.prompts import Prompt
from srppo.errors import ConfigError, RunDirError
from srppo.eval.evaluate import Evaluator, load_scorer
from srppo.eval.models import evaluate_models
from srppo.models.load import fingerprint as model_fingerprint
from srppo.models.load import require_quantizer
from srppo.models.memory import Budget, activation_checkpointing
from srppo.models.roles import Role, Roles
from srppo.models.start import check_context, start_frozen, start_sft, start_tokenizer
from srppo.progress import Reporter
from srppo.provenance import now, provenance
from srppo.report import build
from srppo.report.card import write_cards
from srppo.rollout.hf import HFSampler
from srppo.train.audit import audit
from srppo.train.checkpoint import RunDir, move_aside
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.sft import train_sft
from srppo.train.steps import Keeper
from srppo.train.update import Metrics


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
        self.tokenizer = start_tokenizer(recipe.model)
        apply_template(self.tokenizer)
        check_context(recipe.model, recipe.data)
        self.scorer = load_scorer(recipe.eval.scorer) if recipe.eval.scorer else None
        self.data = read_data(recipe, self.tokenizer)
        inputs = self._inputs()
        if fresh and (old := distributed.from_first(lambda: move_aside(recipe))):
            self.reporter.line(f"starting over: the run that was there is now {old}")
        made_by = {"name": recipe.name, **provenance(recipe, source)}
        self.dir = RunDir.open(recipe, made_by, inputs, allow_change=allow_change)
        self.dir.write_json("data.json", self.data.reports)
        self.dir.write_text("data.txt", describe_all(self.data.reports))
        self._say_data()

    # --- the stages -----------------------------------------------------------------------------

    def sft(self) -> Path:
        """Stage 1; the directory of pi_sft."""
        if self.recipe.model.sft:
            return Path(self.recipe.model.sft)
        with self._stage("sft") as todo:
            if todo:
                self._train_sft("sft", self.recipe.sft)
        return self.dir.path / "sft"

    def audit(self) -> dict[str, Any] | None:
        """The reward audit; None without held-out demonstrations."""
        self._require_sft("audit")
        if not self.data.held_out:
            self.reporter.line("audit: left out, for there are no held-out demonstrations")
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
                self._say_audit(found)
        findings: dict[str, Any] = self.dir.read_json("audit.json")
        return findings

    def ppo(self) -> Path:
        """Stage 2, after the audit; the directory of the aligned model."""
        self._require_sft("ppo")
        self.audit()
        with self._stage("ppo") as todo:
            if todo:
                self._train_ppo("policy", "ppo", self.recipe.ppo, self._curve)
        return self.dir.path / "policy"

    def controls(self) -> None:
        """The same parts used otherwise, each trained as the recipe says."""
        for name, control in self.recipe.controls.items():
            if control.extrapolate is not None:
                continue
            with self._stage(f"controls/{name}") as todo:
                if not todo:
                    continue
                changed = self.recipe.with_control(control)
                if control.sft is not None:
                    self._train_sft(f"controls/{name}", changed.sft)
                else:
                    self._train_ppo(f"controls/{name}", f"controls/{name}", changed.ppo, None)

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

    def report(self) -> Path:
        """The HTML page, and the cards of the models."""
        distributed.from_first(lambda: write_cards(self.dir.path))
        return distributed.from_first(lambda: build(self.dir.path))

    def all(self) -> dict[str, Any]:
        """All stages; the results."""
        self.sft()
        self.ppo()
        self.controls()
        results = self.evaluate()
        if self.dir.record["finished"] is None:
            self.dir.record["finished"] = now()
            self.dir.save_record()
        self.report()
        return results

    # --- how they are done ----------------------------------------------------------------------

    def _train_sft(self, name: str, config: SFTConfig) -> None:
        if not self.data.train:
            raise ConfigError(
                "data.demonstrations is not set: stage 1 has nothing to train on. Set it."
            )
        role = start_sft(self.recipe.model, self.recipe.seed)
        keeper = self._keeper(name)
        with MetricsLog(self.dir.path, name, keeper.metrics) as log, role.active() as model:
            train_sft(
                model,
                self.tokenizer,
                self.data.train,
                config,
                seed=self.recipe.seed,
                log=log,
                reporter=self.reporter,
                keeper=keeper,
                title=name.upper() if name == "sft" else name,
            )
        self.dir.save_model(name, role, self.tokenizer)
        gc.collect()  # the trainer refers to itself: its weights would stay through stage 2

    def _train_ppo(
        self,
        name: str,
        metrics_name: str,
        config: PPOConfig,
        curve: Callable[[Role], Metrics] | None,
    ) -> None:
        roles = Roles.begin(self.base, self.pi_sft, config.estimator == "ppo", config.compute)
        budget = Budget(config.max_tokens_per_batch, self.reporter.line)
        sampler = HFSampler(
            roles.policy,
            eos_token_id=self.tokenizer.eos_token_id,
            max_new_tokens=self.recipe.data.max_response_tokens,
            max_tokens_per_batch=budget,
            critic=roles.critic,
            compute=config.compute,
        )
        keeper = self._keeper(metrics_name)
        keeper.save_best = lambda: self.dir.save_model(f"best/{name}", roles.policy, self.tokenizer)
        with (
            MetricsLog(self.dir.path, metrics_name, keeper.metrics) as log,
            roles.policy.active() as model,
            activation_checkpointing(model, config.gradient_checkpointing),
        ):
            stopped = train_ppo(
                roles,
                sampler,
                [p.ids for p in self.data.prompts],
                config,
                seed=self.recipe.seed,
                log=log,
                reporter=self.reporter,
                evaluate=(lambda: curve(roles.policy)) if curve else None,
                evaluate_every=self.recipe.eval.every,
                keeper=keeper,
                budget=budget,
                title="PPO" if name == "policy" else name,
            )
        if stopped:
            self.reporter.line(f"{name}: {stopped}")
            self.dir.record.setdefault("stopped", {})[name] = stopped
        self.dir.save_model(name, roles.policy, self.tokenizer)

    def _keeper(self, stage: str) -> Keeper:
        return Keeper(self.dir.path, stage, self.recipe.checkpoint, self.reporter)

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
            return evaluator.sampler(self.pi_sft, self.base, control.extrapolate)
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
        return {
            f"eval/{name}/{row['group']}": value
            for row in rows
            for name, value in {**row["scores"], "reward": row["reward"]}.items()
        }

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

    # --- record and messages --------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, **facts: Any) -> Iterator[bool]:
        """True if the stage is still to do; remembered as done when the block ends well.

        `facts` are remembered with it; a stage that was done with others is to do again.
        """
        todo = not self.dir.is_done(name, **facts)
        started = time.monotonic()
        yield todo
        if todo:
            self.dir.mark_done(name, time.monotonic() - started, **facts)
        if not self.recipe.checkpoint.keep_finished:
            self.dir.remove(f"checkpoints/{name}")

    def _say_data(self) -> None:
        for role in ("demonstrations", "prompts", "eval"):
            report = self.data.reports.get(role)
            if report is None:
                continue
            dropped = ", ".join(f"{n} {reason}" for reason, n in report["dropped"].items())
            self.reporter.line(
                f"{role}: {report['used']} of {report['rows']} rows of {report['source']}"
                + (f"; dropped: {dropped}" if dropped else "")
                + (f"; {report['truncated']} truncated" if report["truncated"] else "")
            )
        self.reporter.line(
            f"stage 1 trains on {len(self.data.train)} demonstrations, {len(self.data.held_out)} "
            f"are held out; stage 2 has {len(self.data.prompts)} prompts"
        )
        self.reporter.line(describe_overlap(self.data.reports["overlap"]).strip())
        if note := closing(self.tokenizer):
            self.reporter.line(f"note: {note}")

    def _say_audit(self, findings: dict[str, Any]) -> None:
        curve, reward = findings["curve"], findings["reward"]
        means = "  ".join(f"{name} {r['mean']:+.2f}" for name, r in reward.items())
        self.reporter.line(f"audit: mean reward in nats  {means}")
        self.reporter.line(
            f"audit: held-out NLL {curve['nll_sft']:.2f} at SFT, least at lambda="
            f"{curve['lam_star']:g}; the recipe aims at lambda={curve['lam_recipe']:g}: "
            f"{curve['nll_recipe']:.2f} nats"
        )
        for warning in findings["warnings"]:
            self.reporter.line(f"audit WARNING: {warning}")
