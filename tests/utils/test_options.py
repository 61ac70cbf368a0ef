"""Types of command-line options take numbers within their bounds, and say which those are."""

from argparse import ArgumentTypeError

import pytest

from sparse_unsloth.utils.options import real, whole


def test_numbers_within_their_bounds():
    assert [whole()("1"), whole(0)("0"), whole(-1)("-1"), whole()("64")] == [1, 0, -1, 64]
    assert [real()("-1e-4"), real(above=0)("1e-9"), real(least=0, below=1)("0"), real(most=1)("1")] == [
        -1e-4, 1e-9, 0.0, 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (whole(), "0", "must be an integer from 1 on, given '0'"),
        (whole(2), "1", "must be an integer from 2 on, given '1'"),
        (whole(), "2.5", "given '2.5'"),
        (whole(), "abc", "given 'abc'"),
        (real(), "abc", "must be a number, given 'abc'"),
        (real(), "inf", "must be a number, given 'inf'"),
        (real(above=0), "nan", "must be a number above 0, given 'nan'"),
        (real(above=0), "0", "must be a number above 0, given '0'"),
        (real(least=0, below=1), "1", "must be a number of at least 0 and below 1, given '1'"),
        (real(least=0), "-0.1", "must be a number of at least 0, given"),
        (real(above=0, most=1), "1.1", "must be a number above 0 and at most 1, given"),
    ],
)
def test_others_are_refused_with_the_bounds(kind, text, message):
    with pytest.raises(ArgumentTypeError) as caught:
        kind(text)
    assert message in str(caught.value)
