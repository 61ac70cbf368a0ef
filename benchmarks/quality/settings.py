"""Defines the compared settings, and what each of their steps leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.quality.network import DENSE, Mode
from sparse_unsloth.config.layer_rules import expand, keep_count
from sparse_unsloth.config.schedule import Schedule

SELECTORS = ("prior", "random")


class StepPlan(NamedTuple):
    """A step: the masks that it reads, and the number of MLP channels that context rows keep in each layer."""

    mode: Mode
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """One setting of a comparison.

    Attributes:
        steps: share of the dense run's optimiser steps, with a full learning rate schedule.
        mlp: layer rules, the share of MLP channels left out on context rows; of the kind "rows", the share of context
            rows left out of the backward pass.
        selector: one of `SELECTORS`: "prior", the kind of estimator, or "random" anew at every step.
        kind: see `Mode`.
        start, end: see `Schedule`.
        falling: ``mlp`` is of a mean: rows fall evenly from twice their share in layer 0 to none in the last.
        precision: see `SparsityConfig.precision`.
    """

    steps: float = 1.0
    mlp: Mapping[str, float] = field(default_factory=dict)
    selector: str = "prior"
    kind: str = "forward"
    start: float = 0.05
    end: float = 0.75
    falling: bool = False
    precision: str = "bf16"

    def __post_init__(self):
        if self.selector not in SELECTORS:
            raise ValueError(f"selector {self.selector!r}: not a setting")

    @property
    def calibrated(self) -> bool:
        """Whether its channels are selected by the calibrated estimator."""
        return self.mode.kind == "forward" and self.selector != "random"

    @property
    def mode(self) -> Mode:
        """The mode of a sparse step."""
        if not self.mlp:
            return Mode(precision=self.precision)
        random = self.selector == "random"
        row_sparse = self.kind == "rows"
        return Mode(kind=self.kind, contextual=not (row_sparse or random), random_rows=row_sparse and random)

    def keep(self, layers: int, inner: int) -> tuple[int, ...]:
        """Returns the number of MLP channels that each layer keeps on context rows."""
        left_out = expand(self.mlp, [0.0] * layers)
        if self.falling:
            left_out = [1 - 2 * (1 - share) * (1 - at / (layers - 1)) for at, share in enumerate(left_out)]
        return tuple(keep_count(inner, share) for share in left_out)

    def plan(self, steps: int, layers: int, inner: int) -> list[StepPlan]:
        """Returns the plan of every step of a training of ``steps`` steps; the same for all seeds."""
        schedule, full = Schedule(self.start, self.end), StepPlan(self.mode, self.keep(layers, inner))
        dense = StepPlan(DENSE, (inner,) * layers)
        sparse = schedule.sparse_steps(steps) if self.mode != DENSE else ()
        return [full if step in sparse else dense for step in range(steps)]


def half(share: float, **changes) -> Setting:
    """Makes a setting that leaves out ``share`` of the MLP channels of every layer but the first."""
    return Setting(mlp={"1-29": share}, **changes)


def rows(share: float, **changes) -> Setting:
    """Makes a setting with an exact forward and a backward pass through ``share`` of the context rows."""
    return Setting(mlp={"0-29": 1 - share}, kind="rows", start=0.0, end=1.0, **changes)


def fp8(precision: str) -> Setting:
    """Makes a dense setting whose products with frozen weights are of ``precision``."""
    return Setting(precision=precision, start=0.0, end=1.0)


DENSE_SHARES = {"dense": 1.0, "dense-75": 0.75, "dense-65": 0.65, "dense-50": 0.5, "dense-30": 0.3}

SETTINGS: dict[str, Setting] = {
    **{name: Setting(steps=share) for name, share in DENSE_SHARES.items()},
    "channels-50": half(0.5),
    "random": half(0.5, selector="random"),
    # Gradients of context rows are uneven: a few rows hold most of the norm.
    "default": rows(0.25),
    "default-75": rows(0.25, steps=0.75),
    "default-50": rows(0.25, steps=0.5),
    "rows-10": rows(0.1),
    "rows-10-75": rows(0.1, steps=0.75),
    "rows-10-50": rows(0.1, steps=0.5),
    "random-rows-25": rows(0.25, selector="random"),
    "random-rows-25-50": rows(0.25, steps=0.5, selector="random"),
    # Lower layers need more rows for the same energy of the gradient, see quality-notes.md.
    "falling-25": rows(0.25, falling=True),
    "falling-10": rows(0.1, falling=True),
    "fp8": fp8("fp8"),
    "fp8-context": fp8("fp8-context"),
}
"""In the order of their importance on task A."""

SHORT = (
    *DENSE_SHARES, "default", "falling-25", "default-50", "rows-10", "random-rows-25-50", "default-75", "rows-10-50",
    "channels-50", "random",
)  # fmt: skip
"""What tasks B and C compare."""
CONTROLS = ("random", "random-rows-25", "random-rows-25-50")
