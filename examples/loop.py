"""Self-Rewarding PPO, whole, on a problem small enough to know the answer.

    python examples/loop.py

Responses have at most 3 tokens out of 8 (0 is EOS), so all 400 responses to each of 4 prompts can
be listed, and with them pi*, the policy that maximises J, and the J* that it reaches. The loop
knows nothing of that list; it samples, and every 20 steps the list says how far it has come.
The mathematics is srppo.algo; models, sampling and optimizers are plain torch.
"""

import torch
from torch import Tensor, nn

from srppo.algo.advantage import gae
from srppo.algo.logprobs import token_logprobs
from srppo.algo.loss import clipped_policy_loss, clipped_value_loss
from srppo.algo.masking import masked_mean, masked_sum, whiten
from srppo.algo.optimum import enumerate_responses, objective, optimum
from srppo.algo.reward import token_log_ratios, token_rewards

EOS, V, T = 0, 8, 3  # vocabulary and longest response
PROMPTS = torch.arange(4)
BETA = 0.5  # kl_coef: the price of one nat away from pi_sft
STEPS, ROLLOUTS, EPOCHS, MINIBATCH = 60, 512, 2, 256
CLIP, GAMMA, LAMBDA = 0.2, 1.0, 1.0
LEARNING_RATE = 1e-3


class Toy(nn.Module):
    """A language model, or with `out=1` a critic: a prompt and y_<t in, an output per y_t."""

    def __init__(self, out: int = V) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V + len(PROMPTS), 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Prompts (B,) and responses (B, T) -> (B, T, out); output t has seen x and y_<t."""
        seen = torch.cat([V + x[:, None], y[:, :-1]], dim=1)
        return self.head(self.gru(self.embedding(seen))[0])

    def logprobs(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, T) nats: log pi(y_t | x, y_<t), at temperature 1."""
        return token_logprobs(self(x, y), y)


@torch.no_grad()
def sample(model: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Responses (B, T), and the mask (B, T) that is True up to the first EOS, it included."""
    y = torch.full((len(x), T), EOS)
    for t in range(T):
        y[:, t] = torch.multinomial(model(x, y)[:, t].softmax(-1), 1).squeeze(1)
    is_eos = (y == EOS).long()
    return y, is_eos.cumsum(1) - is_eos == 0


def fine_tune(base: Toy) -> Toy:
    """Stage 1: a few steps of -log pi(y|x) on six demonstrations, EOS included."""
    sft = copy_of(base)
    x = torch.tensor([0, 1, 2, 3, 0, 1])
    y = torch.tensor([[1, 2, EOS], [3, 3, 3], [5, EOS, EOS], [2, 7, EOS], [1, 4, EOS], [3, 6, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]).bool()
    optimizer = torch.optim.Adam(sft.parameters(), 2e-3)
    for _ in range(12):
        loss = -masked_mean(sft.logprobs(x, y), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sft


def copy_of(model: Toy) -> Toy:
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def exact(policy: Toy, sft: Toy, base: Toy) -> tuple[float, float, float]:
    """J(policy), J* and KL(policy||pi*) in nats, means over the prompts: by listing everything."""
    ids, mask = enumerate_responses(V, EOS, T)
    found = []
    for x in PROMPTS.repeat_interleave(len(ids)).split(len(ids)):
        p, s, b = (masked_sum(m.logprobs(x, ids).double(), mask, 1) for m in (policy, sft, base))
        log_star, j_star = optimum(s, b, BETA, ref="sft")
        j = objective(p, s, b, BETA, ref="sft")
        found.append(torch.stack([j, j_star, (p.exp() * (p - log_star)).sum()]))
    j, j_star, kl = torch.stack(found).mean(0).tolist()
    return j, j_star, kl


def main() -> float:
    """Both stages; returns the share of the gap from J(sft) to J* that was closed."""
    torch.manual_seed(0)
    base = Toy()
    with torch.no_grad():
        base.head.weight *= 4  # an untrained network is nearly uniform: give it opinions
    sft = fine_tune(base)

    # Stage 2: maximise J = E[ log pi_sft(y|x) - log pi_base(y|x) - beta log pi(y|x)/pi_sft(y|x) ].
    policy, critic = copy_of(sft), Toy(out=1)
    nn.init.zeros_(critic.head.weight)
    optimizers = [torch.optim.Adam(m.parameters(), LEARNING_RATE) for m in (policy, critic)]
    j_sft, j_star, _ = exact(sft, sft, base)
    print(f"J(sft) {j_sft:.3f}  J* {j_star:.3f}  beta {BETA}")
    for step in range(1, STEPS + 1):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / STEPS)

        x = PROMPTS.repeat(ROLLOUTS // len(PROMPTS))  # prompts only: no responses, no labels
        y, mask = sample(policy, x)
        with torch.no_grad():
            old, ref = policy.logprobs(x, y), sft.logprobs(x, y)
            log_ratios = token_log_ratios(ref, base.logprobs(x, y), mask)
            rewards = token_rewards(log_ratios, old, ref, mask, BETA, credit="eos")
            values = critic(x, y).squeeze(2)
        advantages, returns = gae(rewards, values, mask, GAMMA, LAMBDA)
        advantages, value_clip = whiten(advantages, mask), CLIP * returns[mask].std()

        for _ in range(EPOCHS):
            for rows in torch.randperm(ROLLOUTS).split(MINIBATCH):
                xs, ys, m = x[rows], y[rows], mask[rows]
                new, V_new = policy.logprobs(xs, ys), critic(xs, ys).squeeze(2)
                loss = clipped_policy_loss(new, old[rows], advantages[rows], CLIP, m)
                loss = loss + clipped_value_loss(V_new, values[rows], returns[rows], value_clip, m)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                masked_mean(loss, m).backward()
                for optimizer in optimizers:
                    optimizer.step()

        if step % 20 == 0:
            j, _, kl = exact(policy, sft, base)
            closed = (j - j_sft) / (j_star - j_sft)
            print(f"step {step}  J {j:.3f}  KL(policy||pi*) {kl:.3f} nats  gap closed {closed:.1%}")
    return closed


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
