"""Tests paired tests and aggregates by hand."""

import math
import random

import pytest

from sparse_unsloth.reporting.paired_tests import compare_methods, compare_paired
from sparse_unsloth.reporting.tables import StudyError, aggregate


def test_paired_t_by_hand():
    outcome = compare_paired([3.0, 5.0, 4.0, 8.0], [1.0, 4.0, 4.0, 5.0])
    # Differences 2, 1, 0, 3: mean 1.5, standard deviation sqrt(5/3), t = d sqrt(4) with 3 degrees of freedom, whose
    # distribution has a closed form.
    assert outcome["mean_difference"] == 1.5
    assert outcome["effect_size"] == pytest.approx(1.5 / math.sqrt(5 / 3))
    assert outcome["statistic"] == pytest.approx(2 * 1.5 / math.sqrt(5 / 3))
    x = outcome["statistic"] / math.sqrt(3)
    assert outcome["p_value"] == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))


def test_wilcoxon_by_hand():
    outcome = compare_paired([3.0, 1.0, 6.0, 9.0, 12.0], [1.0, 2.0, 3.0, 4.0, 5.0], "wilcoxon")
    # Differences 2, -1, 3, 5, 7: one negative, of rank 1; two-sided, 4 of the 32 sign patterns are as extreme.
    assert outcome["p_value"] == pytest.approx(4 / 32)
    assert outcome["effect_size"] == pytest.approx(13 / 15)


def test_pairs_without_spread():
    assert compare_paired([1.0, 2.0], [1.0, 2.0])["p_value"] == 1
    constant = compare_paired([1.0, 2.0], [0.0, 1.0])
    assert (constant["p_value"], constant["effect_size"]) == (0.0, math.inf)


def test_pairs_are_matched_by_trial_and_p_values_corrected():
    rows = [
        {"method": method, "trial": trial, "value": trial + offset + random.Random(f"{method}{trial}").random() / 10}
        for method, offset in (("a", 0), ("b", 0.2), ("c", 0.21))
        for trial in random.Random(method).sample(range(6), 6)
    ]
    tests = {(row["first"], row["second"]): row for row in compare_methods(rows, [], "trial", "value")}
    assert tests["a", "b"]["mean_difference"] == pytest.approx(-0.2, abs=0.06)
    plain = sorted(row["p_value"] for row in tests.values())
    corrected = sorted(row["p_holm"] for row in tests.values())
    assert corrected[0] == pytest.approx(3 * plain[0])
    assert corrected[2] == pytest.approx(max(plain[2], 2 * plain[1], 3 * plain[0]))


def test_too_few_pairs_and_unknown_tests():
    with pytest.raises(StudyError, match="two or more pairs"):
        compare_paired([1.0], [2.0])
    with pytest.raises(StudyError, match="must be one of t, wilcoxon"):
        compare_paired([1.0, 2.0], [2.0, 1.0], "z")


def test_aggregate():
    rows = [{"method": "a", "x": 1.0}, {"method": "b", "x": 5.0}, {"method": "a", "x": 3.0}]
    assert aggregate(rows, ["method"], ["x"]) == [
        {"method": "a", "n": 2, "x_mean": 2.0, "x_std": pytest.approx(math.sqrt(2))},
        {"method": "b", "n": 1, "x_mean": 5.0, "x_std": 0.0},
    ]
