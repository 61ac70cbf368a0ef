"""What sparsity of one part costs, from few noisy measurements: a curve for each part, and how much it counts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

SHRINKAGE = 0.2
"""Weight of the median curve of all parts of a kind: a part that measured nothing is not taken to be free."""
LEAST = 1e-6
"""Nats: divisors are at least this."""

PartKey = tuple[int, str]


def smooth(increases: Mapping[float, float]) -> dict[float, float]:
    """The nearest curve in least squares that starts at 0 and never falls: `{sparsity: increase}` in nats."""
    from scipy.optimize import isotonic_regression

    levels = sorted(increases)
    fitted = isotonic_regression([increases[level] for level in levels]).x
    return {level: max(0.0, float(value)) for level, value in zip(levels, fitted, strict=True)}


@dataclass
class Curves:
    """Loss increases by part and sparsity (nats), additive around a recipe.

    Args:
        values: by part, of sparsities above 0: smoothed and drawn to the median of the kind.
        factors: by part: how much more it costs beside the recipe's other parts than alone.
    """

    values: dict[PartKey, dict[float, float]]
    factors: dict[PartKey, float] = field(default_factory=dict)

    @classmethod
    def fit(cls, alone: Mapping[PartKey, Mapping[float, float]]) -> Curves:
        """From the increases that each part alone brings."""
        smoothed = {part: smooth(increases) for part, increases in alone.items()}
        values = {}
        for part, curve in smoothed.items():
            kin = [other for (_, kind), other in smoothed.items() if kind == part[1]]
            values[part] = {
                level: (1 - SHRINKAGE) * value + SHRINKAGE * statistics.median(other[level] for other in kin)
                for level, value in curve.items()
            }
        return cls(values, dict.fromkeys(values, 1.0))

    def increase(self, part: PartKey, sparsity: float) -> float:
        """What ``part`` adds at ``sparsity``; 0 where it is dense."""
        return self.factors[part] * self.values[part][sparsity] if sparsity else 0.0

    def total(self, chosen: Mapping[PartKey, float]) -> float:
        return sum(self.increase(part, sparsity) for part, sparsity in chosen.items())

    def rescale(self, marginal: Mapping[PartKey, tuple[float, float]]) -> None:
        """Makes the curves agree with what parts add beside the others.

        Args:
            marginal: by part, a sparsity and what it adds there in the recipe's company, nats. Noise is damped by the
                kind's medians, as in `fit`.
        """
        for kind in {part[1] for part in marginal}:
            mine = {part: pair for part, pair in marginal.items() if part[1] == kind}
            seen = {part: max(0.0, value) for part, (_, value) in mine.items()}
            alone = {part: self.values[part][sparsity] for part, (sparsity, _) in mine.items()}
            damp_seen = SHRINKAGE * statistics.median(seen.values())
            damp_alone = max(SHRINKAGE * statistics.median(alone.values()), LEAST)
            for part in mine:
                self.factors[part] = (seen[part] + damp_seen) / (alone[part] + damp_alone)
