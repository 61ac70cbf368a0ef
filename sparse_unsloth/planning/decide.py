"""Decides how a training runs, by the forecast of its steps: graphs, kept activations, merged micro-batches, rows.

Nothing here touches a model or a device. What was set by hand is taken as it is, and everything else is chosen; what
is approximate (rows) only where it gains enough, and channels never.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, NamedTuple

from sparse_unsloth.config.sparsity import BACKWARD_ROWS
from sparse_unsloth.planning.step_time import StepTime, graphs_host, larger
from sparse_unsloth.planning.work import MicroBatch, Plan, Work, batch_work

ROWS_GAIN = 1.1
"""Rows are chosen where they make a step this much faster. Steps by rows were worth 0.97 to 0.98 of exact ones on two
of three tasks (``benchmarks/results/quality.csv``), so less is no gain to rely on."""
GRAPHS_GAIN = 1.02
"""CUDA graphs are chosen where they make a step this much faster; less is within the forecast's own error."""
CAPTURE_MS = 15
"""Milliseconds that capturing a layer takes for one batch signature. Steps of a 1B (16 layers, two graphs each) took
0.1 to 0.3 s more where one was captured: 6 to 19 (end_to_end-notes.md). Three graphs, with checkpointing, take more."""
MERGE_GAIN = 1.02
"""Micro-batches are merged where that makes them this much faster, and no more of them than come so near to the best
number; less is within the forecast's own error."""
RUNS_BEFORE = 2
"""A batch signature runs so many times before it is captured (docs/how-it-works.md, section 9)."""
WRONG = 0.15
"""A plan is mended where a step takes so much more or less than predicted."""


class Speed(NamedTuple):
    """Fitted step times, with factors on its two sides where a measured step corrected them."""

    step_time: StepTime
    device: float = 1.0
    host: float = 1.0

    def sides(self, work: Work, graphs: bool) -> tuple[float, float]:
        """Milliseconds of one micro-batch on the host and on the device; the longer one decides."""
        host = graphs_host(work) if graphs else self.step_time.host(work)
        return self.host * host, self.device * self.step_time.device(work)


class Kept(NamedTuple):
    """What fits into the memory: layers that keep their activations, and bytes at the peak of the largest batch.

    ``captured``: the peak with CUDA graphs, whose pool holds what they keep.
    """

    layers: float
    peak: float
    captured: float = 0.0


class Forwards(NamedTuple):
    """The forwards that run some micro-batches, merged as far as they fit, and what of them fits into the memory.

    ``kept`` as in `Facts`.
    """

    batches: tuple[MicroBatch, ...]
    kept: Mapping[bool, Kept] | None = None


@dataclass(frozen=True)
class Facts:
    """What is known when training begins.

    Attributes:
        plan: the dense training without CUDA graphs; None where its costs are not known, for which ``unknown`` is why.
        batches: some micro-batches of the data; ``layout`` "padded" or another.
        speed: None where no comparable step was measured; then FLOPs decide.
        source: whose measured steps these are.
        removal: whether unused rows are skipped.
        no_graphs, no_rows: why the training cannot have them; "" where it can.
        checkpointed: how many layers are checkpointed.
        kept: what fits, of a dense and of a row-sparse training, by ``backward_rows < 1``; empty where no limit is
            known or none is to be used, and ``no_budget`` says why.
        budget: bytes that the training may use.
        micro_batches: how many the training has left; None where it is not known.
        merged: the forwards that run the same micro-batches, by how many of an optimiser step run as one at most.
        no_merging: why none are merged; "" where some can be.
        given: what was set by hand, by the names of `SparsityConfig`.
    """

    plan: Plan | None
    batches: tuple[MicroBatch, ...]
    layout: str = "padded"
    speed: Speed | None = None
    source: str = ""
    removal: bool = True
    no_graphs: str = ""
    no_rows: str = ""
    checkpointed: int = 0
    kept: Mapping[bool, Kept] | None = None
    budget: float = 0.0
    no_budget: str = ""
    micro_batches: int | None = None
    merged: Mapping[int, Forwards] = field(default_factory=dict)
    no_merging: str = "the micro-batches of an optimiser step are not known"
    given: Mapping[str, Any] = None
    unknown: str = ""

    @property
    def context_share(self) -> float:
        """Context tokens over all tokens that are not padding."""
        tokens = sum(batch.context + batch.dense for batch in self.batches)
        return sum(batch.context for batch in self.batches) / max(tokens, 1)

    def forwards(self, merged: int) -> Forwards:
        """The forwards with up to ``merged`` micro-batches in one."""
        return self.merged[merged] if merged > 1 else Forwards(self.batches, self.kept)


def pooled(every: Sequence[Facts]) -> Facts:
    """The facts of several processes that train together: all their data, and of what they can do the least.

    So each comes to the same plan, whatever it read, and however much of its memory is free.
    """
    first = every[0]
    if len(every) == 1:
        return first
    unknown = next((one for one in every if one.plan is None), None)
    if unknown is not None:
        return unknown

    def why(name: str) -> str:
        return next((reason for one in every if (reason := getattr(one, name))), "")

    def forwards(number: int) -> Forwards:
        of_all = [one.forwards(number) for one in every]
        known = [one.kept for one in of_all if one.kept]
        fits = len(known) == len(of_all)
        kept = {rows: _least([one[rows] for one in known]) for rows in (False, True)} if fits else None
        return Forwards(tuple(batch for one in of_all for batch in one.batches), kept)

    alone, no_merging = forwards(1), why("no_merging")
    numbers = [number for number in first.merged if all(number in one.merged for one in every)]
    if not (numbers or no_merging) and any(one.merged for one in every):
        no_merging = "not every process has room for two of them together"
    measured, slowest = all(one.speed for one in every), first
    if measured:
        slowest = max(every, key=lambda one: cost(replace(one, batches=alone.batches), 1.0, False, 0))
    return replace(
        first,
        batches=alone.batches,
        speed=slowest.speed if measured else None,
        source=slowest.source if measured else "",
        no_graphs=why("no_graphs"),
        no_rows=why("no_rows"),
        kept=alone.kept,
        budget=min(one.budget for one in every),
        merged={} if no_merging else {number: forwards(number) for number in numbers},
        no_merging=no_merging,
    )


def _least(kept: Sequence[Kept]) -> Kept:
    layers, peaks, captured = zip(*kept, strict=True)
    return Kept(min(layers), max(peaks), max(captured))


def _peak(kept: Kept, captured: bool) -> float:
    return kept.captured if captured else kept.peak


@dataclass(frozen=True)
class Decision:
    """A plan, with a reason and a predicted gain (1.0: none; None: not predicted) for each of its parts.

    Attributes:
        backward_rows, cuda_graphs: as in `SparsityConfig`.
        kept: how many layers keep their activations in an average forward.
        milliseconds: predicted for an average micro-batch; None where no comparable step was measured.
        peak: predicted bytes; None where no memory is known.
        merged: how many micro-batches of an optimiser step run as one at most.
    """

    facts: Facts
    backward_rows: float
    cuda_graphs: bool
    kept: float
    milliseconds: float | None
    peak: float | None
    reasons: Mapping[str, str]
    gains: Mapping[str, float | None]
    merged: int = 1

    @property
    def chosen(self) -> tuple[float, bool]:
        """What has to be attached: ``(backward_rows, cuda_graphs)``."""
        return self.backward_rows, self.cuda_graphs

    def merging_at_most(self, number: int) -> Decision:
        """The same plan where more than ``number`` micro-batches cannot run as one."""
        left = {most: forwards for most, forwards in self.facts.merged.items() if most <= number}
        why = "" if left else "two together ran out of memory, or had another loss; a line in the log says which"
        facts = replace(self.facts, merged=left, no_merging=self.facts.no_merging or why)
        merged = max((most for most in left if most <= self.merged), default=1)
        return replace(self, facts=facts, merged=merged, kept=_kept(facts, self.backward_rows, merged))


class _Way(NamedTuple):
    """How micro-batches may run, and what an average one costs so (`cost`)."""

    merged: int
    cuda_graphs: bool
    why: str
    cost: float


def decide(facts: Facts) -> Decision:
    """The plan for ``facts``."""
    if facts.plan is None:
        return _unplanned(facts)
    if facts.plan.precision == "fp8-context":
        facts = replace(facts, no_rows=facts.no_rows or "precision: fp8-context is for dense training")
    given = facts.given or {}
    shares = [given["backward_rows"]] if "backward_rows" in given else [1.0] + [BACKWARD_ROWS] * (not facts.no_rows)
    ways = {share: _ways(facts, share) for share in shares}
    rows_gain = _fastest(ways[shares[0]]).cost / _fastest(ways[shares[-1]]).cost
    share = shares[-1] if len(shares) == 1 or (facts.context_share and rows_gain >= ROWS_GAIN) else 1.0
    merged, captured, why_captured, chosen_cost = way = _fastest(ways[share])
    kept = _kept(facts, share, merged)
    in_memory = facts.forwards(merged).kept
    exact = cost(facts, 1.0, captured, _kept(facts, 1.0, merged), merged)
    gains = {
        "cuda_graphs": cost(facts, share, False, kept, merged) / chosen_cost if captured else None,
        "memory_budget": cost(facts, share, captured, 0, merged) / chosen_cost if kept else None,
        "merge_micro_batches": ways[share][0].cost / chosen_cost if merged > 1 and ways[share][0].merged == 1 else None,
        "backward_rows": exact / chosen_cost if share < 1 else None,
    }
    reasons = {
        "cuda_graphs": why_captured,
        "memory_budget": _why_kept(facts, kept),
        "merge_micro_batches": _why_merged(facts, ways[share], way),
        "backward_rows": _why_rows(facts, share, rows_gain),
    }
    return Decision(
        facts,
        share,
        captured,
        kept,
        chosen_cost if facts.speed else None,
        _peak(in_memory[share < 1], captured) if in_memory else None,
        reasons,
        gains,
        merged,
    )


def _ways(facts: Facts, share: float) -> list[_Way]:
    """For each number of micro-batches that may run as one, ascending, the better of graphs and none."""
    ways = []
    for merged in _numbers(facts):
        captured, why = _captures(facts, share, merged)
        ways.append(_Way(merged, captured, why, cost(facts, share, captured, _kept(facts, share, merged), merged)))
    return ways


def _fastest(ways: Sequence[_Way]) -> _Way:
    """The way with the fewest merged micro-batches of those that are as good as the best."""
    best = min(way.cost for way in ways)
    return next(way for way in ways if way.cost <= MERGE_GAIN * best)


def _numbers(facts: Facts) -> list[int]:
    """How many micro-batches of an optimiser step may run as one."""
    given = facts.given or {}
    if "merge_micro_batches" in given:
        return [max(facts.merged, default=1)]
    return [1, *sorted(facts.merged)]


def cost(facts: Facts, share: float, graphs: bool, kept: float, merged: int = 1) -> float:
    """Milliseconds of an average micro-batch of ``facts.batches``; 10^12 FLOPs where no step was measured."""
    works = _works(facts, share, graphs, kept, merged)
    if facts.speed is None:
        return sum(work.flops for work in works) / len(facts.batches) / 1e12
    return sum(larger(*facts.speed.sides(work, graphs)) for work in works) / len(facts.batches)


def mend(decision: Decision, ratio: float, captured: bool = True) -> Decision | None:
    """A plan by what was measured, which may be the same; None where the forecast was right.

    The side of the forecast that decided the step (host or device) is corrected, and all is decided anew; but a
    training that began exactly stays exact.

    Args:
        ratio: measured over predicted time of micro-batches.
        captured: whether forwards were replayed, as planned.
    """
    facts = decision.facts
    if decision.cuda_graphs and not captured:
        facts = replace(facts, no_graphs="hardly a forward replayed them (changing shapes, several forwards)")
    elif abs(ratio - 1) <= WRONG or facts.speed is None:
        return None
    else:
        facts = replace(facts, speed=_corrected(decision, ratio))
    after = decide(facts)
    if after.backward_rows < decision.backward_rows:
        gain = after.gains["backward_rows"]
        facts = replace(facts, no_rows=f"rows would give {gain:.2f}x by what was measured, but training began exactly")
        after = decide(facts)
    return after


def _corrected(decision: Decision, ratio: float) -> Speed:
    """The forecast, with the side that decided the step as long as was measured.

    Where replayed graphs take longer than predicted, it is the GPU: the host hardly works in a replay.
    """
    speed, graphs = decision.facts.speed, decision.cuda_graphs
    works = _works(decision.facts, decision.backward_rows, graphs, decision.kept, decision.merged)
    sides = [speed.sides(work, graphs) for work in works]
    host, device = map(sum, zip(*sides, strict=True))
    measured = ratio * sum(larger(*pair) for pair in sides)
    if host > device and not (graphs and ratio > 1):
        return speed._replace(host=speed.host * measured / host)
    return speed._replace(device=speed.device * measured / device)


def _works(facts: Facts, share: float, graphs: bool, kept: float, merged: int) -> list[Work]:
    """The work of each forward; ``kept`` layers of those that are checkpointed keep their activations."""
    plan = replace(facts.plan, backward_rows=share, captured=graphs)
    again = max(facts.checkpointed - kept, 0) / plan.shape.num_layers
    works = []
    for batch in facts.forwards(merged).batches:
        longer = batch.padded_to_bucket(facts.layout) if graphs else batch
        once, twice = (
            astuple(_work(replace(plan, checkpointing=flag), longer, facts.removal)) for flag in (False, True)
        )
        works.append(Work(*(round(a + again * (b - a)) for a, b in zip(once, twice, strict=True))))
    return works


_work = functools.lru_cache(maxsize=4096)(batch_work)  # counts every layer, and is asked for several times


def _kept(facts: Facts, share: float, merged: int) -> float:
    kept = facts.forwards(merged).kept
    return min(kept[share < 1].layers, facts.checkpointed) if kept else 0


def _captures(facts: Facts, share: float, merged: int) -> tuple[bool, str]:
    """Whether layers are captured in a training with ``share`` and ``merged`` micro-batches, and why."""
    given = facts.given or {}
    if "cuda_graphs" in given:
        return given["cuda_graphs"], "as you set it"
    if facts.no_graphs:
        return False, facts.no_graphs
    if facts.speed is None:
        return False, "no comparable step was measured, so their gain is not predicted"
    kept = _kept(facts, share, merged)
    without, with_graphs = (cost(facts, share, graphs, kept, merged) for graphs in (False, True))
    times = f"{without:.0f} ms without, {with_graphs:.0f} with"
    if without < GRAPHS_GAIN * with_graphs:
        return False, f"the GPU is the limit, not its host: {times}"
    if not _pays(facts, without - with_graphs, merged):
        return False, f"capturing would not pay within {facts.micro_batches} micro-batches ({times})"
    works = _works(facts, share, False, kept, merged)
    hosts, devices = zip(*(facts.speed.sides(work, False) for work in works), strict=True)
    bound = sum(hosts) > sum(devices)
    return True, f"{'launch-bound' if bound else 'fewer launches and whole layers'}: {times}"


def _pays(facts: Facts, milliseconds: float, merged: int) -> bool:
    """Whether saving so much in each captured micro-batch is more than capturing costs in the whole training."""
    if facts.micro_batches is None:
        return True
    forwards = facts.forwards(merged).batches
    together = len(facts.batches) / len(forwards)
    padded = [batch.padded_to_bucket(facts.layout) for batch in forwards]
    signatures = len({(batch.rows, batch.lengths if facts.layout == "padded" else 0) for batch in padded})
    replayed = facts.micro_batches / together - RUNS_BEFORE * signatures
    return replayed * milliseconds * together > signatures * CAPTURE_MS * facts.plan.shape.num_layers


def _why_merged(facts: Facts, ways: Sequence[_Way], way: _Way) -> str:
    if "merge_micro_batches" in (facts.given or {}):
        return "as you set it" + f", but {facts.no_merging}" * bool(facts.no_merging)
    if facts.no_merging:
        return facts.no_merging
    alone, *others = ways
    if way.merged > 1:
        return f"up to {way.merged} of a step fit in a forward: {alone.cost:.0f} ms one by one, {way.cost:.0f} merged"
    best = min(others, key=lambda one: one.cost)
    return f"merging up to {best.merged} of them would give {alone.cost / best.cost:.2f}x"


def _why_kept(facts: Facts, kept: float) -> str:
    if not facts.checkpointed:
        return "gradient checkpointing is off, as you set it"
    if not facts.kept:
        return facts.no_budget
    place = f"{facts.budget / 2**30:.1f} GiB ({_budget_is(facts)})"
    return f"they fit into {place}" if kept else f"no layer's fit into {place}"


def _budget_is(facts: Facts) -> str:
    return "memory_budget" if "memory_budget" in (facts.given or {}) else "90 % of what is free, and what is in use"


def _why_rows(facts: Facts, share: float, gain: float) -> str:
    context = f"context is {facts.context_share:.0%} of your tokens"
    if "backward_rows" in (facts.given or {}):
        return f"as you set it; {context}"
    if facts.no_rows:
        return facts.no_rows
    if not facts.context_share:
        return "no token is context, so training is exact"
    if share < 1:
        return f"{context}: exact forward, backward through {share:.0%} of it"
    return f"{context}: rows would give {gain:.2f}x, so training is exact"


def _unplanned(facts: Facts) -> Decision:
    """The plan for a training whose costs are not known: what was set by hand, and nothing else."""
    given = facts.given or {}
    why = f"nothing is predicted: {facts.unknown}"
    reasons = {
        "cuda_graphs": "as you set it" if "cuda_graphs" in given else why,
        "memory_budget": "as you set it" if "memory_budget" in given else why,
        "merge_micro_batches": "as you set it" if "merge_micro_batches" in given else why,
        "backward_rows": "as you set it" if "backward_rows" in given else f"training is exact, as {why}",
    }
    chosen = given.get("backward_rows", 1.0), given.get("cuda_graphs", False)
    return Decision(facts, *chosen, 0, None, None, reasons, dict.fromkeys(reasons))
