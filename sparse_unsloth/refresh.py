"""Channels that a layer keeps for several optimiser steps (`SparsityConfig.refresh_steps`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_unsloth.config import OUTPUT

if TYPE_CHECKING:
    from sparse_unsloth.selection import AttentionSelection, MlpSelection


@dataclass(frozen=True)
class Kept:
    """A choice, the step of it, and the sparsity that it was made for.

    What depends on nothing but the channels, such as gathered weights, would live as long as this.
    """

    selection: MlpSelection | AttentionSelection
    step: int
    sparsity: float


class KeptSelections:
    """The last choice of each part of each layer, valid for ``steps`` optimiser steps. Outside the module tree.

    Micro-batches of those steps share it; a forward that needs another number of channels (a ramp) chooses anew.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self._kept: dict[tuple[int, str], Kept] = {}

    def find(self, key: tuple[int, str], step: int | None, sparsity: float) -> MlpSelection | AttentionSelection | None:
        """The choice that still holds in ``step``; None where the layer must choose, or nothing counts steps."""
        kept = self._kept.get(key)
        if kept is None or step is None or kept.sparsity != sparsity or not 0 <= step - kept.step < self.steps:
            return None
        return kept.selection

    def put(
        self, key: tuple[int, str], step: int | None, sparsity: float, selection: MlpSelection | AttentionSelection
    ) -> None:
        if step is not None and self.steps > 1:
            self._kept[key] = Kept(selection, step, sparsity)

    def drop(self, parts: Iterable[tuple[int, str]]) -> None:
        """Forgets the choices of ``parts``, for both kinds of tokens."""
        for index, part in parts:
            for name in (part, OUTPUT + part):
                self._kept.pop((index, name), None)

    def clear(self) -> None:
        self._kept.clear()
