"""Computes the gated MLP: densely for loss tokens, with selected channels for context tokens.

Defined in docs/how-it-works.md, section 4.1 (SparseLoRA section 3). Gradients are those of the masked forward, with a
constant mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_unsloth.kernels.gated import (
    gated_backward,
    gated_forward,
    reference_gated_backward,
    reference_gated_forward,
)
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.fused_linear import place_rows
from sparse_unsloth.ops.fused_mlp import FusedMlp, channel_order
from sparse_unsloth.ops.linear import (
    as_loras,
    cast_for_autocast,
    check_rows,
    context_mask,
    lora_scale,
    lora_tensors,
    row_projection,
    rows_mask,
)
from sparse_unsloth.ops.projection import BaseWeight, Projection
from sparse_unsloth.ops.row_projection import RowProjection
from sparse_unsloth.tokens.partition import TokenPartition


@dataclass(frozen=True)
class GatedMlp:
    """The three projections of a gated MLP and the key of its activation in `ACTIVATIONS`."""

    gate: Projection
    up: Projection
    down: Projection
    activation: str


@dataclass
class _Plan:
    partition: TokenPartition
    channels: Tensor
    bases: tuple[BaseWeight, BaseWeight, BaseWeight]
    scales: tuple[float, float, float]
    ranks: tuple[int | None, int | None, int | None]
    activation: str
    order: Tensor | None
    output_unused: bool
    keep: bool
    fused: FusedMlp | None = None
    """Kept from forward to its backward."""


@dataclass
class MlpMemo:
    """What the MLP keeps from its first forward to the recompute.

    Attributes:
        with_gradients: whether the first forward ran with gradients; None before it.
        order: of all channels, if the selection made one.
    """

    with_gradients: bool | None = None
    order: Tensor | None = None

    def is_recompute(self) -> bool:
        """Whether this forward runs with gradients after a first one without; notes how the first one runs."""
        if self.with_gradients is None:
            self.with_gradients = torch.is_grad_enabled()
        return torch.is_grad_enabled() and not self.with_gradients


def sparse_mlp(
    hidden_states: Tensor,
    partition: TokenPartition,
    channels: Tensor,
    mlp: GatedMlp,
    memo: MlpMemo | None = None,
    skip_unused_output: bool = False,
) -> Tensor:
    """``[..., hidden_size]`` to ``[..., hidden_size]``, in ``hidden_states``' dtype.

    Args:
        hidden_states: flattened, its rows are those of ``partition``.
        partition: the token roles. Padding rows of the output are zero.
        channels: int64 ``[k]``, ascending: the intermediate channels that context tokens keep.
        mlp: the projections.
        memo: of one forward and these channels; it identifies the recompute.
        skip_unused_output: whether the checkpointed function only adds the output to something and ends. The recompute
            then returns zeros, as its output is unused (docs/how-it-works.md, section 5.3). Exact; saves a third of
            the recompute's frozen-weight matmuls.

    Raises:
        ValueError: see `check_rows`.
    """
    hidden_states = cast_for_autocast(hidden_states)
    check_rows(hidden_states, partition)
    projections = (mlp.gate, mlp.up, mlp.down)
    memo = MlpMemo() if memo is None else memo
    output_unused = memo.is_recompute() and skip_unused_output
    plan = _Plan(
        partition=partition,
        channels=channels,
        bases=tuple(projection.base for projection in projections),
        scales=tuple(lora_scale(projection) for projection in projections),
        ranks=tuple(None if projection.lora is None else projection.lora.A.shape[0] for projection in projections),
        activation=mlp.activation,
        order=memo.order,
        output_unused=output_unused,
        keep=torch.is_grad_enabled(),
    )
    tensors = [tensor for projection in projections for tensor in lora_tensors(projection)]
    return _SparseMlp.apply(hidden_states, plan, *tensors)


def masked_mlp(hidden_states: Tensor, partition: TokenPartition, channels: Tensor, mlp: GatedMlp) -> Tensor:
    """The masked reference of `sparse_mlp` (docs/how-it-works.md, section 4.1): whole matmuls, masks, autograd."""
    x = hidden_states.flatten(0, -2)
    mask = context_mask(partition, channels, mlp.gate.base.shape[0], x)

    def project(projection: Projection, source: Tensor, base_source: Tensor, out_mask: Tensor | float) -> Tensor:
        y = out_mask * F.linear(base_source, projection.base.dense(x.dtype))
        if projection.base.bias is not None:
            y = y + projection.base.bias
        if projection.lora is not None:
            y = y + projection.lora.scale * (source @ projection.lora.A.t()) @ projection.lora.B.t()
        return y

    h = ACTIVATIONS[mlp.activation](project(mlp.gate, x, x, mask)) * project(mlp.up, x, x, mask)
    y = project(mlp.down, h, mask * h, 1.0)
    return (y * (1 - rows_mask(partition.padding, x))).unflatten(0, hidden_states.shape[:-1])


class _SparseMlp(torch.autograd.Function):
    """Applies the fused function, or `_GatedMlpRows` to each role."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: _Plan, *loras: Tensor | None) -> Tensor:
        ctx.plan, ctx.lora_count = plan, len(loras)
        x = hidden_states.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            fused = _fused_mlp(plan, loras, x)
            if fused is not None:
                y, saved = x.new_zeros(()).expand(x.shape), ()
                if not plan.output_unused:
                    rows_y, saved = fused.forward(x.index_select(0, plan.partition.rows), plan.keep)
                    y = place_rows(rows_y, plan.partition, x)
            else:
                y, saved = torch.zeros_like(x), []
                for index, rows in _row_sets(plan, loras, x.dtype):
                    rows_y, rows_saved = rows.forward(x.index_select(0, index), plan.output_unused)
                    if rows_y is not None:
                        y.index_copy_(0, index, rows_y)
                    saved += rows_saved
        ctx.save_for_backward(hidden_states, *loras, *saved)
        return y.view(hidden_states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        hidden_states, *tensors = ctx.saved_tensors
        loras, saved = tensors[: ctx.lora_count], tensors[ctx.lora_count :]
        x, dy = hidden_states.flatten(0, -2), dy.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            fused = _fused_mlp(ctx.plan, loras, x)
            if fused is not None:
                partition = ctx.plan.partition
                rows_dy, rows_x = (tensor.index_select(0, partition.rows) for tensor in (dy, x))
                dx, gradients = fused.backward(rows_dy, rows_x, saved)
                dx = place_rows(dx, partition, x)
                ctx.plan.fused = None
            else:
                gradients = [None if tensor is None else torch.zeros_like(tensor, dtype=x.dtype) for tensor in loras]
                dx = torch.zeros_like(x)
                for number, (index, rows) in enumerate(_row_sets(ctx.plan, loras, x.dtype)):
                    rows_saved = saved[2 * number : 2 * number + 2]
                    rows_dx = rows.backward(dy.index_select(0, index), x.index_select(0, index), rows_saved, gradients)
                    dx.index_copy_(0, index, rows_dx)
        return dx.view(hidden_states.shape), None, *as_loras(gradients, loras)


@dataclass(frozen=True)
class _GatedMlpRows:
    """The gated MLP on the rows of one role."""

    gate: RowProjection
    up: RowProjection
    down: RowProjection
    activation: str

    def forward(self, x: Tensor, output_unused: bool = False) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """``y [n, hidden]`` (None if ``output_unused``) and what backward needs besides ``x``: the outputs of gate and
        up ``[n, I]``, or only their base products ``[n, k]`` where channels are selected.
        """
        gate_base, up_base = self.gate.base(x), self.up.base(x)
        e, g = self.gate.add_lora(gate_base, self.gate.xA(x)), self.up.add_lora(up_base, self.up.xA(x))
        saved = (e, g) if self.gate.out_index is None else (gate_base, up_base)
        if output_unused:
            return None, saved
        h = (gated_forward if use_kernels(x) else reference_gated_forward)(e, g, self.activation)
        y = self.down.add_lora(self.down.base(h), self.down.xA(h))
        return y, saved

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor], gradients: list[Tensor | None]) -> Tensor:
        """``dx``; ``saved`` is from `forward`. Adds the LoRA gradients of gate, up and down to ``gradients``."""
        gate_xA, up_xA = self.gate.xA(x), self.up.xA(x)
        e, g = saved
        if self.gate.out_index is not None:
            e, g = self.gate.add_lora(e, gate_xA), self.up.add_lora(g, up_xA)
        down_d_xA = self.down.xA_gradient(dy)
        dh = self.down.input_gradient(dy, down_d_xA, e)
        h, de, dg = (gated_backward if use_kernels(x) else reference_gated_backward)(dh, e, g, self.activation)
        down_gradients = self.down.lora_gradients(dy, down_d_xA, h, self.down.xA(h))
        dx, *gate_gradients = self.gate.backward(de, x, gate_xA)
        up_dx, *up_gradients = self.up.backward(dg, x, up_xA)
        dx += up_dx
        for place, gradient in enumerate((*gate_gradients, *up_gradients, *down_gradients)):
            if gradient is not None:
                gradients[place] += gradient
        return dx


def _row_sets(plan: _Plan, loras: Sequence[Tensor | None], dtype: torch.dtype):
    """Yields ``(row index, _GatedMlpRows)`` for loss and context tokens, if there are any; dequantises once."""
    partition, channels = plan.partition, plan.channels
    pairs = [tuple(None if t is None else t.to(dtype) for t in loras[2 * i : 2 * i + 2]) for i in range(3)]
    weights = [base.dense(dtype) if partition.dense.numel() else None for base in plan.bases]
    all_channels, selected = ((None, None),) * 3, ((channels, None), (channels, None), (None, channels))
    for rows, indices in ((partition.dense, all_channels), (partition.context, selected)):
        if rows.numel():
            parts = zip(plan.bases, weights, pairs, plan.scales, indices, strict=True)
            projections = [row_projection(*part, dtype, *index) for *part, index in parts]
            yield rows, _GatedMlpRows(*projections, plan.activation)


def _fused_mlp(plan: _Plan, loras: Sequence[Tensor | None], x: Tensor) -> FusedMlp | None:
    """The MLP as a fused function, if there is LoRA of one rank on all projections and no bias; stored in the plan."""
    partition = plan.partition
    if plan.fused is not None or not (len(partition.rows) and use_kernels(x)):
        return plan.fused
    if None in plan.ranks or len(set(plan.ranks)) > 1 or any(base.bias is not None for base in plan.bases):
        return None
    order = plan.order
    if order is None and partition.num_context:
        order = channel_order(plan.channels, plan.bases[0].shape[0])
    plan.fused = FusedMlp(
        partition.num_dense, partition.num_context, plan.bases, loras, plan.scales, plan.activation, plan.channels,
        order, x.dtype,
    )  # fmt: skip
    return plan.fused
