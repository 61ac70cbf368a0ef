"""Profiles one step: kernels by kind and by name, launches, the GPU's idle time, and host costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

KERNELS, HOST_COSTS = 30, 15
"""The number of printed lines of each list."""
KINDS = (
    ("copies to and from the host", r"Memcpy (HtoD|DtoH)"),
    ("matrix products", r"nvjet|gemm|cutlass|gemv|splitKreduce|cublas"),
    ("attention", r"sdpa|flash|fmha|dot_do_o|convert_dq"),
    ("gated unit", r"glu_|gated_|sum_splits|_fg_kernel|_DWf_DW_dfg"),
    ("joining and splitting of Q, K, V, O", r"(split|join)_columns"),
    ("norms, residual sums", r"norm|add_rows"),
    ("dequantisation", r"_whole_kernel|dequant"),
    ("quantisation", r"quantize_(rows|weight|4bit|4bit_transposed)_kernel"),
    ("choice of channels", r"low_rank_kernel|mlp_scores|attention_energy|top_order|attention_channels"),
    ("LoRA matrices", r"pack_mlp|pack_linear|mlp_gradients"),
    ("rotary embedding", r"rope|rotary"),
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("optimiser", r"multi_tensor|adam"),
)
"""Kinds of work, and words in the names of their kernels; the first match counts."""
OTHER, IDLE = "sums, casts, gathers, others", "no kernel running"


@dataclass(frozen=True)
class Profile:
    """The profile of one step.

    Attributes:
        step_ms: its time, measured without the profiler.
        kinds: milliseconds and launches by kind; kernels of several streams may overlap.
        idle_ms: the time in which no kernel runs, because the GPU waits for the host or for copies.
        text: everything and more, for printing.
    """

    step_ms: float
    kinds: dict[str, tuple[float, int]]
    idle_ms: float
    text: str


def profile(step: Callable[[], float], num_layers: int) -> Profile:
    """Profiles another step; ``step`` runs one and returns its milliseconds."""
    milliseconds = sorted(step() for _ in range(3))[1]
    activities = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        step()
    kernels, copies = [], []
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            moves = event.name.startswith(("Memcpy", "Memset"))
            (copies if moves else kernels).append((event.name, event.time_range.start, event.time_range.end))
    busy = covered((start, end) for _, start, end in kernels) / 1000
    moving = covered((start, end) for _, start, end in copies) / 1000
    kinds = by_kind([*kernels, *copies])
    lines = [
        f"step {milliseconds:.1f} ms (not profiled); kernels run in {busy:.1f} ms of it, {busy / milliseconds:.0%}; "
        f"copies in {moving:.1f} ms; {len(kernels)} launches, {len(kernels) / num_layers:.0f} for each layer",
        "by kind:",
        *(f"  {total:8.2f} ms {count:6d}  {name}" for name, (total, count) in kinds.items()),
        "by name:",
        *_by_name(kernels),
        "host, own time while profiled:",
    ]
    costs = sorted(trace.key_averages(), key=lambda cost: -cost.self_cpu_time_total)[:HOST_COSTS]
    lines += [f"  {cost.self_cpu_time_total / 1000:8.2f} ms {cost.count:6d}  {cost.key[:110]}" for cost in costs]
    return Profile(milliseconds, kinds, max(milliseconds - busy, 0.0), "\n".join(lines))


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of ``(start, end)`` intervals: kernels of several streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def kind_of(name: str) -> str:
    """Returns the kind of work of a kernel with this name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def by_kind(events: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, int]]:
    """Sums milliseconds and launches by kind, from ``(name, start, end)`` in microseconds; the longest first."""
    return _totals((kind_of(name), start, end) for name, start, end in events)


def _by_name(kernels: list[tuple[str, float, float]]) -> list[str]:
    largest = list(_totals(kernels).items())[:KERNELS]
    return [f"  {total:8.2f} ms {count:6d}  {name[:110]}" for name, (total, count) in largest]


def _totals(events: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, int]]:
    totals: dict[str, tuple[float, int]] = {}
    for name, start, end in events:
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + (end - start) / 1000, count + 1
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))
