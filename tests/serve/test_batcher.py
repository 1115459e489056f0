"""The queue, with a scorer that waits until it is told to go on."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from srppo.serve.batcher import Batcher, QueueFullError

SECONDS = 30


class Held:
    """Scores each response with its own ids, once `go` is set; remembers its batches."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, prompts, responses):
        self.batches.append([prompt[0] for prompt in prompts])
        self.begun.set()
        assert self.go.wait(SECONDS)
        if any(99 in response for response in responses):
            raise ValueError("99")
        return [[float(i) for i in response] for response in responses]


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def batcher(held):
    made = Batcher(held, max_batch_tokens=6, max_queue_tokens=12)
    yield made
    held.go.set()
    made.close()
    assert not made.alive


def one(i: int, length: int = 1) -> tuple[list[int], list[int]]:
    return [i], [i] * length


def occupy(batcher: Batcher, held: Held):
    """The thread is busy with a first sequence; the queue is empty."""
    (first,) = batcher.submit([one(0)])
    assert held.begun.wait(SECONDS)
    return first


def test_what_gathers_is_scored_together_in_order_as_far_as_it_fits(batcher, held):
    first = occupy(batcher, held)
    rest = batcher.submit([one(1), one(2), one(3), one(4), one(5)])
    held.go.set()
    assert [f.result(SECONDS) for f in (first, *rest)] == [[float(i)] for i in range(6)]
    assert held.batches == [[0], [1, 2, 3], [4, 5]]
    assert (batcher.tally.batches, batcher.tally.sequences, batcher.tally.tokens) == (3, 6, 12)


def test_a_sequence_longer_than_a_batch_is_a_batch_of_its_own(batcher, held):
    occupy(batcher, held)
    futures = batcher.submit([one(1), one(2, length=8)])
    held.go.set()
    assert futures[1].result(SECONDS) == [2.0] * 8
    assert held.batches == [[0], [1], [2]]


def test_a_full_queue_takes_all_of_a_request_or_none(batcher, held):
    occupy(batcher, held)
    batcher.submit([one(1)] * 5)
    with pytest.raises(QueueFullError) as full:
        batcher.submit([one(2), one(3)])
    assert full.value.retry_after >= 1
    assert batcher.waiting_tokens == 10
    batcher.submit([one(2)])
    held.go.set()


def test_whoever_cancels_loses_the_turn_and_nobody_else(batcher, held):
    occupy(batcher, held)
    gone, stays = batcher.submit([one(1), one(2)])
    assert gone.cancel()
    held.go.set()
    assert stays.result(SECONDS) == [2.0]
    assert held.batches == [[0], [2]]
    assert batcher.waiting_tokens == 0


def test_a_sequence_that_fails_fails_alone(batcher, held):
    occupy(batcher, held)
    before, bad, after = batcher.submit([one(1), one(99), one(2)])
    held.go.set()
    assert (before.result(SECONDS), after.result(SECONDS)) == ([1.0], [2.0])
    with pytest.raises(ValueError, match="99"):
        bad.result(SECONDS)
    assert batcher.alive


def test_the_end_finishes_the_batch_at_hand_and_cancels_what_waits(held):
    batcher = Batcher(held, max_batch_tokens=6, max_queue_tokens=12)
    first = occupy(batcher, held)
    (waiting,) = batcher.submit([one(1)])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(SECONDS)
    held.go.set()
    closing.join(SECONDS)
    assert first.result(0) == [0.0]
    assert not batcher.alive
