"""Fits the loss that sparsity of each part costs, as curves from few noisy measurements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHRINKAGE = 0.2
"""Weight of the median curve of all parts of a kind, so that a part that measured nothing is not free."""
LEAST = 1e-9
"""Nats; keeps quotients of zeros finite."""

PartKey = tuple[int, str]


def smooth(increases: Mapping[float, float]) -> dict[float, float]:
    """The isotonic least-squares fit of ``{sparsity: increase}``, in nats; it is nowhere negative."""
    from scipy.optimize import isotonic_regression

    levels = sorted(increases)
    fitted = isotonic_regression([increases[level] for level in levels]).x
    return {level: max(0.0, float(value)) for level, value in zip(levels, fitted, strict=True)}


@dataclass
class Curves:
    """Loss increases by part and sparsity (nats), additive around a recipe.

    Args:
        values: by part and sparsity above 0: smoothed, and shrunk towards the median of the kind.
        factors: by part: its cost beside the recipe's other parts, over its cost alone.
    """

    values: dict[PartKey, dict[float, float]]
    factors: dict[PartKey, float] = field(default_factory=dict)

    @classmethod
    def fit(cls, alone: Mapping[PartKey, Mapping[float, float]]) -> Curves:
        """Fits curves to the increases of each part alone."""
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
        """The increase of ``part`` at ``sparsity``; 0 where it is dense."""
        return self.factors[part] * self.values[part][sparsity] if sparsity else 0.0

    def total(self, chosen: Mapping[PartKey, float]) -> float:
        return sum(self.increase(part, sparsity) for part, sparsity in chosen.items())

    def rescale(
        self, chosen: Mapping[PartKey, float], groups: Sequence[Sequence[PartKey]], marginal: Sequence[float]
    ) -> None:
        """Sets the factors from what groups of parts add beside the other parts of a recipe.

        A group's factor is the geometric mean of its own and its kind's, since its own is noisy. Dense parts are in no
        group and have their kind's factor.

        Args:
            chosen: the recipe, by part.
            groups: its sparse parts, each group of one kind.
            marginal: what each group adds, in nats; noise can make it negative.
        """
        alone = [sum(self.values[part][chosen[part]] for part in group) for group in groups]
        seen = [max(0.0, value) for value in marginal]
        overall = (sum(seen) + LEAST) / (sum(alone) + LEAST)
        factors = dict.fromkeys(self.values, overall)
        for kind in {group[0][1] for group in groups}:
            members = [number for number, group in enumerate(groups) if group[0][1] == kind]
            total_seen, total_alone = (sum(values[n] for n in members) + LEAST for values in (seen, alone))
            factors |= {part: total_seen / total_alone for part in factors if part[1] == kind}
            for number in members:
                # A tenth of the kind's total keeps a group that measured nothing from being free.
                own = (seen[number] + 0.1 * total_seen) / (alone[number] + 0.1 * total_alone)
                factors |= dict.fromkeys(groups[number], (own * total_seen / total_alone) ** 0.5)
        self.factors = factors
