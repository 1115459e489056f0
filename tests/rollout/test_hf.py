"""The sampler draws from the model's own distribution, whatever the batch around a response."""

import pytest
import torch
from scipy.stats import chisquare

import tiny
from enumerable import EOS, LENGTH, VOCAB, fine_tuned, tiny_llama
from srppo.algo.optimum import enumerate_responses
from srppo.errors import ModelError
from srppo.models.scoring import score
from srppo.rollout.hf import HFSampler

PROMPTS = tiny.sequences(seed=5, n=24).prompt_ids


def sampler_of(model, **options):
    return HFSampler(model, **{"eos_token_id": EOS, "max_new_tokens": 10, **options})


def equal(one, other):
    a, b = one.sequences, other.sequences
    return torch.equal(a.response_ids * a.mask, b.response_ids * b.mask) and torch.equal(
        a.mask, b.mask
    )


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def model(request):
    return tiny.model(request.param)


def test_a_seed_decides_the_responses():
    sampler = sampler_of(tiny.model())
    assert equal(sampler.sample(PROMPTS, seed=3), sampler.sample(PROMPTS, seed=3))
    assert not equal(sampler.sample(PROMPTS, seed=3), sampler.sample(PROMPTS, seed=4))


def test_global_random_numbers_are_neither_used_nor_moved():
    sampler = sampler_of(tiny.model())
    torch.manual_seed(0)
    first = sampler.sample(PROMPTS, seed=3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert equal(sampler.sample(PROMPTS, seed=3), first)
    torch.manual_seed(0)
    assert torch.rand(1) == after


def test_equal_prompts_get_responses_of_their_own():
    rollout = sampler_of(tiny.model()).sample([[1, 2]] * 32, seed=0)
    assert len({tuple(ids) for ids in rollout.sequences.response_ids.tolist()}) > 16


@pytest.mark.parametrize(
    ("options", "dtype", "temperature", "exact"),
    [
        ({}, torch.float32, 1.0, True),
        ({"compute": "bfloat16"}, torch.float32, 1.0, True),  # on a CPU: only training is reduced
        ({}, torch.bfloat16, 1.0, False),
        ({}, torch.float32, 0.5, False),
    ],
)
def test_the_sampled_logprobs_stand_for_a_scoring_pass_only_where_they_equal_it(
    options, dtype, temperature, exact
):
    model = tiny.model().to(dtype)
    rollout = sampler_of(model, **options).sample(PROMPTS, seed=1, temperature=temperature)
    assert rollout.exact == exact
    off = (rollout.logprobs - score(model, rollout.sequences, 1000)).abs()
    assert (off[rollout.sequences.mask].max() < 1e-5) == exact


def test_8_bit_products_are_not_exact():
    """They round each row together with its own largest input."""
    model = tiny.model()
    model.is_loaded_in_8bit = True
    assert not sampler_of(model).sample(PROMPTS, seed=1).exact


@pytest.mark.parametrize("budget", [1, 30, 100])
def test_the_cut_into_batches_changes_nothing(model, budget):
    whole = sampler_of(model).sample(PROMPTS, seed=1)
    cut = sampler_of(model, max_tokens_per_batch=budget).sample(PROMPTS, seed=1)
    assert equal(whole, cut)
    assert torch.equal(whole.ended, cut.ended)
    torch.testing.assert_close(whole.logprobs, cut.logprobs, atol=1e-5, rtol=0)


def test_batches_respect_the_budget():
    model, widths = tiny.model(), []

    def remember(module, args, kwargs):
        if kwargs["past_key_values"] is None:
            return  # the output head by itself
        past = kwargs["past_key_values"].get_seq_length()
        widths.append((len(kwargs["input_ids"]), past + kwargs["input_ids"].shape[1]))

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    sampler_of(model, max_tokens_per_batch=60).sample(PROMPTS, seed=1)
    assert max(b * w for b, w in widths) <= 60
    assert max(b for b, _ in widths) > 1


def test_logprobs_are_those_of_the_model(model):
    rollout = sampler_of(model).sample(PROMPTS, seed=2)
    y = rollout.sequences
    torch.testing.assert_close(rollout.logprobs * y.mask, score(model, y, 10**6), atol=1e-5, rtol=0)
    assert (rollout.logprobs[~y.mask] == 0).all()


def test_logprobs_at_another_temperature_are_those_of_the_tempered_distribution():
    model = tiny.model()
    y = (rollout := sampler_of(model).sample(PROMPTS, seed=2, temperature=0.5)).sequences
    prompt, response = tiny.row(y, 0)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.5).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[0, : len(response)], expected, atol=1e-5, rtol=0)


def test_responses_end_with_their_first_eos_or_are_cut_off():
    rollout = sampler_of(tiny.model()).sample(PROMPTS * 4, seed=0)
    y = rollout.sequences
    for i, ended in enumerate(rollout.ended.tolist()):
        _, response = tiny.row(y, i)
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == ended
        assert ended or len(response) == 10
        assert y.mask[i].tolist() == [t < len(response) for t in range(y.mask.shape[1])]
    assert 0 < rollout.ended.sum() < len(y)  # both kinds occur
    assert y.prompt_ids == PROMPTS * 4
    assert y.mask.any(0).all()  # no column of padding alone


def test_finished_responses_leave_the_batch():
    model, sizes = tiny.model(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    y = sampler_of(model).sample(PROMPTS, seed=0).sequences
    assert sizes == [int((y.lengths > t).sum()) for t in range(y.mask.shape[1])]
    assert sizes[-1] < sizes[0]


def test_progress_counts_every_response():
    seen = []
    sampler_of(tiny.model(), max_tokens_per_batch=50).sample(PROMPTS, 0, progress=seen.append)
    assert sum(seen) == len(PROMPTS)
    assert len(seen) > 1


def test_greedy_is_what_transformers_generates(model):
    rollout = sampler_of(model).sample(PROMPTS, seed=0, temperature=0.0)
    for i, prompt in enumerate(PROMPTS):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        assert tiny.row(rollout.sequences, i)[1] == generated[0, len(prompt) :].tolist()


# --- the distribution -----------------------------------------------------------------------------


def outcome_logprobs(next_logits, prompt):
    """(S,) log-probability of every response of at most 3 tokens, by plain forwards."""
    ids, mask = enumerate_responses(VOCAB, EOS, LENGTH)
    inputs = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
    with torch.no_grad():
        logprobs = next_logits(inputs[:, :-1])[:, len(prompt) - 1 :].log_softmax(-1)
    return (logprobs.gather(2, ids[:, :, None]).squeeze(2) * mask).sum(1)


def counts_of(rollout, rows):
    """(S,) how often each outcome occurs among the rows."""
    ids, mask = enumerate_responses(VOCAB, EOS, LENGTH)
    place = {tuple(y[m].tolist()): k for k, (y, m) in enumerate(zip(ids, mask, strict=True))}
    counts = torch.zeros(len(ids))
    for i in rows:
        counts[place[tuple(tiny.row(rollout.sequences, i)[1])]] += 1
    return counts


def p_value(counts, logprobs):
    """Chi-square test; outcomes expected fewer than five times are taken together."""
    expected = logprobs.double().exp() * counts.sum()
    common = expected >= 5
    return chisquare(
        torch.cat([counts[common], counts[~common].sum()[None]]).numpy(),
        torch.cat([expected[common], expected[~common].sum()[None]]).numpy(),
        sum_check=False,
    ).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("prompt", [[1], [2, 3, 4]])
def test_responses_follow_the_exact_distribution(prompt, temperature):
    """The one-token prompt is padded to the width of its longer neighbours."""
    model, other = tiny_llama(seed=0), tiny_llama(seed=1)
    n = 8000
    prompts = [prompt, [5, 6, 7, 1]] * n
    rollout = sampler_of(model, max_new_tokens=LENGTH).sample(prompts, 11, temperature)
    counts = counts_of(rollout, range(0, 2 * n, 2))
    exact = outcome_logprobs(lambda x: model(x).logits / temperature, prompt)
    wrong = outcome_logprobs(lambda x: other(x).logits / temperature, prompt)
    assert abs(float(exact.exp().sum()) - 1) < 1e-5
    assert p_value(counts, exact) > 1e-3
    assert p_value(counts, wrong) < 1e-9  # and the test would notice another distribution


# --- extrapolation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


def test_lambda_1_samples_from_sft_and_lambda_0_from_base(pair):
    base, sft = pair
    prompts = [[1], [2, 3], [4, 5, 6]] * 20
    by_sft = sampler_of(sft).sample(prompts, seed=7)
    by_base = sampler_of(base).sample(prompts, seed=7)
    assert not equal(by_sft, by_base)
    assert equal(sampler_of(sft, base=base, lam=1.0).sample(prompts, seed=7), by_sft)
    assert equal(sampler_of(sft, base=base, lam=0.0).sample(prompts, seed=7), by_base)


def test_extrapolation_follows_base_times_the_ratio_to_the_lambda(pair):
    base, sft = pair
    n, lam = 8000, 2.5

    def logits(x):
        sft_logprobs, base_logprobs = sft(x).logits.log_softmax(-1), base(x).logits.log_softmax(-1)
        return base_logprobs + lam * (sft_logprobs - base_logprobs)

    sampler = sampler_of(sft, base=base, lam=lam, max_new_tokens=LENGTH)
    counts = counts_of(sampler.sample([[1]] * n, seed=13), range(n))
    assert p_value(counts, outcome_logprobs(logits, [1])) > 1e-3
    assert p_value(counts, outcome_logprobs(lambda x: sft(x).logits, [1])) < 1e-9


def test_a_model_that_diverged_is_named():
    model = tiny_llama(seed=0)
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match=r"NaN.*learning rate"):
        HFSampler(model, eos_token_id=EOS, max_new_tokens=3).sample([[1]], seed=0)
