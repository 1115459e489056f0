"""The fit behind `make bench-scaling`, on costs made up from known rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scaling import (
    CENTRE,
    cases,
    fitted,
    memory_terms,
    parameters,
    predicted_from_others,
    shape_of,
    time_terms,
)
from srppo.train.cost import Shape


def test_shape_and_parameters_are_those_of_the_model():
    case = replace(CENTRE, width=64, layers=2, vocab=128)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=case.width,
                intermediate_size=case.intermediate,
                num_hidden_layers=case.layers,
                num_attention_heads=case.heads,
                vocab_size=case.vocab,
            )
        )
    assert shape_of(case) == Shape.of(model)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert parameters(case) == matrices


@pytest.mark.parametrize("phase", ["rollout", "scoring", "update"])
def test_known_rates_are_found_again_and_predict_what_was_left_out(phase):
    terms = np.array([time_terms(case, phase) for case in cases()])
    used = terms.any(axis=0)
    rates = np.array([0.01, 5.0, 0.5, 0.02]) * used
    np.testing.assert_allclose(fitted(terms, terms @ rates), rates, rtol=1e-6)
    np.testing.assert_allclose(predicted_from_others(terms, terms @ rates), terms @ rates)


def test_a_cost_that_the_formula_does_not_have_is_not_predicted():
    terms = np.array([time_terms(case, "scoring") for case in cases()])
    quadratic = np.array([float(case.prompts) ** 2 for case in cases()])
    predicted = predicted_from_others(terms, quadratic)
    assert np.abs(predicted / quadratic - 1).max() > 0.5


def test_memory_is_bounded_by_the_microbatch():
    once, twice = (memory_terms(replace(CENTRE, prompts=n)) for n in (32, 64))
    assert once == twice
    assert memory_terms(replace(CENTRE, prompts=8))[2] == once[2] / 2  # 1,024 tokens of 2,048
