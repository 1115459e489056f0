"""TRL 1.16's RLOOTrainer and GRPOTrainer with the coherent reward as `reward_funcs`.

.venv/bin/python bench/trl_groups.py DIR STEPS SEED rloo|grpo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import selective_log_softmax

from workload import GROUP, PAD, StepClock, load, load_case

SCORING_ROWS = 16
"""Responses per forward pass of the reward: beyond this, more memory and no more speed."""


class CoherentReward:
    """log pi_sft - log pi_base of each completion."""

    __name__ = "coherent"

    def __init__(self, directory: Path, clock: StepClock) -> None:
        self.sft, self.base = load(directory, "sft"), load(directory, "base")
        self.tokenizer = AutoTokenizer.from_pretrained(directory / "sft")
        self.clock = clock

    def __call__(
        self, prompts: list[str], completion_ids: list[list[int]], **_: object
    ) -> list[float]:
        prompt_ids = self.tokenizer(prompts)["input_ids"]  # all of one length
        self.clock.lengths += map(len, completion_ids)
        rewards: list[float] = []
        for start in range(0, len(prompts), SCORING_ROWS):
            rows = slice(start, start + SCORING_ROWS)
            rewards += self.score(prompt_ids[rows], completion_ids[rows])
        return rewards

    @torch.no_grad()
    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        T = max(map(len, completions))
        ids = torch.tensor(
            [
                prompt + completion + [PAD] * (T - len(completion))
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )
        attention_mask = (ids != PAD).long()
        sft, base = (logprobs(model, ids, attention_mask, T) for model in (self.sft, self.base))
        return torch.where(attention_mask[:, -T:].bool(), sft - base, 0.0).sum(1).tolist()


def logprobs(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, last: int) -> Tensor:
    """(b, last) nats of the last tokens."""
    logits = model(
        input_ids=ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=last + 1
    ).logits[:, :-1]
    return selective_log_softmax(logits, ids[:, -last:])


class Ticks(TrainerCallback):
    """Reads the clock at the end of each step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_end(self, *_: object, **__: object) -> None:
        self.clock.tick()


def group_trainer(
    directory: Path, steps: int, kind: str, clock: StepClock, **settings: object
) -> RLOOTrainer | GRPOTrainer:
    """As TRL's documentation has it; bench/README.md says why these settings."""
    case, prompts = load_case(directory)
    trainer, config = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[kind]
    common = {
        "per_device_train_batch_size": case.prompts,
        "num_generations": GROUP,
        "max_completion_length": case.response_tokens,
        "max_steps": steps,
        "temperature": 1.0,
        "beta": 0.2,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "output_dir": str(directory / kind),
    }
    texts = [" ".join(f"t{i}" for i in prompt) for prompt in prompts[: case.prompts // GROUP]]
    return trainer(
        model=str(directory / "sft"),
        reward_funcs=CoherentReward(directory, clock),
        args=config(**common | settings),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=AutoTokenizer.from_pretrained(directory / "sft"),
        callbacks=[Ticks(clock)],
    )


def main() -> None:
    directory, steps, seed, kind = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
    torch.set_num_threads(1)
    clock = StepClock()
    group_trainer(directory, steps, kind, clock, seed=seed).train()
    print("\n" + json.dumps(clock.report() | {"version": f"trl {trl.__version__}"}))


if __name__ == "__main__":
    main()
