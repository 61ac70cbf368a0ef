"""Formats an estimate as text and as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from sparse_unsloth.costs.memory import ASSUMPTIONS
from sparse_unsloth.forecast.advice import advice
from sparse_unsloth.forecast.result import Estimate, Step

WIDTH = 110


def report(estimate: Estimate) -> str:
    """Returns the text, one block for each question."""
    blocks = (_what, _tokens, _steps, _memory, _advice)
    return "\n\n".join("\n".join(block(estimate)) for block in blocks)


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """Returns plain data, with the advice."""
    tokens = estimate.tokens
    of_tokens = asdict(tokens) | {
        "context_share": tokens.context_share,
        "shares_of_rows": {role: tokens.share(role) for role in ("context", "dense", "padding")},
        "rows_per_micro_batch": tokens.rows,
    }
    ratios = ("flops_ratio", "speedup", "whole_speedup", "free_speedup", "graphs_speedup")
    return (
        asdict(estimate)
        | {"tokens": of_tokens, "memory": estimate.memory.gib()}
        | {name: getattr(estimate, name) for name in ratios}
        | {"advice": advice(estimate)}
    )


def _what(estimate: Estimate) -> Iterator[str]:
    yield f"{estimate.model.name} on {estimate.dataset}, backend {estimate.backend} ({estimate.backend_reason})"
    accumulation = f" x {estimate.accumulation}" if estimate.accumulation > 1 else ""
    yield (
        f"{estimate.sequences}{accumulation} samples a step and GPU, {estimate.tokens.layout}; "
        f"{estimate.optimiser_steps} optimiser steps"
    )
    if estimate.precision != "bf16":
        yield f"precision: {estimate.precision}, of products with frozen weights"
    if estimate.row_sparse:
        yield f"exact forward; backward through {estimate.backward_rows:.3g} of the context rows"


def _tokens(estimate: Estimate) -> Iterator[str]:
    tokens = estimate.tokens
    of_all = "all" if tokens.samples == tokens.dataset_samples else f"of {tokens.dataset_samples}"
    yield f"Tokens ({tokens.samples} samples, {of_all})"
    yield f"  context share       {tokens.context_share:8.1%}"
    for name, spread in (("a sample", tokens.length), ("its answer", tokens.output)):
        yield (
            f"  tokens of {name:10} {spread.mean:7.0f} on average; 10 % below {spread.p10:.0f}, half below "
            f"{spread.p50:.0f}, 90 % below {spread.p90:.0f}, 99 % below {spread.p99:.0f}, at most {spread.max}"
        )
    shares = ", ".join(
        f"{name} {tokens.share(role):.1%}"
        for role, name in (("context", "context"), ("dense", "loss tokens"), ("padding", "padding"))
    )
    yield f"  rows of a micro-batch {tokens.rows:6.0f} on average: {shares}"


def _steps(estimate: Estimate) -> Iterator[str]:
    yield "One optimiser step"
    yield f"  {'':32} {'10^12 FLOPs':>12} {'ms':>9} {'times dense':>12}"
    lines = {
        "dense": estimate.dense,
        "dense, unused rows skipped": estimate.dense_exact,
        "dense, products in FP8": estimate.fp8,
        "sparse": estimate.sparse,
        "sparse, unused rows skipped": estimate.sparse_exact,
        f"{'sparse' if estimate.sparse else 'dense'}, with cuda_graphs": estimate.recorded,
    }
    for name, step in lines.items():
        if step is not None:
            yield f"  {name:32} {step.flops / 1e12:12.2f} {_milliseconds(step)} {_times(estimate.dense, step)}"
    if estimate.fitted is None:
        yield "  No steps of this backend were measured: `times dense` is of FLOPs, the limit of the speed-up."
        return
    fitted, errors = estimate.fitted, estimate.fitted.errors
    yield (
        f"  Predicted for {fitted.device}, {fitted.dtype}, from {fitted.rows} measured steps of Llama-3-8B sizes "
        f"({fitted.newest[:10]}). On steps that the"
    )
    yield (
        f"  fit did not see the error is {errors.step_median:.0%} in time, at worst {errors.step_worst:.0%}"
        + (
            ""
            if errors.speedup_median is None
            else f"; {errors.speedup_median:.0%} in the speed-up, at worst {errors.speedup_worst:.0%}"
        )
        + "."
    )
    if estimate.recorded is not None and errors.recorded_median is not None:
        yield (
            f"  On steps with cuda_graphs, which the fit did not see, it is {errors.recorded_median:.0%}, at worst "
            f"{errors.recorded_worst:.0%}."
        )
    yield from _doubts(estimate)
    hours = estimate.optimiser_steps * estimate.dense.milliseconds / 3.6e6
    if estimate.whole_speedup is not None:
        yield (
            f"  The whole training: {hours:.2f} hours dense, {hours / estimate.whole_speedup:.2f} hours as configured, "
            f"{estimate.whole_speedup:.2f}x."
        )


def _doubts(estimate: Estimate) -> Iterator[str]:
    """Warns where the measured steps differ in dtype or size."""
    fitted, dtype = estimate.fitted, "4bit" if estimate.model.in_4bit else "bf16"
    if fitted.dtype != dtype:
        yield f"  Steps in {dtype} were not measured; those in {fitted.dtype} stand in for them."
    flops = estimate.dense.flops / estimate.accumulation
    if not fitted.smallest / 2 <= flops <= fitted.largest * 2:
        yield (
            f"  A micro-batch here is of {flops / 1e12:.2g} x 10^12 FLOPs, the measured ones were of "
            f"{fitted.smallest / 1e12:.2g} to {fitted.largest / 1e12:.2g}: take the times as a rough guess."
        )


def _memory(estimate: Estimate) -> Iterator[str]:
    parts = estimate.memory.gib()
    yield (
        f"Memory: about {parts['peak']:.1f} GiB at the peak: weights {parts['weights']:.1f}, adapter and its optimiser "
        f"{parts['adapter']:.2f}, kept activations {parts['kept_activations']:.1f}, working set "
        f"{parts['working_set']:.1f}, estimator {parts['estimator']:.2f}, CUDA graphs {parts['graphs']:.1f}"
    )
    if estimate.fitted is not None:
        errors = estimate.fitted.errors
        median, worst = errors.memory_median, errors.memory_worst
        yield f"  against measured peaks off by {median:.0%}, at worst {worst:.0%}; it assumes"
    else:
        yield "  it assumes"
    for assumption in ASSUMPTIONS:
        yield textwrap.fill(assumption, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _advice(estimate: Estimate) -> Iterator[str]:
    yield "Advice"
    for sentence in advice(estimate):
        yield textwrap.fill(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _milliseconds(step: Step) -> str:
    return f"{'-':>9}" if step.milliseconds is None else f"{step.milliseconds:9.0f}"


def _times(dense: Step, step: Step) -> str:
    if step is dense:
        return ""
    ratio = dense.flops / step.flops if step.milliseconds is None else dense.milliseconds / step.milliseconds
    return f"{ratio:11.2f}x"
