"""Trainers that compute their own loss: sparse, and exact with every row kept (the table of docs/training.md)."""

import pytest

from trainer_table import TRAINERS, problems_of

SHARES = {"GRPO": 0.5, "RLOO": 0.5}
"""Of completions without loss: those of the group whose rewards are equal."""


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_is_sparse_and_exact_with_every_row_kept(name, tmp_path):
    try:
        result = problems_of(name, tmp_path)
    except ImportError as error:
        pytest.skip(f"this TRL has no such trainer: {error}")
    assert not result.problems, result.problems
    assert 0.3 < result.context < 1
    assert result.roles != ("labels" if name != "SFT" else "")
    if name in SHARES:
        assert 0.2 < result.idle < 0.8
