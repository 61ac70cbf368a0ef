"""Trainers that compute their own loss: sparse, and exact with every row kept (the table of docs/training.md)."""

import pytest

from trainer_table import TRAINERS, problems_of


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_is_sparse_and_exact_with_every_row_kept(name, tmp_path):
    try:
        result = problems_of(name, tmp_path, ["none"])
    except ImportError as error:
        pytest.skip(f"this TRL has no such trainer: {error}")
    assert not result.problems, result.problems
    assert 0.3 < result.context < 1
    assert result.roles != ("labels" if name != "SFT" else "")
    assert (result.idle is not None) == (name in ("GRPO", "RLOO"))
    assert result.idle is None or 0.2 < result.idle < 0.8, "one group of two has no advantages"
