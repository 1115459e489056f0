"""A problem small enough to enumerate: the oracle of the whole method.

Vocabulary 8 (0 is EOS), responses of at most 3 tokens, four prompts of one token: 400 responses
to each prompt. A truncated response is an outcome like any other, so probabilities sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.algo.optimum import enumerate_responses, objective, optimum

EOS, VOCAB, LENGTH = 0, 8, 3
PROMPTS = [[1], [2], [3], [4]]


def tiny_llama(seed: int, vocab: int = VOCAB, width: int = 32, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def fine_tuned(base: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Twelve Adam steps on six random responses: a pi_sft well apart from pi_base."""
    sft = LlamaForCausalLM(base.config).eval()
    sft.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    demonstrations = torch.randint(1, VOCAB, (6, 1 + LENGTH), generator=generator)
    demonstrations[:, 0] = torch.tensor([1, 2, 3, 4, 1, 2])
    demonstrations[::2, -1] = EOS
    optimizer = torch.optim.Adam(sft.parameters(), 1e-3)
    for _ in range(12):
        logprobs = sft(demonstrations[:, :-1]).logits.log_softmax(-1)
        loss = -logprobs.gather(2, demonstrations[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sft


@torch.no_grad()
def sequence_logprobs(model: LlamaForCausalLM) -> Tensor:
    """(prompts, S) float64: the exact log-probability of every response, by plain forwards."""
    ids, mask = enumerate_responses(VOCAB, EOS, LENGTH)
    rows = []
    for prompt in PROMPTS:
        x = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
        logprobs = model(x[:, :-1]).logits.double().log_softmax(-1)
        rows.append((logprobs.gather(2, ids[:, :, None]).squeeze(2) * mask).sum(1))
    return torch.stack(rows)


@dataclass
class Exact:
    """What enumeration says; means over the prompts, in nats."""

    j_sft: float
    j_star: float
    j_policy: float
    kl_to_optimum: float

    @property
    def gap_closed(self) -> float:
        return (self.j_policy - self.j_sft) / (self.j_star - self.j_sft)


def exact(policy: LlamaForCausalLM, sft: LlamaForCausalLM, base: LlamaForCausalLM, kl_coef: float,
          ref: str = "sft") -> Exact:  # fmt: skip
    p, s, b = (sequence_logprobs(m) for m in (policy, sft, base))
    rows = []
    for i in range(len(PROMPTS)):
        log_star, j_star = optimum(s[i], b[i], kl_coef, ref)
        rows.append(
            [
                float(objective(s[i], s[i], b[i], kl_coef, ref)),
                float(j_star),
                float(objective(p[i], s[i], b[i], kl_coef, ref)),
                float((p[i].exp() * (p[i] - log_star)).sum()),
            ]
        )
    return Exact(*torch.tensor(rows).mean(0).tolist())
