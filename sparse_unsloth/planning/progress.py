"""Compares the predicted time of a training's micro-batches with the measured one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.planning.decide import Decision, cost
from sparse_unsloth.planning.work import MicroBatch

WARM_UP, MEASURED = 12, 12
"""Micro-batches that are not measured (kernels are compiled, memory is reserved), and those that are."""
PATIENCE = 150
"""After so many micro-batches that hardly replayed a CUDA graph, graphs are given up."""


class Outcome(NamedTuple):
    """Milliseconds of a micro-batch, predicted (None: not) and measured, and whether it was captured as planned."""

    predicted: float | None
    measured: float
    captured: bool

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted if self.predicted else 1.0


def of_all(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """What every process acts on: the outcome of the slowest one; None until all have one.

    Gradients are averaged in every step, so the slowest one decides its time.
    """
    found = [one for one in outcomes if one is not None]
    if len(found) < len(outcomes):
        return None
    return max(found, key=lambda one: (not one.captured, one.ratio, one.measured))


class Watch:
    """Measures micro-batches, merged as they run, from the beginning of one's forward to that of the next one.

    With CUDA graphs those that replayed them count alone. Medians, so that evaluations, saving and captures between
    two of them do not count.
    """

    def __init__(self, decision: Decision):
        self._decision = decision
        self._seen = 0
        self._before: tuple[float, float | None] | None = None
        self._batch: MicroBatch | None = None
        self._pairs: list[tuple[float, float | None]] = []

    @property
    def measures(self) -> bool:
        """Whether the next call of `note` counts, so that the device has to be waited for."""
        return self._seen >= WARM_UP

    @property
    def compares(self) -> bool:
        """Whether several processes compare what they measured after the last `note`: after as many on each."""
        return self._seen > WARM_UP + MEASURED and (self._seen - WARM_UP) % MEASURED == 1

    def note(self, now: float, batch: MicroBatch | None, captured: bool) -> Outcome | None:
        """Notes that a forward begins.

        Args:
            now: seconds, by a clock that waited for the device.
            batch: its tokens; None while nothing is measured.
            captured: whether the forward before it was captured or replayed.

        Returns:
            What came out, as soon as enough were measured.
        """
        self._seen += 1
        graphs = self._decision.cuda_graphs
        if self._before is not None and (captured or not graphs):
            self._pairs.append(((now - self._before[0]) * 1000, self._before[1]))
        self._before = None if batch is None else (now, self._predict(self._marked(batch)))
        if len(self._pairs) >= MEASURED:
            return self._outcome(True)
        return self._outcome(False) if graphs and self._seen > WARM_UP + PATIENCE else None

    def _marked(self, batch: MicroBatch) -> MicroBatch:
        """``batch``, marked by the one before it (`mark_repeated`)."""
        layout, before = self._decision.facts.layout, self._batch
        self._batch = batch
        return replace(batch, repeated=before is not None and before.size(layout) == batch.size(layout))

    def _predict(self, batch: MicroBatch) -> float | None:
        facts = self._decision.facts
        if facts.speed is None or facts.plan is None:
            return None
        alone = replace(facts, batches=(batch,), merged={})
        return cost(alone, *self._decision.chosen, self._decision.kept)

    def _outcome(self, captured: bool) -> Outcome:
        measured = statistics.median([pair[0] for pair in self._pairs]) if self._pairs else 0.0
        predicted = [pair[1] for pair in self._pairs]
        if not predicted or None in predicted:
            return Outcome(None, measured, captured)
        ratio = statistics.median(pair[0] / pair[1] for pair in self._pairs)
        mean = statistics.fmean(predicted)
        return Outcome(mean, ratio * mean, captured)


@dataclass
class AutoPlan:
    """The plan of a model that was attached with preset `auto`.

    Attributes:
        asked: the configuration as it was given.
        attach_again: attaches the model of a ``SparsityState`` by another configuration.
        decision: of the present training; None: not decided. ``was_decided``: some training was.
        watch: measures it; None: nothing is to be measured any more.
        micro_batches: how many the training has; None where it is not known.
        own_loss: the trainer's class name, if it computes a loss of its own, else "".
    """

    asked: SparsityConfig
    attach_again: Callable[[Any, SparsityConfig], None]
    decision: Decision | None = None
    was_decided: bool = False
    watch: Watch | None = None
    micro_batches: int | None = None
    own_loss: str = ""

    @property
    def may_merge(self) -> bool:
        """Whether micro-batches of an optimiser step run as one, or may do so by a later plan."""
        return self.decision is not None and bool(self.decision.facts.merged)

    def merge_at_most(self, number: int) -> None:
        """Keeps the plan, with no more than ``number`` micro-batches in a forward from now on."""
        if self.decision is not None:
            self.decision = self.decision.merging_at_most(number)
            self.watch = self.watch and Watch(self.decision)
