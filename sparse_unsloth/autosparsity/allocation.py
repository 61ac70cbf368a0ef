"""Allocates a sparsity to each part: a multiple-choice knapsack problem, solved exactly by HiGHS through SciPy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparse_unsloth.errors import CalibrationError

Part = TypeVar("Part", bound=Hashable)
GAP = 1e-6
"""Relative optimality gap at which the solver may stop."""


class Option(NamedTuple):
    """One sparsity of a part: the loss that it adds, in nats, and its FLOPs, in any common unit."""

    sparsity: Any
    loss: float
    flops: float


def allocate(
    options: Mapping[Part, Sequence[Option]], *, flops: float | None = None, loss: float | None = None
) -> dict[Part, Any]:
    """Chooses one option of each part; exactly one of the two bounds is given.

    Args:
        options: by part, at least one each.
        flops: bound on the total FLOPs; the total loss is minimised.
        loss: bound on the total loss, in nats; the total FLOPs are minimised.

    Returns:
        The sparsity of each part.

    Raises:
        CalibrationError: no choice satisfies the bound.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if (flops is None) == (loss is None):
        raise ValueError("allocate() takes either flops or loss")
    flat = [(part, option) for part, choices in options.items() for option in choices]
    losses = np.array([option.loss for _, option in flat])
    costs = np.array([option.flops for _, option in flat])
    objective, bounded, bound = (losses, costs, flops) if loss is None else (costs, losses, loss)
    # Scaled by the bound and by the largest term, so that the solver's absolute tolerances hardly matter.
    unit = abs(bound) or 1.0
    parts = list(options)
    one_each = np.array([[part == other for other, _ in flat] for part in parts], dtype=float)
    found = milp(
        objective / max(np.abs(objective).max(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bounded[None] / unit, ub=bound / unit)],
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        least = sum(min(getattr(o, "flops" if loss is None else "loss") for o in c) for c in options.values())
        raise CalibrationError(
            f"No choice of sparsities keeps the {'FLOPs' if loss is None else 'loss'} within {bound:g}: the least "
            f"possible is {least:g}."
        )
    chosen = np.flatnonzero(found.x > 0.5)
    return {flat[number][0]: flat[number][1].sparsity for number in chosen}
