"""log pi(y|x) of a padded batch is that of each row alone, for every architecture."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from srppo.algo.logprobs import token_logprobs
from srppo.models.batching import make_batch
from srppo.models.scoring import (
    chunks,
    hidden_states,
    output_logits,
    score,
    score_with_margins,
    score_with_values,
)
from srppo.models.value_head import ValueHead

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
def test_neither_padding_nor_the_cut_changes_a_score(model, budget):
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


def test_nan_at_padding_leaks_into_no_score_and_no_gradient(model):
    """The trunk answers NaN after each row's last input; nothing must notice."""
    y = tiny.sequences()
    batch = make_batch(y, torch.arange(len(y)), model.device)

    def gradients():
        model.zero_grad()
        logits = output_logits(model, hidden_states(model, batch))
        token_logprobs(logits, batch.response_ids).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected, scores = gradients(), score(model, y, ONE_BATCH)

    def spoil(module, args, kwargs, output):
        ids, hidden = kwargs.get("input_ids"), output.last_hidden_state
        if ids is not None and ids.shape == hidden.shape[:2]:  # the trunk, not the head by itself
            padding = ids == tiny.EOS  # EOS comes last and is predicted only
            assert padding.any()
            output.last_hidden_state = hidden.masked_fill(padding[..., None], torch.nan)
        return output

    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    assert torch.equal(score(model, y, ONE_BATCH), scores)
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_trunk_and_head_apart_give_the_logits_of_the_whole_model(model):
    y = tiny.sequences(n=3)
    batch = make_batch(y, torch.arange(3), model.device)
    with torch.no_grad():
        logits = output_logits(model, hidden_states(model, batch)).split(y.lengths.tolist())
    for i in range(3):
        prompt, response = tiny.row(y, i)
        with torch.no_grad():
            plain = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[i], plain, atol=1e-4, rtol=0)


def test_what_an_architecture_does_to_its_logits_is_done():
    """Gemma 2 caps them softly, Cohere scales them: neither is in the output layer."""
    for kind, setting in (
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.1, "pad_token_id": 0}),
    ):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**tiny.SHAPE, **setting})
        model = AutoModelForCausalLM.from_config(config).eval()
        y = tiny.sequences()
        torch.testing.assert_close(score(model, y, 40), alone(model, y), atol=1e-5, rtol=0)


def test_the_model_is_whole_again_after_its_head_was_run_alone(model):
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    output_logits(model, torch.zeros(2, model.config.hidden_size))
    assert torch.equal(model(ids).logits, before)


def test_chunks_cover_the_tokens_in_order(model, monkeypatch):
    monkeypatch.setattr("srppo.algo.logprobs.CPU_CHUNK_ELEMENTS", 5 * tiny.VOCAB)
    y = tiny.sequences()
    batch = make_batch(y, torch.arange(len(y)), model.device)
    pieces = [torch.arange(len(batch))[some] for some in chunks(model, batch)]
    assert max(len(piece) for piece in pieces) == 5
    assert torch.equal(torch.cat(pieces), torch.arange(len(batch)))
    torch.testing.assert_close(score(model, y, ONE_BATCH), alone(model, y), atol=1e-5, rtol=0)


def test_values_come_from_the_same_pass_and_ignore_padding_and_the_predicted_token(model):
    torch.manual_seed(1)
    critic = ValueHead(model)
    torch.nn.init.normal_(critic.out.weight)
    y = tiny.sequences()
    logprobs, units = score_with_values(model, critic, y, ONE_BATCH)
    assert torch.equal(logprobs, score(model, y, ONE_BATCH))
    assert (units[~y.mask] == 0).all()
    assert units[y.mask].std() > 0.1
    last = y.lengths - 1
    other = y.response_ids.clone()
    other[torch.arange(len(y)), last] = (other[torch.arange(len(y)), last] + 1) % tiny.VOCAB
    changed, same = score_with_values(model, critic, replace(y, response_ids=other), 40)
    torch.testing.assert_close(same, units, atol=1e-4, rtol=0)
    assert not torch.allclose(changed, logprobs)


@pytest.mark.parametrize("budget", [40, ONE_BATCH])
def test_margins_are_the_distance_to_the_likeliest_token(budget):
    model, y = tiny.model(), tiny.sequences()
    logprobs, margins = score_with_margins(model, y, budget)
    torch.testing.assert_close(logprobs, score(model, y, budget), atol=1e-5, rtol=0)
    for i, (prompt, length) in enumerate(zip(y.prompt_ids, y.lengths.tolist(), strict=True)):
        ids = torch.cat([torch.tensor(prompt), y.response_ids[i, :length]])
        with torch.no_grad():
            table = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs[i, :length] - table.amax(-1)
        torch.testing.assert_close(margins[i, :length], expected, atol=1e-4, rtol=0)
    assert (margins[~y.mask] == 0).all()
    assert (margins[y.mask] < 0).any()


def test_bfloat16_models_are_scored_with_more_digits_than_they_have():
    """A log-softmax in bfloat16 would round -3.21 to a multiple of 1/64."""
    scores = score(tiny.model().to(torch.bfloat16), tiny.sequences(), ONE_BATCH)
    assert scores.dtype == torch.float32
    scores = scores[scores != 0]
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_scoring_takes_no_gradients():
    assert not score(tiny.model(), tiny.sequences(), ONE_BATCH).requires_grad


def test_a_model_whose_head_was_run_alone_goes_when_it_is_dropped():
    """A reference from the trunk to itself would keep a stage's weights until some collection."""
    model = tiny.model()
    output_logits(model, torch.zeros(2, model.config.hidden_size))
    gone = weakref.ref(model.base_model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
