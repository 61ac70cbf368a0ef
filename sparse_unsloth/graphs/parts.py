"""`ops.decoder_layer` with its products in CUDA graphs around attention that is not captured: long documents, windows.

For layers that gradient checkpointing runs a second time. Recorded are the projections before attention, the one
behind it, and the MLP, with all that prepares their weights; norms, residual sums and the choice of channels run as
they are, and write to where the recordings read. Output and gradient of the input have memory of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.graphs.layer import flatten_gradients, split_gradients
from sparse_unsloth.graphs.recorder import LayerCapture
from sparse_unsloth.kernels.norms import add_norm, add_rows, norm_backward
from sparse_unsloth.ops.decoder_layer import LayerPlan, fused_mlp, lora_tensors_of, without_autocast
from sparse_unsloth.ops.fused_linear import FusedOutputProjection, FusedQKV


def pre_attention(
    hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.decoder_layer.pre_attention`; Q, K, V hold until ``capture`` does no more."""
    return _PreAttention.apply(hidden_states, plan, capture, *lora_tensors_of(plan.projections[:3]))


def post_attention(attention_output: Tensor, residual: Tensor, plan: LayerPlan, capture: LayerCapture) -> Tensor:
    """See `ops.decoder_layer.post_attention`."""
    return _PostAttention.apply(attention_output, residual, plan, capture, *lora_tensors_of(plan.projections[3:]))


class _PreAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture, *loras: Tensor):
        x, norm, rows = hidden_states.flatten(0, -2), plan.input_norm, plan.attention
        partition, dtype = capture.static_partition(rows.partition), x.dtype

        def project(normed: Tensor, *indices: Tensor):
            projections = plan.projections[:3]
            fused = FusedQKV(
                partition, [projection.base for projection in projections], loras,
                [projection.lora.scale for projection in projections], indices, dtype, plan.output_unused,
            )  # fmt: skip
            outputs, xA = fused.forward(normed)
            return outputs, (fused, normed, xA)

        with without_autocast(x):
            normed = capture.buffer("attention's norm", x, rows.order.size)
            _, _, scale = add_norm(x, None, None, norm.weight, norm.eps, rows.order, normed)
            chosen = zip("qkv", plan.attention_indices(normed)[:3], strict=True)
            indices = [capture.constant(name, index) for name, index in chosen]
            outputs = capture.call("qkv", project, (normed, *indices))
        ctx.plan, ctx.capture, ctx.loras = plan, capture, loras
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
            order, weight = plan.attention.order, plan.input_norm.weight
            dx, _ = norm_backward(d_normed, order, x, scale, weight, d_residual.contiguous())
            lora_gradients = split_gradients(found, loras)
        capture.finish()
        return dx.view(hidden_states.shape), None, None, *lora_gradients


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, attention_output: Tensor, residual: Tensor, plan: LayerPlan, capture: LayerCapture, *loras: Tensor
    ):
        a, stream = attention_output.flatten(0, -2), residual.flatten(0, -2)
        norm, rows, dtype = plan.output_norm, plan.mlp, a.dtype
        partition, projection = capture.static_partition(plan.attention.partition), plan.projections[3]

        def project(a: Tensor, index: Tensor):
            fused = FusedOutputProjection(
                partition, projection.base, loras[:2], projection.lora.scale, index, dtype, plan.output_unused
            )
            y, xA = fused.forward(a)
            return (y,), (fused, a, xA)

        def mlp(normed: Tensor, channels: Tensor, order: Tensor):
            y, _ = fused_mlp(plan, loras[2:], channels, order, dtype).forward(normed, False)
            return (y,), None

        with without_autocast(a):
            index = capture.constant("o", plan.attention_indices(None)[3])
            (y,) = capture.call("o", project, (a, index))
            normed = capture.buffer("mlp's norm", stream, rows.order.size)
            total, _, scale = add_norm(stream, y, plan.attention.order, norm.weight, norm.eps, rows.order, normed)
            chosen = zip(("channels", "order"), plan.mlp_channels(normed), strict=True)
            selection = [capture.constant(name, values) for name, values in chosen]
            if plan.output_unused:
                result = stream.new_zeros(()).expand(stream.shape)
            else:
                (y,) = capture.call("mlp", mlp, (normed, *selection))
                result = add_rows(total, y, rows.order)
                capture.finish()
        ctx.plan, ctx.capture, ctx.loras, ctx.normed, ctx.selection = plan, capture, loras, normed, selection
        ctx.attention_shape = attention_output.shape
        ctx.save_for_backward(total, scale)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        total, scale = ctx.saved_tensors
        plan, loras, capture = ctx.plan, ctx.loras, ctx.capture
        dy, rows, order = gradient.flatten(0, -2).contiguous(), plan.mlp, plan.attention.order
        dtype = total.dtype

        def mlp_backward(dy: Tensor, normed: Tensor, channels: Tensor, order: Tensor):
            mlp = fused_mlp(plan, loras[2:], channels, order, dtype)
            d_normed, lora_gradients = mlp.backward(dy, normed, ())
            return (d_normed, flatten_gradients(lora_gradients, loras[2:])), None

        def project_backward(state, d_total: Tensor, *d_sorted: Tensor):
            fused, a, xA = state
            da, lora_gradients = fused.backward(d_total, *(d_sorted or (d_total,)), a, xA)
            return (da, flatten_gradients(lora_gradients, loras[:2])), None

        with without_autocast(total):
            by_role = dy
            if rows.sparse:
                by_role = capture.buffer("dy", dy, rows.order.size)
                torch.index_select(dy, 0, rows.partition.rows, out=by_role)
            inputs = (by_role, ctx.normed, *ctx.selection)
            d_normed, mlp_flat = capture.call("mlp backward", mlp_backward, inputs)
            # The MLP's recording has read these two; now the sum's gradient goes where the projection's reads.
            d_total = [capture.buffer("d_total", total, len(total))]
            if plan.attention.sparse:
                d_total.append(capture.buffer("dy", total, order.size))
            norm_backward(d_normed, rows.order, total, scale, plan.output_norm.weight, dy, order, *d_total)
            da, o_flat = capture.call("o backward", project_backward, d_total, after="o")
            lora_gradients = [*split_gradients(o_flat, loras[:2]), *split_gradients(mlp_flat, loras[2:])]
        return da.view(ctx.attention_shape), d_total[0].view(gradient.shape), None, None, *lora_gradients
