"""The reward audit: is there anything in log pi_sft - log pi_base worth climbing?

Three looks, all before PPO and without labels, on held-out demonstrations:
does the reward tell demonstrations and SFT samples from base samples; do length or single tokens
dominate it; and how far along base·(sft/base)^lambda do held-out demonstrations stay likely
(the lambda-curve)? PPO with coefficient beta aims at lambda = 1 + 1/beta.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.algo.logprobs import token_logprobs
from srppo.algo.optimum import extrapolated_nll
from srppo.algo.reward import token_log_ratios
from srppo.config import PPOConfig
from srppo.data.chat import Example
from srppo.errors import ConfigError
from srppo.models.batching import Sequences, microbatches
from srppo.models.load import is_quantized
from srppo.models.memory import is_out_of_memory
from srppo.models.roles import Role
from srppo.models.scoring import (
    chunks,
    hidden_states,
    output_logits,
    score,
    score_with_margins,
)
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.ppo import correlation
from srppo.train.reward import bounds_of

LAMBDAS = [0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 11.0]
SEPARATES = 0.6
"""Below this probability of ranking a pair correctly, the reward separates next to nothing."""
ROUNDING_SAMPLE = 8
"""Demonstrations that are scored again in float32, with a copy of one model at a time."""
ROUNDS_MUCH = 0.1
"""Rounding of more than this share of the reward's spread over SFT samples is worth a warning."""
STANDS_OUT = 2.0
"""Standard errors by which SFT samples earn more than demonstrations that are worth a warning."""
FEW = 20
"""Demonstrations; what fewer say is mostly chance."""
DOMINATES = 0.5
"""One token with more than this share of the reward, or length with this share of its variance."""


def audit(
    base: Role | PreTrainedModel,
    sft: Role | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[Example],
    config: PPOConfig,
    *,
    max_response_tokens: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """All findings as JSON-ready numbers, with the warnings in plain words."""
    budget = config.max_tokens_per_batch
    prompts = [e.prompt_ids for e in held_out]
    sets = {"demonstrations": Sequences.of(prompts, [e.response_ids for e in held_out])}
    ended = {}
    with reporter.bar("audit: sampling", 2 * len(prompts), "responses") as advance:
        for k, (name, model) in enumerate({"sft": sft, "base": base}.items()):
            sampler = HFSampler(
                model,
                eos_token_id=tokenizer.eos_token_id,
                max_new_tokens=max_response_tokens,
                max_tokens_per_batch=budget,
            )
            rollout = sampler.sample(prompts, seed * 2 + k, progress=advance)
            sets[name], ended[name] = rollout.sequences, rollout.ended

    raw, ratios = {}, {}
    for name, y in sets.items():
        (of_sft, margins), of_base = score_with_margins(sft, y, budget), score(base, y, budget)
        raw[name] = of_sft - of_base
        ratios[name] = token_log_ratios(of_sft, of_base, y.mask, bounds_of(config), margins)
    rewards = {name: r.sum(1) for name, r in ratios.items()}
    lengths = {n: y.lengths.float() for n, y in sets.items()}
    findings: dict[str, Any] = {
        "prompts": len(prompts),
        "reward": _distributions(rewards),
        "separation": {
            "sft_vs_base_auc": auc(rewards["sft"], rewards["base"]),
            "demonstrations_vs_base_auc": auc(rewards["demonstrations"], rewards["base"]),
        },
        "cut_off": _cut_off(rewards["sft"], ended["sft"]),
        "length_corr": {n: float(correlation(lengths[n], r)) for n, r in rewards.items()},
        "top_tokens": top_tokens(sets["sft"], ratios["sft"], tokenizer),
        "curve": lambda_curve(base, sft, sets["demonstrations"], config),
        "rounding": rounding_error(base, sft, sets["demonstrations"], raw["demonstrations"]),
    }
    findings["warnings"] = warnings_from(findings, config)
    return findings


def lambda_curve(
    base: Role | PreTrainedModel, sft: Role | PreTrainedModel, y: Sequences, config: PPOConfig
) -> dict[str, Any]:
    """NLL of demonstrations, in nats a response, under base·(sft/base)^lambda per token, or with
    bounds on the reward under sft·exp((lambda - 1) rho)."""
    wanted = None
    if config.kl_coef != "auto":
        wanted = (1.0 if config.kl_ref == "sft" else 0.0) + 1.0 / config.beta
    lams = torch.tensor(sorted({*LAMBDAS, wanted or 1.0}))
    total, of_base = torch.zeros(len(lams)), torch.zeros(1)
    base, sft = Role.of(base), Role.of(sft)
    rows, budget = torch.arange(len(y)), config.max_tokens_per_batch
    with torch.no_grad(), base.active(), sft.active():
        for batch in microbatches(y, rows, budget, base.device):
            with base.active() as model:
                base_hidden = hidden_states(model, batch)
            with sft.active() as model:
                sft_hidden = hidden_states(model, batch)
            for some in chunks(base.model, batch):
                base_logits = output_logits(base.model, base_hidden[some])
                sft_logits = output_logits(sft.model, sft_hidden[some])
                ids = batch.response_ids[some]
                nll = extrapolated_nll(base_logits, sft_logits, ids, lams, bounds_of(config))
                total += nll.sum(1).cpu()
                of_base -= token_logprobs(base_logits, ids).sum().cpu()
    distributed.add([total, of_base])
    nll_of = dict(zip(lams.tolist(), (total / len(y)).tolist(), strict=True))
    star = min(nll_of, key=nll_of.__getitem__)
    recipe = wanted or star
    nearest = min(nll_of, key=lambda lam: abs(lam - recipe))
    return {
        "lams": list(nll_of),
        "nll": list(nll_of.values()),
        "lam_star": star,
        "beta_star": beta_at(star, config.kl_ref),
        "lam_recipe": recipe,
        "nll_base": float(of_base) / len(y),
        "nll_sft": nll_of[1.0],
        "nll_recipe": nll_of[nearest],
    }


def beta_at(lam: float, kl_ref: str) -> float | None:
    """The beta whose optimum is lambda (docs/math.md, eq. 15); None for what is not past SFT."""
    if lam <= 1.0:
        return None
    return 1.0 / (lam - 1.0) if kl_ref == "sft" else 1.0 / lam


def with_found_beta(config: PPOConfig, findings: dict[str, Any]) -> PPOConfig:
    """`kl_coef=auto` replaced by the beta that aims at the audit's best lambda.

    Raises:
        ConfigError: nothing is left to extrapolate.
    """
    star = findings["curve"]["lam_star"]
    beta = beta_at(star, config.kl_ref)
    if beta is None:
        raise ConfigError(
            f"ppo.kl_coef=auto: held-out demonstrations are likeliest at lambda={star:g}, at the "
            "SFT model or before it, so no beta makes stage 2 worth its steps. Keep the SFT model, "
            "train it more gently (fewer epochs, a lower sft.learning_rate, sft.optimizer=sgd), or "
            "set ppo.kl_coef to a number."
        )
    return config.model_copy(update={"kl_coef": beta})


def rounding_error(
    base: Role | PreTrainedModel, sft: Role | PreTrainedModel, y: Sequences, ratios: Tensor
) -> dict[str, float] | None:
    """How far rounding in the models' number format moves the reward: nats a response, over the
    first few, against the same weights in float32. None: quantised weights have no such twin, or
    there is no memory for it."""
    models = [Role.of(sft), Role.of(base)]
    if any(is_quantized(m.model) or isinstance(m.model, FSDPModule) for m in models):
        return None
    if all(m.model.dtype == torch.float32 for m in models):
        return {"mean": 0.0, "max": 0.0}
    n = min(ROUNDING_SAMPLE, len(y))
    few = Sequences(y.prompt_ids[:n], y.response_ids[:n], y.mask[:n])
    exact = []
    for role in models:
        with role.active() as model:
            twin = _twin(model)
            if twin is None:
                return None
            exact.append(score(twin, few, few.mask.numel()))
    errors = (ratios[:n] - (exact[0] - exact[1])).sum(1).abs()
    return {"mean": float(errors.mean()), "max": float(errors.max())}


def _twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same in float32; None where it does not fit into the memory of every process."""
    try:
        twin = copy.deepcopy(model).float()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        twin = None
    return None if distributed.any_of(twin is None) else twin


def top_tokens(
    y: Sequences, ratios: Tensor, tokenizer: PreTrainedTokenizerBase, n: int = 12
) -> list[dict[str, Any]]:
    """Tokens with the largest share of the summed absolute log-ratio of SFT samples."""
    ids, values = y.response_ids[y.mask], ratios[y.mask]
    whole = values.abs().sum().clamp(min=1e-12)
    kinds, place, counts = ids.unique(return_inverse=True, return_counts=True)
    size = torch.zeros(len(kinds)).index_add(0, place, values.abs())
    signed = torch.zeros(len(kinds)).index_add(0, place, values)
    return [
        {
            "token": tokenizer.convert_ids_to_tokens(int(kinds[k])),
            "id": int(kinds[k]),
            "count": int(counts[k]),
            "mean": float(signed[k] / counts[k]),
            "share": float(size[k] / whole),
        }
        for k in size.argsort(descending=True, stable=True)[:n].tolist()
    ]


def warnings_from(findings: dict[str, Any], config: PPOConfig) -> list[str]:
    """What a person should know before spending compute on stage 2."""
    curve, said = findings["curve"], []
    if findings["prompts"] < FEW:
        said.append(
            f"{findings['prompts']} held-out demonstrations are too few: all that the audit says "
            "is mostly chance. Give more demonstrations, or raise data.held_out: where all others "
            "are trained on, a tenth is held out at most, whatever it says."
        )
    auc_sft = findings["separation"]["sft_vs_base_auc"]
    auc_demos = findings["separation"]["demonstrations_vs_base_auc"]
    if max(auc_sft, auc_demos) < SEPARATES:
        said.append(
            f"the reward separates next to nothing: it ranks an SFT sample above a base sample in "
            f"{auc_sft:.0%} of pairs and a demonstration in {auc_demos:.0%} (chance: 50%). PPO "
            "would climb noise. Train SFT longer or with a higher sft.learning_rate."
        )
    token = findings["top_tokens"][0]
    if token["share"] > DOMINATES:
        said.append(
            f"one token dominates the reward: {token['token']!r} carries {token['share']:.0%} of "
            "it. The policy would learn that token, not the task. Set ppo.token_clip, or look at "
            "the template."
        )
    sft, demos = findings["reward"]["sft"], findings["reward"]["demonstrations"]["mean"]
    if sft["mean"] - demos > STANDS_OUT * sft["std"] / findings["prompts"] ** 0.5:
        cut_off = _of_those_cut_off(findings["cut_off"], demos)
        said.append(
            f"the SFT model's own responses earn more than demonstrations: {sft['mean']:+.2f} "
            f"against {demos:+.2f} nats. What earns most is not what was demonstrated, and PPO "
            f"goes there{cut_off}. Look at them (srppo chat), or train SFT until it says what the "
            "demonstrations say."
        )
    if findings["cut_off"]["share"] > DOMINATES:
        said.append(
            f"{findings['cut_off']['share']:.0%} of the SFT model's own responses are cut off at "
            "data.max_response_tokens: it has hardly learnt to end, and where no response of a "
            "step ends, stage 2 stops. Raise data.max_response_tokens, or train SFT for longer or "
            "at a higher rate (sft.epochs, sft.learning_rate)."
        )
    corr = findings["length_corr"]["sft"]
    if corr**2 > DOMINATES:
        said.append(
            f"length explains {corr**2:.0%} of the reward's variance over SFT samples (correlation "
            f"{corr:+.2f}): the policy may learn {'longer' if corr > 0 else 'shorter'} responses "
            "and little else. Watch response_length, or set ppo.reward=mean."
        )
    rounding, spread = findings["rounding"], findings["reward"]["sft"]["std"]
    if rounding and rounding["mean"] > ROUNDS_MUCH * spread:
        said.append(
            f"rounding moves the reward by {rounding['mean']:.2g} nats a response, where SFT "
            f"samples spread over {spread:.2g}: part of what PPO climbs would be noise of the "
            "number format. Set model.dtype=float32."
        )
    star, recipe = curve["lam_star"], curve["lam_recipe"]
    if star <= 1.0:
        said.append(
            f"nothing is left to extrapolate: held-out demonstrations are likeliest at lambda="
            f"{star:g}, that is at the SFT model itself or before it: it may be overfitted, its "
            "optimizer may have left noise, or it is still far from the demonstrations. Stage 2 is "
            "not likely to help in domain. Where SFT's loss has levelled off, train it more gently "
            "(fewer sft.epochs, a lower sft.learning_rate, sft.optimizer=sgd) or set "
            "ppo.plausibility=0.1; where it still falls, train it for longer."
        )
    elif recipe > star and curve["nll_recipe"] > curve["nll_sft"] and _is_plain(config):
        said.append(
            f"kl_coef={config.beta:g} asks for lambda={recipe:g}, more extrapolation than the "
            f"reward supports: held-out demonstrations cost {curve['nll_recipe']:.2f} nats there, "
            f"{curve['nll_sft']:.2f} at the SFT model and least at lambda={star:g}. "
            f"Try ppo.kl_coef={beta_at(star, config.kl_ref):.2g}, or train SFT more gently."
        )
    return said


def _of_those_cut_off(cut_off: dict[str, float], demos: float) -> str:
    """What they add to that, and the cure."""
    excess = cut_off["reward"] - demos
    if not cut_off["share"] or excess <= 0:
        return ""
    return (
        f"; the {cut_off['share']:.0%} that are cut off earn {cut_off['reward']:+.2f}: set "
        f"ppo.missing_eos_penalty to {excess:.3g} or more"
    )


def _is_plain(config: PPOConfig) -> bool:
    """Whether lambda follows from kl_coef: not with a mean, nor from base with bounded tokens."""
    return config.reward == "sum" and (config.kl_ref == "sft" or not config.is_bounded)


def _cut_off(rewards: Tensor, ended: Tensor) -> dict[str, float]:
    """Share and mean reward of responses without an end; a reward of 0 where there is none."""
    without = rewards[~ended]
    return {
        "share": len(without) / len(rewards),
        "reward": float(without.mean()) if len(without) else 0.0,
    }


def auc(above: Tensor, below: Tensor) -> float:
    """P(a > b) + P(a = b)/2 for a from `above`, b from `below`: 0.5 is chance."""
    difference = above[:, None] - below[None, :]
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


def _distributions(rewards: dict[str, Tensor]) -> dict[str, Any]:
    together = torch.cat(list(rewards.values()))
    edges = torch.linspace(float(together.min()), float(together.max()) + 1e-6, 31)
    levels = {"5": 0.05, "25": 0.25, "50": 0.5, "75": 0.75, "95": 0.95}
    return {
        name: {
            "mean": float(r.mean()),
            "std": float(r.std(correction=0)),
            "quantiles": {k: float(r.quantile(q)) for k, q in levels.items()},
            "histogram": {
                "edges": edges.tolist(),
                "counts": torch.histogram(r, edges).hist.int().tolist(),
            },
        }
        for name, r in rewards.items()
    }


def describe_audit(findings: dict[str, Any]) -> str:
    """audit.json in a few lines."""
    curve, reward = findings["curve"], findings["reward"]
    means = "  ".join(f"{name} {r['mean']:+.2f}" for name, r in reward.items())
    lines = [
        f"audit: mean reward in nats  {means}",
        f"audit: held-out NLL {curve['nll_sft']:.2f} at SFT, least at lambda="
        f"{curve['lam_star']:g}; the recipe aims at lambda={curve['lam_recipe']:g}: "
        f"{curve['nll_recipe']:.2f} nats",
        *(f"audit WARNING: {warning}" for warning in findings["warnings"]),
    ]
    return "\n".join(lines)
