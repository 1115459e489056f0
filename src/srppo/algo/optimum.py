"""What SRPPO converges to: pi* and J* by enumeration, and extrapolation of logits.

    pi*(y|x) ∝ pi_ref(y|x) exp(r(x, y) / beta)    J* = beta log Z    r = log pi_sft - log pi_base

so pi* ∝ base (sft / base)^lambda over whole responses: lambda = 1 + 1/beta if pi_ref = pi_sft,
lambda = 1/beta if pi_ref = pi_base. The same formula over single tokens (`extrapolate`) is another
distribution, because it cannot look ahead; the two agree on responses of one token.
"""

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from srppo.algo.logprobs import token_chunks, working_dtype
from srppo.algo.masking import require_same_shape
from srppo.algo.reward import UNBOUNDED, Bounds
from srppo.errors import ConfigError, ShapeError


def enumerate_responses(vocab_size: int, eos: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Every response there is: it ends at its first `eos`, or is truncated at `max_length`.

    Args:
        vocab_size: V; there are (V-1)^0 + ... + (V-1)^(T-1) responses that end and (V-1)^T that
            are truncated, so keep both V and T small.
        eos: id in [0, V).
        max_length: T, tokens, EOS included.

    Returns:
        ids (S, T) int64, right-padded with `eos`, and mask (S, T) bool, True up to the first EOS
        (included). Truncated responses count, so the probabilities of all S sum to 1.
    """
    others = [token for token in range(vocab_size) if token != eos]
    responses = [
        [*words, eos] for length in range(max_length) for words in product(others, repeat=length)
    ]
    responses += [list(words) for words in product(others, repeat=max_length)]
    ids = torch.tensor([y + [eos] * (max_length - len(y)) for y in responses])
    lengths = torch.tensor([len(y) for y in responses])
    return ids, torch.arange(max_length) < lengths[:, None]


def optimum(
    sft: Tensor, base: Tensor, kl_coef: float, ref: Literal["sft", "base"]
) -> tuple[Tensor, Tensor]:
    """The policy that maximises J, and the J it reaches.

    Args:
        sft: (S,) nats, log pi_sft of every possible response; the probabilities sum to 1.
        base: (S,) nats, the same under pi_base.
        kl_coef: beta, above 0.
        ref: which of the two the KL term refers to.

    Returns:
        log pi* (S,) nats, normalised, and J* = beta log Z, a scalar in nats.

    Raises:
        ShapeError: `sft` and `base` differ in shape.
        ConfigError: `ref` is neither of the two.
    """
    require_same_shape(sft=sft, base=base)
    tilted = _reference(sft, base, ref) + (sft - base) / kl_coef
    log_z = tilted.logsumexp(dim=0)
    return tilted - log_z, kl_coef * log_z


def objective(
    policy: Tensor, sft: Tensor, base: Tensor, kl_coef: float, ref: Literal["sft", "base"]
) -> Tensor:
    """Exact J = E_{y~policy}[log sft/base - kl_coef log policy/ref], a scalar in nats.

    Args:
        policy: (S,) nats, log-probability of every possible response; -inf for impossible ones.
        sft: (S,) nats.
        base: (S,) nats.
        kl_coef: beta.
        ref: which of `sft` and `base` the KL term refers to.

    Raises:
        ShapeError: the three shapes differ.
        ConfigError: `ref` is neither of the two.
    """
    require_same_shape(policy=policy, sft=sft, base=base)
    possible = policy > -torch.inf
    policy, sft, base = policy[possible], sft[possible], base[possible]
    gain = sft - base - kl_coef * (policy - _reference(sft, base, ref))
    return (policy.exp() * gain).sum()


def extrapolate(
    base_logits: Tensor, sft_logits: Tensor, lam: float, bounds: Bounds = UNBOUNDED
) -> Tensor:
    """Next-token log-probabilities of pi_lam ∝ base (sft / base)^lam.

    With bounds: pi_lam ∝ sft exp((lam - 1) rho), rho the bounded log(sft / base).

    Args:
        base_logits: (..., V), finite.
        sft_logits: (..., V), finite, of the same prefixes.
        lam: 0 gives base (without bounds), 1 gives sft, above 1 goes past sft.
        bounds: of log(sft / base).

    Returns:
        (..., V) nats, normalised, float32 (float64 for float64).

    Raises:
        ShapeError: the two shapes differ.
    """
    require_same_shape(base_logits=base_logits, sft_logits=sft_logits)
    base, step = _direction(base_logits, sft_logits, bounds)
    return torch.log_softmax(base + lam * step, dim=-1)


def extrapolated_nll(
    base_logits: Tensor,
    sft_logits: Tensor,
    ids: Tensor,
    lams: Tensor,
    bounds: Bounds = UNBOUNDED,
) -> Tensor:
    """-log pi_lam of each token, for each lambda. A measurement: no gradient flows through it.

    Args:
        base_logits: (..., V), finite.
        sft_logits: (..., V), finite, of the same prefixes.
        ids: (...) int64 in [0, V).
        lams: (L,).
        bounds: as in `extrapolate`.

    Returns:
        (L, ...) nats, float32 (float64 for float64 logits). Memory beyond the logits and the
        result: a few chunks of tokens.

    Raises:
        ShapeError: the logits differ in shape, or `ids` is not one id per row of them.
    """
    require_same_shape(base_logits=base_logits, sft_logits=sft_logits)
    if base_logits.shape[:-1] != ids.shape:
        raise ShapeError(
            f"logits {tuple(base_logits.shape)} need ids of shape "
            f"{tuple(base_logits.shape[:-1])}, got {tuple(ids.shape)}. "
            "Are the logits shifted by one against the ids?"
        )
    flat_ids = ids.reshape(-1, 1)
    dtype = working_dtype(base_logits)
    out = torch.empty(len(lams), ids.numel(), dtype=dtype, device=ids.device)
    with torch.no_grad():
        for place, (base_rows, sft_rows) in token_chunks(base_logits, sft_logits):
            base, step = _direction(base_rows, sft_rows, bounds)
            for row, lam in enumerate(lams.tolist()):
                scores = torch.add(base, step, alpha=lam)
                chosen = scores.gather(1, flat_ids[place]).squeeze(1)
                out[row, place] = scores.logsumexp(dim=1) - chosen
    return out.view(len(lams), *ids.shape)


def _direction(base_logits: Tensor, sft_logits: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Where lambda = 0 is, and one step of lambda: log base, and log sft - log base."""
    base = torch.log_softmax(base_logits, dim=-1, dtype=working_dtype(base_logits))
    sft = torch.log_softmax(sft_logits, dim=-1, dtype=working_dtype(sft_logits))
    if bounds == UNBOUNDED:
        return base, sft - base
    step = bounds.apply(sft - base, sft - sft.amax(-1, keepdim=True))
    return sft - step, step  # lambda = 1 stays sft


def _reference(sft: Tensor, base: Tensor, ref: Literal["sft", "base"]) -> Tensor:
    if ref == "sft":
        return sft
    if ref == "base":
        return base
    raise ConfigError(f"ref={ref!r} is unknown: choose 'sft' or 'base'.")
