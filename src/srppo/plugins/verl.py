"""The coherent reward for verl; read against 0.9.1.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=CoherentRewardManager
    reward.reward_manager.module.path=pkg://srppo.plugins.verl

scores token ids by `srppo serve-reward`, whose address SRPPO_REWARD_URL holds in every worker. The
reward of a response is one number at its last token. Each token gets its own where verl collects
rewards after sampling (reward.reward_model.enable=True without a resource pool, and a
reward.custom_reward_function.path), for only then it calls `assemble_rm_scores`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from srppo.errors import ConfigError
from srppo.plugins.checks import require_kl, require_unscaled, require_whole_distribution
from srppo.plugins.client import RewardClient

Ids = list[int]
AT_ONCE = 64
"""Requests; the server makes batches of them."""


class CoherentRewardManager(RewardManagerBase):
    """log pi_sft - log pi_base of sampled responses, nats."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        """As verl calls it (verl/trainer/ppo/reward.py); all but `config` is of no use here."""
        super().__init__(config, tokenizer, compute_score)
        check_settings(config)
        self.dense = is_colocated(config)
        self.client = RewardClient.from_environment()
        self.threads = ThreadPoolExecutor(AT_ONCE)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of one response; `reward_score` is a list of one number a token if `dense`."""
        prompt, response = token_ids(data)
        (ratios,) = await asyncio.get_running_loop().run_in_executor(
            self.threads, self.client.score, [prompt], [response]
        )
        reward = sum(ratios)
        return {
            "reward_score": ratios if self.dense else reward,
            "reward_extra_info": {"coherent": reward, "coherent_tokens": len(ratios)},
        }

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[Any]) -> Tensor:
        """(N, T) what `run_single` said, at each token or at the last one; responses are
        right-padded."""
        if not isinstance(scores[0], list):
            return super().assemble_rm_scores(data, scores)
        rewards = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        for row, ratios in zip(rewards, scores, strict=True):
            row[: len(ratios)] = torch.tensor(ratios)
        return rewards


def token_ids(data: Any) -> tuple[Ids, Ids]:
    """Prompt and response of the last sequence, without padding.

    Raises:
        ConfigError: a response of several turns, parts of which the policy did not write.
    """
    item = data[-1:][0]
    prompts, responses = item.batch["prompts"], item.batch["responses"]
    about = item.non_tensor_batch
    if int(about.get("__num_turns__", 2)) > 2:
        raise ConfigError(
            f"a response of {about['__num_turns__']} turns holds text that the policy did not "
            "write, and would be rewarded for it. Use the agent loop single_turn_agent."
        )
    if "prompt_len" in about:  # verl/experimental/agent_loop/agent_loop.py pads these on the right
        return (
            prompts[: int(about["prompt_len"])].tolist(),
            responses[: int(about["response_len"])].tolist(),
        )
    real = item.batch["attention_mask"].bool()
    width = len(prompts)
    return prompts[real[:width]].tolist(), responses[real[width:]].tolist()


def is_colocated(config: Any) -> bool:
    """Whether verl collects rewards after sampling, and so calls `assemble_rm_scores`."""
    model = config.reward.reward_model
    return bool(model.enable and not model.enable_resource_pool)


def check_settings(config: Any) -> None:
    """ConfigError where verl would train for something else."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    require_whole_distribution(
        {name: rollout.get(name) for name in ("temperature", "top_p", "top_k")},
        "actor_rollout_ref.rollout.",
    )
    algorithm = config.algorithm
    if algorithm.use_kl_in_reward:
        require_kl("algorithm.kl_ctrl.kl_coef", algorithm.kl_ctrl.kl_coef, default=0.001)
    elif actor.use_kl_loss:
        name = "actor_rollout_ref.actor.kl_loss_coef"
        require_kl(name, actor.kl_loss_coef, default=0.001)
    else:
        require_kl("algorithm.use_kl_in_reward=False, kl_coef", None, default=None)
    if algorithm.adv_estimator == "grpo":
        scaled = algorithm.norm_adv_by_std_in_grpo
        require_unscaled("algorithm.norm_adv_by_std_in_grpo", scaled, False)
    custom = config.reward.custom_reward_function.path
    if config.reward.reward_model.enable and custom is None:
        raise ConfigError(
            "reward.reward_model.enable=True without reward.custom_reward_function.path: verl "
            "would ask its reward model, and never this manager. Set that path to any file with a "
            "compute_score; the function itself is not called."
        )
