"""Two trainings in turns: one at a time, in pairs, and an error of one ends the other."""

import time

import pytest

from sparse_unsloth.quickstart.turns import Turns


def taker(log, name, turns, fails_at=None):
    """A function of so many turns, each of which it logs when it begins and ends."""

    def function(give_away):
        for turn in range(turns):
            if turn:
                give_away()
            log.append(f"{name}{turn}")
            time.sleep(0.002)
            if turn == fails_at:
                raise ValueError(f"{name} failed")
            log.append("end")

    return function


def test_each_pair_is_adjacent_and_each_is_first_of_every_second_pair():
    log = []
    Turns().run(taker(log, "a", 4), taker(log, "b", 4))
    assert log[::2] == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]
    assert log[1::2] == ["end"] * 8, "two went on at once"


@pytest.mark.parametrize(("turns", "expected"), [((1, 3), "a0 b0 b1 b2"), ((3, 1), "a0 b0 a1 a2")])
def test_the_longer_one_goes_on_alone(turns, expected):
    log = []
    Turns().run(taker(log, "a", turns[0]), taker(log, "b", turns[1]))
    assert log[::2] == expected.split()


@pytest.mark.parametrize("failing", ["a", "b"])
def test_an_error_of_one_ends_both(failing):
    log = []
    with pytest.raises(ValueError, match=f"{failing} failed"):
        Turns().run(*(taker(log, name, 50, fails_at=1 if name == failing else None) for name in "ab"))
    assert len(log) < 10
