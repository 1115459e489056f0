"""log pi(y|x) of a padded batch is that of each row alone, for every architecture."""

from dataclasses import replace

import pytest
import torch

import tiny
from srppo.models.batching import make_batch
from srppo.models.scoring import batch_logprobs, response_logits, score

ONE_BATCH = 10**6


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def model(request):
    return tiny.model(request.param)


def alone(model, y):
    """Each row by a plain unpadded forward; zero at padding."""
    expected = torch.zeros(y.mask.shape)
    for i in range(len(y)):
        expected[i][y.mask[i]] = tiny.plain_logprobs(model, *tiny.row(y, i))
    return expected


@pytest.mark.parametrize("budget", [1, 40, ONE_BATCH])
def test_padding_left_and_right_changes_no_score(model, budget):
    y = tiny.sequences()
    scores = score(model, y, budget)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, alone(model, y), atol=1e-5, rtol=0)


def test_scores_of_the_rows_differ(model):
    """Were every row scored alike, the test above could not fail."""
    totals = score(model, tiny.sequences(), ONE_BATCH).sum(1)
    assert totals.std() > 1


def test_garbage_ids_in_padding_change_nothing(model):
    y = tiny.sequences()
    garbage = torch.where(y.mask, y.response_ids, tiny.VOCAB - 1)
    assert not torch.equal(garbage, y.response_ids)
    scores = score(model, replace(y, response_ids=garbage), ONE_BATCH)
    assert torch.equal(scores, score(model, y, ONE_BATCH))


def spoil_padding(model):
    """The model now answers NaN at every position whose next token is padding."""
    masks = []

    def remember(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    def spoil(module, args, logits):
        following = torch.nn.functional.pad(masks[-1][:, 1:], (0, 1))[:, -logits.shape[1] :]
        return torch.where(following[..., None] == 1, logits, torch.nan)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.lm_head.register_forward_hook(spoil)
    return model


def test_nan_at_padding_leaks_into_no_score_and_no_gradient(model):
    y = tiny.sequences()
    batch = make_batch(y, torch.arange(len(y)), model.device)
    expected = score(model, y, ONE_BATCH)
    torch.where(batch.mask, batch_logprobs(model, batch), 0.0).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    spoil_padding(model)
    with torch.no_grad():
        assert response_logits(model, batch)[~batch.mask].isnan().all()
    assert torch.equal(score(model, y, ONE_BATCH), expected)
    torch.where(batch.mask, batch_logprobs(model, batch), 0.0).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_response_logits_are_the_distributions_that_responses_were_drawn_from(model):
    y = tiny.sequences(n=3)
    batch = make_batch(y, torch.arange(3), model.device)
    with torch.no_grad():
        logits = response_logits(model, batch)
    assert logits.shape == (*batch.response_ids.shape, tiny.VOCAB)
    for i in range(3):
        prompt, response = tiny.row(y, i)
        with torch.no_grad():
            plain = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[i, : len(response)], plain, atol=1e-4, rtol=0)


def test_bfloat16_models_are_scored_with_more_digits_than_they_have():
    """A log-softmax in bfloat16 would round -3.21 to a multiple of 1/64."""
    scores = score(tiny.model().to(torch.bfloat16), tiny.sequences(), ONE_BATCH)
    assert scores.dtype == torch.float32
    scores = scores[scores != 0]
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_scoring_takes_no_gradients():
    assert not score(tiny.model(), tiny.sequences(), ONE_BATCH).requires_grad
