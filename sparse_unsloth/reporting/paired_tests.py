"""Compares methods on the same trials, so that differences between trials cancel."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from sparse_unsloth.reporting.tables import Row, StudyError, groups

TESTS = ("t", "wilcoxon")


def compare_paired(first: Sequence[float], second: Sequence[float], test: str = "t") -> dict[str, float]:
    """Tests whether ``first - second``, pair by pair, differs from zero (two-sided).

    Args:
        first, second: values of the same trials in the same order, at least two.
        test: "t" (paired t-test) or "wilcoxon" (signed ranks, zeros split between the signs).

    Returns:
        ``mean_difference``; ``statistic`` and ``p_value`` of the test; ``effect_size``: Cohen's d of the differences
        (mean over standard deviation) with "t", the matched-pairs rank-biserial correlation with "wilcoxon".
        All differences zero: p is 1, effect 0. All equal and not zero: d is infinite, p of "t" is 0.

    Raises:
        StudyError: scipy is missing, the test is unknown, or the pairs are fewer than two.
    """
    if test not in TESTS:
        raise StudyError(f"test is {test!r}; it must be one of {', '.join(TESTS)}.")
    if len(first) != len(second) or len(first) < 2:
        raise StudyError(f"a paired test needs two or more pairs, given {len(first)} and {len(second)} values.")
    try:
        from scipy import stats
    except ImportError:
        raise StudyError(
            "the study's tests need scipy, which is not installed: `pip install 'sparse-unsloth[study]'`."
        ) from None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if not any(differences):
        return {"mean_difference": 0.0, "statistic": 0.0, "p_value": 1.0, "effect_size": 0.0}
    if test == "wilcoxon":
        outcome = stats.wilcoxon(differences, zero_method="zsplit")
        effect = _rank_biserial(differences, stats.rankdata)
    elif spread == 0:
        infinite = math.copysign(math.inf, mean)
        return {"mean_difference": mean, "statistic": infinite, "p_value": 0.0, "effect_size": infinite}
    else:
        outcome = stats.ttest_rel(first, second)
        effect = mean / spread
    return {
        "mean_difference": mean,
        "statistic": float(outcome.statistic),
        "p_value": float(outcome.pvalue),
        "effect_size": effect,
    }


def compare_methods(
    rows: Sequence[Row], keys: Sequence[str], pairing: str, value: str, test: str = "t"
) -> list[dict[str, Any]]:
    """Compares every pair of methods (column ``method``) within each combination of ``keys``, paired by ``pairing``.

    ``p_holm`` is the p-value corrected for all returned comparisons (Holm's step-down method).

    Raises:
        StudyError: see `compare_paired`.
    """
    table = []
    for key, members in groups(rows, keys).items():
        methods = {
            name: {row[pairing]: float(row[value]) for row in group}
            for (name,), group in groups(members, ["method"]).items()
        }
        for first, second in combinations(methods, 2):
            shared = [trial for trial in methods[first] if trial in methods[second]]
            outcome = compare_paired(
                [methods[first][trial] for trial in shared], [methods[second][trial] for trial in shared], test
            )
            names = {"value": value, "first": first, "second": second, "pairs": len(shared), "test": test}
            table.append(dict(zip(keys, key, strict=True)) | names | outcome)
    for entry, corrected in zip(table, holm([entry["p_value"] for entry in table]), strict=True):
        entry["p_holm"] = corrected
    return table


def _rank_biserial(differences: Sequence[float], rankdata) -> float:
    """Returns (sum of positive ranks - sum of negative ranks) / sum of all; zeros count half for each side."""
    ranks = rankdata([abs(value) for value in differences])
    signed = sum(rank * ((value > 0) - (value < 0)) for rank, value in zip(ranks, differences, strict=True))
    return float(signed / sum(ranks))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number by Holm's step-down method; keeps their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = largest
    return corrected
