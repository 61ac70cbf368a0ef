"""Runs row-sparse layers of Unsloth's Llama form as whole layers: one row-wise function after attention.

The function holds the O projection, the residual sum, the norm and the MLP (docs/how-it-works.md, section 3.1), with
Unsloth's own code. Backward computes chosen rows from attention's output and the residual stream; a recompute under
gradient checkpointing skips the function. Elsewhere the layer's own forward runs, with the hooks of its parts.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.backends import row_hooks
from sparse_unsloth.backends.patching import original_forward, plain_forward, replace_forward
from sparse_unsloth.backends.unsloth import layer_plan
from sparse_unsloth.backends.unsloth.attention import attend, capturable_attention, fixed_tensors
from sparse_unsloth.backends.unsloth.contract import NORM
from sparse_unsloth.backends.unsloth.layer_plan import OTHER_PARTS, open_capture, plan_of_rows, prove, why_different
from sparse_unsloth.graphs import parts
from sparse_unsloth.graphs.rows import row_sparse_post_attention, row_sparse_whole_layer
from sparse_unsloth.ops.decoder_layer import post_attention, pre_attention
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.runtime.state import LayerRuntime

CACHED = ("use_cache", "output_attentions", "past_key_value", "past_key_values")


def why_not(runtime: LayerRuntime) -> str:
    """Why the layer cannot run as a whole layer; "" where it can, as far as its modules tell (`prove` tests it)."""
    if not hasattr(sys.modules.get("unsloth.models.llama"), NORM):
        return f"the installed Unsloth has no {NORM} in unsloth.models.llama"
    return "" if runtime.layer.adds_mlp_output else OTHER_PARTS


def replace(runtime: LayerRuntime) -> None:
    """Puts `layer_forward` on the layer, whose attention and MLP are hooked already."""
    runtime.not_fusable = layer_plan.why_not(runtime)
    replace_forward(runtime.layer.module, layer_forward, runtime)


def layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces Unsloth's ``LlamaDecoderLayer_fast_forward`` in training forwards without a cache."""
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.context is not None and runtime.context.probe:
        return _prove(runtime, hidden_states, kwargs)
    usable = not args and not any(kwargs.get(name) for name in CACHED)
    choice = (
        runtime.row_choice(self, hidden_states) if usable and self.self_attn.training and self.mlp.training else None
    )
    if choice is None:
        return plain_forward(self, hidden_states, *args, **kwargs)
    runtime.context.whole.add(runtime.layer.index)
    captured = _captured(runtime, hidden_states, kwargs)
    return (_compute(runtime, hidden_states, kwargs, choice) if captured is None else captured,)


def _prove(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
    """Proves the layer's forward (see `prove`), and the fused functions that recompute its rows and are captured."""
    choice = runtime.row_choice(runtime.layer.module, hidden_states)
    output = prove(runtime, hidden_states, arguments, lambda: _compute(runtime, hidden_states, arguments, choice))
    if not runtime.not_fusable:

        def compute() -> Tensor | None:
            every = runtime.context.every_row_dense()
            plan = plan_of_rows(runtime.layer, hidden_states, every, output_unused=False)
            if plan is None:
                return None
            *qkv, residual = pre_attention(hidden_states, plan)
            return post_attention(attend(runtime, hidden_states, qkv, arguments), residual, plan)

        runtime.not_fusable = why_different(compute, output[0], runtime.layer.module)
    return output


def _compute(runtime: LayerRuntime, hidden_states: Tensor, kwargs: dict[str, Any], choice: RowChoice) -> Tensor:
    """The layer's output without CUDA graphs."""
    layer = runtime.layer.module
    norm = getattr(sys.modules["unsloth.models.llama"], NORM)
    context, attention, mlp = runtime.context, layer.self_attn, layer.mlp
    apply_o = attention._sparse_original[1]

    def after_attention(attention_output: Tensor, stream: Tensor) -> Tensor:
        stream = stream + apply_o(attention, attention_output)
        return stream + original_forward(mlp, norm(layer.post_attention_layernorm, stream))

    def recompute(attention_output: Tensor, stream: Tensor) -> Tensor:
        """Computes the same with fewer launches and without the down projection, where our functions apply."""
        plan = None
        if not runtime.not_fusable:
            plan = plan_of_rows(runtime.layer, attention_output, context.chosen_rows(choice))
        if plan is None:
            return after_attention(attention_output, stream)
        return post_attention(attention_output, stream, plan)

    output_unused = row_hooks.is_output_unused(runtime)
    runtime.skip_output_projection = True
    try:
        attention_output, *_ = attention(hidden_states=norm(layer.input_layernorm, hidden_states), **kwargs)
    finally:
        runtime.skip_output_projection = False
    for part in ("mlp", "self_attn"):
        runtime.record_run(part)
    if not torch.is_grad_enabled():
        return after_attention(attention_output, hidden_states)
    weights = row_hooks.trained(attention.o_proj, layer.post_attention_layernorm, mlp)
    rows = BackwardRows(choice, recompute, residual_index=1, skip_output=output_unused)
    return backward_rows(after_attention, [attention_output, hidden_states], weights, rows)


def _captured(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """The layer's output from CUDA graphs of our functions; None where this forward is not captured."""
    context, layer, config = runtime.context, runtime.layer, runtime.state.config
    memo, share = context.memo(layer.index), config.backward_rows
    if context.graphs is None or runtime.not_fusable or not config.exact_removal:
        return None
    recompute = torch.is_grad_enabled() and memo.captured  # a recompute is captured if its first forward was
    keep = torch.is_grad_enabled() and not recompute
    fixed = fixed_tensors(runtime, hidden_states, arguments)
    plan = plan_of_rows(layer, hidden_states, context.every_row_dense())
    if plan is None or (keep and fixed is None):  # around attention nothing can be kept
        return None
    capture = open_capture(context, layer, list(plan.projections), (share, recompute), keep)
    if capture is None:
        return None
    memo.captured = not keep
    for part in ("mlp", "self_attn"):
        runtime.record_run(part)
    plan = dataclasses.replace(plan, output_unused=recompute, keep=keep)
    rows = context.partition, share, context.chosen_rows(context.row_choice(layer.index, share))
    if fixed is not None:
        attention = capturable_attention(runtime, arguments, fixed)
        return row_sparse_whole_layer(hidden_states, plan, capture, attention, list(fixed.values()), *rows)
    *qkv, residual = parts.pre_attention(hidden_states, plan, capture)
    attention_output = attend(runtime, hidden_states, qkv, arguments)
    if recompute:
        return row_sparse_post_attention(attention_output, residual, plan, capture, *rows)
    return parts.post_attention(attention_output, residual, plan, capture)
