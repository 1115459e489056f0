"""What a stage trains: from models to a model directory, by way of checkpoints and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.baselines.pairs import train_pairs
from srppo.baselines.weights import extrapolate_weights
from srppo.config import PPOConfig, Recipe, SFTConfig
from srppo.config_controls import ControlConfig
from srppo.data.load import Data
from srppo.errors import ConfigError
from srppo.models.memory import Budget, activation_checkpointing
from srppo.models.roles import Role, Roles
from srppo.models.start import start_sft
from srppo.models.value_head import ValueHead
from srppo.progress import Reporter
from srppo.rollout.check import check_passes
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Sampler
from srppo.train.checkpoint import RunDir
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.sft import train_sft
from srppo.train.steps import Keeper
from srppo.train.update import Metrics


@dataclass(frozen=True)
class Training:
    """The parts that every stage of a run trains with. `name` is where its model goes."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Data
    dir: RunDir
    reporter: Reporter

    def sft(self, name: str, config: SFTConfig, share: float = 1.0) -> None:
        """Stage 1, on that share of the demonstrations, which are in random order.

        Raises:
            ConfigError: there are none.
        """
        if not self.data.train:
            raise ConfigError(
                "data.demonstrations is not set: stage 1 has nothing to train on. Set it."
            )
        role = start_sft(self.recipe.model, self.recipe.seed, config.compute)
        check_passes(role)
        keeper = self._keeper(name)
        with MetricsLog(self.dir.path, name, keeper.metrics) as log, role.active() as model:
            train_sft(
                model,
                self.tokenizer,
                self.data.train[: math.ceil(share * len(self.data.train))],
                config,
                seed=self.recipe.seed,
                log=log,
                reporter=self.reporter,
                keeper=keeper,
                title=name.upper() if name == "sft" else name,
            )
        self.dir.save_model(name, role, self.tokenizer)

    def ppo(
        self,
        name: str,
        base: Role,
        sft: Role,
        config: PPOConfig,
        curve: Callable[[Role], Metrics] | None = None,
    ) -> None:
        """Stage 2; `curve` measures the policy at the steps of `eval.every`."""
        stage = "ppo" if name == "policy" else name
        roles = Roles.begin(base, sft, config.estimator == "ppo", config.compute)
        check_passes(roles.policy)
        budget = Budget(config.max_tokens_per_batch, self.reporter.line)
        sampler = self._engine(roles, config, budget)
        keeper = self._keeper(stage)
        keeper.save_best = lambda: self.dir.save_model(f"best/{name}", roles.policy, self.tokenizer)
        with (
            closing(sampler),
            MetricsLog(self.dir.path, stage, keeper.metrics) as log,
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
                importance_cap=self.recipe.rollout.importance_cap,
                title="PPO" if name == "policy" else name,
            )
        if stopped:
            self.reporter.line(f"{name}: {stopped}")
            self.dir.record.setdefault("stopped", {})[name] = stopped
        self.dir.save_model(name, roles.policy, self.tokenizer)

    def baseline(self, name: str, base: Role, sft: Role, control: ControlConfig) -> None:
        """What is neither of the stages again."""
        policy = sft.successor()
        if control.pairs:
            config = self.recipe.ppo
            budget = Budget(config.max_tokens_per_batch, self.reporter.line)
            keeper = self._keeper(name)
            with MetricsLog(self.dir.path, name, keeper.metrics) as log:
                train_pairs(
                    policy,
                    self._sampler(policy, config, budget, None),
                    self.data.train,
                    control.pairs,
                    seed=self.recipe.seed,
                    log=log,
                    reporter=self.reporter,
                    keeper=keeper,
                    title=name,
                )
        elif control.extrapolate_weights:
            extrapolate_weights(policy, base, control.extrapolate_weights)
        self.dir.save_model(name, policy, self.tokenizer)

    def _keeper(self, stage: str) -> Keeper:
        return Keeper(self.dir.path, stage, self.recipe.checkpoint, self.reporter)

    def _engine(self, roles: Roles, config: PPOConfig, budget: Budget) -> Sampler:
        """What samples the rollouts."""
        settings, data = self.recipe.rollout, self.recipe.data
        eos, longest = self.tokenizer.eos_token_id, data.max_response_tokens
        if settings.engine == "continuous":
            from srppo.rollout.continuous import ContinuousSampler  # late, as the next one

            return ContinuousSampler(
                roles.policy, eos_token_id=eos, max_new_tokens=longest, compute=config.compute
            )
        if settings.engine == "vllm":
            from srppo.rollout.vllm import VLLMSampler

            return VLLMSampler(
                roles.policy,
                settings,
                Path(settings.weight_directory or self.dir.path.resolve()) / "rollout-weights",
                eos_token_id=eos,
                max_new_tokens=longest,
                longest=data.max_prompt_tokens + longest,
            )
        return self._sampler(roles.policy, config, budget, roles.critic)

    def _sampler(
        self, policy: Role, config: PPOConfig, budget: Budget, critic: ValueHead | None
    ) -> HFSampler:
        return HFSampler(
            policy,
            eos_token_id=self.tokenizer.eos_token_id,
            max_new_tokens=self.recipe.data.max_response_tokens,
            max_tokens_per_batch=budget,
            critic=critic,
            compute=config.compute,
        )
