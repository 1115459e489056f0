"""Weighted losses of stage 1 against plain unpadded forwards and torch's own SGD."""

import json

import pytest
import torch

import tiny
from srppo.config import SFTConfig
from srppo.data.chat import Example
from srppo.progress import Reporter
from srppo.train.metrics import MetricsLog
from srppo.train.sft import train_sft
from srppo.train.weighted import reference_logprobs

EXAMPLES = [Example(*tiny.row(y, i)) for y in [tiny.sequences(n=10)] for i in range(10)]
STEPS, RATE = 4, 1e-2


def weight_none(logprobs, reference):
    return torch.ones(len(logprobs))


def weight_probability(logprobs, reference):
    return logprobs.exp()


def weight_of_response(logprobs, reference):
    whole = (logprobs.mean() - reference.mean()).exp()
    return torch.minimum(whole, torch.tensor(16.0)).expand(len(logprobs))


def weight_of_token(logprobs, reference):
    ratio = logprobs.exp() / reference.exp()
    return torch.minimum(torch.maximum(ratio, torch.tensor(0.2)), torch.tensor(1.8))


def by_hand(weight):
    """The model after some steps of SGD on all demonstrations, and the loss before each."""
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    n = sum(len(e.response_ids) for e in EXAMPLES)
    references = [tiny.plain_logprobs(model, e.prompt_ids, e.response_ids) for e in EXAMPLES]
    losses = []
    for _ in range(STEPS):
        loss = torch.tensor(0.0)
        for e, reference in zip(EXAMPLES, references, strict=True):
            logits = model(torch.tensor([e.prompt_ids + e.response_ids])).logits[0]
            logprobs = logits[len(e.prompt_ids) - 1 : -1].log_softmax(-1)
            logprobs = logprobs.gather(1, torch.tensor(e.response_ids)[:, None]).squeeze(1)
            loss = loss - (weight(logprobs.detach(), reference) * logprobs).sum() / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        ("nll", weight_none),
        ("dft", weight_probability),
        ("iw", weight_of_response),
        ("iw_step", weight_of_token),
    ],
)
@pytest.mark.parametrize("micro", [10, 5])
def test_steps_of_sgd_are_those_of_the_weighted_likelihood(loss, weight, micro, tmp_path):
    config = SFTConfig(
        loss=loss, epochs=STEPS, batch_size=10, micro_batch_size=micro, optimizer="sgd",
        learning_rate=RATE, lr_schedule="constant", warmup_fraction=0.0, max_grad_norm=1e6,
    )  # fmt: skip
    trained = tiny.model()
    with MetricsLog(tmp_path, "sft") as log:
        train_sft(
            trained, tiny.tokenizer(), EXAMPLES, config, seed=0, log=log,
            reporter=Reporter(quiet=True),
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics/sft.jsonl").read_text().splitlines()]
    expected, losses = by_hand(weight)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-3)
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)
    moved = [a - b for a, b in zip(expected.parameters(), tiny.model().parameters(), strict=True)]
    assert max(float(m.detach().abs().max()) for m in moved) > 2e-3


def test_the_four_losses_are_four(tmp_path):
    """Of the oracle itself: where two agreed, the test above could not tell them apart."""
    models = [by_hand(w)[0] for w in (weight_none, weight_probability, weight_of_response)]
    models.append(by_hand(weight_of_token)[0])
    vectors = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            assert float((one - other).abs().max()) > 1e-3


def test_reference_logprobs_are_of_every_token_but_the_first():
    model = tiny.model()
    for row, e in zip(reference_logprobs(model, EXAMPLES), EXAMPLES, strict=True):
        assert row[: len(e.prompt_ids) - 1] == [0.0] * (len(e.prompt_ids) - 1)
        plain = tiny.plain_logprobs(model, e.prompt_ids, e.response_ids)
        torch.testing.assert_close(torch.tensor(row[len(e.prompt_ids) - 1 :]), plain)
