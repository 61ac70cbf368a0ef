"""What sparsity of one part costs, from few noisy measurements: a curve for each part, and how much it counts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHRINKAGE = 0.2
"""Weight of the median curve of all parts of a kind: a part that measured nothing is not taken to be free."""
LEAST = 1e-9
"""Nats: keeps quotients of nothing finite."""

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

    def rescale(
        self, chosen: Mapping[PartKey, float], groups: Sequence[Sequence[PartKey]], marginal: Sequence[float]
    ) -> None:
        """Makes the curves agree with what groups of parts add beside the others of a recipe.

        A group's factor is the geometric mean of its own and of that of all groups of its kind: half of what sets it
        apart is believed. Parts in no group, dense ones, have their kind's factor.

        Args:
            chosen: the recipe, by part.
            groups: its sparse parts, each group of one kind.
            marginal: what each group adds, nats; noise can make it negative.
        """
        alone = [sum(self.values[part][chosen[part]] for part in group) for group in groups]
        seen = [max(0.0, value) for value in marginal]
        overall = (sum(seen) + LEAST) / (sum(alone) + LEAST)
        factors = dict.fromkeys(self.values, overall)
        for kind in {group[0][1] for group in groups}:
            mine = [number for number, group in enumerate(groups) if group[0][1] == kind]
            total_seen, total_alone = (sum(values[n] for n in mine) + LEAST for values in (seen, alone))
            factors |= {part: total_seen / total_alone for part in factors if part[1] == kind}
            for number in mine:
                # A tenth of the kind's own keeps a group that measured nothing from being free.
                own = (seen[number] + 0.1 * total_seen) / (alone[number] + 0.1 * total_alone)
                factors |= dict.fromkeys(groups[number], (own * total_seen / total_alone) ** 0.5)
        self.factors = factors
