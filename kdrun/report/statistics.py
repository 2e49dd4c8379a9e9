"""Statistics of results: paired tests, correlations, bootstrap, analysis of variance.

Every function takes plain numbers and says in its result how many went in. A test that its data
cannot decide (too few numbers, or no variation) has the p-value None, never a misleading 0.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Alternative = Literal["two-sided", "greater", "less"]

RESOLUTION = 1e-6
"""Results are single-precision numbers: what varies by less, relative to them, does not vary."""


EXACT = 7
"""Up to so many pairs the p-value of a rank correlation is counted out."""


@dataclass(frozen=True)
class Test:
    """A test of one hypothesis.

    Attributes:
        estimate: the effect: a mean, a mean difference, a correlation.
        statistic: what the test computes from it (t, W, F, rho); None where it cannot.
        p_value: None where the data decide nothing.
        n: numbers, pairs or rows that went in.
        low: lower end of the confidence interval of ``estimate``, where there is one.
        high: its upper end.
    """

    estimate: float
    statistic: float | None
    p_value: float | None
    n: int
    low: float | None = None
    high: float | None = None


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1); the latter None for a single value.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    # Exact: equal numbers have that mean, and no deviation at all.
    mean = float(statistics.mean(values))
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def one_sample(values: Sequence[float], alternative: Alternative = "two-sided") -> Test:
    """Student's t-test of the mean against zero."""
    mean, std = mean_and_std(values)
    if not std or not math.isfinite(std):
        return Test(mean, None, None, len(values))
    from scipy import stats

    found = stats.ttest_1samp(values, 0.0, alternative=alternative)
    return Test(mean, float(found.statistic), float(found.pvalue), len(values))


def paired(
    first: Mapping[int, float],
    second: Mapping[int, float],
    test: Literal["t", "wilcoxon"] = "t",
    alternative: Alternative = "two-sided",
) -> Test:
    """Compare two methods over the seeds that both have.

    Args:
        first: result by seed; ``second`` likewise.
        test: Student's t-test of the differences, or Wilcoxon's signed-rank test, which assumes
            only that they are symmetric but cannot reach 5% (two-sided) with fewer than 6 pairs.
        alternative: of the mean of ``first - second``.

    Returns:
        ``estimate`` is the mean difference; NaN without common seeds.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = [first[seed] - second[seed] for seed in seeds]
    if not differences:
        return Test(math.nan, None, None, 0)
    mean, std = mean_and_std(differences)
    largest = max(abs(value) for seed in seeds for value in (first[seed], second[seed]))
    if std is None or not std > RESOLUTION * largest or not math.isfinite(std):
        return Test(mean, None, None, len(differences))
    if test == "t":
        return one_sample(differences, alternative)
    from scipy import stats

    found = stats.wilcoxon(differences, alternative=alternative)
    return Test(mean, float(found.statistic), float(found.pvalue), len(differences))


def correlation(
    x: Sequence[float],
    y: Sequence[float],
    kind: Literal["spearman", "pearson"] = "spearman",
    confidence: float = 0.95,
) -> Test:
    """Rank (Spearman) or linear (Pearson) correlation with a confidence interval.

    Ties get average ranks; p is two-sided, from t with n - 2 degrees of freedom. Of a rank
    correlation of up to ``EXACT`` pairs, where t is far off (three pairs in one order would have
    p = 0), it is the share of all orders that correlate as much. The interval is Fisher's, through
    ``atanh``, with the variance 1 / (n - 3) for Pearson and (1 + rho^2 / 2) / (n - 3) for Spearman
    (Bonett and Wright, Psychometrika 2000, equation 9). Numbers that are not finite decide nothing.

    Raises:
        ValueError: ``x`` and ``y`` differ in length.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values")
    n = len(x)
    if n < 3 or not all(map(math.isfinite, (*x, *y))) or len(set(x)) == 1 or len(set(y)) == 1:
        return Test(math.nan, None, None, n)
    from scipy import stats

    found = (stats.spearmanr if kind == "spearman" else stats.pearsonr)(x, y)
    rho = float(found.statistic)
    p_value = float(found.pvalue)
    if kind == "spearman" and n <= EXACT:
        p_value = _share_of_orders(stats.rankdata(x), stats.rankdata(y))
    if n < 4 or abs(rho) >= 1:
        return Test(rho, rho, p_value, n)
    variance = (1 + rho**2 / 2 if kind == "spearman" else 1.0) / (n - 3)
    width = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    low, high = (math.tanh(math.atanh(rho) + side * width) for side in (-1, 1))
    return Test(rho, rho, p_value, n, low, high)


def _share_of_orders(x: np.ndarray, y: np.ndarray) -> float:
    """The share of all orders of the ranks ``y`` whose correlation with ``x`` is as far from 0."""
    orders = np.array(list(itertools.permutations(y - y.mean())))
    products = np.abs(orders @ (x - x.mean()))
    return float((products >= products[0] - 1e-9).mean())  # the first order is that of ``y``


def bootstrap(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Test:
    """Bias-corrected and accelerated (BCa) bootstrap interval of a statistic.

    Args:
        values: the sample; for two paired samples, their differences.
        statistic: of an array and ``axis``.
        confidence: of the interval.
        resamples: number of resamples drawn.
        seed: of the draws, so that a report is the same each time.

    Returns:
        ``low`` and ``high`` are None where the values do not vary. There is no p-value.
    """
    array = np.asarray(values, dtype=float)
    estimate = float(statistic(array, axis=0))
    if len(array) < 2 or not np.ptp(array):
        return Test(estimate, None, None, len(array))
    from scipy import stats

    found = stats.bootstrap(
        (array,),
        statistic,
        confidence_level=confidence,
        n_resamples=resamples,
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    if math.isnan(low) or math.isnan(high):
        return Test(estimate, None, None, len(array))
    return Test(estimate, None, None, len(array), low, high)


def anova(groups: Sequence[Sequence[float]]) -> Test:
    """One-way analysis of variance: do the groups have one mean? ``statistic`` is F.

    ``estimate`` is eta squared, the share of the variance that lies between the groups.
    """
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    n = sum(map(len, filled))
    together = np.concatenate(filled) if filled else np.zeros(0)
    total = float(((together - together.mean()) ** 2).sum()) if n else 0.0
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in filled)
    estimate = 1 - within / total if total else math.nan
    if len(filled) < 2 or n <= len(filled) or not within or not math.isfinite(total):
        return Test(estimate, None, None, n)
    from scipy import stats

    found = stats.f_oneway(*filled)
    return Test(estimate, float(found.statistic), float(found.pvalue), n)


def factorial_anova(
    values: Sequence[float], factors: Mapping[str, Sequence[str]]
) -> dict[str, Test]:
    """Analysis of variance with several factors and no interactions (type II sums of squares).

    Args:
        values: the results.
        factors: the level of each factor (method, pair of networks, ...) for each result.

    Returns:
        For each factor with more than one level: F, p, and as ``estimate`` its share of the sum of
        squares (eta squared).

    Raises:
        UserError: statsmodels is not installed.
    """
    varied = {name: levels for name, levels in factors.items() if len(set(levels)) > 1}
    n = len(values)
    used = sum(len(set(levels)) - 1 for levels in varied.values())
    if not varied or n - 1 - used <= 0 or len(set(values)) == 1:
        return {name: Test(math.nan, None, None, n) for name in varied}
    formula, anova_lm, ols, frame = _models()
    # Names of factors may be anything; the formula language takes identifiers.
    columns = {f"factor{i}": list(levels) for i, levels in enumerate(varied.values())}
    data = frame({"value": list(values)} | columns)
    terms = " + ".join(f"{formula}({name})" for name in columns)
    found = anova_lm(ols(f"value ~ {terms}", data).fit(), typ=2)
    total = float(found["sum_sq"].sum())
    result = {}
    for name, column in zip(varied, columns, strict=True):
        line = found.loc[f"{formula}({column})"]
        f, p = float(line["F"]), float(line["PR(>F)"])
        known = math.isfinite(f) and math.isfinite(p)
        result[name] = Test(
            float(line["sum_sq"]) / total, f if known else None, p if known else None, n
        )
    return result


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several tests at once; what has no p-value does not count."""
    known = [p for p in p_values if p is not None]
    order = sorted(range(len(known)), key=known.__getitem__)
    adjusted = [0.0] * len(known)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(known) - rank) * known[place]))
        adjusted[place] = largest
    remaining = iter(adjusted)
    return [None if p is None else next(remaining) for p in p_values]


def _models():
    """What is needed of statsmodels: the name of a category in formulas, and three functions."""
    from kdrun.errors import UserError

    try:
        from pandas import DataFrame
        from statsmodels.formula.api import ols
        from statsmodels.stats.anova import anova_lm
    except ImportError:
        raise UserError(
            "analysis of variance needs statsmodels: pip install 'kdrun[report]'"
        ) from None
    return "C", anova_lm, ols, DataFrame
