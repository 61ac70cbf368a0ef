"""Compares runs: groups them by settings over seeds, and tests differences between groups.

Runs are grouped by their resolved recipes, so a group cannot mix settings. Where two groups share seeds, a metric's
differences are tested over seeds (paired t). Where they share one seed only, an evaluation's scores are tested over its
items: exactly for right and wrong (McNemar), by signed ranks for others. Seeds show how a result varies between
trainings; items only show how certain the scores of these two trainings are.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_unsloth.errors import SparsityError
from sparse_unsloth.reporting.paired_tests import compare_paired, holm

RECIPE_FILE, METRICS_FILE, RESULTS_FILE = "recipe.yaml", "metrics.json", "results.json"
NOT_A_SETTING = (
    "seed",
    "data_seed",
    "dataset_seed",
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "disable_tqdm",
)
ORDER = ("training loss", "held-out", "tokens/s", "dense step", "sparse step", "training seconds", "peak")
"""The first words of rows, in their order; scores come last."""
BETTER = {"lower": ("loss", "seconds", "GiB"), "higher": ("accuracy", "tokens/s", "pass@", " mean", " score")}
"""Whether more or less is better, by words in a metric's name."""


class CompareError(SparsityError):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        name: the folder's name.
        seed: of the training.
        settings: the recipe without the keys that differ between seeds.
        values: figures by metric.
        items: scores of single items by metric.
        losses: ``(step, training loss)`` as logged.
    """

    name: str
    seed: Any
    settings: str
    values: dict[str, float]
    items: dict[str, dict[str, float]]
    losses: list[tuple[int, float]]


@dataclass
class Group:
    """Runs of one recipe."""

    name: str
    runs: list[Run] = field(default_factory=list)

    def values(self, metric: str) -> dict[Any, float]:
        """By seed."""
        return {run.seed: run.values[metric] for run in self.runs if metric in run.values}


def read_run(folder: str | Path) -> Run:
    """Reads a run folder's figures.

    Raises:
        CompareError: the folder holds no finished run.
    """
    folder = Path(folder)
    missing = [name for name in (RECIPE_FILE, METRICS_FILE) if not (folder / name).is_file()]
    if missing:
        raise CompareError(f"{folder}: has no {' and no '.join(missing)}, so it holds no finished run.")
    recipe = _stored(folder / RECIPE_FILE, yaml.safe_load)
    metrics = _stored(folder / METRICS_FILE, json.loads, "log")
    settings = {key: value for key, value in recipe.items() if key not in NOT_A_SETTING}
    # Factors are in the run folder, unless the recipe names them.
    estimator = settings.get("sparsity", {}).get("estimator", {})
    if str(estimator.get("path") or "").startswith(str(recipe.get("output_dir"))):
        settings["sparsity"] = {**settings["sparsity"], "estimator": {**estimator, "path": None}}
    values = dict(_training_values(metrics))
    items = {}
    for path in sorted(folder.glob(f"evaluation/*/{RESULTS_FILE}")):
        results = _stored(path, json.loads, "suite", "scores", "items")
        for number, (name, value) in enumerate(results["scores"].items()):
            values[f"{results['suite']} {name}"] = value
            if number == 0 and results["items"]:
                items[f"{results['suite']} {name}"] = results["items"]
    losses = [(entry["step"], entry["loss"]) for entry in metrics["log"] if "loss" in entry]
    seed = recipe.get("seed", "default")
    return Run(folder.resolve().name, seed, json.dumps(settings, sort_keys=True), values, items, losses)


def _stored(path: Path, read: Callable[[str], Any], *needed: str) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        CompareError: the file cannot be read, or lacks required keys.
    """
    try:
        found = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise CompareError(f"{path}: is damaged: {' '.join(str(error).split())}. Train or evaluate again.") from error
    missing = [key for key in needed if key not in found] if isinstance(found, dict) else ["mapping"]
    if missing:
        raise CompareError(f"{path}: is damaged: it holds no {', '.join(missing)}. Train or evaluate again.")
    return found


def _training_values(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        yield "training loss, last tenth", statistics.fmean(last)
    for name, value in (metrics.get("evaluation") or {}).items():
        bookkeeping = name.endswith(("_runtime", "_per_second", "_num_tokens", "_time")) or name == "epoch"
        if not bookkeeping and isinstance(value, int | float):
            yield f"held-out {name.removeprefix('eval_').replace('_', ' ')}", value
    if metrics.get("tokens_per_second"):
        yield "tokens/s", metrics["tokens_per_second"]
    for kind, seconds in metrics["median_step_seconds"].items():
        if seconds is not None:
            yield f"{kind} step, median seconds", seconds
    yield "training seconds", metrics["train_seconds"]
    for name, label in (("gpu_allocated", "peak GPU memory, GiB"), ("host", "peak host memory, GiB")):
        if name in (metrics.get("memory") or {}):
            yield label, metrics["memory"][name] / 2**30


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs of equal settings, in the given order.

    Raises:
        CompareError: a folder or a seed occurs twice in a group.
    """
    groups: dict[str, Group] = {}
    for run in runs:
        group = groups.setdefault(run.settings, Group(run.name))
        twin = next((other for other in group.runs if other.seed == run.seed), None)
        if twin is not None:
            raise CompareError(f"{twin.name} and {run.name} are the same recipe with the same seed ({run.seed}).")
        group.runs.append(run)
    for group in groups.values():
        if len(group.runs) > 1:
            group.name = f"{_common_name([run.name for run in group.runs])} (n={len(group.runs)})"
    return list(groups.values())


def compare(groups: Sequence[Group]) -> dict[str, Any]:
    """Computes mean, spread and tests.

    Returns:
        ``{"groups": [names], "metrics": {metric: [{"mean", "spread", "n"} or None, ...]}, "tests": [...]}``. A test
        compares one metric between the first group and another: over seeds or items, the number of pairs, the mean
        difference (other minus first), ``p_value``, and ``p_holm``, corrected for all tests of the table.
    """
    metrics = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.values))
    metrics.sort(
        key=lambda name: next((place for place, text in enumerate(ORDER) if name.startswith(text)), len(ORDER))
    )
    table: dict[str, list[dict[str, Any] | None]] = {}
    tests: list[dict[str, Any]] = []
    for metric in metrics:
        table[metric] = [_summary(list(group.values(metric).values())) for group in groups]
        for other in groups[1:]:
            found = _test(groups[0], other, metric)
            if found is not None:
                tests.append({"metric": metric, "first": groups[0].name, "second": other.name, **found})
    for test, corrected in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = corrected
    return {"groups": [group.name for group in groups], "metrics": table, "tests": tests}


def _summary(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "n": len(values)}


def _test(first: Group, second: Group, metric: str) -> dict[str, Any] | None:
    ours, theirs = first.values(metric), second.values(metric)
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) > 1:
        outcome = compare_paired([theirs[seed] for seed in seeds], [ours[seed] for seed in seeds])
        return {"over": "seeds", "test": "t", "pairs": len(seeds), **_kept(outcome)}
    for seed in seeds:
        left, right = (
            next(run for run in group.runs if run.seed == seed).items.get(metric, {}) for group in (first, second)
        )
        shared = [name for name in left if name in right]
        if len(shared) > 1:
            return _test_items([right[name] for name in shared], [left[name] for name in shared])
    return None


def _test_items(second: list[float], first: list[float]) -> dict[str, Any]:
    found = {"over": "items", "pairs": len(first)}
    if {*first, *second} <= {0.0, 1.0}:
        from scipy.stats import binomtest

        gained = sum(a > b for a, b in zip(second, first, strict=True))
        lost = sum(a < b for a, b in zip(second, first, strict=True))
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        return {**found, "test": "McNemar", "mean_difference": (gained - lost) / len(first), "p_value": p_value}
    return {**found, "test": "wilcoxon", **_kept(compare_paired(second, first, "wilcoxon"))}


def _kept(outcome: Mapping[str, float]) -> dict[str, float]:
    return {name: outcome[name] for name in ("mean_difference", "p_value")}


def _common_name(names: list[str]) -> str:
    """Returns the common prefix of the folders' names, without the separators and digits of the seed."""
    shared = 0
    while all(len(name) > shared and name[shared] == names[0][shared] for name in names):
        shared += 1
    return names[0][:shared].rstrip("-_.0123456789 ") or names[0]


def rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the table's heading and rows as text."""
    body = []
    for metric, cells in comparison["metrics"].items():
        body.append([metric, *(_cell(cell) for cell in cells)])
    return ["", *comparison["groups"]], body


def test_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the tests, one per row."""
    heading = ["metric", "against the first", "difference", "pairs", "test", "p", "p, Holm"]
    body = [
        [
            test["metric"], test["second"], f"{test['mean_difference']:+.4g}", f"{test['pairs']} {test['over']}",
            test["test"], f"{test['p_value']:.3g}", f"{test['p_holm']:.3g}",
        ]
        for test in comparison["tests"]
    ]  # fmt: skip
    return heading, body


test_rows.__test__ = False  # no test of pytest's


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    spread = "" if cell["spread"] is None else f" ± {cell['spread']:.2g}"
    return f"{cell['mean']:.4g}{spread}"


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """Returns notes that explain the table."""
    over = {test["over"] for test in comparison["tests"]}
    found = ["± is the standard deviation over seeds; held-out figures and scores are of the dense forward."]
    if "seeds" not in over:
        found.append("No two groups share more than one seed: how much a figure varies between trainings is not known.")
    if "items" in over:
        found.append(
            "A test over items says how sure the score of these trainings is, not whether another seed agrees."
        )
    return found


def markdown(comparison: Mapping[str, Any]) -> str:
    """Returns the text of comparison.md: tables, notes and picture."""
    parts = ["# Comparison", _markdown_table(*rows(comparison))]
    if comparison["tests"]:
        parts.append(_markdown_table(*test_rows(comparison)))
    parts += ["\n".join(f"- {note}" for note in notes(comparison)), "![Loss and metrics](comparison.png)"]
    return "\n\n".join(parts) + "\n"


def _markdown_table(heading: list[str], body: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def draw(groups: Sequence[Group], comparison: Mapping[str, Any], path: Path) -> None:
    """Draws training losses, and for every metric a bar with its spread for each group."""
    from matplotlib.figure import Figure

    metrics = [name for name in comparison["metrics"] if "loss, last" not in name]
    columns = min(4, len(metrics) + 1)
    height = -(-(len(metrics) + 1) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    colours = [f"C{index % 10}" for index in range(len(groups))]
    for group, colour in zip(groups, colours, strict=True):
        for number, run in enumerate(group.runs):
            steps, losses = zip(*run.losses, strict=True) if run.losses else ((), ())
            axes[0].plot(steps, losses, color=colour, alpha=0.7, label=group.name if number == 0 else None)
    axes[0].set(title="training loss", xlabel="step")
    axes[0].legend(fontsize="x-small")
    for axis, metric in zip(axes[1:], metrics, strict=False):
        for index, (cell, colour) in enumerate(zip(comparison["metrics"][metric], colours, strict=True)):
            if cell is not None:
                axis.bar(index, cell["mean"], yerr=cell["spread"], color=colour, capsize=4)
        better = next((f"\n{side} is better" for side, found in BETTER.items() if any(w in metric for w in found)), "")
        axis.set_title(f"{metric}{better}", fontsize="small")
        axis.set_xticks([])
        axis.set_xlim(-0.6, len(groups) - 0.4)
    for axis in axes[len(metrics) + 1 :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
