"""What sparsity did between two log lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_unsloth.nonfinite import notice_nonfinite_scores

if TYPE_CHECKING:
    from sparse_unsloth.runtime import SparsityState


@dataclass
class ForwardCounts:
    """Training forwards with labels and their tokens, padding left out."""

    forwards: int = 0
    sparse_forwards: int = 0
    context_tokens: int = 0
    dense_tokens: int = 0
    whole_layers: int = 0
    captured_layers: int = 0
    """Of the last forward: layers that the project's functions computed as a whole, and those in CUDA graphs."""


def metrics(state: SparsityState) -> dict[str, float]:
    """What sparsity did since the last call: zeros for empty counts, nothing for a model that nothing is done to.

    ``sparsity/enabled`` is 1 where a forward was sparse since then, and ``sparsity/scale`` what the schedule asks for.
    """
    if not (state.runtimes or state.recorded_dense):
        return {}
    tokens = max(state.counts.context_tokens + state.counts.dense_tokens, 1)
    enabled = float(state.counts.sparse_forwards > 0)
    figures = {
        "sparsity/enabled": enabled,
        "sparsity/scale": state.scale,
        "sparsity/context_share": state.counts.context_tokens / tokens,
        "sparsity/sparse_forwards": state.counts.sparse_forwards / max(state.counts.forwards, 1),
    }
    if state.by_rows:
        figures["sparsity/backward_rows"] = state.config.backward_rows * enabled
    else:
        means = [sum(values) / len(state.stack) for values in zip(*state.layer_sparsity, strict=True)]
        scale = state.scale * enabled
        figures |= {"sparsity/mean_mlp": means[0] * scale, "sparsity/mean_self_attn": means[1] * scale}
    if state.whole_forwards:
        figures["sparsity/whole_layers"] = float(state.counts.whole_layers)
    if state.graphs is not None:
        figures["sparsity/captured_layers"] = float(state.counts.captured_layers)
    notice_nonfinite_scores(state)
    if state.watch.events:
        figures["sparsity/nonfinite"] = float(state.watch.events)
        state.watch.events = 0
    if state.planner is not None:
        figures["sparsity/kept_layers"] = float(state.planner.num_kept)
    state.counts = ForwardCounts()
    return figures
