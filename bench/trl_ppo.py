"""TRL 1.12's PPOTrainer with the coherent reward. Runs in `.bench/`, through run.py.

    .bench/bin/python bench/trl_ppo.py DIR STEPS SEED [MICROBATCH]

The reward goes where that trainer takes one: a "reward model", asked for one number per position
and read at the last one. It is never told where the response starts, so all prompts have to have
one length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.trainer.utils import selective_log_softmax

from workload import StepClock, load, load_case

SCORING_ROWS = 16
"""Responses per forward pass of the shim: beyond this, more memory and no more speed."""


class CoherentReward(nn.Module):
    """log pi_sft - log pi_base of the response so far, at each of its positions."""

    base_model_prefix = "backbone"

    def __init__(self, sft: PreTrainedModel, base: PreTrainedModel, prompt_tokens: int) -> None:
        super().__init__()
        self.sft, self.base, self.prompt_tokens = sft, base, prompt_tokens
        self.score = nn.Identity()
        self.lengths: list[int] = []

    @property
    def backbone(self) -> CoherentReward:
        """The trainer calls this, then `score` on its hidden states."""
        return self

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: object
    ) -> BaseModelOutput:
        P = self.prompt_tokens
        inputs = (x.split(SCORING_ROWS) for x in (input_ids, attention_mask, position_ids))
        ratios = torch.cat(
            [
                self.logprobs(self.sft, *rows) - self.logprobs(self.base, *rows)
                for rows in zip(*inputs, strict=True)
            ]
        )
        mask = attention_mask[:, P:].bool()
        self.lengths += mask.sum(1).tolist()
        so_far = torch.where(mask, ratios, 0.0).cumsum(1)
        rewards = torch.cat([so_far.new_zeros(len(so_far), P), so_far], 1)
        return BaseModelOutput(hidden_states=(rewards[..., None],))

    def logprobs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        """(b, T) nats of the response tokens."""
        responses = ids[:, self.prompt_tokens :]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=responses.shape[1] + 1,
        ).logits[:, :-1]
        return selective_log_softmax(logits, responses)


class Ticks(TrainerCallback):
    """Reads the clock at the end of each step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_end(self, *_: object, **__: object) -> None:
        self.clock.tick()


def ppo_trainer(
    directory: Path,
    steps: int,
    callbacks: list[TrainerCallback],
    *,
    policy: PreTrainedModel | None = None,
    value_model: PreTrainedModel | None = None,
    optimizers: tuple = (None, None),
    **settings: object,
) -> PPOTrainer:
    """As TRL's documentation has it; bench/README.md says why these settings."""
    case, prompts = load_case(directory)
    config = {
        "per_device_train_batch_size": case.prompts,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "total_episodes": case.prompts * steps,
        "response_length": case.response_tokens,
        "stop_token": "eos",
        "temperature": 1.0,
        "kl_coef": 0.2,
        "gamma": 1.0,
        "lam": 1.0,
        "learning_rate": 1e-6,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "output_dir": str(directory / "trl-ppo"),
    }
    sft, base = load(directory, "sft"), load(directory, "base")
    return PPOTrainer(
        args=PPOConfig(**config | settings),
        processing_class=AutoTokenizer.from_pretrained(directory / "sft"),
        model=policy or load(directory, "sft"),
        ref_model=load(directory, "sft"),
        reward_model=CoherentReward(sft, base, case.prompt_tokens),
        value_model=value_model or zero_value_model(directory),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def zero_value_model(directory: Path) -> PreTrainedModel:
    """The SFT model's trunk with a head that starts at zero, as ours does."""
    model = AutoModelForSequenceClassification.from_pretrained(
        directory / "sft", num_labels=1, dtype=torch.float32
    )
    nn.init.zeros_(model.score.weight)
    return model


def main() -> None:
    directory, steps, seed = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    settings = {"seed": seed}
    if len(sys.argv) > 4:
        rows = int(sys.argv[4])
        accumulate = load_case(directory)[0].prompts // rows
        settings["per_device_train_batch_size"] = rows
        settings["gradient_accumulation_steps"] = accumulate
    clock = StepClock()
    trainer = ppo_trainer(directory, steps, [Ticks(clock)], **settings)
    trainer.train()
    clock.lengths = trainer.reward_model.lengths
    print("\n" + json.dumps(clock.report() | {"version": f"trl {trl.__version__}"}))


if __name__ == "__main__":
    main()
