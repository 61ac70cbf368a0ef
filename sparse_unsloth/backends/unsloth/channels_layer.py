"""Runs channel-sparse and dense layers of Unsloth's Llama form as whole layers, captured in CUDA graphs or not.

Two functions compute everything but attention (docs/how-it-works.md, section 7). Where they do not apply, the layer's
own forward runs with the hooks of its parts. The result is the same up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import plain_forward, replace_forward
from sparse_unsloth.backends.unsloth.attention import attend, capturable_attention, fixed_tensors
from sparse_unsloth.backends.unsloth.layer_plan import fits_kernels, norm_of, open_capture, prove, read_projections
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.graphs import layer as graphed_layer
from sparse_unsloth.graphs import parts
from sparse_unsloth.graphs.recorder import GraphCache, LayerCapture
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, post_attention, pre_attention
from sparse_unsloth.runtime.state import LayerRuntime


def replace(runtime: LayerRuntime) -> None:
    """Puts `layer_forward` on the layer, whose attention and MLP are hooked already."""
    replace_forward(runtime.layer.module, layer_forward, runtime)


def layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces Unsloth's ``LlamaDecoderLayer_fast_forward`` in training forwards without a cache."""
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.context is not None and runtime.context.probe:
        return prove(runtime, hidden_states, kwargs, lambda: _compute(runtime, hidden_states, kwargs))
    output = None if args else _compute(runtime, hidden_states, kwargs)
    return plain_forward(self, hidden_states, *args, **kwargs) if output is None else (output,)


def _compute(runtime: LayerRuntime, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output by the two functions, captured or not; None where its own forward must run."""
    planned = _plan(runtime, hidden_states, kwargs)
    if planned is None:
        return None
    plan, capture, fixed = planned
    runtime.context.whole.add(runtime.layer.index)
    for part in PARTS:
        if runtime.is_sparse(part):
            runtime.record_run(part)
    if capture is not None and fixed is not None:
        return _captured(runtime, hidden_states, plan, capture, kwargs, fixed)
    before, after = pre_attention, post_attention
    if capture is not None:
        before = partial(parts.pre_attention, capture=capture)
        after = partial(parts.post_attention, capture=capture)
    *qkv, residual = before(hidden_states, plan)
    attention_output = attend(runtime, hidden_states, qkv, kwargs)
    output = after(attention_output, residual, plan)
    if runtime.state.graphs is not None and capture is None and not plan.output_unused:
        _reserve(runtime, runtime.state.graphs)
    return output


def _captured(
    runtime: LayerRuntime,
    hidden_states: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    arguments: dict[str, Any],
    fixed: dict[str, Tensor],
) -> Tensor:
    """The layer's output from CUDA graphs of the whole layer; ``fixed``: the result of `fixed_tensors`."""
    attention = capturable_attention(runtime, arguments, fixed)
    output = graphed_layer.whole_layer(hidden_states, plan, capture, attention, list(fixed.values()))
    for part, chosen in capture.selections.items():
        runtime.context.selections[runtime.layer.index, part] = chosen
    return output


def _reserve(runtime: LayerRuntime, graphs: GraphCache) -> None:
    """Allocates memory for the layer's channel selections, if the next forward of this batch signature is captured."""
    context, index = runtime.context, runtime.layer.index
    if (index, context.batch_key) in graphs.reserved or not graphs.captures_next(context.batch_key):
        return
    for part in PARTS:
        if runtime.is_sparse(part):
            graphed_layer.reserve(graphs, index, part, context.selections[index, part])
    graphs.reserved.add((index, context.batch_key))


def _plan(
    runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]
) -> tuple[LayerPlan, LayerCapture | None, dict[str, Tensor] | None] | None:
    """The plan of this call, its capture, if there is one, and the result of `fixed_tensors` for it.

    None where the layer's own forward must run.
    """
    context, layer = runtime.context, runtime.layer
    module = layer.module
    if context is None or context.scale <= 0 or (context.loss_only and runtime.loss_only_parts):
        return None
    training = module.training and layer.self_attn.training and layer.mlp.training
    if not training or arguments.get("use_cache") or arguments.get("output_attentions"):
        return None
    if arguments.get("past_key_value") is not None or arguments.get("past_key_values") is not None:
        return None
    if not fits_kernels(hidden_states, module.input_layernorm.weight):
        return None
    runtime.check_rows(module, hidden_states)
    memo = context.memo(layer.index)
    recompute = memo.is_recompute()
    projections = memo.projections if recompute else None
    if projections is None:
        projections = read_projections(layer)
        if projections is None:
            return None
    memo.projections = None if recompute else projections
    attention, mlp = (
        RowOrder(context.partition, True) if runtime.is_sparse(part) else RowOrder(context.every_row_dense(), False)
        for part in ("self_attn", "mlp")
    )
    output_unused = recompute and runtime.state.config.exact_removal
    if not recompute:  # a recompute is captured if its first forward was
        ready = context.graphs is not None and (layer.index, context.batch_key) in context.graphs.reserved
        memo.captured = ready and runtime.state.config.exact_removal
    keep = torch.is_grad_enabled() and not recompute
    fixed = fixed_tensors(runtime, hidden_states, arguments) if memo.captured else None
    capture = None
    if memo.captured and (fixed is not None or not keep):  # around attention nothing can be kept
        which = attention.sparse, mlp.sparse, output_unused
        capture = open_capture(context, layer, projections, which, keep)
    plan = LayerPlan(
        input_norm=norm_of(module.input_layernorm),
        output_norm=norm_of(module.post_attention_layernorm),
        attention=attention,
        mlp=mlp,
        projections=projections,
        activation=layer.activation,
        choose_attention=partial(runtime.select_for_context, "self_attn"),
        choose_mlp=partial(runtime.select_for_context, "mlp"),
        output_unused=output_unused,
        keep=torch.is_grad_enabled(),
    )
    return plan, capture, fixed
