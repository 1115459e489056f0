"""Benchmarks while a model trains: fixed questions, and nothing that training could notice."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import bytewise
from questions import write_jsonl
from srppo.errors import ConfigError, DataError
from srppo.eval.preflight import Settings
from srppo.eval.subset import Benchmarks
from srppo.models.roles import Role
from srppo.progress import Reporter


@pytest.fixture(scope="module")
def benchmarks(data_dir) -> Benchmarks:
    return Benchmarks(["gsm8k", "gpqa"], limit=3, seed=1, data_dir=data_dir, max_tokens=6)


def test_what_is_measured(benchmarks, tokenizer):
    measured = benchmarks.measure(bytewise.byte_llama(), tokenizer)
    assert list(measured) == [
        "bench/gsm8k/flexible",
        "bench/gsm8k/strict",
        "bench/gsm8k/mean_length",
        "bench/gsm8k/eos_rate",
        "bench/gpqa/accuracy",
    ]
    assert 1 <= measured["bench/gsm8k/mean_length"] <= 6
    assert benchmarks.measure(bytewise.byte_llama(), tokenizer) == measured


def test_ifeval_is_measured_too(with_punkt, tokenizer):
    few = Benchmarks(["ifeval"], limit=3, data_dir=with_punkt, max_tokens=6)
    measured = few.measure(bytewise.byte_llama(), tokenizer)
    assert measured.keys() >= {"bench/ifeval/prompt_strict", "bench/ifeval/inst_loose"}


def test_it_is_what_a_whole_evaluation_says(data_dir, model_dir, tmp_path, tokenizer):
    """All questions, so that the drawn ones are all."""
    from srppo.eval.harness import evaluate

    settings = Settings(("gsm8k", "gpqa"), data_dir=data_dir, max_tokens=6)
    (found,) = evaluate([str(model_dir)], settings, tmp_path, Reporter(quiet=True))
    few = Benchmarks(["gsm8k", "gpqa"], limit=99, data_dir=data_dir, max_tokens=6)
    measured = few.measure(bytewise.byte_llama(), tokenizer)
    for task, entry in found.record["tasks"].items():
        for name, metric in entry["metrics"].items():
            assert measured[f"bench/{task}/{name}"] == metric["value"]


def test_the_seed_draws_the_questions(data_dir):
    def questions(seed):
        (task,) = Benchmarks(["gpqa"], limit=4, seed=seed, data_dir=data_dir).tasks
        return [doc["Question"] for doc in task.questions.docs]

    assert questions(1) == questions(1) != questions(2)
    assert questions(1) == sorted(questions(1))  # in the benchmark's own order


def state(model):
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        {name: p.clone() for name, p in model.state_dict().items()},
    )


def test_nothing_is_disturbed(benchmarks, tokenizer):
    model = bytewise.byte_llama().train()
    model.model.layers[0].eval()  # a mode that is not the whole model's
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = state(model)
    benchmarks.measure(Role(model), tokenizer)
    *same, weights = state(model)
    assert same == list(before[:-1])
    assert all(torch.equal(weights[name], p) for name, p in before[-1].items())
    assert torch.is_grad_enabled()


def test_a_model_in_train_mode_is_measured_without_dropout(benchmarks, tokenizer):
    model = bytewise.byte_llama()
    quiet = benchmarks.measure(model, tokenizer)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert benchmarks.measure(model.train(), tokenizer) == quiet
    assert model.training


def test_training_goes_on_as_if_nothing_had_been_in_between(benchmarks, tokenizer):
    def train(measure: bool) -> dict[str, torch.Tensor]:
        model = bytewise.byte_llama().train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            ids = torch.randint(0, 256, (2, 12))  # depends on the random state
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            if measure:
                benchmarks.measure(model, tokenizer)
            optimizer.step()
        return model.state_dict()

    with_it, without = train(True), train(False)
    assert all(torch.equal(with_it[name], weight) for name, weight in without.items())


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        ("alpaca_eval", ConfigError, "cannot be measured while a model trains"),
        ("nonsense", ConfigError, "These can: ifeval, gsm8k, gpqa"),
        ("gsm8k", DataError, "has no 'answer'"),
    ],
)
def test_what_cannot_be_measured(tmp_path, task, error, says):
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "?"}])
    with pytest.raises(error, match=says):
        Benchmarks([task], limit=2, data_dir=tmp_path)
