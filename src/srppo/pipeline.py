"""A recipe, run: each stage is one method, leaves its output in the run directory and is done once.

demonstrations -> sft -> audit -> ppo -> controls -> evaluate -> report
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.baselines.pairs import train_pairs
from srppo.baselines.weights import extrapolate_weights
from srppo.config import PPOConfig, Recipe, SFTConfig
from srppo.config_controls import ControlConfig
from srppo.data.chat import apply_template, closing
from srppo.data.describe import describe_all, describe_used
from srppo.data.load import fingerprint, read_data
from srppo.data.prompts import Prompt
from srppo.errors import ConfigError, RunDirError
from srppo.eval.evaluate import Evaluator, load_scorer
from srppo.eval.models import evaluate_models
from srppo.models.load import (
    check_same_tokens,
    context_length,
    has_tokenizer,
    is_adapter,
    load_tokenizer,
    require_quantizer,
)
from srppo.models.memory import activation_checkpointing
from srppo.models.roles import Role, Roles
from srppo.models.start import start_frozen, start_sft
from srppo.models.value_head import ValueHead
from srppo.progress import Reporter
from srppo.provenance import now, provenance
from srppo.report import build
from srppo.report.card import write_cards
from srppo.rollout.hf import HFSampler
from srppo.train.audit import audit, describe_audit
from srppo.train.checkpoint import RunDir
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.sft import train_sft
from srppo.train.update import Metrics


class Run:
    """One recipe on its way through the stages. A stage that is done already is left out."""

    def __init__(self, recipe: Recipe, reporter: Reporter | None = None, source: str = "") -> None:
        """Reads the data and opens the run directory; nothing is trained yet.

        Raises:
            SrppoError: whatever would fail later and can be known now.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.recipe = recipe
        self.reporter = reporter or Reporter()
        if recipe.model.quantize:
            require_quantizer(recipe.model.quantize)
        self.tokenizer = self._tokenizer()
        self._check_context()
        self.scorer = load_scorer(recipe.eval.scorer) if recipe.eval.scorer else None
        self.data = read_data(recipe, self.tokenizer)
        self.dir = RunDir.open(recipe, {"name": recipe.name, **provenance(recipe, source)})
        self._check_same_data()
        self.dir.write_json("data.json", self.data.reports)
        self.dir.write_text("data.txt", describe_all(self.data.reports))
        self.reporter.line(describe_used(self.data, closing(self.tokenizer)))

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
                found = audit(
                    self.base,
                    self.pi_sft,
                    self.tokenizer,
                    self.data.held_out[: self.recipe.audit.prompts],
                    self.recipe.ppo,
                    max_response_tokens=self.recipe.data.max_response_tokens,
                    seed=self.recipe.seed,
                    reporter=self.reporter,
                )
                self.dir.write_json("audit.json", found)
                self.reporter.line(describe_audit(found))
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
            place = f"controls/{name}"
            with self._stage(place) as todo:
                if not todo:
                    continue
                changed = self.recipe.with_control(control)
                if control.sft is not None:
                    self._train_sft(place, changed.sft)
                elif control.ppo is not None:
                    base = self._halfway() if control.against == "halfway" else self.base
                    self._train_ppo(place, place, changed.ppo, None, base)
                else:
                    self._train_baseline(place, control)

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
        write_cards(self.dir.path)
        return build(self.dir.path)

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

    def _train_sft(self, name: str, config: SFTConfig, share: float = 1.0) -> None:
        """On that share of the demonstrations, which are in random order."""
        if not self.data.train:
            raise ConfigError(
                "data.demonstrations is not set: stage 1 has nothing to train on. Set it."
            )
        role = start_sft(self.recipe.model, self.recipe.seed)
        with MetricsLog(self.dir.path, name) as log, role.active() as model:
            train_sft(
                model,
                self.tokenizer,
                self.data.train[: math.ceil(share * len(self.data.train))],
                config,
                seed=self.recipe.seed,
                log=log,
                reporter=self.reporter,
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
        base: Role | None = None,
    ) -> None:
        roles = Roles.begin(base or self.base, self.pi_sft, critic=config.estimator == "ppo")
        sampler = self._sampler_of(roles.policy, config, roles.critic)
        with (
            MetricsLog(self.dir.path, metrics_name) as log,
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
                title="PPO" if name == "policy" else name,
            )
        if stopped:
            self.reporter.line(f"{name}: {stopped}")
            self.dir.record.setdefault("stopped", {})[name] = stopped
        self.dir.save_model(name, roles.policy, self.tokenizer)

    def _sampler_of(self, policy: Role, config: PPOConfig, critic: ValueHead | None) -> HFSampler:
        return HFSampler(
            policy,
            eos_token_id=self.tokenizer.eos_token_id,
            max_new_tokens=self.recipe.data.max_response_tokens,
            max_tokens_per_batch=config.max_tokens_per_batch,
            critic=critic,
            compute=config.compute,
        )

    def _train_baseline(self, name: str, control: ControlConfig) -> None:
        """What is neither of the stages again."""
        policy = self.pi_sft.successor()
        if control.pairs:
            with MetricsLog(self.dir.path, name) as log:
                train_pairs(
                    policy,
                    self._sampler_of(policy, self.recipe.ppo, None),
                    self.data.train,
                    control.pairs,
                    seed=self.recipe.seed,
                    log=log,
                    reporter=self.reporter,
                    title=name,
                )
        elif control.extrapolate_weights:
            extrapolate_weights(policy, self.base, control.extrapolate_weights)
        self.dir.save_model(name, policy, self.tokenizer)

    def _halfway(self) -> Role:
        """Stage 1 on the first half of the demonstrations, frozen."""
        with self._stage("halfway") as todo:
            if todo:
                self._train_sft("halfway", self.recipe.sft, share=0.5)
        return self.base.sibling(self.dir.path / "halfway")

    def _evaluate(self, names: list[str]) -> None:
        if not self.data.eval_prompts:
            self.reporter.line("evaluation: left out, for no demonstrations were held out for it")
            self.dir.write_json("results.json", {"groups": [], "primary": None, "rows": []})
            return
        evaluator = self._evaluator(self.data.eval_prompts)
        results, samples = evaluate_models(
            names,
            lambda name: self._sampler(name, evaluator),
            evaluator,
            self.data.held_out,
            self.recipe.eval,
            self.reporter,
        )
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
        evaluator = self._evaluator(self.data.curve_prompts)
        rows = evaluator.measure(evaluator.sampler(policy), temperature=1.0)
        return {
            f"eval/{name}/{row['group']}": value
            for row in rows
            for name, value in {**row["scores"], "reward": row["reward"]}.items()
        }

    def _evaluator(self, prompts: list[Prompt]) -> Evaluator:
        return Evaluator(
            tokenizer=self.tokenizer,
            prompts=prompts,
            max_new_tokens=self.recipe.data.max_response_tokens,
            seed=self.recipe.seed,
            base=self.base,
            sft=self.pi_sft,
            max_tokens_per_batch=self.recipe.ppo.max_tokens_per_batch,
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

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The SFT model's where there is one, checked against the base's."""
        model = self.recipe.model
        tokenizer = load_tokenizer(model.base)
        if model.sft and has_tokenizer(model.sft):
            base, tokenizer = tokenizer, load_tokenizer(model.sft)
            check_same_tokens(base, tokenizer, model.base, model.sft)
        apply_template(tokenizer)
        return tokenizer

    def _check_context(self) -> None:
        data = self.recipe.data
        longest = data.max_prompt_tokens + data.max_response_tokens
        names = (self.recipe.model.base, self.recipe.model.sft)
        for name in (n for n in names if n and not is_adapter(n)):
            context = context_length(name)
            if context is not None and longest > context:
                raise ConfigError(
                    f"data.max_prompt_tokens={data.max_prompt_tokens} + data.max_response_tokens="
                    f"{data.max_response_tokens} = {longest} is more than the {context} positions "
                    f"of {name!r}: long sequences would be scored wrongly. Try {context // 2} "
                    "for each."
                )

    def _check_same_data(self) -> None:
        """A run goes on only with the data that it began with."""
        now_read = fingerprint(self.data)
        if self.dir.record.setdefault("data_sha256", now_read) != now_read:
            raise RunDirError(
                f"the data of {self._sources()} is not what {self.dir.path} began with: "
                "demonstrations that were held out may have been trained on. Restore the data, or "
                "set output_dir to a new directory."
            )
        self.dir.save_record()

    def _sources(self) -> str:
        names = [
            self.data.reports.get(role, {}).get("source") for role in ("demonstrations", "prompts")
        ]
        return " and ".join(filter(None, names))

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
        if self.dir.is_done(name, **facts):
            yield False
            return
        started = time.monotonic()
        yield True
        self.dir.mark_done(name, time.monotonic() - started, **facts)
