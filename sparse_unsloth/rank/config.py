"""Defines `RankConfig`, the configuration of rank-sparse LoRA, checked on construction."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sparse_unsloth.errors import SparsityError


class RankError(SparsityError):
    """Rank-sparse LoRA cannot run as requested: wrong options, model or stored state."""


@dataclass(frozen=True)
class RankConfig:
    """How rank components are chosen.

    At each training forward a layer scores its components, ``(1 - importance_lambda) * c + importance_lambda * a``,
    and computes the best ``target_density`` of them. ``c`` is the contextual importance ``|x A_i| |B_i|`` over rows of
    the batch, ``a`` its moving average over the steps; both sum to one over the layer's components. The ``k`` chosen of
    ``r`` components are scaled by ``sqrt(r / k)``, as in a LoRA of rank ``k`` with rank-stabilised scaling. A step does
    not move the others, not even by momentum. (The published method has neither; benchmarks/results/rank measures
    both.)

    Raises:
        RankError: values of a wrong type or out of range, all of them together.
    """

    target_density: float = 0.08
    """Share of the components that a step computes, in (0, 1]; 1 is plain LoRA. From 16 on the count is rounded up to a
    multiple of 8, for matrix units."""
    importance_lambda: float = 1.0
    """Weight of the accumulated importance, in [0, 1]. At 1 training computes what evaluation does, and the choice
    changes slowly. At 0.15, as published, mostly the batch decides, and components are trained less together."""
    importance_decay: float = 0.95
    """Decay of the moving average per optimiser step, in [0, 1)."""
    warmup_steps: int = 20
    """Optimiser steps that compute every component, at least 1, because B and every importance begin at zero. A fifth
    of a short training was better than less."""
    prune_after: int = 100
    """Components that no forward chose in this many optimiser steps are pruned: set to zero for good. 0: none."""
    score_rows: int = 256
    """Rows of a batch, evenly spaced, from which the contextual importance is computed."""
    retain_ratio: float | None = None
    """For recipes: after training a pruned adapter of this share of the components is also written; in (0, 1]."""

    def __post_init__(self) -> None:
        problems = [
            *_outside("target_density", self.target_density, lambda x: 0 < x <= 1, "in (0, 1]"),
            *_outside("importance_lambda", self.importance_lambda, lambda x: 0 <= x <= 1, "in [0, 1]"),
            *_outside("importance_decay", self.importance_decay, lambda x: 0 <= x < 1, "in [0, 1)"),
        ]
        for name, least in (("warmup_steps", 1), ("prune_after", 0), ("score_rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} must be a whole number from {least} up, given {value!r}")
        if self.retain_ratio is not None:
            problems += _outside("retain_ratio", self.retain_ratio, lambda x: 0 < x <= 1, "in (0, 1]")
        if problems:
            raise RankError("rank: " + "; ".join(problems) + ".")

    @classmethod
    def from_any(cls, value: Mapping[str, Any] | RankConfig | None) -> RankConfig | None:
        """A configuration from a recipe's block; None stays None.

        Raises:
            RankError: not a mapping, unknown keys, or wrong values.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RankError(f"rank: must be a block of {', '.join(_names())}, given {value!r}.")
        unknown = [key for key in value if key not in _names()]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), _names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(_names())}."
            raise RankError(f"rank: {unknown[0]}: unknown key{hint}")
        return cls(**value)

    def kept(self, rank: int) -> int:
        """How many of ``rank`` components a step computes."""
        return count_of(self.target_density, rank)


def count_of(share: float, rank: int) -> int:
    """``share`` of ``rank`` components: at least one, from 16 on the next multiple of 8."""
    count = max(1, round(share * rank))
    return min(rank, -(-count // 8) * 8 if count >= 16 else count)


def _names() -> list[str]:
    return [entry.name for entry in fields(RankConfig)]


def _outside(name: str, value: Any, fits, words: str) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        return [f"{name} must be a number {words}, given {value!r}"]
    return []
