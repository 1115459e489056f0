"""The coherent reward for OpenRLHF; read against 0.11.2.

    python -m srppo.plugins.openrlhf ARGUMENTS       as `python -m openrlhf.cli.train_ppo_ray`

checks the arguments, adds this file as `--train.agent_func_path`, and starts OpenRLHF. The agent
scores the token ids that vLLM sampled. As `--reward.remote_url`, this file scores text: ids may
drift, errors are swallowed by OpenRLHF. Both need `srppo serve-reward` and SRPPO_REWARD_URL.
"""

from __future__ import annotations

import argparse
import asyncio
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor

from srppo.errors import ConfigError
from srppo.plugins.checks import (
    require_kl,
    require_no_clip,
    require_unscaled,
    require_whole_distribution,
)
from srppo.plugins.client import RewardClient

AT_ONCE = 64
"""Requests; the server makes batches of them."""
USUAL_CLIP = 10.0
"""OpenRLHF's own --reward.clip_range; how often it would have acted is logged."""


class AgentExecutor(SingleTurnAgentExecutor):
    """One response to a prompt, rewarded with log pi_sft - log pi_base of its very tokens."""

    def __init__(self, client: RewardClient | None = None) -> None:
        super().__init__()
        self.client = client or RewardClient.from_environment()
        self.threads = ThreadPoolExecutor(AT_ONCE)

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """What OpenRLHF makes an experience of; an error ends the training, as it should."""
        output: dict[str, Any] = await super().execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
        )
        ids = output["observation_tokens"]
        ((start, end),) = output["action_ranges"]
        if not output["truncated"]:
            _require_end(ids[end - 1], hf_tokenizer)
        (ratios,) = await asyncio.get_running_loop().run_in_executor(
            self.threads, self.client.score, [ids[:start]], [ids[start:end]]
        )
        reward = sum(ratios)
        logs = {
            "coherent_tokens": float(len(ratios)),
            "coherent_beyond_10": float(abs(reward) > USUAL_CLIP),
        }
        return output | {"reward": reward, "scores": reward, "extra_logs": logs}


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """The form of `--reward.remote_url FILE.py`; OpenRLHF passes one query at a time."""
    rewards = torch.tensor(RewardClient.from_environment().reward_text(queries, prompts))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def check_arguments(arguments: list[str]) -> None:
    """ConfigError where train_ppo_ray would train for something else; its defaults as in 0.11.2
    (openrlhf/cli/train_ppo_ray.py)."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--reward.clip_range", type=float, nargs=2, default=(-10.0, 10.0))
    parser.add_argument("--algo.kl.init_coef", type=float, default=0.01)
    parser.add_argument("--rollout.temperature", type=float, default=1.0)
    parser.add_argument("--rollout.top_p", type=float, default=1.0)
    parser.add_argument("--algo.advantage.estimator", default="gae")
    parser.add_argument("--reward.stop_properly_penalty_coef", type=float)
    given = vars(parser.parse_known_args(arguments)[0])

    require_no_clip(
        "--reward.clip_range",
        given["reward.clip_range"],
        "Add --reward.clip_range -1000000 1000000 (argparse does not take -1e6).",
    )
    require_kl("--algo.kl.init_coef", given["algo.kl.init_coef"], default=0.01)
    sampling = {name: given[f"rollout.{name}"] for name in ("temperature", "top_p")}
    require_whole_distribution(sampling, "--rollout.")
    if given["algo.advantage.estimator"] == "group_norm":
        require_unscaled("--algo.advantage.estimator", "group_norm", "rloo")
    coefficient = given["reward.stop_properly_penalty_coef"]
    if coefficient is not None and coefficient >= 0:
        raise ConfigError(
            f"--reward.stop_properly_penalty_coef {coefficient:g} multiplies the reward of a "
            "response that was cut off: where that is negative, being cut off would be rewarded. "
            "Leave it out, or give the reward of such responses as a negative number."
        )


def _require_end(last: int, tokenizer: Any) -> None:
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if last not in control | {tokenizer.eos_token_id}:
        raise ConfigError(
            f"a response that ended by itself ends with the ordinary token {last}: the reward "
            "would lack the decision to end. Let EOS end responses, not a stop string."
        )


def main(arguments: list[str]) -> None:
    """Check, then run OpenRLHF's own command line in this process."""
    check_arguments(arguments)
    RewardClient.from_environment().model()  # there, and lets us in
    sys.argv = ["train_ppo_ray", "--train.agent_func_path", __file__, *arguments]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
