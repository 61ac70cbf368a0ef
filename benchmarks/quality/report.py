"""Makes the benchmark's table and picture from its CSV file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.settings import CONTROLS, DENSE_SHARES, SETTINGS
from benchmarks.quality.table import SMOLLM2, Row, curve_of, dense_curves, holm, paired, with_equivalents
from benchmarks.quality.tasks import TASKS, task_of
from sparse_unsloth.reporting.figures import new_figure, save_figure

INTRODUCTION = """# Quality at equal cost

LoRA r = 16 on all projections, of the instruction-tuned model that a heading names; every setting with the same data,
order and initialisation of each seed. Gemma 3 has 32,768 of its 262,144 tokens here (`benchmarks/quality/gemma3.py`),
which lowers its losses by 0.01 to 0.2 before training. Costs are shares of the dense run's: FLOPs of all products with
gradient checkpointing (LoRA, attention, logits, channel scores and calibration included; both sides leave out work
without effect), and time as the project's kernels take it on Llama-3-8B (`speed.csv`; scaled by the FLOPs that a
setting saves where it was not measured itself), never that of the masks used here.

*equal cost*: answer loss minus that of a dense run of the same FLOPs (*time*: of the same time), on the dense curve of
the same seed; negative is better than stopping earlier. Mean, 95 % interval over seeds (paired t), and p, corrected for
all settings of the task (Holm). *dense steps*: the share of dense steps that gives the same loss, "-" below 30 %.
*sparse forward*: answer loss when prompts are computed as they were in training. Made by
`python -m benchmarks.quality report`; what the settings are: `benchmarks/quality/settings.py`. `cut` and `comp-*` are
of code that was deleted, see `quality-notes.md`.

![Answer loss against cost](quality.png)
"""
HEADING = (
    "setting", "seeds", "FLOPs", "time", "answer loss", "sparse forward", "token accuracy", "exact match",
    "dense steps", "equal cost, FLOPs", "p", "equal cost, time", "p", "against dense",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Formats the report, a table for each model and task."""
    rows = with_equivalents(rows)
    lines = [INTRODUCTION]
    for (model, task), mine in _studies(rows).items():
        title = TASKS[task_of(task)].title if task_of(task) in TASKS else ""
        lines += [f"## {model}, {task}: {title}", "", _plateau(mine), ""]
        lines += [f"| {' | '.join(HEADING)} |", f"| --- |{' ---: |' * (len(HEADING) - 1)}"]
        lines += [f"| {' | '.join(cells)} |" for cells in _table(mine)]
        first = mine[0]
        lines += ["", f"{first['device']}, {min(row['date'] for row in mine)}, commit {first['commit']}.", ""]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws answer loss over both costs for each model and task, with the curve of the dense trainings.

    Models and tasks of which dense was trained alone are left out.
    """
    studies = [one for one in _studies(rows).items() if set(_names(one[1])) - set(DENSE_SHARES)]
    figure, axes = new_figure(4, math.ceil(len(studies) / 2), share_y=False)
    figure.set_size_inches(24, 4.5 * math.ceil(len(studies) / 2))
    for place, axis in enumerate(axes):
        if place // 2 == len(studies):
            axis.set_axis_off()
            continue
        ((model, task), mine), cost = studies[place // 2], ("cost_flops", "cost_time")[place % 2]
        curve = sorted(_mean(mine, name, cost) for name in DENSE_SHARES if _of(mine, name))
        axis.plot(*zip(*curve, strict=True), color="black", marker="o", label="dense, fewer steps", zorder=3)
        limit = 3 * max(loss for _, loss in curve)
        for name in _names(mine):
            if name in DENSE_SHARES:
                continue
            at, loss = _mean(mine, name, cost)
            shown = min(loss, limit)
            spread = statistics.stdev(row["answer_nll"] for row in _of(mine, name)) if len(_of(mine, name)) > 1 else 0
            colour = "tab:red" if name in CONTROLS else "tab:blue"
            axis.errorbar(
                at, shown, yerr=0 if loss > limit else spread, color=colour, marker="^" if loss > limit else "s"
            )
            axis.annotate(name, (at, shown), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set_yscale("log")
        axis.set(xlabel=f"{cost.replace('cost_', 'cost in ')} (1: dense)", ylabel="answer loss, nats")
        axis.set_title(f"{model}, {task}")
        axis.legend(fontsize="x-small")
    save_figure(figure, path)


def _studies(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows by model and task, the longest studied model first."""
    keys = sorted({(row["model"], row["task"]) for row in rows}, key=lambda key: (key[0] != SMOLLM2, key))
    return {key: [row for row in rows if (row["model"], row["task"]) == key] for key in keys}


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    curves, names = dense_curves(rows), _names(rows)
    tests: dict[str, dict[str, tuple[float, float, float]]] = {"cost_flops": {}, "cost_time": {}}
    for cost, found in tests.items():
        for name in names:
            own = [row for row in _of(rows, name) if curve_of(row) in curves]
            if name not in DENSE_SHARES:
                found[name] = paired([row["answer_nll"] - curves[curve_of(row)].loss(row[cost]) for row in own])
    corrected = {
        cost: dict(zip(found, holm([p for _, _, p in found.values()]), strict=True)) for cost, found in tests.items()
    }
    dense = {row["seed"]: row for row in _of(rows, "dense")}
    table = []
    for name in names:
        own = _of(rows, name)
        against = [row["answer_nll"] - dense[row["seed"]]["answer_nll"] for row in own if row["seed"] in dense]
        compared = []
        for cost in tests:
            if name in DENSE_SHARES:
                compared += ["", ""]
            else:
                mean, width, _ = tests[cost][name]
                compared += [_with_error(mean, width), _p(corrected[cost][name])]
        equivalents = [row["equivalent_dense_steps"] for row in own]
        table.append(
            (
                name,
                str(len(own)),
                *(f"{_average(own, cost):.2f}" for cost in ("cost_flops", "cost_time")),
                _with_spread(own, "answer_nll", 3),
                f"{_average(own, 'answer_nll_sparse_forward'):.3f}",
                f"{_average(own, 'token_accuracy'):.3f}",
                _with_spread(own, "exact_match", 3),
                "-" if any(math.isnan(value) for value in equivalents) else f"{statistics.fmean(equivalents):.2f}",
                *compared,
                "" if name == "dense" else _with_error(*paired(against)[:2]),
            )
        )
    return table


def _plateau(rows: Sequence[Row]) -> str:
    if not (_of(rows, "dense") and _of(rows, "dense-75")):
        return "The dense trainings are not complete."
    long, short = (_average(_of(rows, name), "answer_nll") for name in ("dense", "dense-75"))
    return f"Dense with 75 % of the steps: answer loss {short / long - 1:+.1%} against dense ({short:.3f}, {long:.3f})."


def _names(rows: Sequence[Row]) -> list[str]:
    present = {row["config"] for row in rows}
    return [name for name in SETTINGS if name in present] + sorted(present - set(SETTINGS))


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["config"] == name]


def _average(rows: Sequence[Row], column: str) -> float:
    return statistics.fmean(row[column] for row in rows)


def _mean(rows: Sequence[Row], name: str, cost: str) -> tuple[float, float]:
    own = _of(rows, name)
    return _average(own, cost), _average(own, "answer_nll")


def _with_spread(rows: Sequence[Row], column: str, digits: int) -> str:
    values = [row[column] for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _with_error(mean: float, width: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:+.3f} ± {width:.3f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else ("<0.001" if value < 0.001 else f"{value:.3f}")
