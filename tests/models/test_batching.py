"""Batches: every row once, little padding, and every index where it belongs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from srppo.models.batching import (
    MAX_PADDING,
    MIN_TOKENS,
    Sequences,
    cut,
    input_lengths,
    make_batch,
    microbatches,
)
from tiny import row, sequences

CPU = torch.device("cpu")


def lists(n: int) -> st.SearchStrategy:
    return st.lists(st.integers(1, 30), min_size=n, max_size=n)


@given(
    prompts=st.integers(1, 12).flatmap(lists),
    data=st.data(),
    budget=st.integers(1, 200),
)
def test_microbatches_cover_every_row_once_and_respect_the_budget(prompts, data, budget):
    responses = data.draw(lists(len(prompts)))
    y = Sequences.of([[1] * n for n in prompts], [[1] * n for n in responses])
    rows = torch.tensor(data.draw(st.permutations(range(len(prompts)))))
    batches = list(microbatches(y, rows, budget, CPU))
    assert sorted(i for b in batches for i in b.rows.tolist()) == list(range(len(prompts)))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.rows) == 1


def test_microbatches_take_only_the_rows_asked_for():
    chosen = torch.tensor([7, 2, 5])
    batches = microbatches(sequences(), chosen, 10**6, CPU)
    assert sorted(torch.cat([b.rows for b in batches]).tolist()) == [2, 5, 7]
    assert list(microbatches(sequences(), chosen[:0], 10**6, CPU)) == []


def test_a_roomy_budget_is_one_batch_and_a_tight_one_is_not():
    """The budget is used, not merely respected: row by row would satisfy it as well."""
    y = sequences(n=12)
    every = torch.arange(12)
    assert len(list(microbatches(y, every, 12 * 20, CPU))) == 1
    assert 1 < len(list(microbatches(y, every, 40, CPU))) < 12


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(500, 5000))
def test_a_group_is_small_or_holds_little_padding(lengths, budget):
    for group in cut(lengths, budget):
        padded = len(group) * max(lengths[k] for k in group)
        used = sum(lengths[k] for k in group)
        before_the_last = used - lengths[group[-1]]
        assert padded <= budget
        assert padded - used <= MAX_PADDING * padded or before_the_last < MIN_TOKENS


def test_equal_lengths_are_cut_by_the_budget_alone():
    assert [len(group) for group in cut([100] * 64, 2048)] == [20, 20, 20, 4]


def test_the_padding_of_a_spread_of_lengths_stays_under_five_percent():
    lengths = [64 + k for k in range(128)]
    padded = sum(len(group) * lengths[group[0]] for group in cut(lengths, 16384))
    assert 0.01 < 1 - sum(lengths) / padded < 0.05


def test_a_batch_holds_its_rows_and_knows_what_predicts_each_response_token():
    y = sequences()
    batch = make_batch(y, torch.tensor([3, 0, 6]), CPU)
    width = batch.input_ids.shape[1]
    place = 0
    for k, i in enumerate([3, 0, 6]):
        prompt, response = row(y, i)
        inputs = (prompt + response)[:-1]  # the last token is predicted, never read
        assert batch.input_ids[k, : len(inputs)].tolist() == inputs
        mine = slice(place, place + len(response))
        assert batch.response_ids[mine].tolist() == response
        first = k * width + len(prompt) - 1
        assert batch.predictors[mine].tolist() == list(range(first, first + len(response)))
        place += len(response)
    assert len(batch) == place
    assert width == max(input_lengths(y, torch.tensor([3, 0, 6])))


def test_take_and_put_are_inverse_and_leave_other_rows_alone():
    y = sequences()
    x = torch.where(y.mask, torch.randn(y.mask.shape), 0.0)
    batch = make_batch(y, torch.tensor([3, 0, 6]), CPU)
    into = torch.full_like(x, 7.0)
    batch.put(into, batch.take(x))
    for i in range(len(y)):
        expected = torch.where(y.mask[i], x[i], 7.0) if i in (0, 3, 6) else torch.tensor(7.0)
        assert torch.equal(into[i], expected.expand_as(into[i]))


def test_lengths_count_response_tokens():
    y = Sequences.of([[1], [2, 3]], [[4, 0], [5, 6, 7]])
    assert len(y) == 2
    assert y.lengths.tolist() == [2, 3]
    assert y.mask.tolist() == [[True, True, False], [True, True, True]]
