"""Captures a layer's projections and MLP around attention that cannot be captured (long documents, windows).

See docs/how-it-works.md, section 9.4; the functions are those of `sparse_unsloth.ops.decoder_layer`, for layers under
gradient checkpointing. Q, K, V, then O, and the MLP are captured, together with what prepares their weights. Norms,
residual sums and channel selection are not; they write to addresses that the graphs read. The output and the gradient
of the input are in new memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.graphs.layer import flatten_gradients, split_gradients
from sparse_unsloth.graphs.recorder import LayerCapture
from sparse_unsloth.kernels.norms import add_norm, add_rows, norm_backward
from sparse_unsloth.ops.decoder_layer import (
    LayerPlan,
    RowOrder,
    after_attention_loras,
    fused_mlp,
    fused_qkv,
    lora_tensors_of,
    mlp_backward,
    output_projection,
    padded_loras,
    without_autocast,
)


def pre_attention(
    hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `sparse_unsloth.ops.decoder_layer.pre_attention`; Q, K, V are valid until another pass begins."""
    return _PreAttention.apply(hidden_states, _static(plan, capture), capture, *padded_loras(plan.projections[:3]))


def post_attention(attention_output: Tensor, residual: Tensor, plan: LayerPlan, capture: LayerCapture) -> Tensor:
    """See `sparse_unsloth.ops.decoder_layer.post_attention`."""
    loras = after_attention_loras(plan)
    return _PostAttention.apply(attention_output, residual, _static(plan, capture), capture, *loras)


def _static(plan: LayerPlan, capture: LayerCapture) -> LayerPlan:
    """``plan`` with the rows that graphs read at fixed addresses."""

    def fixed(rows: RowOrder) -> RowOrder:
        return RowOrder(capture.static_partition(rows.partition), rows.sparse)

    return replace(plan, attention=fixed(plan.attention), mlp=plan.mlp if plan.adds_mlp_output else fixed(plan.mlp))


def _fixed(capture: LayerCapture, plan: LayerPlan, loras: Sequence[Tensor]) -> list[Tensor]:
    """``loras`` at fixed addresses: the trained matrices are, and padded ones (`padded_loras`) are copied."""
    trained = {id(lora) for lora in lora_tensors_of(plan.projections)}
    return [
        lora if id(lora) in trained else capture.stage_input(("lora", len(loras), number), lora)
        for number, lora in enumerate(loras)
    ]


class _PreAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture, *loras: Tensor):
        x, rows, fixed = hidden_states.flatten(0, -2), plan.attention, _fixed(capture, plan, loras)
        dtype = x.dtype

        def project(normed: Tensor, *indices: Tensor):
            fused = fused_qkv(plan, fixed, indices, dtype)
            outputs, xA = fused.forward(normed)
            return outputs, (fused, normed, xA)

        with without_autocast(x):
            normed = capture.buffer("attention's norm", x, rows.order.size)
            _, _, scale = add_norm(x, None, None, plan.attention_norm, rows.order, normed)
            selected = zip("qkv", plan.attention_indices(normed)[:3], strict=True)
            indices = [capture.constant(name, index) for name, index in selected]
            outputs = capture.call("qkv", project, (normed, *indices))
        ctx.plan, ctx.capture, ctx.loras = plan, capture, fixed
        ctx.save_for_backward(hidden_states, scale)
        return *(y.view(*hidden_states.shape[:-1], -1) for y in outputs), hidden_states.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        hidden_states, scale = ctx.saved_tensors
        plan, loras, capture, x = ctx.plan, ctx.loras, ctx.capture, hidden_states.flatten(0, -2)
        *gradients, d_residual = (dy.flatten(0, -2) for dy in gradients)

        def project_backward(state, *gradients: Tensor):
            fused, normed, xA = state
            d_normed, lora_gradients = fused.backward(gradients, normed, xA)
            return (d_normed, flatten_gradients(lora_gradients, loras)), None

        with without_autocast(x):
            d_normed, found = capture.call("qkv backward", project_backward, gradients, after="qkv")
            order, norm = plan.attention.order, plan.attention_norm
            dx, _ = norm_backward(d_normed, order, x, scale, norm, d_residual.contiguous())
            lora_gradients = split_gradients(found, loras)
        capture.finish()
        return dx.view(hidden_states.shape), None, None, *lora_gradients


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, attention_output: Tensor, residual: Tensor, plan: LayerPlan, capture: LayerCapture, *loras: Tensor
    ):
        a, stream, fixed = attention_output.flatten(0, -2), residual.flatten(0, -2), _fixed(capture, plan, loras)
        rows, dtype, norm, multiplier = plan.mlp, a.dtype, plan.attention_output_norm, plan.residual_multiplier

        def project(a: Tensor, index: Tensor):
            fused = output_projection(plan, fixed[:2], index, dtype)
            y, xA = fused.forward(a)
            return (y,), (fused, a, xA)

        def mlp(normed: Tensor, channels: Tensor, order: Tensor):
            y, _ = fused_mlp(plan, fixed[2:], channels, order, dtype).forward(normed, False)
            return (y,), None

        with without_autocast(a):
            index = capture.constant("o", plan.attention_indices(None)[3])
            (y,) = capture.call("o", project, (a, index))
            normed = capture.buffer("mlp's norm", stream, rows.order.size)
            total, _, scale = add_norm(
                stream, y, plan.attention.order, plan.mlp_norm, rows.order, normed, norm, multiplier
            )
            selected = zip(("channels", "order"), plan.mlp_channels(normed), strict=True)
            selection = [capture.constant(name, values) for name, values in selected]
            added = None if norm is None else y
            if plan.output_unused:
                result = stream.new_zeros(()).expand(stream.shape)
            else:
                (y,) = capture.call("mlp", mlp, (normed, *selection))
                result = add_rows(total, y, rows.order, plan.mlp_output_norm, multiplier)
                capture.finish()
        ctx.plan, ctx.capture, ctx.loras, ctx.normed, ctx.selection = plan, capture, fixed, normed, selection
        ctx.attention_shape = attention_output.shape
        ctx.save_for_backward(total, scale, added)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        total, scale, added = ctx.saved_tensors
        plan, loras, capture = ctx.plan, ctx.loras, ctx.capture
        dy, rows, order = gradient.flatten(0, -2).contiguous(), plan.mlp, plan.attention.order
        dtype, norm, multiplier = total.dtype, plan.attention_output_norm, plan.residual_multiplier

        def backward_of_mlp(dy: Tensor, normed: Tensor, channels: Tensor, order: Tensor):
            mlp = fused_mlp(plan, loras[2:], channels, order, dtype)
            if plan.adds_mlp_output:  # sorted below
                d_normed, lora_gradients = mlp.backward(dy, normed, ())
            else:
                d_normed, lora_gradients = mlp_backward(dy, plan, mlp, normed, ())
            return (d_normed, flatten_gradients(lora_gradients, loras[2:])), None

        def project_backward(state, d_total: Tensor, *d_part: Tensor):
            fused, a, xA = state
            d_part = d_part[0] if d_part else d_total
            da, lora_gradients = fused.backward(plan.natural_gradient(d_total, d_part), d_part, a, xA)
            return (da, flatten_gradients(lora_gradients, loras[:2])), None

        with without_autocast(total):
            sorted_dy = dy
            if rows.sparse and plan.adds_mlp_output:
                sorted_dy = capture.buffer("dy", dy, rows.order.size)
                torch.index_select(dy, 0, rows.partition.rows, out=sorted_dy)
            inputs = (sorted_dy, ctx.normed, *ctx.selection)
            d_normed, mlp_flat = capture.call("mlp backward", backward_of_mlp, inputs)
            # The MLP's graph has read these buffers; now they take the sum's gradient, which O's graph reads.
            d_total = [capture.buffer("d_total", total, len(total))]
            if plan.attention.sparse or norm is not None or multiplier != 1:
                d_total.append(capture.buffer("dy", total, order.size))
            norm_backward(
                d_normed, rows.order, total, scale, plan.mlp_norm, dy, order, *d_total,
                added=added, added_norm=norm, multiplier=multiplier,
            )  # fmt: skip
            da, o_flat = capture.call("o backward", project_backward, d_total, after="o")
            lora_gradients = [*split_gradients(o_flat, loras[:2]), *split_gradients(mlp_flat, loras[2:])]
        return da.view(ctx.attention_shape), d_total[0].view(gradient.shape), None, None, *lora_gradients
