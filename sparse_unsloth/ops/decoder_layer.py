"""Computes a decoder layer as two functions with few launches, before and after attention.

Defined in docs/how-it-works.md, sections 1.3 and 7. Before attention: norm and Q, K, V. After attention: O, residual
sum, norm, gated MLP, residual sum. The norms write their rows sorted by role, so projections and MLP gather nothing.
The results equal those of the norms, `sparse_unsloth.ops.linear` and `sparse_unsloth.ops.mlp`, except that gradients
of residual sums are rounded once less. A dense part keeps all rows in natural order and computes all channels.

In a recompute whose output is unused (gradient checkpointing) the MLP is skipped: its backward computes what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.kernels.norms import Order, add_norm, add_rows, norm_backward
from sparse_unsloth.ops.fused_linear import FusedOutputProjection, FusedQKV
from sparse_unsloth.ops.fused_mlp import FusedMlp, channel_order
from sparse_unsloth.ops.linear import as_loras, lora_tensors
from sparse_unsloth.ops.projection import Projection
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.tokens.partition import TokenPartition


@dataclass(frozen=True)
class Norm:
    """An RMS norm with a frozen weight ``[hidden_size]``."""

    weight: Tensor
    eps: float


class RowOrder:
    """The order of a part's rows: sorted by role in a sparse part, natural in a dense one.

    Args:
        partition: the token roles; in a dense part every row is in its ``dense``.
        sparse: whether the part is sparse.
    """

    def __init__(self, partition: TokenPartition, sparse: bool):
        self.partition, self.sparse = partition, sparse
        size = partition.num_dense + partition.num_context
        self.order = Order(partition.place if sparse else None, partition.num_dense, size)

    def sort(self, values: Tensor) -> Tensor:
        """``values [M, width]`` in this order."""
        return values.index_select(0, self.partition.rows) if self.sparse else values

    def context(self, values: Tensor) -> Tensor:
        """The context tokens' rows of ``values``, which are in this order."""
        return values[self.partition.num_dense :]


@dataclass(frozen=True)
class LayerPlan:
    """What one call of a layer computes.

    Args:
        input_norm, output_norm: before attention and before the MLP.
        attention, mlp: the order of each part's rows.
        projections: q, k, v, o, gate, up, down. All have LoRA; q, k, v share one rank, and gate, up, down share one.
        activation: of the MLP, a key of `ACTIVATIONS`.
        choose_attention, choose_mlp: select a part's channels from its normalised context rows ``[n, hidden_size]``;
            called only if the part is sparse.
        output_unused: whether this is a recompute whose output is unused; its backward comes next.
        keep: whether backward follows, so that forward saves its intermediates.
    """

    input_norm: Norm
    output_norm: Norm
    attention: RowOrder
    mlp: RowOrder
    projections: Sequence[Projection]
    activation: str
    choose_attention: Callable[[Tensor], AttentionSelection]
    choose_mlp: Callable[[Tensor], MlpSelection]
    output_unused: bool
    keep: bool

    def attention_indices(self, normed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The selected channels of q, k, v, o; empty in a dense part. None as ``normed``: selected before."""
        if not self.attention.sparse:
            return (self.attention.partition.context,) * 4
        selection = self.choose_attention(None if normed is None else self.attention.context(normed))
        return selection.q, selection.k, selection.v, selection.o

    def with_loras(self, loras: Sequence[Tensor]) -> LayerPlan:
        """The same plan with other LoRA matrices: A and B of each projection in turn."""
        projections = [
            replace(projection, lora=replace(projection.lora, A=A, B=B))
            for projection, A, B in zip(self.projections, loras[::2], loras[1::2], strict=True)
        ]
        return replace(self, projections=projections)

    def mlp_channels(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's selected channels, and all channels with these first; both empty in a dense part."""
        if not self.mlp.sparse:
            return (self.mlp.partition.context,) * 2
        selection = self.choose_mlp(self.mlp.context(normed))
        size = self.projections[4].base.shape[0]
        order = channel_order(selection.channels, size) if selection.order is None else selection.order
        return selection.channels, order


def pre_attention(hidden_states: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(Q, K, V, residual)`` of ``hidden_states [..., hidden_size]``; the residual is ``hidden_states``."""
    return _PreAttention.apply(hidden_states, plan, *lora_tensors_of(plan.projections[:3]))


def post_attention(attention_output: Tensor, residual: Tensor, plan: LayerPlan) -> Tensor:
    """The layer's output ``[..., hidden_size]``.

    Args:
        attention_output: ``[..., heads * head_dim]``, before o_proj.
        residual: as returned by `pre_attention`.
    """
    return _PostAttention.apply(attention_output, residual, plan, *lora_tensors_of(plan.projections[3:]))


class _PreAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: LayerPlan, *loras: Tensor):
        x, norm, rows = hidden_states.flatten(0, -2), plan.input_norm, plan.attention
        with without_autocast(x):
            _, normed, scale = add_norm(x, None, None, norm.weight, norm.eps, rows.order)
            projections = plan.projections[:3]
            fused = FusedQKV(
                rows.partition, [projection.base for projection in projections], loras,
                [projection.lora.scale for projection in projections], plan.attention_indices(normed)[:3], x.dtype,
                plan.output_unused,
            )  # fmt: skip
            outputs, xA = fused.forward(normed)
        ctx.plan, ctx.fused = plan, fused
        ctx.save_for_backward(hidden_states, normed, scale, xA, *loras)
        return *(y.view(*hidden_states.shape[:-1], -1) for y in outputs), hidden_states.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        hidden_states, normed, scale, xA, *loras = ctx.saved_tensors
        plan, x = ctx.plan, hidden_states.flatten(0, -2)
        *gradients, d_residual = (dy.flatten(0, -2) for dy in gradients)
        with without_autocast(x):
            d_normed, lora_gradients = ctx.fused.backward(gradients, normed, xA)
            order, weight = plan.attention.order, plan.input_norm.weight
            dx, _ = norm_backward(d_normed, order, x, scale, weight, d_residual.contiguous())
        return dx.view(hidden_states.shape), None, *as_loras(lora_gradients, loras)


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention_output: Tensor, residual: Tensor, plan: LayerPlan, *loras: Tensor):
        a, stream = attention_output.flatten(0, -2), residual.flatten(0, -2)
        output = plan.projections[3]
        norm, rows = plan.output_norm, plan.mlp
        with without_autocast(a):
            o = FusedOutputProjection(
                plan.attention.partition, output.base, loras[:2], output.lora.scale, plan.attention_indices(None)[3],
                a.dtype, plan.output_unused,
            )  # fmt: skip
            y, xA = o.forward(a)
            total, normed, scale = add_norm(stream, y, plan.attention.order, norm.weight, norm.eps, rows.order)
            del y
            mlp = fused_mlp(plan, loras[2:], *plan.mlp_channels(normed), normed.dtype)
            if plan.output_unused:
                saved, result = (), stream.new_zeros(()).expand(stream.shape)
            else:
                y, saved = mlp.forward(normed, plan.keep)
                result = add_rows(total, y, rows.order)
        ctx.plan, ctx.o, ctx.mlp, ctx.num_loras = plan, o, mlp, len(loras)
        ctx.save_for_backward(attention_output, xA, total, normed, scale, *loras, *saved)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        attention_output, xA, total, normed, scale, *rest = ctx.saved_tensors
        loras, saved, plan = rest[: ctx.num_loras], rest[ctx.num_loras :], ctx.plan
        a, dy = attention_output.flatten(0, -2), gradient.flatten(0, -2).contiguous()
        with without_autocast(a):
            d_normed, mlp_gradients = ctx.mlp.backward(plan.mlp.sort(dy), normed, saved)
            d_total, d_sorted = norm_backward(
                d_normed, plan.mlp.order, total, scale, plan.output_norm.weight, dy, plan.attention.order
            )
            del d_normed
            da, o_gradients = ctx.o.backward(d_total, d_sorted, a, xA)
        lora_gradients = as_loras([*o_gradients, *mlp_gradients], loras)
        return da.view(attention_output.shape), d_total.view(gradient.shape), None, *lora_gradients


def fused_mlp(
    plan: LayerPlan, loras: Sequence[Tensor], channels: Tensor, order: Tensor, dtype: torch.dtype
) -> FusedMlp:
    """The MLP of ``plan`` with ``channels`` and ``order`` from `LayerPlan.mlp_channels`."""
    partition, projections = plan.mlp.partition, plan.projections[4:]
    return FusedMlp(
        partition.num_dense, partition.num_context, [projection.base for projection in projections], loras,
        tuple(projection.lora.scale for projection in projections), plan.activation, channels, order,
        dtype,
    )  # fmt: skip


def lora_tensors_of(projections: Sequence[Projection]) -> list[Tensor]:
    """A and B of each projection in turn."""
    return [tensor for projection in projections for tensor in lora_tensors(projection)]


class without_autocast:
    """``torch.autocast(device, enabled=False)`` with a tenth of its host time."""

    __slots__ = ("before", "device")

    def __init__(self, like: Tensor):
        self.device = like.device.type

    def __enter__(self) -> None:
        self.before = torch.is_autocast_enabled(self.device)
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.device, self.before)
