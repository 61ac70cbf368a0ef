"""Writes the page of `benchmarks.preferences`: each arm's figures, and its differences from dense, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.table import paired

INTRODUCTION = """# Trainers with a loss of their own, and losses that read one row

SmolLM2-135M after a short supervised training; LoRA r = 16; each arm with the same items, order and initialisation of
each seed. Held-out items are the same for all. *FLOPs*: share of dense training's, with gradient checkpointing, DPO's
reference and GRPO's generation counted as a forward each. Differences are paired by seed: mean and 95 % interval.
*equal cost* is dense training with fewer steps. Made by `python -m benchmarks.preferences`; what was expected, and what
follows: `preferences-notes.md`.
"""


@dataclass(frozen=True)
class Measures:
    """What the columns ``score`` and ``second`` of a task hold, and whether ``loss`` holds anything."""

    title: str
    score: str
    second: str
    loss: bool


def markdown(rows: Sequence[dict[str, str]], tasks: Mapping[str, Measures], arms: Sequence[str]) -> str:
    """The page of results.

    Args:
        rows: of preferences.csv.
        tasks: what was measured of each.
    """
    lines = [INTRODUCTION]
    for task, own in tasks.items():
        mine = [row for row in rows if row["task"] == task]
        if mine:
            lines += [f"## {own.title}", "", *table(mine, own, arms), ""]
    sources = sorted({f"{row['device']}, commit {row['commit']}" for row in rows})
    return "\n".join([*lines, *sources, ""])


def table(rows: Sequence[dict[str, str]], task: Measures, arms: Sequence[str]) -> list[str]:
    """The lines of a task: each arm's means, and its differences from dense seed by seed."""
    measures = {task.score: "score"} | ({"loss": "loss"} if task.loss else {})
    measures |= {task.second: "second"} if task.second else {}
    heading = ["arm", "seeds", "steps", "FLOPs", *measures]
    heading += [f"{name} - {other}" for name in list(measures)[:2] for other in ("dense", "equal cost")]
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    for arm in ("untrained", *arms):
        own = {row["seed"]: row for row in rows if row["arm"] == arm}
        if not own:
            continue
        any_row = next(iter(own.values()))
        cells = [arm, str(len(own)), any_row["steps"], f"{float(any_row['cost_flops']):.2f}"]
        cells += [spread([float(row[column]) for row in own.values()]) for column in measures.values()]
        for column in list(measures.values())[:2]:
            cells += [difference(own, rows, arm, other, column) for other in ("dense", "dense-equal-cost")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.3f}"


def difference(own: dict[str, Any], rows: Sequence[dict[str, str]], arm: str, other: str, column: str) -> str:
    """The mean difference from ``other`` over the seeds that both have, with its 95 % interval."""
    if arm in (other, "untrained", "dense"):
        return ""
    theirs = {row["seed"]: row for row in rows if row["arm"] == other}
    mean, width, _ = paired([float(own[seed][column]) - float(theirs[seed][column]) for seed in own if seed in theirs])
    return "-" if math.isnan(mean) else f"{mean:+.3f} ± {width:.3f}"
