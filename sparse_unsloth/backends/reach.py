"""Proves that the context of a forward reaches every hooked part of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_unsloth.backends.patching import Uncompiled
from sparse_unsloth.backends.peft import compiled
from sparse_unsloth.backends.row_parts import probe_tokens, refuse_meta
from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.training_flags import training_mode
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.runtime.handing import Handing
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.partition import TokenPartition


def probe_reach(state: SparsityState) -> None:
    """Proves with a forward of four tokens in training mode that every hooked part runs and receives its context.

    Where no decoder layer gets the model's keyword arguments, ``state.handing`` hands the context to them.

    Raises:
        AttachError: a part was not reached.
    """
    if not (state.runtimes or state.last_layer or state.whole_layers):
        return
    refuse_meta(state.model)
    context = _run(state)
    if not context.entered:
        state.handing = Handing(state.model)
        state.handles.append(state.handing)
        context = _run(state)
    expected = state.hooked_parts()
    missing = expected - context.ran
    if missing:
        raise AttachError(
            f"A probe forward did not reach {len(missing)} of {len(expected)} hooked parts: "
            f"{state.name_parts(missing)}. {type(state.model).__name__} does not call its decoder layers, or these do "
            "not call their projections, so it has no sparse path. Train it dense (sparsity=None)."
        )


def _run(state: SparsityState) -> SparseContext:
    """The context of a forward of four tokens."""
    ids = probe_tokens(state.model, (1, 4))
    labels = torch.full_like(ids, -100)
    labels[:, 3] = ids[:, 3]
    context = SparseContext(TokenPartition.from_labels(labels), scale=1.0, loss_only=state.last_layer is not None)
    context.loss_reached = True  # the output of this forward is unused
    context.probe = True
    for index, runtime in () if state.row_sparse else state.runtimes.items():
        layer, device = runtime.layer, next(runtime.layer.module.parameters()).device
        queries, keys = (
            torch.arange(heads * layer.head_dim, device=device) for heads in (layer.num_heads, layer.num_kv_heads)
        )
        context.selections[index, "mlp"] = MlpSelection(torch.arange(layer.intermediate_size, device=device))
        context.selections[index, "self_attn"] = AttentionSelection(q=queries, k=keys, v=keys, o=queries)
    options = compiled.probe_arguments(state.layers[0].module) if state.backend.name == "peft" else {}
    if state.handing is None:
        options = {**options, CONTEXT_ARGUMENT: context}
    else:
        state.handing.begin(context)
    switches: list[Any] = [Uncompiled(layer) for layer in state.stack.values()] + _heads_in_their_dtype(state)
    try:
        with torch.no_grad(), training_mode(state.model):
            state.model(input_ids=ids, use_cache=False, **options)
    finally:
        for switch in switches:
            switch.remove()
        if state.handing is not None:
            state.handing.end()
    return context


def _heads_in_their_dtype(state: SparsityState) -> list[Any]:
    """Hooks that give linear modules outside of the decoder layers rows of their dtype, as autocast does in training.

    A classifier's or a reward model's head is often float32 on a base in bf16.
    """

    def cast(module: nn.Module, args: tuple) -> tuple:
        weight = module.weight
        return tuple(x.to(weight.dtype) if x.is_floating_point() and weight.is_floating_point() else x for x in args)

    inside = {id(module) for layer in state.stack.values() for module in layer.modules()}
    linear = [module for module in state.model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    return [module.register_forward_pre_hook(cast) for module in linear]
