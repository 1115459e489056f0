"""The update: which rows, which gradient, who moves."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import tiny
from srppo.config import PPOConfig
from srppo.models.roles import Roles
from srppo.models.scoring import score, score_with_values
from srppo.rollout.sampler import Rollout
from srppo.train import update as module
from srppo.train.update import Experience, Optimizers, accumulate, generator, update

ONE_BATCH = 10**6
ROWS = torch.arange(10)


def config_of(**settings):
    return PPOConfig(**{"minibatch_size": 4, "learning_rate": 1e-3, **settings})


def rollout_of(y, logprobs):
    return Rollout(y, logprobs, ended=torch.ones(len(y), dtype=torch.bool))


def values_of(roles, y):
    units = score_with_values(roles.policy, roles.critic, y, ONE_BATCH)[1]
    return torch.where(y.mask, roles.critic.in_nats(units), 0.0)


@pytest.fixture
def roles():
    return Roles.begin(tiny.model(seed=0), tiny.model(seed=1), critic=True)


@pytest.fixture
def experience(roles):
    """Ten responses with random advantages and returns."""
    torch.manual_seed(2)
    y = tiny.sequences(n=10)
    advantages = torch.randn(y.mask.shape) * y.mask
    returns = 5 + 2 * torch.randn(y.mask.shape) * y.mask
    roles.critic.calibrate(returns, y.mask)
    logprobs = score(roles.policy, y, ONE_BATCH)
    return Experience(
        rollout=rollout_of(y, logprobs),
        logprobs=logprobs,
        values=values_of(roles, y),
        advantages=advantages,
        returns=returns,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def steps_taken(optimizer):
    return max((int(s["step"]) for s in optimizer.state.values()), default=0)


# --- which rows -----------------------------------------------------------------------------------


def test_minibatches_cover_every_row_of_every_epoch_the_remainder_included(
    roles, experience, monkeypatch
):
    """10 rollouts in minibatches of 4: 4 + 4 + 2, in another order each epoch."""
    seen = []

    def recording(roles, experience, rows, *rest):
        seen.append(rows.tolist())
        return accumulate(roles, experience, rows, *rest)

    monkeypatch.setattr(module, "accumulate", recording)
    config = config_of(epochs=2)
    update(roles, experience, Optimizers(roles, config), config, generator(0))
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for rows in epoch for i in rows] for epoch in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_every_minibatch_multiplies_with_the_weights_of_its_time(roles, experience, monkeypatch):
    """What converts weights to bfloat16 may keep them, so it must not outlive an optimizer step."""
    order = []

    @contextmanager
    def noting(compute, device):
        order.append("enter")
        yield
        order.append("leave")

    monkeypatch.setattr(module, "computing", noting)
    config = config_of(epochs=1)
    optimizers = Optimizers(roles, config)
    optimizers.policy.register_step_pre_hook(lambda *_: order.append("step"))
    update(roles, experience, optimizers, config, generator(0))
    assert order == ["enter", "leave", "step"] * 3


# --- which gradient -------------------------------------------------------------------------------


def test_the_first_gradient_is_the_policy_gradient(roles, experience):
    """At ratio 1: minus the advantage-weighted mean of grad log pi, by plain unpadded forwards."""
    rows = torch.tensor([8, 1, 5])
    accumulate(roles, experience, rows, config_of())
    found = gradients(roles.policy)
    roles.policy.model.zero_grad()
    y, total, tokens = experience.rollout.sequences, torch.tensor(0.0), 0
    for i in rows.tolist():
        prompt, response = tiny.row(y, i)
        logits = roles.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        total = total - (logprobs * experience.advantages[i, : len(response)]).sum()
        tokens += len(response)
    (total / tokens).backward()
    torch.testing.assert_close(found, gradients(roles.policy), atol=1e-5, rtol=1e-4)
    assert found.norm() > 0.1


@pytest.mark.parametrize("budget", [1, 60])
def test_microbatches_add_up_to_the_gradient_of_the_whole(roles, experience, budget):
    """Rows differ in length, so a mean of microbatch means would be another gradient."""
    whole = accumulate(roles, experience, ROWS, config_of())
    of_whole = [gradients(m) for m in (roles.policy, roles.critic)]
    roles.policy.model.zero_grad()
    roles.critic.zero_grad()
    split = accumulate(roles, experience, ROWS, config_of(max_tokens_per_batch=budget))
    of_split = [gradients(m) for m in (roles.policy, roles.critic)]
    torch.testing.assert_close(of_split, of_whole, atol=1e-5, rtol=1e-4)
    assert split.pop("padding") < whole.pop("padding")
    assert split == pytest.approx(whole, abs=1e-5)


def test_a_ratio_outside_the_clip_that_would_gain_more_has_no_gradient(roles, experience):
    """old = new - 1, so every ratio is e; positive advantages are clipped, negative ones not."""
    y = experience.rollout.sequences
    for sign, clipped in ((1.0, True), (-1.0, False)):
        roles.policy.model.zero_grad()
        moved = Experience(
            experience.rollout,
            (experience.logprobs - 1.0) * y.mask,
            experience.values,
            sign * y.mask.float(),
            experience.returns,
        )
        stats = accumulate(roles, moved, ROWS, config_of(clip=0.2))
        assert stats["clip_fraction"] == pytest.approx(1.0)
        assert (gradients(roles.policy).norm() == 0) == clipped


def test_the_first_minibatch_tells_how_far_the_sampler_is_from_the_trainer(roles, experience):
    """Later ones would measure how far the policy has moved."""
    y, config = experience.rollout.sequences, config_of(learning_rate=1e-2)
    rollout = replace(rollout_of(y, experience.logprobs + 0.25), exact=True)
    off = replace(experience, rollout=rollout)
    stats = update(roles, off, Optimizers(roles, config), config, generator(0))
    assert stats["sampler_logprob_diff"] == pytest.approx(0.25, abs=1e-5)


def test_update_kl_is_zero_before_and_positive_after_a_move(roles, experience):
    before = accumulate(roles, experience, ROWS, config_of())["update_kl"]
    assert before == pytest.approx(0.0, abs=1e-8)
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert accumulate(roles, experience, ROWS, config_of())["update_kl"] > 1e-3


def test_padding_may_hold_nan(roles, experience):
    y = experience.rollout.sequences
    poisoned = Experience(
        experience.rollout,
        *(
            torch.where(y.mask, x, torch.nan)
            for x in (
                experience.logprobs,
                experience.values,
                experience.advantages,
                experience.returns,
            )
        ),
    )
    accumulate(roles, experience, ROWS, config_of())
    expected = gradients(roles.policy)
    roles.policy.model.zero_grad()
    stats = accumulate(roles, poisoned, ROWS, config_of())
    torch.testing.assert_close(gradients(roles.policy), expected)
    assert all(math.isfinite(value) for value in stats.values())


def test_responses_with_positive_advantage_become_likelier(roles, experience):
    y = experience.rollout.sequences
    sign = torch.tensor([1.0, -1.0] * 5)[:, None]
    pulled = Experience(
        experience.rollout,
        experience.logprobs,
        experience.values,
        sign * y.mask,
        experience.returns,
    )
    config = config_of(epochs=4)
    update(roles, pulled, Optimizers(roles, config), config, generator(0))
    change = ((score(roles.policy, y, ONE_BATCH) - experience.logprobs) * sign).sum(1)
    assert (change > 0).all()


def test_the_critic_learns_the_returns(roles):
    """The policy's states explain most of what fifty returns have in common with their prefixes."""
    y = tiny.sequences(n=10)
    returns = torch.where(y.mask, 100.0 + y.lengths[:, None], 0.0)
    roles.critic.calibrate(returns, y.mask)
    config = config_of(epochs=60, value_learning_rate=5e-3, value_clip=1e6)
    start, logprobs = values_of(roles, y), score(roles.policy, y, ONE_BATCH)
    experience = Experience(
        rollout_of(y, logprobs), logprobs, start, torch.zeros_like(start), returns
    )
    update(roles, experience, Optimizers(roles, config), config, generator(0))

    def error(values):
        return float((values - returns)[y.mask].square().mean())

    assert error(values_of(roles, y)) < 0.5 * error(start)


# --- who moves ------------------------------------------------------------------------------------


def test_an_update_moves_policy_and_critic_and_leaves_base_and_sft_alone(roles, experience):
    models = {n: getattr(roles, n).model for n in ("base", "sft", "policy")}
    models["critic"] = roles.critic
    before = {n: weights(m) for n, m in models.items()}
    config = config_of()
    stats = update(roles, experience, Optimizers(roles, config), config, generator(0))
    moved = {n for n, w in before.items() if not torch.equal(w, weights(models[n]))}
    assert moved == {"policy", "critic"}
    assert stats["learning_rate"] == 1e-3
    assert stats["grad_norm"] > 0


def test_warm_up_moves_the_critic_only(roles, experience):
    policy, critic = weights(roles.policy), weights(roles.critic)
    config = config_of()
    optimizers = Optimizers(roles, config)
    stats = update(roles, experience, optimizers, config, generator(0), move_policy=False)
    assert torch.equal(weights(roles.policy), policy)
    assert not torch.equal(weights(roles.critic), critic)
    assert "grad_norm" not in stats
    # no gradient of the warm-up is left over for the first real step
    assert all(p.grad is None for p in roles.policy.parameters())
    assert not optimizers.policy.state


def test_the_kl_limit_of_an_update_stops_the_policy_and_not_the_critic(roles, experience):
    free = config_of(minibatch_size=2, epochs=2, learning_rate=1e-2)
    bounded = free.model_copy(update={"update_kl_limit": 1e-2})
    taken = {}
    for config in (free, bounded):
        fresh = Roles.begin(roles.base, roles.sft, critic=True)
        fresh.critic.calibrate(experience.returns, experience.rollout.sequences.mask)
        optimizers = Optimizers(fresh, config)
        update(fresh, experience, optimizers, config, generator(0))
        taken[config] = (steps_taken(optimizers.policy), steps_taken(optimizers.critic))
        # the gradient that was over the limit does not wait for the next rollout
        assert all(p.grad is None for p in fresh.policy.parameters())
    assert taken[free] == (10, 10)
    policy_steps, critic_steps = taken[bounded]
    assert 1 <= policy_steps < 10
    assert critic_steps == 10


def test_a_gradient_is_scaled_down_to_the_norm_asked_for(roles, experience):
    """With AdamW the first step does not depend on the scale, so the norm is read from .grad."""
    config = config_of(max_grad_norm=1e-3)
    optimizers = Optimizers(roles, config)
    seen = []
    optimizers.policy.register_step_pre_hook(lambda *_: seen.append(gradients(roles.policy).norm()))
    stats = update(roles, experience, optimizers, config, generator(0))
    assert stats["grad_norm"] > 0.01  # logged as it was before
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in seen)


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_schedules_start_at_the_peak_and_hold_it_in_warm_up(roles, schedule, at_half, at_end):
    config = config_of(lr_schedule=schedule, learning_rate=1e-3, value_learning_rate=4e-3)
    optimizers = Optimizers(roles, config)
    for progress, factor in ((-0.5, 1), (0.0, 1), (0.5, at_half), (1.0, at_end)):
        optimizers.set_progress(progress)
        rates = [o.param_groups[0]["lr"] for o in optimizers.all]
        assert rates == pytest.approx([factor * 1e-3, factor * 4e-3], abs=1e-12)


def test_without_a_critic_there_is_one_optimizer(roles, experience):
    alone = Roles.begin(roles.base, roles.sft, critic=False)
    config = config_of()
    optimizers = Optimizers(alone, config)
    stats = update(alone, experience, optimizers, config, generator(0))
    assert len(optimizers.all) == 1
    assert not [key for key in stats if key.startswith("value")]


def test_a_gradient_that_is_no_number_moves_nothing():
    roles = Roles.begin(tiny.model(seed=0), tiny.model(seed=1), critic=False)
    optimizers = Optimizers(roles, PPOConfig())
    before = [p.detach().clone() for p in roles.policy.parameters()]
    for p in roles.policy.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert math.isnan(optimizers.step(move_policy=True)["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, roles.policy.parameters(), strict=True))
