"""What the plugins need of OpenRLHF and verl, transcribed from their wheels, shortened to text.

Tests run against these, and against the wheels themselves where `make engines` has installed them:
what passes here and fails there is a transcript that has aged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


class SingleTurnAgentExecutor:
    """openrlhf 0.11.2, openrlhf/utils/agent.py."""

    def __init__(self, remote_rm_url=None):
        assert remote_rm_url is None

    async def execute(
        self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None
    ):
        prompt_token_ids = hf_tokenizer(text=prompt, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0].tolist()
        prompt_token_ids = prompt_token_ids[-(max_length - sampling_params.max_tokens) :]
        request_output = await llm_engine.generate(
            prompt_token_ids, sampling_params, multi_modal_data=None
        )
        generation_output = request_output.outputs[0]
        observation_token_ids = prompt_token_ids + generation_output.token_ids
        return {
            "prompt": prompt,
            "label": label,
            "images": images,
            "mm_train_inputs": None,
            "observation_tokens": observation_token_ids,
            "action_ranges": [(len(prompt_token_ids), len(observation_token_ids))],
            "rollout_log_probs": None,
            "truncated": generation_output.finish_reason == "length",
            "reward": None,
            "scores": None,
            "extra_logs": {},
        }


class RewardManagerBase:
    """verl 0.9.1, verl/experimental/reward_loop/reward_manager/base.py."""

    def __init__(self, config, tokenizer, compute_score):
        self.config = config
        self.tokenizer = tokenizer
        self.compute_score = compute_score

    @classmethod
    def assemble_rm_scores(cls, data, scores):
        prompt_length = data.batch["prompts"].size(1)
        valid_response_length = data.batch["attention_mask"][:, prompt_length:].sum(dim=1)
        rm_scores = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        rows = torch.arange(rm_scores.size(0))
        rm_scores[rows, valid_response_length - 1] = rm_scores.new_tensor(scores)
        return rm_scores


@dataclass
class Data:
    """verl 0.9.1, verl/protocol.py, DataProto: rows of tensors and of anything."""

    batch: dict[str, torch.Tensor]
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)

    def __len__(self):
        return len(self.batch["responses"])

    def __getitem__(self, rows):
        return Data(
            {name: x[rows] for name, x in self.batch.items()},
            {name: x[rows] for name, x in self.non_tensor_batch.items()},
        )
