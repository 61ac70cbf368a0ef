"""Fits step times to the table of measured steps (``benchmarks/results/speed.csv``), stored for `planning.fits`.

Predictions are of the present code. Rows of ``rows-*`` with ``checkpointing`` False up to 2026-11-27 were measured with
code that stored the inputs of O and MLP alone and computed the chosen rows again: they took less memory and more FLOPs
than is predicted for them now.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from sparse_unsloth.bench.methods import LLAMA_3_8B, OURS, PLAIN, backend_of, sparsity_of, without_backend
from sparse_unsloth.bench.shapes import shape_of
from sparse_unsloth.bench.table import is_of_method
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import fused_logits, logit_bytes, peak_memory, plain_logits, sparse_layer_activations
from sparse_unsloth.planning.fits import STORED, Errors, Fitted
from sparse_unsloth.planning.step_time import fit, leave_one_out
from sparse_unsloth.planning.work import MicroBatch, Plan, Work, backward_rows_of, batch_work, logit_rows

MODELS = {"llama8b": LLAMA_3_8B}
"""Sizes of measured models, by the name of the checkpoint's folder."""
GRAPHED = tuple(method for method in OURS if method.endswith("-graphs"))
"""Methods with CUDA graphs, which a `Plan` does not describe, without their backend."""
FITTED = {"dense", *OURS} - {"nothing-dropped", *GRAPHED}
"""Methods that are fitted, without their backend; nothing-dropped is not used for training."""
SAME_CODE = datetime.timedelta(days=1)
"""Rows of our own methods that are older than the newest one by more than this were measured on older code."""
FEWEST = 4
"""The least number of rows for a fit, dense and sparse ones among them."""


def usable_rows(rows: Iterable[Mapping]) -> list[dict]:
    """Selects the newest row of each device, model, dtype, checkpointing, method and shape, without older code."""
    newest = _newest(row for row in rows if without_backend(row["method"]) in FITTED)
    ours = [_date(row) for row in newest if row["method"] not in PLAIN]
    limit = max(ours) - SAME_CODE if ours else None
    return [row for row in newest if row["method"] in PLAIN or _date(row) >= limit]


def _newest(rows: Iterable[Mapping]) -> list[dict]:
    """Selects the newest row of each device, model, dtype, checkpointing, method and shape; no other arms' rows."""
    names = ("device", "model", "dtype", "checkpointing", "method", "shape")
    by_name = {tuple(row[name] for name in names): dict(row) for row in sorted(filter(is_of_method, rows), key=_date)}
    return list(by_name.values())


def work_of_row(row: Mapping, model: ModelShape) -> Work:
    """Returns the work of the measured step."""
    plan, batch, removal = plan_of_row(row, model)
    return batch_work(plan, batch, removal)


def plan_of_row(row: Mapping, model: ModelShape) -> tuple[Plan, MicroBatch, bool]:
    """Returns the measured model and method, its batch, and whether unused rows were skipped."""
    shape, method = shape_of(row["shape"]), row["method"]
    sparsity = SparsityConfig.from_any(sparsity_of(method, model.num_layers))
    backend = backend_of(method)
    plan = Plan(
        model,
        tuple(tuple(layer) for layer in sparsity.layer_sparsity(model.num_layers)),
        backend,
        checkpointing=row["checkpointing"] != "False",
        estimator_rank=sparsity.estimator.rank,
        backward_rows=sparsity.backward_rows,
        captured=sparsity.cuda_graphs,
        precision=sparsity.precision,
        in_4bit=row["dtype"] == "4bit",
    )
    loss = shape.batch * shape.outputs
    lengths = (shape.length,) * shape.batch
    batch = MicroBatch(shape.tokens - shape.context_tokens, shape.context_tokens, 0, loss, lengths)
    return plan, batch, method not in PLAIN


def memory_of_row(row: Mapping, model: ModelShape) -> float:
    """Predicts the peak of the measured step in GiB by `peak_memory`, for a model without a tied head."""
    plan, batch, removal = plan_of_row(row, model)
    projections = model.projections().values()
    checkpointing = {"False": "off", "True": "on"}.get(row["checkpointing"], "unsloth")
    if checkpointing == "unsloth" and plan.backend == "peft":
        checkpointing = "on"
    unsloth = re.search(r"unsloth=(\S+)", row.get("versions") or "")
    each = logit_bytes(unsloth[1] if unsloth else None)

    head = logit_rows(plan, batch, removal)
    logits = fused_logits(model, head, each) if plan.backend == "unsloth" else plain_logits(model, head)
    return peak_memory(
        model,
        linear=model.num_layers * sum(inputs * outputs for inputs, outputs in projections),
        other=model.hidden_size * (2 * model.vocab_size + 2 * model.num_layers + 1),
        adapter=model.num_layers * plan.lora_rank * sum(inputs + outputs for inputs, outputs in projections),
        rows=batch.rows,
        checkpointing=checkpointing,
        in_4bit=row["dtype"] == "4bit",
        logits=logits,
        estimator_rank=plan.estimator_rank,
        sparse_parts=plan.sparse_parts,
        backward_rows=backward_rows_of(plan, batch) if plan.row_sparse else None,
        fp8=plan.precision != "bf16",
        recomputed=sparse_layer_activations(
            model, [mlp for mlp, _ in plan.layers], batch.rows, batch.dense, plan.lora_rank
        ),
        captured=[(batch.rows, logits)] if plan.captured else (),
    ).gib()["peak"]


def fit_table(rows: Iterable[Mapping], models: Mapping[str, ModelShape] | None = None) -> list[Fitted]:
    """Fits each device, backend and dtype that was measured dense and sparse.

    Args:
        rows: of the table, as `sparse_unsloth.bench.table.read_rows` returns them.
        models: sizes by the name of the model; `MODELS` by default. Rows of other models are ignored.
    """
    models = MODELS if models is None else models
    known = [row for row in rows if row["model"] in models]
    groups: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for row in usable_rows(known):
        groups[_group(row)].append(row)
    recorded: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for row in _newest(row for row in known if without_backend(row["method"]) in GRAPHED):
        recorded[_group(row)].append(row)
    fitted = []
    for (device, backend, dtype), group in sorted(groups.items()):
        if len(group) < FEWEST or len({row["method"] in PLAIN for row in group}) < 2:
            continue
        steps = [(work_of_row(row, models[row["model"]]), row["median_ms"]) for row in group]
        peaks = [memory_of_row(row, models[row["model"]]) for row in group]
        step_time = fit(steps)
        others = [
            abs(step_time.with_graphs(work_of_row(row, models[row["model"]])) / row["median_ms"] - 1)
            for row in recorded[device, backend, dtype]
        ]
        fitted.append(
            Fitted(
                device,
                backend,
                dtype,
                step_time=step_time,
                errors=replace(
                    _errors(group, leave_one_out(steps), peaks),
                    recorded_median=_rounded(statistics.median(others)) if others else None,
                    recorded_worst=_rounded(max(others)) if others else None,
                ),
                rows=len(group),
                newest=max(row["date"] for row in group),
                commits=tuple(sorted({row["commit"] for row in group})),
                smallest=float(min(work.flops for work, _ in steps)),
                largest=float(max(work.flops for work, _ in steps)),
            )
        )
    return fitted


def _group(row: Mapping) -> tuple[str, str, str]:
    return row["device"], backend_of(row["method"]), row["dtype"]


def save(fitted: list[Fitted], path: Path = STORED) -> None:
    """Writes the fits to the file that `load` reads."""
    path.write_text(json.dumps([asdict(one) for one in fitted], indent=2) + "\n", encoding="utf-8")


def _errors(group: list[dict], predicted: list[float], peaks: list[float]) -> Errors:
    memory = [abs(ours / row["peak_gib"] - 1) for row, ours in zip(group, peaks, strict=True)]
    steps = [abs(ours / row["median_ms"] - 1) for row, ours in zip(group, predicted, strict=True)]
    names = ("model", "checkpointing", "shape")
    dense = {
        tuple(row[name] for name in names): (row["median_ms"], ours)
        for row, ours in zip(group, predicted, strict=True)
        if row["method"] in PLAIN
    }
    speedups = []
    for row, ours in zip(group, predicted, strict=True):
        base = dense.get(tuple(row[name] for name in names))
        if base is not None and row["method"] not in PLAIN:
            speedups.append(abs(base[1] / ours / (base[0] / row["median_ms"]) - 1))
    return Errors(
        _rounded(statistics.median(steps)),
        _rounded(max(steps)),
        _rounded(statistics.median(speedups)) if speedups else None,
        _rounded(max(speedups)) if speedups else None,
        _rounded(statistics.median(memory)),
        _rounded(max(memory)),
    )


def _rounded(error: float) -> float:
    return math.ceil(error * 1000) / 1000


def _date(row: Mapping) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["date"])
