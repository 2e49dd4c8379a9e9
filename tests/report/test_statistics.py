from __future__ import annotations

import math

import numpy as np
import pytest

from kdrun.report.statistics import (
    anova,
    bootstrap,
    correlation,
    factorial_anova,
    holm,
    mean_and_std,
    one_sample,
    paired,
)


def test_mean_and_std_by_hand() -> None:
    assert mean_and_std([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(1.2909944))
    assert mean_and_std([7.0]) == (7.0, None)
    assert mean_and_std([0.1] * 3) == (0.1, 0.0)
    with pytest.raises(ValueError, match="no values"):
        mean_and_std([])


def test_one_sample_by_hand() -> None:
    found = one_sample([1, 2, 3, 4], "greater")
    assert found.statistic == pytest.approx(3.872983, abs=1e-6)
    assert found.p_value == pytest.approx(0.015233, abs=1e-6)
    assert (found.estimate, found.n) == (2.5, 4)


def test_paired_uses_common_seeds_only() -> None:
    ours, baseline = {0: 2.0, 1: 4.0, 2: 6.0, 9: 50.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: 0.0}
    found = paired(ours, baseline)
    same = one_sample([1, 2, 3])
    assert found == same
    # By hand: mean 2, std 1, t = 2 sqrt(3), two sides, 2 degrees of freedom.
    assert found.statistic == pytest.approx(2 * math.sqrt(3))
    assert found.p_value == pytest.approx(0.0741799, abs=1e-6)


@pytest.mark.parametrize(
    ("ours", "baseline", "n"),
    [
        ({0: 1.0}, {1: 1.0}, 0),
        ({0: 2.0}, {0: 1.0}, 1),
        # Equal differences: an infinite t would claim certainty after two runs.
        ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}, 2),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, 2),
        # Both two images in a thousand better, in single precision.
        ({0: 83.79999995, 1: 84.40000296}, {0: 83.60000252, 1: 84.20000076}, 2),
    ],
)
def test_nothing_is_decided_without_variation(
    ours: dict[int, float], baseline: dict[int, float], n: int
) -> None:
    found = paired(ours, baseline)
    assert (found.p_value, found.statistic, found.n) == (None, None, n)


def test_wilcoxon_of_six_wins() -> None:
    ours = {seed: 1.0 + seed for seed in range(6)}  # all signs alike: 2 of 2^6 ways
    found = paired(ours, dict.fromkeys(range(6), 0.0), test="wilcoxon")
    assert found.p_value == pytest.approx(2 / 2**6)
    assert found.n == 6


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 1, 2], [1, 2, 3], 0.866025),
        ([1, 2, 3], [1, 100, 101], 1.0),
    ],
)
def test_spearman_by_hand(x: list[float], y: list[float], rho: float) -> None:
    assert correlation(x, y).estimate == pytest.approx(rho, abs=1e-6)


def test_intervals_of_correlations() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = x + generator.normal(size=50)
    pearson = correlation(x.tolist(), y.tolist(), "pearson")
    # Fisher: atanh(r) +- 1.959964 / sqrt(47).
    width = 1.959964 / math.sqrt(47)
    assert pearson.low == pytest.approx(math.tanh(math.atanh(pearson.estimate) - width), abs=1e-6)
    assert pearson.high == pytest.approx(math.tanh(math.atanh(pearson.estimate) + width), abs=1e-6)
    spearman = correlation(x.tolist(), y.tolist())
    assert spearman.low < spearman.estimate < spearman.high
    assert spearman.high - spearman.low > 0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        x, noise = generator.normal(size=(2, 30))
        found = correlation(x.tolist(), (0.6 * x + 0.8 * noise).tolist(), "pearson")
        covered += found.low <= 0.6 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_a_constant_correlates_with_nothing() -> None:
    found = correlation([1, 1, 1, 1], [1, 2, 3, 4])
    assert math.isnan(found.estimate)
    assert found.p_value is None
    with pytest.raises(ValueError, match="3 and 2"):
        correlation([1, 2, 3], [1, 2])


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(2).normal(5.0, 1.0, size=40).tolist()
    found = bootstrap(values)
    mean, std = mean_and_std(values)
    assert found.estimate == pytest.approx(mean)
    # For a mean of 40 numbers the bootstrap is close to the normal interval.
    assert found.high - found.low == pytest.approx(2 * 1.96 * std / math.sqrt(40), rel=0.1)
    assert found == bootstrap(values)
    assert bootstrap([1.0, 1.0, 1.0]).low is None


def test_anova_by_hand() -> None:
    # Means 2, 3, 7 around 4: between 42, within 6; F = (42 / 2) / (6 / 6).
    found = anova([[1, 2, 3], [2, 3, 4], [6, 7, 8]])
    assert found.statistic == pytest.approx(21.0)
    assert found.estimate == pytest.approx(42 / 48)
    assert found.p_value == pytest.approx(8**-3)  # (1 + 2 F / 6)^-3 for 2 and 6
    assert anova([[1, 1], [2, 2]]).p_value is None
    assert anova([[1, 2]]).p_value is None


def test_one_factor_of_several_is_the_one_way_analysis() -> None:
    pytest.importorskip("statsmodels")
    values = [1, 2, 3, 2, 3, 4, 6, 7, 8]
    method = [*"aaabbbccc"]
    found = factorial_anova(values, {"method": method, "data set": ["x"] * 9})
    assert found.keys() == {"method"}
    assert found["method"].statistic == pytest.approx(21.0)
    assert found["method"].estimate == pytest.approx(42 / 48)


def test_two_factors_by_hand() -> None:
    pytest.importorskip("statsmodels")
    # Rows add 0 or 2, columns 0 or 10, and the corners a residual of +-0.5.
    values = [0.5, 9.5, 1.5, 12.5]
    found = factorial_anova(values, {"row": [*"aabb"], "column": [*"xyxy"]})
    # Sums of squares: rows 4, columns 100, residual 1 with one degree of freedom.
    assert found["row"].statistic == pytest.approx(4.0)
    assert found["column"].statistic == pytest.approx(100.0)
    assert found["column"].estimate == pytest.approx(100 / 105)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.slow
def test_holm_agrees_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for p_values in np.random.default_rng(3).uniform(size=(20, 7)).tolist():
        expected = multitest.multipletests(p_values, method="holm")[1]
        assert holm(p_values) == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("x", "y", "p_value"),
    [
        ([1, 2, 3], [5, 6, 7], 2 / 6),
        ([1, 2, 3, 4], [4, 3, 2, 1], 2 / 24),
        ([1, 1, 2, 2], [3, 3, 4, 4], 8 / 24),  # orders among equals are the same
        ([1, 2, 3], [1, 3, 2], 1.0),
    ],
)
def test_rank_correlation_of_a_few_counts_orders(
    x: list[float], y: list[float], p_value: float
) -> None:
    assert correlation(x, y).p_value == pytest.approx(p_value)


def test_counted_orders_agree_with_a_permutation_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0], [2.0, 7.0, 1.0, 8.0, 2.5, 0.5, 8.5]
    expected = stats.permutation_test(
        (y,), lambda y: stats.spearmanr(x, y).statistic, permutation_type="pairings"
    )
    assert correlation(x, y).p_value == pytest.approx(expected.pvalue)


def test_what_is_not_finite_decides_nothing() -> None:
    nan = math.nan
    assert correlation([1, 2, 3, nan], [1, 2, 3, 4]).p_value is None
    assert correlation([1, 2, 3], [1, 2, math.inf], "pearson").p_value is None
    assert anova([[1, 2, nan], [3, 4, 5]]).p_value is None
