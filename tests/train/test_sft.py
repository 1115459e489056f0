"""Stage 1 against a hand-computed masked likelihood."""

import json
import math

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)
from trl.trainer import base_trainer

import tiny
from srppo.config import SFTConfig
from srppo.data.chat import Example
from srppo.errors import ModelError
from srppo.progress import Reporter
from srppo.train.metrics import MetricsLog
from srppo.train.sft import train_sft

EXAMPLES = [Example(*tiny.row(y, i)) for y in [tiny.sequences(n=10)] for i in range(10)]
FULL_BATCH = {
    "epochs": 1,
    "batch_size": 10,
    "micro_batch_size": 10,
    "lr_schedule": "constant",
    "warmup_fraction": 0.0,
    "max_grad_norm": 1e6,
}


@pytest.fixture
def train(tmp_path):
    """Trains a fresh tiny model; returns it with the log's lines."""

    def run(examples=EXAMPLES, seed=0, model=None, **settings):
        model = model or tiny.model()
        with MetricsLog(tmp_path, "sft") as log:
            trained = train_sft(
                model,
                tiny.tokenizer(),
                examples,
                SFTConfig(**settings),
                seed=seed,
                log=log,
                reporter=Reporter(quiet=True),
            )
        assert trained is model
        text = (tmp_path / "metrics/sft.jsonl").read_text()
        return model, [json.loads(line) for line in text.splitlines()]

    return run


def nll(model, examples):
    """Mean over response tokens of -log pi, by plain unpadded forwards; differentiable."""
    total = torch.tensor(0.0)
    for e in examples:
        ids = torch.tensor([e.prompt_ids + e.response_ids])
        logits = model(ids).logits[0, len(e.prompt_ids) - 1 : -1].log_softmax(-1)
        total = total - logits.gather(1, torch.tensor(e.response_ids)[:, None]).sum()
    return total / sum(len(e.response_ids) for e in examples)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [10, 5, 1])
def test_the_first_loss_is_the_mean_nll_of_response_tokens(train, micro_batch_size):
    """EOS included, prompts and padding not, however the batch is cut."""
    _, lines = train(**{**FULL_BATCH, "micro_batch_size": micro_batch_size})
    assert lines[0]["loss"] == pytest.approx(nll(tiny.model(), EXAMPLES).item(), abs=1e-4)


def test_prompt_and_eos_would_change_that_loss():
    """Else the test above could not tell."""
    model = tiny.model()
    right = nll(model, EXAMPLES).item()
    with_prompt = [Example(e.prompt_ids[:1], e.prompt_ids[1:] + e.response_ids) for e in EXAMPLES]
    without_eos = [Example(e.prompt_ids, e.response_ids[:-1]) for e in EXAMPLES[1::2]]
    assert abs(nll(model, with_prompt).item() - right) > 0.1
    assert abs(nll(model, without_eos + EXAMPLES[::2]).item() - right) > 0.01


@pytest.mark.parametrize("micro_batch_size", [10, 2])
def test_an_sgd_step_follows_the_gradient_of_that_loss(train, micro_batch_size):
    settings = {**FULL_BATCH, "micro_batch_size": micro_batch_size}
    trained, _ = train(**settings, optimizer="sgd", learning_rate=0.1)
    model = tiny.model()
    nll(model, EXAMPLES).backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trained), expected, atol=1e-6, rtol=1e-4)


def test_a_first_adamw_step_has_the_size_of_the_learning_rate_everywhere(train):
    """Where SGD moves in proportion to the gradient."""
    start = weights(tiny.model())
    moves = {}
    for optimizer in ("adamw", "sgd"):
        trained, _ = train(**FULL_BATCH, optimizer=optimizer, learning_rate=1e-3)
        moves[optimizer] = (weights(trained) - start).abs()
    assert float(moves["adamw"].max()) == pytest.approx(1e-3, rel=0.01)
    assert float(moves["adamw"].median()) == pytest.approx(1e-3, rel=0.05)
    assert moves["sgd"].median() < 0.1 * moves["sgd"].max()


def test_sgd_has_momentum(train):
    """With a constant gradient direction, the second step is longer than the first."""
    settings = {**FULL_BATCH, "optimizer": "sgd", "learning_rate": 1e-4}
    start = weights(tiny.model())
    one = weights(train(**{**settings, "epochs": 1})[0]) - start
    two = weights(train(**{**settings, "epochs": 2})[0]) - start
    assert float(two.norm() / one.norm()) == pytest.approx(1 + 1.9, rel=0.02)


def test_gradients_are_scaled_down_to_the_norm_asked_for(train):
    settings = {**FULL_BATCH, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e-3}
    trained, lines = train(**settings)
    assert lines[0]["grad_norm"] > 0.1  # as it was before
    assert float((weights(trained) - weights(tiny.model())).norm()) == pytest.approx(1e-3, rel=0.01)


def test_each_epoch_sees_every_demonstration_once_the_remainder_included(train):
    """Ten in batches of four, at a learning rate of almost zero: token-weighted, the epoch's
    losses average to the loss of the whole."""
    alike = [Example(e.prompt_ids, (e.response_ids * 3)[:3]) for e in EXAMPLES]
    settings = {**FULL_BATCH, "epochs": 2, "batch_size": 4, "micro_batch_size": 2}
    _, lines = train(alike, **settings, optimizer="sgd", learning_rate=1e-12)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    whole = nll(tiny.model(), alike).item()
    for epoch in (lines[:3], lines[3:]):
        losses = [line["loss"] for line in epoch]
        assert (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10 == pytest.approx(
            whole, abs=1e-3
        )
    assert [line["loss"] for line in lines[:3]] != [line["loss"] for line in lines[3:]]


def test_training_lowers_the_loss_and_leaves_the_model_in_eval_mode(train):
    model, lines = train(epochs=15, batch_size=5, micro_batch_size=5, learning_rate=3e-3)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert nll(model, EXAMPLES).item() < nll(tiny.model(), EXAMPLES).item() / 2
    assert not model.training


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [0, 0.5, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
    ],
)
def test_learning_rates_follow_the_schedule(train, schedule, warmup, expected):
    settings = {**FULL_BATCH, "epochs": 4, "lr_schedule": schedule, "warmup_fraction": warmup}
    _, lines = train(**settings, learning_rate=1e-4)
    rates = [line["learning_rate"] / 1e-4 for line in lines]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_seed_decides_the_weights(train, optimizer):
    settings = {"batch_size": 4, "micro_batch_size": 4, "optimizer": optimizer}
    (one, lines), (two, same), (other, _) = (
        train(seed=s, learning_rate=1e-2, **settings) for s in (1, 1, 2)
    )
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))
    for line in (*lines, *same):
        del line["time/seconds"]
    assert lines == same


def test_fewer_demonstrations_than_a_batch_are_one_batch(train):
    _, lines = train(EXAMPLES[:3], batch_size=128, micro_batch_size=8, epochs=2)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(nll(tiny.model(), EXAMPLES[:3]).item(), abs=1e-4)


def test_a_line_says_where_the_run_is(train):
    _, lines = train(**{**FULL_BATCH, "epochs": 2})
    assert [line["epoch"] for line in lines] == [1.0, 2.0]
    for line in lines:
        assert {
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "time/seconds",
        } <= line.keys()


def test_nothing_is_printed_on_stdout(train, capsys):
    train(**FULL_BATCH)
    assert capsys.readouterr().out == ""


def mixture_of_experts():
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.9}
    return MixtralForCausalLM(MixtralConfig(**tiny.SHAPE, **experts)).eval()


def test_nothing_is_added_to_the_likelihood_of_a_mixture_of_experts(train):
    """And its configuration stays as it was."""
    model, lines = train(model=mixture_of_experts(), **FULL_BATCH)
    assert lines[0]["loss"] == pytest.approx(nll(mixture_of_experts(), EXAMPLES).item(), abs=1e-4)
    assert model.config.output_router_logits is mixture_of_experts().config.output_router_logits
    assert model.config.router_aux_loss_coef == 0.9


def test_a_model_that_would_weigh_its_own_loss_otherwise_is_weighed_as_all(train):
    """Gemma 4 tells trainers that its loss takes no count of tokens."""
    seen = []
    for micro_batch_size in (10, 1):
        model = tiny.model()
        model.accepts_loss_kwargs = False
        _, lines = train(model=model, **{**FULL_BATCH, "micro_batch_size": micro_batch_size})
        seen.append([lines[-1]["loss"], lines[-1]["grad_norm"]])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    assert seen[0][0] == pytest.approx(nll(tiny.model(), EXAMPLES).item(), abs=1e-4)


def test_a_loss_that_is_not_of_what_is_scored_is_refused(train):
    """TRL's own output head leaves out what it does not know: here a layer before the last."""
    torch.manual_seed(0)
    shape = {k: v for k, v in tiny.SHAPE.items() if k != "num_key_value_heads"}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertDecoderConfig(**{**shape, **ids, "initializer_range": 0.5})
    with pytest.raises(
        ModelError, match=r"ModernBert.* cannot be fine-tuned here: .* nats a token"
    ):
        train(model=ModernBertDecoderForCausalLM(config).eval(), **FULL_BATCH)


def test_nobody_is_told_what_is_trained(train, monkeypatch):
    told = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **k: told.append((a, k)))
    train(**FULL_BATCH)
    assert told == []
