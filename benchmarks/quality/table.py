"""Reads and writes the long table of results, fits the dense curve, and compares at equal cost in pairs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.settings import DENSE_SHARES
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.reporting import paired_tests
from sparse_unsloth.reporting.tables import append_csv

COLUMNS = (
    "date", "commit", "device", "model", "task", "config", "seed", "cost_flops", "cost_time", "answer_nll",
    "answer_nll_sparse_forward", "token_accuracy", "exact_match", "equivalent_dense_steps",
)  # fmt: skip
NUMBERS = COLUMNS[COLUMNS.index("cost_flops") :]
Row = dict
SMOLLM2, GEMMA3 = "SmolLM2-135M", "Gemma-3-270M"
MODELS = {"llama": SMOLLM2, "gemma3_text": GEMMA3}
"""The values of the column `model`, by the type in a model's configuration."""


def read_rows(path: Path) -> list[Row]:
    """Reads the rows, numbers as numbers (NaN where a field is empty); none where there is no file.

    Raises:
        SparsityError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise SparsityError(f"{path} has other columns than a table of quality; write to another file.")
        numbers = lambda row: {name: float(row[name] or "nan") for name in NUMBERS}  # noqa: E731
        return [row | {"seed": int(row["seed"])} | numbers(row) for row in reader]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows; a new file gets a heading."""
    append_csv(path, ({name: _text(row[name]) for name in COLUMNS} for row in rows), COLUMNS)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)


def _text(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


class DenseCurve:
    """Answer loss of the dense trainings of one task and seed by their share of the steps.

    Between trainings the logarithm of the loss is linear in that of the share. A longer training that is worse than a
    shorter one (noise, overfitting) counts as good as that one: it could have stopped there.
    """

    def __init__(self, points: Iterable[tuple[float, float]]):
        self.shares, losses = (np.array(values) for values in zip(*sorted(points), strict=True))
        self.losses = np.minimum.accumulate(losses)

    def loss(self, share: float) -> float:
        """Returns the loss at a share of the dense cost; NaN below the shortest training, the best beyond all."""
        if share < self.shares[0]:
            return math.nan
        return float(np.exp(np.interp(np.log(share), np.log(self.shares), np.log(self.losses))))

    def share(self, loss: float) -> float:
        """Returns the least share of dense steps that reaches ``loss``; NaN if the shortest training is better.

        For a loss below every dense training the last segment is extrapolated to at most 2; if that segment gains
        nothing, the result is 2.
        """
        if loss > self.losses[0]:
            return math.nan
        logs, at = np.log(self.losses), np.log(self.shares)
        if loss < self.losses[-1]:
            slope = (logs[-1] - logs[-2]) / (at[-1] - at[-2])
            return 2.0 if slope >= -1e-9 else float(min(2.0, np.exp(at[-1] + (math.log(loss) - logs[-1]) / slope)))
        for i in range(1, len(logs)):
            if loss >= self.losses[i]:
                if logs[i] == logs[i - 1]:
                    return float(self.shares[i - 1])
                part = (math.log(loss) - logs[i - 1]) / (logs[i] - logs[i - 1])
                return float(np.exp(at[i - 1] + part * (at[i] - at[i - 1])))
        return float(self.shares[-1])


def curve_of(row: Row) -> tuple[str, str, int]:
    """Returns the key of the dense curve that a row is compared with."""
    return row["model"], row["task"], row["seed"]


def dense_curves(rows: Sequence[Row]) -> dict[tuple[str, str, int], DenseCurve]:
    """Returns the curves by model, task and seed with at least two dense trainings."""
    points: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["config"] in DENSE_SHARES:
            points.setdefault(curve_of(row), []).append((DENSE_SHARES[row["config"]], row["answer_nll"]))
    return {key: DenseCurve(own) for key, own in points.items() if len(own) > 1}


def with_equivalents(rows: Sequence[Row]) -> list[Row]:
    """Computes ``equivalent_dense_steps`` of the rows from the dense rows among them."""
    curves = dense_curves(rows)

    def equivalent(row: Row) -> float:
        if row["config"] in DENSE_SHARES:
            return DENSE_SHARES[row["config"]]
        curve = curves.get(curve_of(row))
        return math.nan if curve is None else curve.share(row["answer_nll"])

    return [row | {"equivalent_dense_steps": equivalent(row)} for row in rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down correction; NaN stays NaN and does not count."""
    corrected = iter(paired_tests.holm([p for p in p_values if not math.isnan(p)]))
    return [p if math.isnan(p) else next(corrected) for p in p_values]


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Returns mean, half width of its 95 % interval, and p (two-sided t-test); NaN for fewer than two."""
    from scipy import stats

    values = np.array(differences, dtype=float)
    if len(values) < 2 or np.isnan(values).any():
        return math.nan, math.nan, math.nan
    error = values.std(ddof=1) / math.sqrt(len(values))
    width = float(stats.t.ppf(0.975, len(values) - 1) * error)
    p = float(stats.ttest_1samp(values, 0).pvalue) if error > 0 else (1.0 if values.mean() == 0 else 0.0)
    return float(values.mean()), width, p
