"""What TRL's trainers computed in one step: tokens, rewards, advantages, losses, weights.

    .bench/bin/python bench/capture.py DIR FILE ppo SPREAD
    .venv/bin/python bench/capture.py DIR FILE rloo|grpo

The step is the benchmark's, with three changes that leave nothing trivially equal: the policy has
already moved away from SFT (DIR/policy is where it starts); there is a second epoch, and the
learning rate is large enough to make it off-policy; SPREAD is the critic's first output weights'
standard deviation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from workload import StepClock, load

LEARNING_RATE = 3e-4
POLICY_CHANGE = 0.03
"""How far the policy starts from SFT, in standard deviations of the weights."""


def main() -> None:
    directory, file, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if not (directory / "policy").exists():
        moved_policy(directory).save_pretrained(directory / "policy")
    found = ppo(directory, float(sys.argv[4])) if kind == "ppo" else groups(directory, kind)
    torch.save(found, file)


@torch.no_grad()
def moved_policy(directory: Path) -> PreTrainedModel:
    torch.manual_seed(1)
    policy = load(directory, "sft")
    for weight in policy.model.layers.parameters():
        if weight.dim() == 2:
            weight += POLICY_CHANGE * weight.std() * torch.randn_like(weight)
    return policy


class Locals(TrainerCallback):
    """Reads the variables of PPOTrainer.train() at the end of its step."""

    names = (
        *("queries", "responses", "sequence_lengths", "padding_mask", "padding_mask_p1"),
        *("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "returns"),
        *("advantages", "pg_loss_stats", "vf_loss_stats"),
    )

    def __init__(self) -> None:
        self.found: dict[str, object] = {}

    def on_step_end(self, *_: object, **__: object) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name != "train":
            frame = frame.f_back
        self.found = {name: frame.f_locals[name].clone() for name in self.names}

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        self.logs = dict(logs)


def ppo(directory: Path, spread: float) -> dict[str, object]:
    from trl_ppo import ppo_trainer, zero_value_model

    policy, value_model, callback = load(directory, "policy"), zero_value_model(directory), Locals()
    torch.manual_seed(2)
    nn.init.normal_(value_model.score.weight, std=spread)
    parameters = [*policy.parameters(), *value_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    weights: dict[str, list[dict[str, Tensor]]] = {"policy": [], "value_model": []}

    def before_step(*_: object) -> None:
        weights["policy"].append(copied(policy))
        weights["value_model"].append(copied(value_model))

    optimizer.register_step_pre_hook(before_step)
    trainer = ppo_trainer(
        directory,
        1,
        [callback],
        policy=policy,
        value_model=value_model,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        num_ppo_epochs=2,
        logging_steps=1,
    )
    trainer.train()
    return callback.found | {"logs": callback.logs, "weights": weights}


def groups(directory: Path, kind: str) -> dict[str, object]:
    from trl_groups import group_trainer

    changes: dict[str, object] = {"num_iterations": 2, "learning_rate": LEARNING_RATE}
    if kind == "grpo":
        changes |= {"scale_rewards": "none", "loss_type": "bnpo"}
    trainer = group_trainer(directory, 2, kind, StepClock(), **changes)
    trainer.model.load_state_dict(load(directory, "policy").state_dict())
    scored: list[dict[str, object]] = []
    losses: list[dict[str, object]] = []
    reward, loss_of = trainer.reward_funcs[0], trainer.compute_loss

    def record_reward(prompts: list[str], completion_ids: list[list[int]], **rest: object) -> list:
        rewards = reward(prompts, completion_ids, **rest)
        scored.append({"prompts": prompts, "completions": completion_ids, "rewards": rewards})
        return rewards

    def record_loss(model: nn.Module, inputs: dict[str, Tensor], **rest: object) -> Tensor:
        weights = copied(trainer.model)
        loss = loss_of(model, inputs, **rest)
        rows = {key: x.clone() for key, x in inputs.items() if isinstance(x, Tensor)}
        losses.append({"loss": float(loss), "weights": weights, "inputs": rows})
        return loss

    trainer.reward_funcs[0], trainer.compute_loss = record_reward, record_loss
    trainer.train()
    prompt_ids = trainer.processing_class(scored[0]["prompts"])["input_ids"]
    return {"prompt_ids": prompt_ids, "scored": scored[0], "losses": losses}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


if __name__ == "__main__":
    main()
