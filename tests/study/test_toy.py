"""Tests approximations against independent computations, and `study toy` from end to end."""

import pytest
import torch

from sparse_unsloth.cli import main
from sparse_unsloth.study.approximation import (
    LOW_RANK,
    MAGNITUDE,
    Decomposition,
    low_rank_loss,
    magnitude_loss,
    spectral_norm,
)

from outputs import is_picture, rows_of


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    return Decomposition.of(torch.randn(24, 16, dtype=torch.float64))


# -- Approximations ---------------------------------------------------------------------------------------------------


def test_best_approximation_is_the_truncated_svd(known):
    left, values, right = torch.linalg.svd(known.matrix, full_matrices=False)
    residual = known.matrix - left[:, :5] * values[:5] @ right[:5]
    loss = low_rank_loss("svd_topk", known, 5, seeded())
    assert loss.frobenius == pytest.approx((residual.norm() / known.matrix.norm()).item())
    assert loss.spectral == pytest.approx((values[5] / values[0]).item())
    assert loss.parameters == 5 * (24 + 16)


@pytest.mark.parametrize("method", LOW_RANK)
def test_full_rank_loses_nothing_but_for_random_factors(known, method):
    loss = low_rank_loss(method, known, 16, seeded())
    assert (loss.frobenius < 1e-7) == (method != "random_factors")


def test_random_factors_take_the_best_scalar(known):
    generator = seeded(4)
    product = torch.randn(24, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 16, generator=generator, dtype=torch.float64
    )
    errors = [(known.matrix - scalar * product).norm().item() for scalar in torch.linspace(-1, 1, 2001).tolist()]
    found = low_rank_loss("random_factors", known, 3, seeded(4)).frobenius * known.matrix.norm().item()
    assert found == pytest.approx(min(errors), rel=1e-5)


def test_columns_of_leverage_are_found():
    """A matrix whose energy is in two columns: these have all the leverage of its top subspace."""
    matrix = 1e-3 * torch.randn(20, 12, generator=seeded(), dtype=torch.float64)
    matrix[:, [3, 8]] += torch.randn(20, 2, generator=seeded(1), dtype=torch.float64)
    planted = Decomposition.of(matrix)
    assert low_rank_loss("leverage_columns", planted, 2, seeded()).frobenius < 0.01
    assert low_rank_loss("random_columns", planted, 2, seeded()).frobenius > 0.3


@pytest.mark.parametrize("method", MAGNITUDE)
def test_magnitude_against_sorting(known, method):
    squares = known.matrix.square()
    if method != "magnitude":
        squares = squares.sum({"magnitude_rows": 1, "magnitude_columns": 0}[method])
    kept = round(0.25 * squares.numel())
    left_out = squares.flatten().sort().values[:-kept].sum()
    loss = magnitude_loss(method, known, 0.25)
    assert loss.frobenius == pytest.approx((left_out / known.matrix.square().sum()).sqrt().item())
    assert loss.parameters == 96


@pytest.mark.parametrize("shape", [(60, 40), (5, 70), (64, 1)])
def test_spectral_norm(shape):
    matrix = torch.randn(shape, generator=seeded())
    exact = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert exact * 0.998 < spectral_norm(matrix) <= exact * (1 + 1e-5)


def test_spectral_norm_of_nothing():
    assert spectral_norm(torch.zeros(4, 6)) == 0


@pytest.mark.parametrize(("method", "rank"), [("svd_topk", 0), ("svd_topk", 17), ("best", 3)])
def test_wrong_approximation(known, method, rank):
    with pytest.raises(ValueError, match=r"rank is|method is"):
        low_rank_loss(method, known, rank, seeded())


# -- toy --------------------------------------------------------------------------------------------------------------


def test_toy_ranks_the_methods(tmp_path, capsys):
    words = f"study toy --n 40 --m 30 --ranks 2 8 20 --trials 6 --seed 3 --outdir {tmp_path}"
    assert main(words.split()) == 0
    assert "toy.png, toy_summary.csv, toy_tests.csv, toy_trials.csv" in capsys.readouterr().out
    trials = rows_of(tmp_path / "toy_trials.csv")
    assert len(trials) == 2 * 3 * 5 * 6
    error = {(row["matrix"], row["rank"], row["trial"], row["method"]): float(row["frobenius"]) for row in trials}
    for matrix, rank, trial in {key[:3] for key in error}:
        best, subspace, factors = (
            error[matrix, rank, trial, method] for method in ("svd_topk", "random_subspace", "random_factors")
        )
        assert best < subspace < factors
        assert best <= error[matrix, rank, trial, "leverage_columns"]
        assert best <= error[matrix, rank, trial, "random_columns"]
    summary = rows_of(tmp_path / "toy_summary.csv")
    assert {row["n"] for row in summary} == {"6"}
    tests = rows_of(tmp_path / "toy_tests.csv")
    assert len(tests) == 2 * 3 * 10
    assert all(0 <= float(row["p_value"]) <= float(row["p_holm"]) <= 1 for row in tests)
    assert is_picture(tmp_path / "toy.png")


def test_toy_is_repeatable(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        words = f"study toy --n 12 --m 12 --ranks 3 --trials 2 --seed {seed} --outdir {tmp_path / name}"
        assert main(words.split()) == 0
    first, same, other = ((tmp_path / name / "toy_trials.csv").read_text() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize("words", ["--ranks 97", "--ranks 0", "--trials 1", "--n 0"])
def test_toy_that_cannot_be(tmp_path, words, capsys):
    assert main(["study", "toy", *words.split(), "--outdir", str(tmp_path)]) == 2
    assert "toy: needs n, m >= 1" in capsys.readouterr().err
