"""The all-action estimator against PPO and RLOO where the truth can be enumerated.

    OMP_NUM_THREADS=1 python bench/all_action.py variance
    OMP_NUM_THREADS=1 python bench/all_action.py rollouts [--seeds 10 --budget 8192]

Random problems: a small network is pi_base, a few Adam steps on random demonstrations make pi_sft.
Every state (prompt and prefix without EOS) is a row of a table, so J and its gradient are exact.

`variance`: total variance of the gradient per response over the squared norm of the exact gradient
at policies that have closed 0, 50, 90 and 98% of the gap from J(sft) to J*; in brackets how far the
mean of 300 batches of 32 is from the exact gradient, and how far chance alone would put it.
`rollouts`: responses sampled until J has come 95% and 99% of the way, for each estimator at its
best of one grid of learning rate, epochs and clip, chosen on other seeds: 32 responses a step in 2
minibatches, gradient norm 1, all else as the trainer has it (advantages whitened but for
all-action, critic calibrated).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import cross_entropy

from srppo.algo.advantage import gae, leave_one_out
from srppo.algo.all_action import (
    all_action_advantages,
    all_action_loss,
    expected_gain,
    future_gains,
    soft_rewards,
)
from srppo.algo.logprobs import token_logprobs
from srppo.algo.loss import clipped_policy_loss, clipped_value_loss
from srppo.algo.masking import whiten

WIDTH, BATCH, MINIBATCHES, GROUP = 64, 32, 2, 4  # GROUP: responses to one prompt


class Networks:
    """R networks with two hidden layers side by side: (R, n, features) -> (R, n, outputs)."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = [w.detach().clone().requires_grad_() for w in weights]

    @classmethod
    def random(cls, runs: int, features: int, outputs: int, generator: torch.Generator) -> Networks:
        sizes = [features, WIDTH, WIDTH, outputs]
        weights = []
        for n_in, n_out in pairwise(sizes):
            weights.append(torch.randn(runs, n_in, n_out, generator=generator) / n_in**0.5)
            weights.append(torch.zeros(runs, 1, n_out))
        return cls(weights)

    def repeat(self, runs: int) -> Networks:
        return Networks([w.repeat(runs, 1, 1) for w in self.weights])

    def __call__(self, x: Tensor) -> Tensor:
        W1, b1, W2, b2, W3, b3 = self.weights
        return torch.baddbmm(b3, torch.baddbmm(b2, torch.baddbmm(b1, x, W1).tanh(), W2).tanh(), W3)


class Adam:
    """One Adam for each of R networks, with its own learning rate and gradient clipping."""

    def __init__(self, networks: Networks, learning_rates: Tensor) -> None:
        self.weights, self.rates, self.steps = networks.weights, learning_rates[:, None, None], 0
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]

    def step(self, loss: Tensor, max_norm: float = 1.0) -> None:
        """`loss` is a sum over the runs; their gradients do not mix."""
        grads = torch.autograd.grad(loss, self.weights)
        norms = sum(g.square().sum((1, 2)) for g in grads).sqrt()
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
        self.steps += 1
        with torch.no_grad():
            for w, g, (m, v) in zip(self.weights, grads, self.moments, strict=True):
                g = g * scale
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
                w -= self.rates * m_hat / (v_hat.sqrt() + 1e-8)


class Problem:
    """pi_base, pi_sft and all states; vocabulary V with EOS 0, at most T tokens, P prompts."""

    def __init__(self, seed: int, V: int, T: int, P: int, kl_coef: float) -> None:
        self.V, self.T, self.P, self.kl_coef = V, T, P, kl_coef
        self.name = f"V={V} T={T} prompts={P} beta={kl_coef}"
        rows: list[tuple[int, tuple[int, ...]]] = []
        level = [(p, ()) for p in range(P)]
        self.levels = []
        for _ in range(T):
            self.levels.append(slice(len(rows), len(rows) + len(level)))
            rows += level
            level = [(p, (*y, a)) for p, y in level for a in range(1, V)]
        place = {row: i for i, row in enumerate(rows)}
        self.next = torch.tensor([[place.get((p, (*y, a)), -1) for a in range(V)] for p, y in rows])
        self.next[:, 0] = -1  # (S, V): the state that a token leads to, -1 where a response ends
        self.x = torch.zeros(len(rows), P + T + T * V)  # one-hot prompt, position, tokens
        for i, (p, y) in enumerate(rows):
            self.x[i, [p, P + len(y), *(P + T + k * V + a for k, a in enumerate(y))]] = 1.0

        generator = torch.Generator().manual_seed(seed)
        self.base = Networks.random(1, self.x.shape[1], V, generator)
        with torch.no_grad():
            self.base.weights[0] *= 3  # few features are on: give the prefixes opinions
            self.base.weights[4] *= 2
        self.sft = self._fine_tuned(generator)
        with torch.no_grad():
            self.sft_logits, base_logits = self.sft(self.x[None])[0], self.base(self.x[None])[0]
            self.soft = soft_rewards(self.sft_logits, base_logits, kl_coef, "sft")
        self.j_star = float(self.values(None)[: self.P].mean())
        self.j_sft = float(self.objective(self.sft_logits[None]))

    def _fine_tuned(self, generator: torch.Generator, steps: int = 25) -> Networks:
        """Adam on two random demonstrations a prompt, each with T tokens or EOS at a third."""
        states, tokens = [], []
        for start in range(2 * self.P):
            state = start % self.P
            while state >= 0:
                states.append(state)
                ends = torch.rand((), generator=generator) < 1 / self.T
                token = 0 if ends else int(torch.randint(1, self.V, (), generator=generator))
                tokens.append(token)
                state = int(self.next[state, token])
        sft = self.base.repeat(1)
        adam = Adam(sft, torch.tensor([3e-3]))
        for _ in range(steps):
            adam.step(cross_entropy(sft(self.x[None, states])[0], torch.tensor(tokens)))
        return sft

    def values(self, logits: Tensor | None) -> Tensor:
        """(..., S) float64: exact V of every state under (..., S, V) logits, or V* for None."""
        soft, beta = self.soft.double(), self.kl_coef
        logprobs = None if logits is None else logits.double().log_softmax(-1)
        V = soft.new_zeros(len(soft)) if logprobs is None else torch.zeros_like(logprobs[..., 0])
        for level in reversed(self.levels):
            after = self.next[level]
            q = soft[level] + torch.where(after >= 0, V[..., after.clamp(min=0)], 0.0)
            if logprobs is None:
                found = beta * (q / beta).logsumexp(-1)
            else:
                lp = logprobs[..., level, :]
                found = (lp.exp() * (q - beta * lp)).sum(-1)
            V = torch.cat([V[..., : level.start], found, V[..., level.stop :]], dim=-1)
        return V

    def objective(self, logits: Tensor) -> Tensor:
        """(R,) float64: exact J, mean over the prompts, of (R, S, V) logits."""
        return self.values(logits)[..., : self.P].mean(-1)

    def sample(
        self, logits: Tensor, n: int, group: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """n responses of each run: states, tokens and mask, each (R, n, T); groups consecutive."""
        R = len(logits)
        p, run = logits.softmax(-1), torch.arange(R)[:, None]
        state = (torch.arange(n // group) % self.P).repeat_interleave(group).expand(R, n)
        alive, steps = torch.ones(R, n, dtype=torch.bool), []
        for _ in range(self.T):
            rows = p[run, state].view(R * n, self.V)
            token = torch.multinomial(rows, 1, generator=generator).view(R, n)
            steps.append((state, token, alive))
            after = self.next[state, token]
            alive = alive & (after >= 0)
            state = torch.where(alive, after, state)
        states, tokens, mask = (torch.stack(x, dim=2) for x in zip(*steps, strict=True))
        return states, tokens, mask


class Rollout:
    """What an estimator may look at: n responses of each of R runs, all (R, n, T) nats."""

    def __init__(self, p: Problem, logits: Tensor, states: Tensor, ids: Tensor, mask: Tensor):
        run = torch.arange(len(logits))[:, None, None]
        self.mask = mask
        self.logprobs = token_logprobs(logits[run, states], ids)
        self.rewards = p.soft[states, ids] - p.kl_coef * self.logprobs
        soft = p.soft.expand(len(logits), -1, -1)
        gains = expected_gain(logits.flatten(0, 1), soft.flatten(0, 1), p.kl_coef)
        self.gains = gains.view(logits.shape[:2])[run, states]
        self.exact_values = p.values(logits)[run, states].float()

    def mixed(self, share: float) -> Tensor:
        """Rewards of which only a share is sampled; zero at padding."""
        return torch.where(self.mask, self.gains.lerp(self.rewards, share), 0.0)


Advantages = Callable[[Rollout], Tensor]


def rloo(r: Rollout) -> Tensor:
    whole = r.mixed(1.0).sum(2)
    return leave_one_out(whole.flatten(), GROUP).view_as(whole)[..., None] * r.mask


def all_action(share: float, group_size: int = GROUP, gamma: float = 1.0) -> Advantages:
    return lambda r: all_action_advantages(r.gains, r.rewards, r.mask, group_size, share, gamma)


def exact_critic(share: float, lam: float) -> Advantages:
    return lambda r: gae_of(r, r.exact_values, share, lam)[0]


def gae_of(r: Rollout, values: Tensor, share: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE over rewards of which a share is sampled: with share 0 it is all-action's A_t."""
    rows = (x.flatten(0, 1) for x in (r.mixed(share), values, r.mask))
    advantages, returns = gae(*rows, 1.0, lam)
    return advantages.view_as(values), returns.view_as(values)


# name: advantages of the sampled tokens, and the share c of sampled rewards (1: no exact part)
GRADIENTS: dict[str, tuple[Advantages, float]] = {
    "RLOO": (rloo, 1.0),
    "reward to go": (all_action(1.0), 1.0),
    "PPO, exact V, lambda 1": (exact_critic(1.0, 1.0), 1.0),
    "PPO, exact V, lambda 0": (exact_critic(1.0, 0.0), 1.0),
    "all-action, immediate part only": (lambda r: torch.zeros_like(r.gains), 0.0),
    "all-action, no baseline": (lambda r: future_gains(r.gains, r.mask), 0.0),
    "all-action, batch baseline": (all_action(0.0, group_size=1), 0.0),
    "all-action, gamma 0.9": (all_action(0.0, gamma=0.9), 0.0),
    "all-action": (all_action(0.0), 0.0),
    "all-action, c = 0.25": (all_action(0.25), 0.25),
    "all-action, c = 0.5": (all_action(0.5), 0.5),
    "all-action, c = 0.75": (all_action(0.75), 0.75),
    "all-action, exact V, lambda 1": (exact_critic(0.0, 1.0), 0.0),
    "all-action, exact V, lambda 1, c = 0.5": (exact_critic(0.5, 1.0), 0.5),
    "all-action, exact V, lambda 0": (exact_critic(0.0, 0.0), 0.0),
}
# the same, to train with; None: GAE with a critic that learns
ESTIMATORS: dict[str, tuple[Advantages | None, float]] = {
    "PPO": (None, 1.0),
    "RLOO": (rloo, 1.0),
    "all-action": (all_action(0.0), 0.0),
    "all-action, c = 0.5": (all_action(0.5), 0.5),
    "all-action with critic, c = 0.5": (None, 0.5),
}


def token_losses(
    p: Problem, logits: Tensor, states: Tensor, ids: Tensor, old: Tensor, advantages: Tensor,
    share: float, clip: float,
) -> Tensor:  # fmt: skip
    """Loss of each token; `logits` (..., V), the others (...)."""
    if share == 1:
        return clipped_policy_loss(token_logprobs(logits, ids), old, advantages, clip)
    flat = [x.flatten() for x in (ids, old, advantages)]
    soft = p.soft[states.flatten()]
    losses = all_action_loss(logits.flatten(0, -2), soft, *flat, p.kl_coef, share, clip)
    return losses.view(ids.shape)


def policy_at(p: Problem, share: float) -> Networks:
    """Exact gradient ascent on J from pi_sft, until that share of the gap is closed."""
    policy = p.sft.repeat(1)
    adam = Adam(policy, torch.tensor([1e-3]))
    while (j := p.objective(policy(p.x[None]))) < p.j_sft + share * (p.j_star - p.j_sft):
        adam.step(-j.sum())
    return policy


def variance(
    p: Problem, policy: Networks, batch: int = 32, repeats: int = 300
) -> dict[str, tuple[float, float, float]]:
    """Variance per response / |grad J|^2; |mean - grad J| / |grad J|, and what chance makes it."""
    generator = torch.Generator().manual_seed(0)
    logits = policy(p.x[None])
    exact = _flat(torch.autograd.grad(-p.objective(logits).sum(), policy.weights))
    estimates: dict[str, list[Tensor]] = {name: [] for name in GRADIENTS}
    for _ in range(repeats):
        states, ids, mask = p.sample(logits.detach(), batch, GROUP, generator)
        rollout = Rollout(p, logits.detach(), states, ids, mask)
        new = policy(p.x[None])[0, states]
        for name, (advantages, share) in GRADIENTS.items():
            losses = token_losses(
                p, new, states, ids, rollout.logprobs, advantages(rollout), share, 0.2
            )
            loss = torch.where(rollout.mask, losses, 0.0).sum() / batch
            gradient = torch.autograd.grad(loss, policy.weights, retain_graph=True)
            estimates[name].append(_flat(gradient))
    found = {}
    for name, rows in estimates.items():
        stacked = torch.stack(rows)
        noise = float(stacked.var(0).sum() / exact.square().sum())
        bias = float((stacked.mean(0) - exact).norm() / exact.norm())
        found[name] = batch * noise, bias, (noise / repeats) ** 0.5
    return found


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    learning_rate: float
    epochs: int
    clip: float

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, {self.epochs} epochs, clip {self.clip:g}"


def train(
    p: Problem, estimator: str, rates: Tensor, epochs: int, clip: float, seed: int, budget: int
) -> list[tuple[int, Tensor]]:
    """A run for each learning rate: (rollouts so far, share of the gap closed (R,)), by step."""
    generator = torch.Generator().manual_seed(seed)
    advantages_of, share = ESTIMATORS[estimator]
    R, group = len(rates), GROUP if advantages_of else 1
    policy = p.sft.repeat(R)
    optimizer = Adam(policy, rates)
    critic = None if advantages_of else Critic(p, rates, generator)
    x, curve, best = p.x.expand(R, -1, -1), [], torch.zeros(R)
    while len(curve) * BATCH < budget and bool((best < 0.99).any()):
        with torch.no_grad():
            logits = policy(x)
            states, ids, mask = p.sample(logits, BATCH, group, generator)
            rollout = Rollout(p, logits, states, ids, mask)
            old = rollout.logprobs
            if critic:
                advantages = critic.advantages(rollout, states, share)
            else:
                advantages = advantages_of(rollout)
            if share == 1:
                advantages = torch.stack([whiten(*am) for am in zip(advantages, mask, strict=True)])
        for _ in range(epochs):
            for rows in torch.randperm(BATCH, generator=generator).chunk(MINIBATCHES):
                s, m = states[:, rows], mask[:, rows]
                weight = m / m.sum((1, 2), keepdim=True)
                seen = p.x[s].flatten(1, 2)
                losses = token_losses(
                    p, policy(seen).view(*s.shape, p.V), s, ids[:, rows], old[:, rows],
                    advantages[:, rows], share, clip,
                )  # fmt: skip
                optimizer.step((losses * weight).sum())
                if critic:
                    critic.step(seen, rows, weight)
        with torch.no_grad():
            closed = (p.objective(policy(x)) - p.j_sft) / (p.j_star - p.j_sft)
        curve.append(((len(curve) + 1) * BATCH, closed))
        best = torch.maximum(best, closed)
    return curve


class Critic:
    """PPO's: as large as the policy, calibrated to the first returns, clipped as in the trainer."""

    def __init__(self, p: Problem, rates: Tensor, generator: torch.Generator) -> None:
        self.x = p.x
        self.network = Networks.random(len(rates), p.x.shape[1], 1, generator)
        with torch.no_grad():
            self.network.weights[4].zero_()
        self.optimizer = Adam(self.network, rates)
        self.calibration: tuple[Tensor, Tensor] | None = None

    def advantages(self, r: Rollout, states: Tensor, share: float) -> Tensor:
        if self.calibration is None:
            returns = r.mixed(share).flip(2).cumsum(2).flip(2)[r.mask]
            self.calibration = returns.mean(), returns.std()
        shift, scale = self.calibration
        self.values = self.network(self.x[states].flatten(1, 2)).view(states.shape)
        advantages, returns = gae_of(r, shift + scale * self.values, share, 1.0)
        self.targets = (returns - shift) / scale
        stds = [t[m].std() for t, m in zip(self.targets, r.mask, strict=True)]
        self.clip = 0.2 * torch.stack(stds).view(-1, 1, 1)
        return advantages

    def step(self, seen: Tensor, rows: Tensor, weight: Tensor) -> None:
        values, targets = self.values[:, rows], self.targets[:, rows]
        new = self.network(seen).view(values.shape)
        losses = clipped_value_loss(new, values, targets, self.clip)
        self.optimizer.step((losses * weight).sum())


def rollouts(
    p: Problem, estimator: str, settings: list[Setting], seeds: int, seed: int, budget: int
) -> dict[Setting, Tensor]:
    """(2, seeds) rollouts to 95% and 99% of the gap for each setting; inf: not within budget."""
    found = {}
    for epochs, clip in sorted({(s.epochs, s.clip) for s in settings}):
        alike = [s for s in settings if (s.epochs, s.clip) == (epochs, clip)]
        rates = torch.tensor([s.learning_rate for s in alike]).repeat_interleave(seeds)
        curve = train(p, estimator, rates, epochs, clip, seed, budget)
        reached = torch.stack([first(curve, 0.95), first(curve, 0.99)]).view(2, len(alike), seeds)
        found |= {s: reached[:, i] for i, s in enumerate(alike)}
    return found


def first(curve: list[tuple[int, Tensor]], share: float) -> Tensor:
    """(R,) rollouts when each run had first closed that share of the gap; inf: never."""
    reached = torch.full_like(curve[0][1], math.inf)
    for used, closed in reversed(curve):
        reached = torch.where(closed >= share, float(used), reached)
    return reached


def interval(x: Tensor, budget: int) -> str:
    """Geometric mean over the seeds with its 95% interval; runs that failed count as the budget."""
    logs = x.clamp(max=budget).log()
    half = float(student.ppf(0.975, len(x) - 1)) * float(logs.std()) / len(x) ** 0.5
    mean, failed = float(logs.mean()), int(x.isinf().sum())
    text = f"{math.exp(mean):.0f} ({math.exp(mean - half):.0f} to {math.exp(mean + half):.0f})"
    return text + (f", {failed} of {len(x)} failed" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["variance", "rollouts"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for problem in PROBLEMS:
        p = Problem(*problem)
        print(f"\n{p.name}: J(sft) {p.j_sft:.2f}, J* {p.j_star:.2f} nats\n")
        if args.what == "variance":
            print_variance(p)
        else:
            print_rollouts(p, args.seeds, args.budget)


def print_variance(p: Problem) -> None:
    shares = (0.0, 0.5, 0.9, 0.98)
    columns = [variance(p, policy_at(p, share)) for share in shares]
    print("| variance / norm² (bias; by chance) | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
    print("|" + "---|" * (len(shares) + 1))
    for name in GRADIENTS:
        cells = ["{:.3g} ({:.2f}; {:.2f})".format(*column[name]) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def print_rollouts(p: Problem, seeds: int, budget: int) -> None:
    """Each estimator's best setting is chosen on some seeds, and reported on others."""
    print("| estimator | to 95% of the gap | to 99% | setting |\n|---|---|---|---|")
    for estimator in ESTIMATORS:
        tried = rollouts(p, estimator, GRID, seeds, 0, budget)
        best = min(tried, key=lambda s: float(tried[s][1].clamp(max=budget).log().sum()))
        cells = [
            interval(x, budget) for x in rollouts(p, estimator, [best], seeds, 1, budget)[best]
        ]
        print(f"| {estimator} | {cells[0]} | {cells[1]} | {best} |", flush=True)


PROBLEMS = [(0, 8, 3, 4, 0.5), (1, 8, 4, 4, 0.2), (2, 3, 8, 4, 0.5)]  # seed, V, T, prompts, beta
GRID = [
    Setting(learning_rate, epochs, clip)
    for epochs, clip in ((2, 0.2), (2, 1.0), (4, 0.2))
    for learning_rate in (1e-3, 2e-3, 4e-3, 8e-3)
]

if __name__ == "__main__":
    main()
