"""Padding: prompts end and responses start at one column, and no row is lost."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from srppo.models.batching import Sequences, make_batch, microbatches, pad_left, positions
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


def test_a_batch_holds_its_rows_and_marks_everything_else_as_padding():
    y = sequences()
    batch = make_batch(y, torch.tensor([3, 0, 6]), CPU)
    P = batch.input_ids.shape[1] - batch.response_ids.shape[1]
    for k, i in enumerate([3, 0, 6]):
        prompt, response = row(y, i)
        seen = batch.attention_mask[k].bool()
        assert batch.input_ids[k][seen].tolist() == prompt + response
        assert batch.response_ids[k][batch.mask[k]].tolist() == response
        assert batch.position_ids[k][seen].tolist() == list(range(len(prompt + response)))
        # the prompt ends where the response starts
        assert batch.input_ids[k, P - len(prompt) : P].tolist() == prompt
        assert batch.input_ids[k, P : P + len(response)].tolist() == response
    assert batch.input_ids.shape[1] == max(len(row(y, i)[0]) for i in (3, 0, 6)) + max(
        len(row(y, i)[1]) for i in (3, 0, 6)
    )


def test_lengths_count_response_tokens():
    y = Sequences.of([[1], [2, 3]], [[4, 0], [5, 6, 7]])
    assert len(y) == 2
    assert y.lengths.tolist() == [2, 3]
    assert y.mask.tolist() == [[True, True, False], [True, True, True]]


def test_positions_are_not_advanced_by_padding():
    ids, mask = pad_left([[5, 6, 7], [8]], CPU)
    assert ids[:, -1].tolist() == [7, 8]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask)[0].tolist() == [0, 1, 2]
    assert positions(mask)[1, -1] == 0
