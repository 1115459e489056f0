"""Intervals and tests against statsmodels, scipy and enumeration."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from srppo.eval import statistics
from srppo.eval.statistics import Difference, Estimate

SCORES = st.lists(st.floats(0, 1, width=16), min_size=2, max_size=40)
BITS = st.lists(st.integers(0, 1), min_size=2, max_size=60)


def two(values):
    """Two lists of one length."""
    return st.integers(2, 60).flatmap(
        lambda n: st.tuples(*[st.lists(values, min_size=n, max_size=n)] * 2)
    )


def questions(seed, n=300):
    """Scores of 1 to 5 instructions a question, alike within a question; and of a second model."""
    rng = np.random.default_rng(seed)
    easy = rng.beta(1, 1, n)
    sizes = rng.integers(1, 6, n)
    return [
        [(rng.random(k) < e**power).astype(int).tolist() for e, k in zip(easy, sizes, strict=True)]
        for power in (1, 0.8)
    ]


def cluster_robust(values):
    """Mean and its standard error by statsmodels: residuals summed within questions."""
    flat = np.concatenate(values)
    groups = np.repeat(np.arange(len(values)), [len(v) for v in values])
    fit = sm.OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return fit.params[0], fit.bse[0]


# --- one model ------------------------------------------------------------------------------------


@given(BITS)
def test_a_proportion_has_wilsons_interval(bits):
    k, n = sum(bits), len(bits)
    found = statistics.proportion(k, n)
    assert (found.value, found.n) == (k / n, n)
    assert found.stderr == pytest.approx(np.std(bits) / math.sqrt(n))
    assert (found.low, found.high) == pytest.approx(
        proportion_confint(k, n, method="wilson"), abs=1e-9
    )


@given(SCORES)
def test_a_mean_has_students_interval(values):
    assume(np.ptp(values) > 0)
    found, oracle = statistics.mean(values), DescrStatsW(values)
    assert found.value == pytest.approx(oracle.mean)
    assert found.stderr == pytest.approx(stats.sem(values))
    assert (found.low, found.high) == pytest.approx(oracle.tconfint_mean(0.05))


def test_a_bootstrap_is_that_of_all_resamples():
    """Four questions have 256 equally likely resamples."""
    values = [[1, 0, 1], [1], [0, 0], [1, 1, 1, 0]]
    ratios = [
        np.concatenate([values[i] for i in drawn]).mean()
        for drawn in itertools.product(range(4), repeat=4)
    ]
    found = statistics.clustered(values)
    assert found.value == pytest.approx(0.6)
    assert found.n == 4
    assert found.stderr == pytest.approx(np.std(ratios), rel=0.02)
    exact = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_instructions_of_a_question_do_not_count_as_independent(seed):
    values = questions(seed)[0]
    found = statistics.clustered(values)
    mean, stderr = cluster_robust(values)
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(stderr, rel=0.05)
    assert (found.low, found.high) == pytest.approx(
        (mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.006
    )
    assert found.stderr > 1.1 * stats.sem(np.concatenate(values))


def test_a_bootstrap_is_the_same_for_the_same_seed():
    values = questions(0)[0]
    assert statistics.clustered(values, seed=1) == statistics.clustered(values, seed=1)
    assert statistics.clustered(values, seed=1) != statistics.clustered(values, seed=2)


def test_one_question_has_no_error():
    for found in (statistics.mean([0.5]), statistics.clustered([[0, 1]])):
        assert (found.value, found.n) == (0.5, 1)
        assert all(map(math.isnan, (found.stderr, found.low, found.high)))
    for found in (
        statistics.paired_means([0.0], [1.0]),
        statistics.paired_proportions([0], [1]),
        statistics.paired_clusters([[0]], [[1]]),
    ):
        assert (found.value, found.p, found.gained) == (1, 1, 1)
        assert all(map(math.isnan, (found.stderr, found.low, found.high)))


@pytest.mark.parametrize("n", [2, 3, 5, 500])
@pytest.mark.parametrize("value", [0, 0.3, 1])
def test_scores_that_are_all_alike_are_not_certain(n, value):
    """A share of 3/n is missed by n questions with probability exp(-3), about 5%."""
    assert (1 - min(1, 3 / n)) ** n < 0.05
    for found in (statistics.mean([value] * n), statistics.clustered([[value] * 3] * n)):
        assert (found.value, found.stderr) == (pytest.approx(value), 0)
        others = [(1 - min(1, 3 / n)) * value + min(1, 3 / n) * other for other in (0, 1)]
        assert (found.low, found.high) == pytest.approx(others)


# --- two models -----------------------------------------------------------------------------------


@given(two(st.integers(0, 1)))
def test_proportions_are_compared_by_mcnemars_exact_test(pair):
    first, second = map(np.array, pair)
    found = statistics.paired_proportions(first, second)
    table = [[sum((first == a) & (second == b)) for b in (1, 0)] for a in (1, 0)]
    assert found.p == pytest.approx(min(1, mcnemar(table, exact=True).pvalue))
    assert (found.lost, found.gained) == (table[0][1], table[1][0])
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert found.n == len(first)


@given(two(st.floats(0, 1, width=16)))
def test_means_are_compared_by_the_paired_t_test(pair):
    first, second = pair
    assume(np.ptp(np.subtract(second, first)) > 0)
    found = statistics.paired_means(first, second)
    oracle = stats.ttest_rel(second, first)
    assert found.p == pytest.approx(oracle.pvalue, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))
    assert found.stderr == pytest.approx(stats.sem(np.subtract(second, first)))
    assert found.gained + found.lost == sum(a != b for a, b in zip(first, second, strict=True))


def test_the_interval_of_proportions_is_that_of_their_differences():
    first, second = [0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]
    found, oracle = statistics.paired_proportions(first, second), stats.ttest_rel(second, first)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_compared_by_question(seed):
    first, second = questions(seed)
    found = statistics.paired_clusters(first, second)
    mean, stderr = cluster_robust([np.subtract(b, a) for a, b in zip(first, second, strict=True)])
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(stderr, rel=0.05)
    assert (found.low, found.high) == pytest.approx(
        (mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.006
    )
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(mean) / stderr), abs=0.02)
    changes = [sum(b) - sum(a) for a, b in zip(first, second, strict=True)]
    assert (found.gained, found.lost) == (sum(c > 0 for c in changes), sum(c < 0 for c in changes))


@given(st.integers(0, 10**6))
def test_a_bootstraps_p_and_interval_agree(seed):
    first, second = questions(seed, n=30)
    found = statistics.paired_clusters(first, second)
    assert (found.p <= 0.05) == (not found.low <= 0 <= found.high)


def test_clusters_of_other_sizes_cannot_be_paired():
    with pytest.raises(ValueError, match="more scores"):
        statistics.paired_clusters([[1, 0], [1]], [[1], [1]])


def test_estimates_alone_are_compared_as_independent():
    """0.3 apart with errors 0.06 and 0.08, so 0.1 together: three standard errors."""
    first = Estimate(0.2, 0.06, 0, 0, 50)
    second = Estimate(0.5, 0.08, 0, 0, 50)
    found = statistics.unpaired(first, second)
    assert found.stderr == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.3 - 0.195996, 0.3 + 0.195996), abs=1e-6)
    assert found.p == pytest.approx(0.0026998, abs=1e-7)
    assert (found.gained, found.lost, found.n) == (None, None, None)


PAIRED = [statistics.paired_proportions, statistics.paired_means]


@pytest.mark.parametrize("test", PAIRED)
@given(pair=two(st.integers(0, 1)))
def test_swapped_models_flip_the_sign_and_nothing_else(test, pair):
    assert_flipped(test(*pair), test(*pair[::-1]))


@given(st.integers(0, 10**6))
def test_swapped_clusters_flip_the_sign_and_nothing_else(seed):
    pair = questions(seed, n=20)
    assert_flipped(statistics.paired_clusters(*pair), statistics.paired_clusters(*pair[::-1]))


def assert_flipped(one: Difference, other: Difference) -> None:
    assert one.p == other.p
    assert (one.gained, one.lost, one.n) == (other.lost, other.gained, other.n)
    assert one.stderr == pytest.approx(other.stderr, abs=1e-12)
    assert one.value == -other.value
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)


@pytest.mark.parametrize("test", PAIRED)
@given(values=BITS)
def test_a_model_does_not_differ_from_itself(test, values):
    missed = min(1, 3 / len(values))
    assert test(values, values) == Difference(0, 0, -missed, missed, 1, 0, 0, len(values))


def test_a_model_with_clusters_does_not_differ_from_itself():
    values = questions(0)[0]
    found = statistics.paired_clusters(values, values)
    assert found == Difference(0, 0, -0.01, 0.01, 1, 0, 0, 300)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_no_difference_is_more_certain_than_its_signs(n):
    """All questions differ alike: n coins that fall on one side, either one."""
    p = stats.binomtest(n, n).pvalue
    ones, zeros = [1.0] * n, [0.0] * n
    for found in (statistics.paired_proportions(zeros, ones), statistics.paired_means(zeros, ones)):
        assert (found.value, found.stderr, found.p) == (1, 0, pytest.approx(p))
        assert (found.low, found.high) == (pytest.approx(1 - 2 * min(1, 3 / n)), 1)
    found = statistics.paired_clusters([[0, 0]] * n, [[1, 1]] * n)
    assert found.p == pytest.approx(max(p, 2 / 10_000))
    assert (found.low, found.high) == (pytest.approx(1 - 2 * min(1, 3 / n)), 1)
    few = statistics.paired_clusters([[0, 0]] * n, [[1, 0]] + [[1, 1]] * (n - 1))
    assert few.p == pytest.approx(max(p, 2 / 10_000))


def test_estimates_without_spread_are_not_certain():
    none, all_ = (Estimate(value, 0, value, value, 3) for value in (0, 1))
    found = statistics.unpaired(none, all_)
    assert found.low < 0 < found.high
    assert found.p > 0.05


# --- several tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [[0.03], [0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 1, 0], [0.9, 0.02]])
def test_holm_is_that_of_statsmodels(p):
    assert statistics.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_holm_of_none_is_none():
    assert statistics.holm([]) == []


@pytest.mark.parametrize("n", [8, 12, 20, 100])
def test_no_difference_of_two_shares_has_a_wider_interval(n):
    """statsmodels' Wald interval of k questions of n against j of n others, every k and j."""
    ends = [
        confint_proportions_2indep(k, n, j, n, method="wald", compare="diff")
        for k in range(1, n)
        for j in range(k, n)
    ]
    widest = max(high - low for low, high in ends) / 2
    assert statistics.widest_difference(n) == pytest.approx(widest)
    assert statistics.widest_difference(1) == 1
