"""Runs ``study toy``: approximates random and power-law matrices in five ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.reporting.figures import new_figure, save_figure
from sparse_unsloth.reporting.paired_tests import compare_methods
from sparse_unsloth.reporting.tables import StudyError, aggregate, groups, write_csv
from sparse_unsloth.study.approximation import LOW_RANK, Decomposition, low_rank_loss

KINDS = ("random", "power_law")
EXPONENT = 1.0
"""The exponent of the power law: the i-th singular value is ``i ** -EXPONENT``."""


def toy(
    n: int, m: int, ranks: Sequence[int], trials: int, seed: int, outdir: Path, test: str = "t"
) -> list[dict[str, Any]]:
    """Approximates ``trials`` matrices ``[n, m]`` of each kind, and writes trials, aggregates, tests and a picture.

    Args:
        ranks: of the approximations, each at most ``min(n, m)``.
        trials: matrices of each kind, at least two; all methods see the same ones.
        test: of the paired comparisons, "t" or "wilcoxon".

    Returns:
        The aggregated rows.

    Raises:
        StudyError: sizes or ranks are out of range.
    """
    if min(n, m, trials - 1) < 1 or not ranks or not all(1 <= rank <= min(n, m) for rank in ranks):
        raise StudyError(
            f"toy: needs n, m >= 1, trials >= 2 and ranks from 1 to min(n, m); given n={n}, m={m}, trials={trials}, "
            f"ranks={list(ranks)}."
        )
    rows = []
    for kind in KINDS:
        for trial in range(trials):
            generator = torch.Generator().manual_seed((seed * len(KINDS) + KINDS.index(kind)) * 100_003 + trial)
            known = Decomposition.of(make_matrix(kind, n, m, generator))
            for rank in sorted(set(ranks)):
                for method in LOW_RANK:
                    loss = low_rank_loss(method, known, rank, generator)
                    place = {"matrix": kind, "rank": rank, "method": method, "trial": trial}
                    rows.append(place | {"frobenius": loss.frobenius, "spectral": loss.spectral})
    summary = aggregate(rows, ["matrix", "rank", "method"], ["frobenius", "spectral"])
    write_csv(outdir / "toy_trials.csv", rows)
    write_csv(outdir / "toy_summary.csv", summary)
    write_csv(outdir / "toy_tests.csv", compare_methods(rows, ["matrix", "rank"], "trial", "frobenius", test))
    _draw(summary, outdir / "toy.png")
    return summary


def make_matrix(kind: str, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Makes ``[n, m]`` in float64: "random" has normal entries, "power_law" the singular values ``i ** -EXPONENT``."""
    gaussian = torch.randn(n, m, generator=generator, dtype=torch.float64)
    if kind == "random":
        return gaussian
    left, _, right = torch.linalg.svd(gaussian, full_matrices=False)
    values = torch.arange(1, min(n, m) + 1, dtype=torch.float64).pow(-EXPONENT)
    return (left * values) @ right


def _draw(summary: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_figure(len(KINDS))
    for axis, kind in zip(axes, KINDS, strict=True):
        rows = [row for row in summary if row["matrix"] == kind]
        for (method,), members in groups(rows, ["method"]).items():
            ranks = [row["rank"] for row in members]
            means = [row["frobenius_mean"] for row in members]
            axis.errorbar(
                ranks, means, [row["frobenius_std"] for row in members], label=method, marker="o", markersize=3
            )
        axis.set(title=kind.replace("_", " "), xlabel="rank", ylim=(0, 1.05))
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("relative Frobenius error (mean, ± 1 sd)")
    axes[0].legend()
    save_figure(figure, path)
