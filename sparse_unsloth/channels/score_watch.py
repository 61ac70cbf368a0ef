"""Notices NaN and inf in channel scores without waiting for the GPU, and pauses the sparsity of those parts.

A part with such scores is dense in the next `PAUSE` forwards (docs/how-it-works.md, section 4.7). At the end of a
forward one small tensor of sums is copied to the host asynchronously. It is read in the next forward, after that has
waited for the GPU anyway to count its roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection

PAUSE = 10
"""How many forwards a part with non-finite scores is dense."""
Part = tuple[int, str]


class ScoreWatch:
    """Watches the scores of one attached model.

    Attributes:
        events: how often a part had non-finite scores since the caller last set this to 0.
    """

    def __init__(self) -> None:
        self.events = 0
        self._left: dict[Part, int] = {}
        self._in_flight: list[tuple[list[Part], Tensor, torch.cuda.Event | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without sums that are still being copied to the host."""
        return {**self.__dict__, "_in_flight": []}

    def look(self, selections: Mapping[Part, MlpSelection | AttentionSelection]) -> None:
        """Starts the check that the scores of ``selections`` are finite; at most three launches per device."""
        scored: dict[torch.device, list[tuple[Part, Tensor]]] = {}
        for part, selection in selections.items():
            for scores in selection.scores:
                scored.setdefault(scores.device, []).append((part, scores))
        for device, pairs in scored.items():
            parts, scores = [part for part, _ in pairs], [scores for _, scores in pairs]
            sums = torch.stack(torch._foreach_norm(scores, 1))  # of magnitudes: finite only if all of them are
            if device.type != "cuda":
                self._in_flight.append((parts, sums, None))
                continue
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            self._in_flight.append((parts, host, arrived))

    def collect(self) -> set[Part]:
        """The parts whose scores were not finite since the last call; they are paused from now on."""
        found: set[Part] = set()
        for parts, sums, arrived in self._in_flight:
            if arrived is not None:
                arrived.synchronize()
            bad = {part for part, finite in zip(parts, sums.isfinite().tolist(), strict=True) if not finite}
            self.events += len(bad)
            found |= bad
        self._in_flight.clear()
        self._left |= dict.fromkeys(found, PAUSE)
        return found

    def pause(self) -> frozenset[Part]:
        """The parts that are paused in the forward that begins."""
        dense = frozenset(self._left)
        self._left = {part: left - 1 for part, left in self._left.items() if left > 1}
        return dense
