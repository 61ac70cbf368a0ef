"""Writes a plan as a table of at most eight lines: what, why, and what it is predicted to give."""

from __future__ import annotations

from sparse_unsloth.costs.memory import GIB
from sparse_unsloth.planning.decide import Decision

WHY = 150
"""The most characters of a reason; the errors of layers that cannot be captured are longer."""


def table(decision: Decision, title: str = "auto") -> list[str]:
    """The lines, of which the first is ``title`` with the data, and the last what is predicted."""
    facts = decision.facts
    count, tokens = len(facts.batches), sum(batch.rows for batch in facts.batches)
    data = f"{tokens / max(count, 1):.0f} tokens a micro-batch, {facts.context_share:.0%} context ({count} read)"
    rows = "exact" if decision.backward_rows == 1 else f"rows {decision.backward_rows:g}"
    kept = f"{decision.kept:.0f} of {facts.checkpointed} layers" if facts.checkpointed else "all layers"
    together = count / max(len(facts.forwards(decision.merged).batches), 1)
    cells = {
        "backward": (rows, "backward_rows"),
        "CUDA graphs": ("on" if decision.cuda_graphs else "off", "cuda_graphs"),
        "activations kept": (kept, "memory_budget"),
        "micro-batches": (f"{together:.3g} as one" if decision.merged > 1 else "one by one", "merge_micro_batches"),
    }
    lines = [f"sparse_unsloth {title}: {data}"]
    for name, (value, key) in cells.items():
        gain = decision.gains[key]
        lines.append(f"  {name:<16} {value:<14} {_times(gain):<6} {_short(decision.reasons[key])}")
    return [*lines, f"  {_predicted(decision)}"]


def _predicted(decision: Decision) -> str:
    milliseconds, peak = decision.milliseconds, decision.peak
    time = "no time (gains are of FLOPs)" if milliseconds is None else f"{milliseconds:.0f} ms a micro-batch"
    memory = "no memory" if peak is None else f"{peak / GIB:.1f} GiB at the peak"
    source = f", by {decision.facts.source}" if decision.facts.source else ""
    return f"predicted: {time}, {memory}{source}"


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WHY else f"{text[: WHY - 3]}..."
