"""Sums up for a log line what sparsity did since the last one."""

from __future__ import annotations

import logging

from sparse_unsloth.channels.score_watch import PAUSE
from sparse_unsloth.runtime.state import ForwardCounts, SparsityState
from sparse_unsloth.utils.distributed import rank

logger = logging.getLogger("sparse_unsloth")


def metrics(state: SparsityState) -> dict[str, float]:
    """The metrics since the last call, by name; empty for a model without sparse, captured or FP8 layers.

    ``sparsity/enabled`` is 1 if a forward was sparse since then; ``sparsity/scale`` is the schedule's factor.
    ``sparsity/completion_without_loss`` is the share of the completions' tokens that bear no loss (GRPO, RLOO: an
    advantage of zero, a clipped ratio).
    Under row sparsity ``sparsity/gradient_energy`` is the share of the energy of the gradients of layers' outputs that
    chosen rows held in this process, the mean over the layers, and ``sparsity/gradient_energy_min`` the least.
    """
    if not (state.runtimes or state.dense_whole):
        return {}
    tokens = max(state.counts.context_tokens + state.counts.dense_tokens, 1)
    enabled = float(state.counts.sparse_forwards > 0)
    figures = {
        "sparsity/enabled": enabled,
        "sparsity/scale": state.scale,
        "sparsity/context_share": state.counts.context_tokens / tokens,
        "sparsity/sparse_forwards": state.counts.sparse_forwards / max(state.counts.forwards, 1),
    }
    if state.row_sparse:
        figures["sparsity/backward_rows"] = state.config.backward_rows * enabled
        figures |= state.observer.take_energy()
    else:
        means = [sum(values) / len(state.stack) for values in zip(*state.layer_sparsity, strict=True)]
        scale = state.scale * enabled
        figures |= {"sparsity/mean_mlp": means[0] * scale, "sparsity/mean_self_attn": means[1] * scale}
    if state.counts.completion is not None:
        without, every = state.counts.completion.tolist()
        figures["sparsity/completion_without_loss"] = without / max(every, 1)
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


def notice_nonfinite_scores(state: SparsityState) -> None:
    """Warns of NaN or inf in the scores of earlier forwards; their flags have reached the host, so it does not wait."""
    found = state.watch.collect()
    if found and "non-finite" not in state.warned:
        state.warned.add("non-finite")
        logger.warning(
            f"Rank {rank()}: NaN or inf in the scores of {len(found)} parts ({state.name_parts(found)}), so in the "
            "activations or in the estimator. Context tokens took the lowest-numbered channels in that forward; "
            f"these parts are dense in the next {PAUSE} forwards, and again whenever it happens (logged as "
            "sparsity/nonfinite). If the loss is NaN too, lower the learning rate, or use bf16 in place of fp16."
        )
