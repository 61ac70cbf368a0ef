"""Times of paired steps: the median, and whether the machine was too busy to judge."""

import os

import pytest

from sparse_unsloth.quickstart import pairs
from sparse_unsloth.quickstart.pairs import Pairs

CALM = [1.2, 1.25, 1.24, 1.3, 1.26]


def test_the_first_pair_warms_up(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (2.1, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = Pairs.of([90.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 4.0])
    assert found.speed == [2.0, 1.5, 1.0]
    assert (found.median, found.load, found.cores) == (1.5, 2.1, 2)
    assert found.as_dict()["verdict"] == found.verdict()


@pytest.mark.parametrize(
    ("speed", "load", "words"),
    [
        (CALM, 2.1, "can be judged: the middle half of the pairs lies between 1.24 and 1.26, load average 2.1 on 2"),
        (CALM, None, "can be judged"),
        (CALM, 2.6, "too busy to judge times: its load average was 2.6 on 2 cores. Run"),
        ([0.8, 1.0, 1.25, 1.5, 2.0], 2.0, "too busy to judge times: the middle half of the pairs reaches from 1.00"),
        ([0.8, 1.0, 1.25, 1.5, 2.0], 9.0, "load average was 9.0 on 2 cores, and the middle half"),
        ([1.3], 2.0, "fewer than two pairs"),
        ([], 2.0, "fewer than two pairs"),
    ],
)
def test_a_busy_machine_is_named(speed, load, words):
    assert words in Pairs(speed, load, 2).verdict()


def test_the_width_is_relative_to_the_median():
    low, high = 2 * (1 - pairs.WIDE / 2.1), 2 * (1 + pairs.WIDE / 2.1)
    assert "can be judged" in Pairs([low, low, 2.0, high, high], 2.0, 2).verdict()
    assert "too busy" in Pairs([low / 2, low / 2, 1.0, high, high], 2.0, 2).verdict()
