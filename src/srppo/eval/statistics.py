"""How sure a score is, and a difference of two scores on the same questions.

Every interval is a 95% interval; scores and shares lie within [0, 1], not per cent. Where all
questions say the same, no spread says how sure it is; the rule of three does, see `_unseen`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9999
"""Of a bootstrap: the ends of its interval are the 250th smallest and largest, p is a multiple of
0.0002."""


@dataclass(frozen=True)
class Estimate:
    """A score on `n` questions. One alone gives no error: NaN, but for Wilson's interval."""

    value: float
    stderr: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Second score minus first, on the same `n` questions, of which `gained` have a higher score
    and `lost` a lower one; None where not paired.

    `p` is two-sided, of no difference; 1 where nothing differs or there is a single question.
    """

    value: float
    stderr: float
    low: float
    high: float
    p: float
    gained: int | None
    lost: int | None
    n: int | None


def proportion(successes: int, n: int) -> Estimate:
    """Share of n questions, with Wilson's interval, which also holds at 0 and 1. JASA 22:209."""
    share = successes / n
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    low, high = float(interval.low), float(interval.high)
    return Estimate(share, math.sqrt(share * (1 - share) / n), low, high, n)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of one value a question, with Student's interval."""
    return Estimate(*_student(np.asarray(values, dtype=float), lowest=0), len(values))


def clustered(values: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Mean over all values, several a question: a question's values are not independent, so
    standard error and percentile interval are a bootstrap's that draws questions."""
    sums, counts = _sums(values)
    return Estimate(*_spread(sums, counts, _bootstrap(sums, counts, seed), lowest=0), len(values))


def paired_proportions(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of scores that are 0 or 1: McNemar's exact test (a sign test of the questions that differ;
    Psychometrika 12:153), Student's interval of the differences."""
    d = np.subtract(second, first, dtype=float)
    gained, lost = _changes(d)
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference(*_student(d, lowest=-1), p, gained, lost, len(d))


def paired_means(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of any scores, one a question: the paired t-test and its interval."""
    d = np.subtract(second, first, dtype=float)
    value, stderr, low, high = _student(d, lowest=-1)
    p = _p(value, stderr, len(d) - 1) if stderr else _least_p(d)
    return Difference(value, stderr, low, high, p, *_changes(d), len(d))


def paired_clusters(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> Difference:
    """Of several scores a question: a bootstrap that draws questions, each with both its scores;
    p is where the percentile interval would just reach 0, but no less than signs can tell.

    Raises:
        ValueError: a question has more scores in one than in the other.
    """
    (a, counts), (b, other) = _sums(first), _sums(second)
    if not np.array_equal(counts, other):
        raise ValueError("a question has more scores in one model than in the other")
    draws = _bootstrap(b - a, counts, seed)
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, max(2 * (int(tail) + 1) / (len(draws) + 1), _least_p(b - a)))
    spread = _spread(b - a, counts, draws, lowest=-1)
    return Difference(*spread, p, *_changes(b - a), len(counts))


def unpaired(first: Estimate, second: Estimate) -> Difference:
    """Of two scores known by their standard errors alone, taken as independent: a normal test."""
    value, stderr = second.value - first.value, math.hypot(_error(first), _error(second))
    half, p = float(stats.norm.ppf(0.975)) * stderr, _p(value, stderr, math.inf)
    return Difference(value, stderr, value - half, value + half, p, None, None, None)


def widest_difference(n: int) -> float:
    """Half the width of the interval of a difference of two scores within [0, 1], each on `n`
    questions of its own, at its widest: half of them 0, half 1. Normal; no more than 1."""
    return min(1.0, float(stats.norm.ppf(0.975)) * math.sqrt(2 * 0.25 / n))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number; below 0.05, the chance of any false one is below 5%.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    order = np.argsort(p)
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(x) for x in adjusted]


def _student(x: np.ndarray, lowest: float) -> tuple[float, float, float, float]:
    """Mean, standard error, ends of the interval; NaN but for the mean where there is one value."""
    value, n = float(x.mean()), len(x)
    if n < 2:
        return value, math.nan, math.nan, math.nan
    if _alike(x):
        return value, 0.0, *_unseen(value, lowest, n)
    stderr = float(x.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * stderr
    return value, stderr, value - half, value + half


def _alike(x: np.ndarray) -> bool:
    """Whether all are one value, but for rounding."""
    return float(np.ptp(x)) < 1e-12


def _unseen(value: float, lowest: float, n: int) -> tuple[float, float]:
    """Interval of a mean of n values that are all alike: another value, between `lowest` and 1,
    may be had by up to 3/n of all questions without one among these, at 95%.

    Source: Hanley & Lippman-Hand 1983, JAMA 249:1743.
    """
    share = min(1.0, 3 / n)
    return value - share * (value - lowest), value + share * (1 - value)


def _error(score: Estimate) -> float:
    """Standard error of a score; where it is 0, that of the interval of the rule of three."""
    return score.stderr or min(1.0, 3 / score.n) / float(stats.norm.ppf(0.975))


def _p(value: float, stderr: float, freedom: float) -> float:
    """Two-sided, of Student's t; without freedom nothing can be told."""
    if freedom < 1 or value == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(value) / stderr, freedom))


def _least_p(d: np.ndarray) -> float:
    """Of the sign test where all that differ do so in one direction; 1 where none does."""
    return 2.0 ** (1 - max(1, int(np.count_nonzero(d))))


def _sums(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    sums = np.array([math.fsum(v) for v in values])
    return sums, np.array([len(v) for v in values])


def _bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """RESAMPLES ratios of sums over questions drawn with replacement; NaN from one question."""
    rng, n = np.random.default_rng(seed), len(sums)
    if n < 2:
        return np.full(RESAMPLES, math.nan)
    drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)  # how often each question
    return (drawn @ sums) / (drawn @ counts)


def _spread(
    sums: np.ndarray, counts: np.ndarray, draws: np.ndarray, lowest: float
) -> tuple[float, float, float, float]:
    """Mean, standard deviation of the draws, and the ends between which 95% of them lie."""
    value, n = float(sums.sum() / counts.sum()), len(counts)
    if n > 1 and _alike(sums / counts):
        return value, 0.0, *_unseen(value, lowest, n)
    ordered, k = np.sort(draws), (RESAMPLES + 1) // 40
    return value, float(draws.std(ddof=1)), float(ordered[k - 1]), float(ordered[-k])


def _changes(d: np.ndarray) -> tuple[int, int]:
    return int((d > 0).sum()), int((d < 0).sum())
