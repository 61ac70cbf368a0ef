"""Where the time of one step goes: kernels by name, launches, how much of the step the GPU works, and host costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

KERNELS, HOST_COSTS = 30, 15
"""Lines that are printed of each."""


def profile(step: Callable[[], float], num_layers: int) -> str:
    """The profile of one more step, as text; ``step`` runs one and returns its milliseconds."""
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
    lines = [
        f"step {milliseconds:.1f} ms (not profiled); kernels run in {busy:.1f} ms of it, {busy / milliseconds:.0%}; "
        f"copies in {moving:.1f} ms; {len(kernels)} launches, {len(kernels) / num_layers:.0f} for each layer",
        *_by_name(kernels),
        "host, own time while profiled:",
    ]
    costs = sorted(trace.key_averages(), key=lambda cost: -cost.self_cpu_time_total)[:HOST_COSTS]
    lines += [f"  {cost.self_cpu_time_total / 1000:8.2f} ms {cost.count:6d}  {cost.key[:110]}" for cost in costs]
    return "\n".join(lines)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``(start, end)`` intervals: kernels of several streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _by_name(kernels: list[tuple[str, float, float]]) -> list[str]:
    totals: dict[str, tuple[float, int]] = {}
    for name, start, end in kernels:
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + end - start, count + 1
    largest = sorted(totals.items(), key=lambda item: -item[1][0])[:KERNELS]
    return [f"  {total / 1000:8.2f} ms {count:6d}  {name[:110]}" for name, (total, count) in largest]
