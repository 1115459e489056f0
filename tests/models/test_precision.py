"""bfloat16 products: where they are, how far off, and that they leave nothing behind."""

import pytest
import torch

import tiny
from srppo.algo.logprobs import token_logprobs
from srppo.config import parse_recipe
from srppo.errors import ConfigError
from srppo.models import precision
from srppo.models.batching import make_batch
from srppo.models.precision import check_compute, computing
from srppo.models.scoring import hidden_states, output_logits, score

CPU = torch.device("cpu")


def logprobs_and_gradients(model, compute):
    y = tiny.sequences()
    batch = make_batch(y, torch.arange(len(y)), CPU)
    model.zero_grad()
    with computing(compute, CPU):
        logits = output_logits(model, hidden_states(model, batch))
        logprobs = token_logprobs(logits, batch.response_ids)
        logprobs.sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_training_passes_are_close_to_float32_and_not_equal_to_it(architecture):
    model = tiny.model(architecture)
    exact, gradient = logprobs_and_gradients(model, "float32")
    rounded, rounded_gradient = logprobs_and_gradients(model, "bfloat16")
    assert rounded.dtype == rounded_gradient.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.2
    cosine = torch.cosine_similarity(rounded_gradient, gradient, dim=0)
    assert 0.99 < cosine < 1.0


def test_layers_of_gpt_2_multiply_so_too(monkeypatch):
    """They are no `linear`: (in, out) weights."""
    multiplied = []
    own = precision._Linear.apply
    monkeypatch.setattr(precision._Linear, "apply", lambda *a: multiplied.append(1) or own(*a))
    logprobs_and_gradients(tiny.model("gpt2"), "bfloat16")
    assert len(multiplied) >= 4 * 2 + 1  # four products a layer, and the head


def test_scores_are_not_touched():
    """The reward is a difference of two near-equal numbers: it keeps its digits."""
    model, y = tiny.model(), tiny.sequences()
    exact = score(model, y, 100)
    with computing("bfloat16", CPU):
        assert torch.equal(score(model, y, 100), exact)


def test_outside_nothing_has_changed():
    model = tiny.model()
    exact, _ = logprobs_and_gradients(model, "float32")
    logprobs_and_gradients(model, "bfloat16")
    assert torch.equal(logprobs_and_gradients(model, "float32")[0], exact)


def test_biases_and_frozen_weights_get_the_gradients_they_should():
    layer = torch.nn.Linear(8, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with computing("bfloat16", CPU):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3, 8), atol=2e-2, rtol=0)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_processor_without_such_products_is_refused(monkeypatch, stage):
    model, data = {"base": "b", "device": "cpu"}, {"demonstrations": "d.jsonl"}
    base = {"name": "n", "output_dir": "o", "model": model, "data": data}
    asked = parse_recipe({**base, stage: {"compute": "bfloat16"}})
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    check_compute(asked)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    check_compute(parse_recipe(base))
    with pytest.raises(ConfigError, match=f"{stage}.compute=bfloat16.*Set {stage}.compute=float32"):
        check_compute(asked)
