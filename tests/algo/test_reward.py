import math

import pytest
import torch

from srppo.algo.reward import Bounds, last_token, token_log_ratios, token_rewards
from srppo.errors import ConfigError, ShapeError

NAN = math.nan
MASK = torch.tensor([[True, True, True], [True, False, False]])
SFT = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, NAN, NAN]])
BASE = torch.tensor([[-2.0, -1.5, -4.5], [-3.5, NAN, NAN]])


def test_reward_by_hand_with_nan_in_padding():
    assert token_log_ratios(SFT, BASE, MASK).tolist() == [[1, -0.5, 4], [0.5, 0, 0]]
    assert token_log_ratios(SFT, BASE, MASK).sum(1).tolist() == [4.5, 0.5]


def test_reward_is_a_log_likelihood_ratio():
    """E_base[exp r] = 1 and E_sft[r] = KL(sft || base) >= 0, over all responses of two tokens."""
    logits = torch.randn(2, 9, dtype=torch.float64)
    sft, base = logits.log_softmax(-1)  # of the 9 responses; any split over tokens will do
    split = torch.rand(9, 2, dtype=torch.float64).softmax(-1)
    mask = torch.ones(9, 2, dtype=torch.bool)
    r = token_log_ratios(sft[:, None] * split, base[:, None] * split, mask).sum(1)
    assert (base.exp() * r.exp()).sum().item() == pytest.approx(1)
    kl = torch.nn.functional.kl_div(base, sft, log_target=True, reduction="sum")
    assert (sft.exp() * r).sum().item() == pytest.approx(kl.item())
    assert kl > 0


def test_reward_is_zero_when_sft_is_base_and_changes_sign_when_they_swap():
    assert token_log_ratios(SFT, SFT, MASK).sum(1).tolist() == [0, 0]
    assert torch.equal(
        token_log_ratios(SFT, BASE, MASK).sum(1), -token_log_ratios(BASE, SFT, MASK).sum(1)
    )


def test_clip_acts_on_each_token_not_on_the_sum():
    assert token_log_ratios(SFT, BASE, MASK, Bounds(clip=0.75)).tolist() == [
        [0.75, -0.5, 0.75],
        [0.5, 0, 0],
    ]
    unclipped = token_log_ratios(SFT, BASE, MASK, Bounds(clip=9.0))
    assert unclipped.tolist() == [[1, -0.5, 4], [0.5, 0, 0]]


def test_an_implausible_token_pays_for_what_it_lacks_and_the_others_earn_their_ratio():
    """alpha = 0.1: ln 10 nats below the likeliest token is the bound; beyond it, the distance."""
    ln10 = math.log(10)
    margins = torch.tensor([[0.0, -ln10 + 0.01, -ln10 - 1.5], [-ln10 - 0.25, NAN, NAN]])
    found = token_log_ratios(SFT, BASE, MASK, Bounds(plausibility=0.1), margins)
    torch.testing.assert_close(found, torch.tensor([[1, -0.5, -1.5], [-0.25, 0, 0]]))
    both = token_log_ratios(SFT, BASE, MASK, Bounds(clip=0.75, plausibility=0.1), margins)
    torch.testing.assert_close(both, torch.tensor([[0.75, -0.5, -0.75], [-0.25, 0, 0]]))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"clip": 0.0}, "clip=0.0"), ({"plausibility": 0.0}, "0.0"), ({"plausibility": 1.5}, "1.5")],
)
def test_bounds_that_make_no_sense_are_refused(wrong, word):
    with pytest.raises(ConfigError, match=word):
        Bounds(**wrong)


def test_last_token():
    assert last_token(MASK).tolist() == [2, 0]
    with pytest.raises(ShapeError, match="row 1 has no response token"):
        last_token(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ShapeError, match="row 0 has a response token after padding"):
        last_token(torch.tensor([[False, True], [True, True]]))


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    sft, base, policy = -torch.rand(3, 5, 7, dtype=torch.float64, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6, 2])[:, None]
    return [x.masked_fill(~mask, NAN) for x in (sft, base, policy)] + [mask]


@pytest.mark.parametrize("credit", ["eos", "token"])
def test_the_sum_is_the_rearranged_objective(credit, rollout):
    """ref = sft: sum_t (1 + beta) log sft - log base - beta log policy, row by row."""
    sft, base, policy, mask = rollout
    rewards = token_rewards(token_log_ratios(sft, base, mask), policy, sft, mask, 0.3, credit)
    for b, length in enumerate(mask.sum(1).tolist()):
        expected = (1.3 * sft - base - 0.3 * policy)[b, :length].sum()
        torch.testing.assert_close(rewards[b].sum(), expected)
    assert (rewards[~mask] == 0).all()


def test_where_the_credit_goes(rollout):
    sft, base, policy, mask = rollout
    log_ratios = token_log_ratios(sft, base, mask)
    at_eos = token_rewards(log_ratios, policy, sft, mask, 0.0, "eos")
    assert at_eos.nonzero().tolist() == [[0, 6], [1, 0], [2, 3], [3, 5], [4, 1]]
    torch.testing.assert_close(at_eos.sum(1), token_log_ratios(sft, base, mask).sum(1))
    assert torch.equal(token_rewards(log_ratios, policy, sft, mask, 0.0, "token"), log_ratios)
    penalty = token_rewards(torch.zeros_like(log_ratios), policy, sft, mask, 2.0, "eos")
    torch.testing.assert_close(penalty[mask], 2 * (sft - policy)[mask])


def test_nan_in_the_padding_of_the_log_ratios_is_not_read(rollout):
    sft, base, policy, mask = rollout
    dirty = sft - base
    assert dirty.isnan().any()
    for credit in ("eos", "token"):
        assert token_rewards(dirty, policy, sft, mask, 0.2, credit).isfinite().all()


@pytest.mark.parametrize("credit", ["eos", "token"])
def test_batch_of_one_equals_batch_of_many(credit, rollout):
    sft, base, policy, mask = rollout

    def both(rows):
        s, b, p, m = (x[rows] for x in (sft, base, policy, mask))
        return token_rewards(token_log_ratios(s, b, m), p, s, m, 0.3, credit)

    alone = torch.cat([both(slice(i, i + 1)) for i in range(5)])
    assert torch.equal(both(slice(None)), alone)


def test_what_cannot_be_scored_is_refused(rollout):
    sft, base, policy, mask = rollout
    with pytest.raises(ShapeError, match=r"base_logprobs \(1, 7\)"):
        token_log_ratios(sft, base[:1], mask).sum(1)
    with pytest.raises(ShapeError, match="ref_logprobs"):
        token_rewards(sft, policy, base[:, :1], mask, 0.2, "eos")
    with pytest.raises(ConfigError, match="'last'"):
        token_rewards(sft, policy, base, mask, 0.2, "last")
