"""SPIN and GSIL: rounds of telling demonstrations from the model's own responses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from srppo import distributed
from srppo.algo.imitation import pair_losses
from srppo.algo.logprobs import token_logprobs
from srppo.config_controls import PairsConfig
from srppo.data.demonstrations import Example
from srppo.models.batching import Batch, Sequences, idle_batch, make_batch
from srppo.models.roles import Role
from srppo.models.scoring import hidden_states, output_logits, score
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Sampler
from srppo.train.metrics import MetricsLog
from srppo.train.state import Tree, load_optimizer, load_tensors, misfit, optimizer_state
from srppo.train.steps import Keeper, Steps
from srppo.train.update import Metrics, add_gradients, clipped_step, generator


@dataclass
class Trained:
    """What a step changes, and what the round began with."""

    policy: Role
    optimizer: Optimizer
    prompts: list[list[int]]
    """Of the demonstrations and, in the same order, of the policy's own responses."""
    pairs: Sequences | None = None
    """2N rows, see `make_pairs`; None before the first round."""
    ref: Tensor | None = None
    """(2N,) nats, log pi_ref of each; pi_ref is the policy as the round began."""

    def state_dict(self) -> Tree:
        """As it is between two steps."""
        assert self.pairs is not None
        return {
            "policy": self.policy.parameters(),
            "optimizer": optimizer_state(self.optimizer),
            "response_ids": self.pairs.response_ids,
            "mask": self.pairs.mask,
            "ref": self.ref,
        }

    def load_state_dict(self, state: Tree) -> None:
        """As it was. Raises RunDirError if it trained something else."""
        if len(state["ref"]) != len(self.prompts):
            raise misfit(f"{len(state['ref']) // 2} pairs, there are {len(self.prompts) // 2}")
        load_tensors(self.policy.parameters(), state["policy"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.pairs = Sequences(self.prompts, state["response_ids"], state["mask"])
        self.ref = state["ref"]


def train_pairs(
    policy: Role,
    sampler: HFSampler,
    examples: Sequence[Example],
    config: PairsConfig,
    *,
    seed: int,
    log: MetricsLog,
    reporter: Reporter,
    keeper: Keeper | None = None,
    title: str = "pairs",
) -> None:
    """Minimise `pair_losses` of the demonstrations against responses of the policy itself, which is
    trained in place. The loss of an optimizer step is the mean over its pairs.

    Args:
        sampler: samples from `policy` as it is at the time of the call.
        keeper: of checkpoints; training goes on from the last one.

    Source: arXiv:2401.01335, algorithm 1, with the pairs of the newest round only.
    """
    rate = config.learning_rate
    optimizer = (
        SGD(policy.parameters(), rate, momentum=0.9)
        if config.optimizer == "sgd"
        else AdamW(policy.parameters(), rate, weight_decay=0.0)
    )
    a_round = config.epochs * math.ceil(len(examples) / config.batch_size)
    total, started = config.rounds * a_round, time.monotonic()
    trained = Trained(policy, optimizer, [e.prompt_ids for e in examples] * 2)
    with (
        policy.active(),
        Steps(keeper, trained, log) as place,
        reporter.bar(title, total, "steps", place.done) as advance,
    ):
        for turn in range(place.done // a_round + 1, config.rounds + 1):
            shuffle = generator(seed * 1_000_003 + turn)
            begin = (turn - 1) * a_round
            if place.done == begin:
                trained.pairs = make_pairs(sampler, examples, shuffle.initial_seed())
                trained.ref = sampler.budget.fit(partial(score, policy, trained.pairs)).sum(1)
            pairs, ref = trained.pairs, trained.ref
            assert pairs is not None
            assert ref is not None
            orders = [
                torch.randperm(len(examples), generator=shuffle) for _ in range(config.epochs)
            ]
            batches = [rows for order in orders for rows in order.split(config.batch_size)]
            for step in range(place.done + 1, begin + a_round + 1):
                rows = batches[step - begin - 1]
                metrics = accumulate(policy, pairs, ref, rows, config)
                place.begin_update()
                add_gradients(policy.parameters())
                norm = clipped_step(optimizer, config.max_grad_norm)
                metrics |= {"round": turn, "grad_norm": norm}
                log.log(step, {**metrics, "time/seconds": time.monotonic() - started})
                advance(1)
                place.complete(step, metrics)
            reporter.line(f"{title} round {turn}/{config.rounds}  loss {metrics['loss']:.3f}")


def make_pairs(sampler: Sampler, examples: Sequence[Example], seed: int) -> Sequences:
    """2N rows: the N demonstrations, then in the same order the model's own responses."""
    prompts = [e.prompt_ids for e in examples]
    own = sampler.sample(prompts, seed).sequences
    lists = [ids[mask].tolist() for ids, mask in zip(own.response_ids, own.mask, strict=True)]
    return Sequences.of(prompts * 2, [e.response_ids for e in examples] + lists)


def accumulate(
    policy: Role, pairs: Sequences, ref: Tensor, rows: Tensor, config: PairsConfig
) -> Metrics:
    """Add the gradients of this process's share of a batch of pairs; statistics are means over all.

    Args:
        ref: (2N,) nats, log pi_ref of each response.
        rows: (b,) which of the N pairs.
    """
    device, size = policy.device, config.micro_batch_size
    places = [torch.tensor(share) for share in distributed.shares([1.0] * len(rows))]
    mine = places[distributed.rank()].split(size) if len(places[distributed.rank()]) else ()
    found = torch.zeros(3, len(rows))  # the loss, and both log-ratios, of each pair
    with policy.active() as model:
        for place in mine:
            both = torch.cat([rows[place], rows[place] + len(pairs) // 2])
            batch = make_batch(pairs, both, device)
            data, own = (response_logprobs(model, batch) - ref[both].to(device)).chunk(2)
            loss = pair_losses(data, own, config.loss, config.scale, config.shift)
            (loss.sum() / len(rows)).backward()
            found[:, place] = torch.stack([loss, data, own]).detach().cpu()
        for _ in range(math.ceil(len(places[0]) / size) - len(mine)):  # the first has most
            response_logprobs(model, idle_batch(pairs, device)).sum().backward()
    distributed.add([found])
    loss, data, own = found
    return {
        "loss": float(loss.mean()),
        "data_log_ratio": float(data.mean()),
        "own_log_ratio": float(own.mean()),
        "told_apart": float((data > own).float().mean()),
    }


def response_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(b,) nats, log pi(y|x) of each row, differentiable."""
    logprobs = token_logprobs(output_logits(model, hidden_states(model, batch)), batch.response_ids)
    row = batch.mask.nonzero()[:, 0].to(logprobs.device)
    return logprobs.new_zeros(len(batch.rows)).index_add(0, row, logprobs)
