"""Prepares an attached model's layers for CUDA graphs (`cuda_graphs`)."""

from __future__ import annotations

import logging

from sparse_unsloth.backends import whole_layer
from sparse_unsloth.backends.peft import compiled
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs import packed_attention
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.runtime.attach_report import reasons
from sparse_unsloth.runtime.state import SparsityState

logger = logging.getLogger("sparse_unsloth")


def prepare_graphs(state: SparsityState) -> None:
    """Makes the graph cache for `cuda_graphs`; raises AttachError where no layer can be captured, or without a GPU."""
    if not state.config.cuda_graphs:
        return
    layers = state.whole_forwards
    for runtime in layers:
        runtime.not_captured = whole_layer.why_not_captured(runtime)
        if state.backend.name == "peft":
            runtime.not_captured = runtime.not_captured or compiled.why_not_captured(runtime.layer)
    if all(runtime.not_captured for runtime in layers):
        why = "; ".join(f"{reason} ({count} layers)" for reason, count in reasons(layers, "not_captured"))
        raise AttachError(f"cuda_graphs: no layer of this model can be captured: {why}. Set cuda_graphs: false.")
    if len({next(layer.module.parameters()).device for layer in state.layers}) > 1:
        raise AttachError(
            "cuda_graphs: the layers are on several devices, and a CUDA graph is of one. Set cuda_graphs: false."
        )
    state.graphs = GraphCache()
    _try_documents(state)


def _try_documents(state: SparsityState) -> None:
    """Tests whether attention within packed documents or a window can be captured; warns where it cannot on a GPU."""
    if state.backend.name == "peft":  # both are in its mask
        return
    layer = state.layers[0]
    weights = (one for name, one in layer.module.named_parameters() if name.endswith("norm.weight"))
    like = next(weights, None)
    if like is None or not like.is_cuda:
        return
    like = like.detach()
    heads = layer.num_heads, layer.num_kv_heads, layer.head_dim
    reason = packed_attention.why_not_captured(*heads, like, state.graphs.recorder)
    state.graphs.clear()
    if reason:
        state.graphs.captures_documents = False
        logger.warning(
            "cuda_graphs: attention within packed documents or a window cannot be captured (%s). Packed and "
            "padding-free batches, and layers with a window shorter than the sequence, run without CUDA graphs.",
            reason,
        )
