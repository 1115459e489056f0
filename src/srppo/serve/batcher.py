"""Requests in, one thread that scores whatever waits, as much at a time as fits."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

Ids = list[int]
Score = Callable[[list[Ids], list[Ids]], list[list[float]]]


class QueueFullError(Exception):
    """No room for a request now; `retry_after` is when there may be, in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class _Job:
    prompt: Ids
    response: Ids
    done: Future[list[float]] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class Tally:
    """What was scored since the start."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Batcher:
    """First come, first served; while a batch is scored, the next one gathers."""

    def __init__(self, score: Score, max_batch_tokens: int, max_queue_tokens: int) -> None:
        """Only this object's thread calls `score`."""
        self.tally = Tally()
        self.waiting_tokens = 0
        self._score = score
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._jobs: deque[_Job] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything that waits will be scored."""
        return self._thread.is_alive()

    def submit(self, sequences: list[tuple[Ids, Ids]]) -> list[Future[list[float]]]:
        """Prompts and responses, all of them or none; cancel a future, and its turn is skipped.

        Raises:
            QueueFullError: they do not fit beside what waits already, or the end has come.
        """
        jobs = [_Job(prompt, response) for prompt, response in sequences]
        tokens = sum(job.tokens for job in jobs)
        with self._changed:
            if self._closed or self.waiting_tokens + tokens > self._max_queue_tokens:
                raise QueueFullError(self._seconds_for(self.waiting_tokens))
            self._jobs.extend(jobs)
            self.waiting_tokens += tokens
            self._changed.notify()
        return [job.done for job in jobs]

    def close(self) -> None:
        """Finish the batch at hand; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.done.cancel()
            self._changed.notify()
        self._thread.join()

    def _seconds_for(self, tokens: int) -> int:
        rate = self.tally.tokens / self.tally.seconds if self.tally.tokens else math.inf
        return max(1, math.ceil(tokens / rate))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                jobs = self._next_batch()
            jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)

    def _next_batch(self) -> list[_Job]:
        jobs: list[_Job] = []
        room = self._max_batch_tokens
        while self._jobs and (not jobs or self._jobs[0].tokens <= room):
            jobs.append(self._jobs.popleft())
            room -= jobs[-1].tokens
            self.waiting_tokens -= jobs[-1].tokens
        return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        start = time.monotonic()
        try:
            scores = self._score([job.prompt for job in jobs], [job.response for job in jobs])
        except Exception as e:
            if len(jobs) == 1:
                jobs[0].done.set_exception(e)  # told by whoever asked
            else:
                for job in jobs:  # one bad sequence is not the others' fault
                    self._answer([job])
            return
        self.tally.batches += 1
        self.tally.sequences += len(jobs)
        self.tally.tokens += sum(job.tokens for job in jobs)
        self.tally.seconds += time.monotonic() - start
        for job, score in zip(jobs, scores, strict=True):
            job.done.set_result(score)
