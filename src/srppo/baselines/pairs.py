"""SPIN and GSIL: rounds of telling demonstrations from the model's own responses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from srppo.algo.imitation import pair_losses
from srppo.algo.logprobs import token_logprobs
from srppo.config_controls import PairsConfig
from srppo.data.demonstrations import Example
from srppo.models.batching import Batch, Sequences, make_batch
from srppo.models.roles import Role
from srppo.models.scoring import hidden_states, output_logits, score
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Sampler
from srppo.train.metrics import MetricsLog
from srppo.train.update import Metrics, generator


def train_pairs(
    policy: Role,
    sampler: HFSampler,
    examples: Sequence[Example],
    config: PairsConfig,
    *,
    seed: int,
    log: MetricsLog,
    reporter: Reporter,
    title: str = "pairs",
) -> None:
    """Minimise `pair_losses` of the demonstrations against responses of the policy itself, which is
    trained in place. The loss of an optimizer step is the mean over its pairs.

    Args:
        sampler: samples from `policy` as it is at the time of the call.

    Source: arXiv:2401.01335, algorithm 1, with the pairs of the newest round only.
    """
    rate = config.learning_rate
    optimizer = (
        SGD(policy.parameters(), rate, momentum=0.9)
        if config.optimizer == "sgd"
        else AdamW(policy.parameters(), rate, weight_decay=0.0)
    )
    total = config.rounds * config.epochs * math.ceil(len(examples) / config.batch_size)
    step, started = 0, time.monotonic()
    with policy.active() as model, reporter.bar(title, total, "steps") as advance:
        for turn in range(1, config.rounds + 1):
            shuffle = generator(seed * 1_000_003 + turn)
            pairs = make_pairs(sampler, examples, shuffle.initial_seed())
            # pi_ref is the policy at this moment.
            ref = sampler.budget.fit(partial(score, policy, pairs)).sum(1)
            for _ in range(config.epochs):
                order = torch.randperm(len(examples), generator=shuffle)
                for rows in order.split(config.batch_size):
                    metrics = accumulate(model, policy.device, pairs, ref, rows, config)
                    norm = clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                    if norm.isfinite():
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    step += 1
                    metrics |= {"round": turn, "grad_norm": float(norm)}
                    log.log(step, {**metrics, "time/seconds": time.monotonic() - started})
                    advance(1)
            reporter.line(f"{title} round {turn}/{config.rounds}  loss {metrics['loss']:.3f}")


def make_pairs(sampler: Sampler, examples: Sequence[Example], seed: int) -> Sequences:
    """2N rows: the N demonstrations, then in the same order the model's own responses."""
    prompts = [e.prompt_ids for e in examples]
    own = sampler.sample(prompts, seed).sequences
    lists = [ids[mask].tolist() for ids, mask in zip(own.response_ids, own.mask, strict=True)]
    return Sequences.of(prompts * 2, [e.response_ids for e in examples] + lists)


def accumulate(
    model: PreTrainedModel,
    device: torch.device,
    pairs: Sequences,
    ref: Tensor,
    rows: Tensor,
    config: PairsConfig,
) -> Metrics:
    """Add the gradients of one batch of pairs; statistics are means over them.

    Args:
        ref: (2N,) nats, log pi_ref of each response.
        rows: (b,) which of the N pairs.
    """
    losses: list[Tensor] = []
    found: list[Tensor] = []
    for some in rows.split(config.micro_batch_size):
        both = torch.cat([some, some + len(pairs) // 2])
        batch = make_batch(pairs, both, device)
        ratios = response_logprobs(model, batch) - ref[both].to(device)
        data, own = ratios.chunk(2)
        loss = pair_losses(data, own, config.loss, config.scale, config.shift)
        (loss.sum() / len(rows)).backward()
        losses.append(loss.detach())
        found.append(torch.stack([data, own]).detach())
    data, own = torch.cat(found, dim=1)
    return {
        "loss": float(torch.cat(losses).mean()),
        "data_log_ratio": float(data.mean()),
        "own_log_ratio": float(own.mean()),
        "told_apart": float((data > own).float().mean()),
    }


def response_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(b,) nats, log pi(y|x) of each row, differentiable."""
    logprobs = token_logprobs(output_logits(model, hidden_states(model, batch)), batch.response_ids)
    row = batch.mask.nonzero()[:, 0].to(logprobs.device)
    return logprobs.new_zeros(len(batch.rows)).index_add(0, row, logprobs)
