"""Notices NaN and inf in the scores that channels are chosen by, without waiting for the GPU.

A choice from such scores is still defined (a NaN ranks below every number, equal scores in channel order), but it says
nothing about the batch. At the end of a forward one small tensor of flags starts on its way to the host; it is read
when the next forward has waited for the GPU anyway, for its rows. The parts concerned are dense in the next `PAUSE`
forwards, and every such event is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.channels.selector import AttentionSelection, MlpSelection

PAUSE = 10
"""Forwards in which a part with non-finite scores is dense."""
Part = tuple[int, str]


class ScoreWatch:
    """Of one attached model.

    Attributes:
        events: parts and forwards with non-finite scores so far; set it back as you like.
    """

    def __init__(self) -> None:
        self.events = 0
        self._left: dict[Part, int] = {}
        self._on_the_way: list[tuple[list[Part], Tensor, torch.cuda.Event | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What is on its way arrives here, and not in a copy."""
        return {**self.__dict__, "_on_the_way": []}

    def look(self, selections: Mapping[Part, MlpSelection | AttentionSelection]) -> None:
        """Sends off whether the scores of a forward's ``selections`` are finite; two or three launches a device."""
        scored: dict[torch.device, list[tuple[Part, Tensor]]] = {}
        for part, selection in selections.items():
            for scores in selection.scores:
                scored.setdefault(scores.device, []).append((part, scores))
        for device, pairs in scored.items():
            parts, scores = [part for part, _ in pairs], [scores for _, scores in pairs]
            sums = torch.stack(torch._foreach_norm(scores, 1))  # of magnitudes: finite only if all of them are
            if device.type != "cuda":
                self._on_the_way.append((parts, sums, None))
                continue
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            self._on_the_way.append((parts, host, arrived))

    def collect(self) -> set[Part]:
        """The parts whose scores were not finite in the forwards since the last call; they are dense from now on."""
        found: set[Part] = set()
        for parts, sums, arrived in self._on_the_way:
            if arrived is not None:
                arrived.synchronize()
            bad = {part for part, finite in zip(parts, sums.isfinite().tolist(), strict=True) if not finite}
            self.events += len(bad)
            found |= bad
        self._on_the_way.clear()
        self._left |= dict.fromkeys(found, PAUSE)
        return found

    def pause(self) -> frozenset[Part]:
        """The parts that are dense in the forward that begins."""
        dense = frozenset(self._left)
        self._left = {part: left - 1 for part, left in self._left.items() if left > 1}
        return dense
