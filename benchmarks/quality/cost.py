"""Computes what a training costs relative to dense training of the same task and seed: by FLOPs and by measured time.

FLOPs are counted by `sparse_unsloth.costs.flops` for real tokens only (padding left out), with gradient checkpointing,
as Unsloth trains (before 2026-11-27 without it): frozen-weight matmuls, LoRA, attention core, logits of loss positions,
channel scores and calibration passes. Where only part of a LoRA branch is computed, or of an answer token,
nothing is deducted. Dense and sparse runs both skip unused rows (docs/how-it-works.md, section 5).

Time is that of the project's kernels: the sparse step's share of the dense step's time in ``speed.csv``, measured on
Llama-3-8B, never the time of this benchmark's masks. That of FP8 is computed, see `FP8_TIME`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.quality.batches import Counts
from benchmarks.quality.settings import Setting, StepPlan
from sparse_unsloth.bench.methods import LLAMA_3_8B, METHODS, flop_limit
from sparse_unsloth.bench.shapes import shape_of
from sparse_unsloth.bench.table import read_rows
from sparse_unsloth.config.layer_rules import expand
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, attention_pairs, step_flops
from sparse_unsloth.forecast.speed_table import usable_rows

BASELINES = ("unsloth-dense-exact", "unsloth-dense")
"""Of measured times; the first that the run has."""
MANY = 10_000
"""Rows, of which a share is a whole number."""
ROW_METHODS = {0.25: "rows-25", 0.1: "rows-10"}
"""Methods of speed.csv whose backward goes through this share of the context rows."""
SPARSE_METHODS = {0.5: "sparse-50", 0.75: "sparse-25"}
"""Methods of speed.csv that leave out this share of the MLP channels of every layer but the first."""

FP8_TIME = 0.72
"""The time of a step whose frozen-weight matmuls are in FP8, over that of a bf16 step: computed from the times of the
products (benchmarks/results/fp8), 8,192 tokens, nothing recomputed."""


def training_flops(
    shape: ModelShape, plans: Sequence[StepPlan], counts: Sequence[Counts], lora_rank: int, factor_rank: int
) -> list[int]:
    """Counts the FLOPs of each step of one seed.

    Args:
        plans, counts: of each step.
    """
    units: dict[StepPlan, tuple[int, int, int]] = {}
    totals = []
    for plan, count in zip(plans, counts, strict=True):
        if plan not in units:
            units[plan] = _plan_flops(shape, plan, lora_rank, factor_rank)
        dense, context, loss = units[plan]
        total = count.dense * dense + count.context * context + count.loss * loss
        totals.append(total + _head(shape, count.loss) + _core(shape, attention_pairs(count.lengths)))
    return totals


def _plan_flops(shape: ModelShape, plan: StepPlan, lora_rank: int, factor_rank: int) -> tuple[int, int, int]:
    """Counts the FLOPs of all layers for a dense row and a context row, and the additional ones of a loss position."""
    layers, inner = shape.num_layers, shape.intermediate_size
    found = []
    for layer in range(layers):
        row = _Row(
            shape=replace(shape, num_layers=1),
            mlp=1 - plan.keep[layer] / inner if plan.mode.kind == "forward" else 0.0,
            rows=plan.keep[layer] / inner if plan.mode.kind == "rows" else None,
            first=layer == 0,
            last=layer == layers - 1,
            lora_rank=lora_rank,
            factor_rank=factor_rank if plan.mode.contextual else 0,
        )
        found.append([_row_flops(row, role) for role in ("dense", "context", "loss")])
    return tuple(sum(column) for column in zip(*found, strict=True))


@dataclass(frozen=True)
class _Row:
    shape: ModelShape
    mlp: float
    rows: float | None
    first: bool
    last: bool
    lora_rank: int
    factor_rank: int


@cache
def _row_flops(row: _Row, role: str) -> int:
    """Counts one row of ``role`` ("dense", "context"), or what a loss position adds in the last layer ("loss")."""
    options = {
        "lora_rank": row.lora_rank,
        "seq_lengths": (),
        "head_tokens": 0,
        "input_requires_grad": not row.first,
        "checkpointing": True,
    }
    none = [(0.0, 0.0)]
    if row.last:
        # After keys and values only loss positions are computed, densely.
        if role == "loss":
            whole, rest = (
                step_flops(row.shape, none, TrainingStep(1, 0, last_layer_tokens=tokens, **options)).total
                for tokens in (1, 0)
            )
            return whole - rest
        rows = (0, 1) if role == "context" else (1, 0)
        return step_flops(row.shape, none, TrainingStep(*rows, last_layer_tokens=0, **options)).total
    if role == "loss":
        return 0
    if role == "dense":
        return step_flops(row.shape, none, TrainingStep(1, 0, **options)).total
    if row.rows is not None:
        return step_flops(row.shape, none, TrainingStep(0, MANY, backward_rows=row.rows, **options)).total // MANY
    return step_flops(row.shape, [(row.mlp, 0.0)], TrainingStep(0, 1, estimator_rank=row.factor_rank, **options)).total


def _head(shape: ModelShape, rows: int) -> int:
    return 2 * 2 * rows * shape.hidden_size * shape.vocab_size


def _core(shape: ModelShape, pairs: int) -> int:
    """Counts attention's products: two forward, two in the recompute, five backward, with any sparsity."""
    return shape.num_layers * (2 + 2 + 5) * 2 * pairs * shape.num_heads * shape.head_dim


def forward_flops(shape: ModelShape, counts: Iterable[Counts], lora_rank: int) -> int:
    """Counts the FLOPs of the dense forward over some batches, as a calibration pass runs it."""
    counts = list(counts)
    tokens = sum(count.dense + count.context for count in counts)
    lengths = [length for count in counts for length in count.lengths]
    dense = [(0.0, 0.0)] * shape.num_layers
    return step_flops(shape, dense, TrainingStep(tokens, 0, lengths, lora_rank, head_tokens=0)).forward.total


class StepTimes:
    """Predicts a sparse step's share of the dense step's time, from a table of measured steps.

    Rows of older code are left out (`usable_rows`), and steps without Unsloth's checkpointing. Where the method was
    measured (half, or a quarter, of the MLP channels; backward through chosen rows), its shares are interpolated over
    the context share. Below the least one that was measured, where less can be left out, the FLOP saving is scaled by
    the part of it that turned into time there. For every other setting that part, of all methods measured that leave
    out channels, is interpolated instead.
    """

    def __init__(self, path: Path):
        wanted = {"model": "llama8b", "dtype": "4bit", "checkpointing": "unsloth"}
        rows = [row for row in usable_rows(read_rows(path)) if row.items() >= wanted.items()]
        newest = {(row["device"], row["shape"], row["method"]): row["median_ms"] for row in rows}
        self._shares: dict[str, dict[float, list[float]]] = {}
        self._realised: dict[float, list[float]] = {}
        self._realised_of: dict[str, dict[float, list[float]]] = {}
        for (device, name, method), milliseconds in newest.items():
            baseline = next((base for base in BASELINES if (device, name, base) in newest), None)
            counted, shape = method.startswith(("sparse-", "rows-")) and method in METHODS, shape_of(name)
            if not (counted and baseline and shape.context_tokens) or name == "host":
                continue
            context, share = shape.context_tokens / shape.tokens, milliseconds / newest[device, name, baseline]
            limit = flop_limit(name, method, LLAMA_3_8B)
            saving = 1 - flop_limit(name, baseline, LLAMA_3_8B) / limit
            self._shares.setdefault(method, {}).setdefault(context, []).append(share)
            self._realised_of.setdefault(method, {}).setdefault(context, []).append((1 - share) / saving)
            if method.startswith("rows-"):
                continue
            saving = 1 - 1 / limit
            self._realised.setdefault(context, []).append((1 - share) / saving)
        if not self._realised:
            raise ValueError(f"{path} has no sparse step of llama8b in 4 bit beside its dense one; measure some first")

    def share(self, flops: float, context: float, method: str | None = None) -> float:
        """Returns the time share of a step with the share ``flops`` of the dense FLOPs, at a context share."""
        if method in self._shares:
            least = min(self._shares[method])
            if context >= least:
                return _interpolated(self._shares[method], context)
            return 1 - (1 - flops) * _interpolated(self._realised_of[method], least)
        return 1 - (1 - flops) * _interpolated(self._realised, context)

    def source(self, method: str | None) -> str:
        """Names the source of `share`."""
        return "measured" if method in self._shares else "scaled"


def _interpolated(points: Mapping[float, list[float]], at: float) -> float:
    places = sorted(points)
    return float(np.interp(at, places, [float(np.median(points[place])) for place in places]))


def measured_method(setting: Setting) -> str | None:
    """Returns the method of speed.csv whose sparse step is that of ``setting``; of rows, that with its mean share."""
    if setting.kind == "rows":
        left_out = expand(setting.mlp, [0.0] * 30)
        return ROW_METHODS.get(round(1 - sum(left_out) / len(left_out), 6))
    shares = set(setting.mlp.values())
    return SPARSE_METHODS.get(next(iter(shares))) if list(setting.mlp) == ["1-29"] else None


def costs(
    setting: Setting,
    flops: Sequence[int],
    dense_flops: Sequence[int],
    calibration: int,
    times: StepTimes,
    context: float,
) -> tuple[float, float]:
    """Returns ``(FLOPs, time)`` of a run over those of the dense run.

    Args:
        flops: of each step; ``dense_flops`` of each step of the whole dense run, which has the same batches.
        calibration: FLOPs of calibration passes.
        context: context share of the tokens.
    """
    method, total = measured_method(setting), sum(dense_flops)
    shares = Counter(round(own / dense, 4) for own, dense in zip(flops, dense_flops, strict=False))
    in_fp8 = {"bf16": 0.0, "fp8": 1.0, "fp8-context": context}[setting.precision]
    dense = 1 - in_fp8 * (1 - FP8_TIME)
    time = sum(
        number * (dense if share >= 0.9995 else times.share(share, context, method)) for share, number in shares.items()
    )
    return (sum(flops) + calibration) / total, time / len(dense_flops) + calibration / total
