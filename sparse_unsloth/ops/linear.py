"""Computes Q, K, V and O: densely for loss tokens, with selected channels for context tokens.

Defined in docs/how-it-works.md, section 4.1. Q, K, V select output channels, O selects input channels. Gradients are
those of the masked forward, with constant masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.fused_linear import FusedOutputProjection, FusedQKV
from sparse_unsloth.ops.projection import BaseWeight, Projection
from sparse_unsloth.ops.row_projection import RowProjection
from sparse_unsloth.tokens.partition import TokenPartition


@dataclass(frozen=True)
class SelectedProjection:
    """A projection and the channels that context tokens keep: ``out_index`` or ``in_index``, int64 ``[k]``."""

    projection: Projection
    out_index: Tensor | None = None
    in_index: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """A `SelectedProjection` without its LoRA matrices, which are arguments of the autograd function."""

    base: BaseWeight
    scale: float
    out_index: Tensor | None
    in_index: Tensor | None


@dataclass
class _Plan:
    partition: TokenPartition
    parts: tuple[_Part, ...]
    fused: FusedQKV | FusedOutputProjection | None = None
    """Kept from forward to its backward."""


def sparse_linear(
    hidden_states: Tensor, partition: TokenPartition, parts: Sequence[SelectedProjection]
) -> tuple[Tensor, ...]:
    """Several projections of one input, each ``[..., out_features]``, in ``hidden_states``' dtype.

    Args:
        hidden_states: ``[..., in_features]``; flattened, its rows are those of ``partition``.
        partition: the token roles. Padding rows of the outputs are zero.
        parts: the projections with their selected channels.

    Raises:
        ValueError: see `check_rows`.
    """
    hidden_states = cast_for_autocast(hidden_states)
    check_rows(hidden_states, partition)
    constants = tuple(
        _Part(part.projection.base, lora_scale(part.projection), part.out_index, part.in_index) for part in parts
    )
    tensors = [tensor for part in parts for tensor in lora_tensors(part.projection)]
    return _SparseLinear.apply(hidden_states, _Plan(partition, constants), *tensors)


def masked_linear(
    hidden_states: Tensor, partition: TokenPartition, parts: Sequence[SelectedProjection]
) -> tuple[Tensor, ...]:
    """The masked reference of `sparse_linear` (docs/how-it-works.md, section 4.1): whole matmuls, masks, autograd."""
    x = hidden_states.flatten(0, -2)
    outputs = []
    for part in parts:
        base, lora = part.projection.base, part.projection.lora
        weight = base.dense(x.dtype)
        out_mask = context_mask(partition, part.out_index, weight.shape[0], x)
        in_mask = context_mask(partition, part.in_index, weight.shape[1], x)
        y = out_mask * F.linear(in_mask * x, weight)
        if base.bias is not None:
            y = y + base.bias
        if lora is not None:
            y = y + lora.scale * (x @ lora.A.t()) @ lora.B.t()
        y = y * (1 - rows_mask(partition.padding, x))
        outputs.append(y.unflatten(0, hidden_states.shape[:-1]))
    return tuple(outputs)


def context_mask(partition: TokenPartition, channels: Tensor | None, width: int, like: Tensor) -> Tensor:
    """``[N, width]`` in ``like``'s dtype: 1, except 0 on context rows outside ``channels`` (None: all channels)."""
    mask = torch.ones(like.shape[0], width, dtype=like.dtype, device=like.device)
    if channels is not None:
        kept = torch.zeros(width, dtype=like.dtype, device=like.device).index_fill_(0, channels, 1.0)
        mask[partition.context] = kept
    return mask


def rows_mask(rows: Tensor, like: Tensor) -> Tensor:
    """``[N, 1]`` in ``like``'s dtype: 1 on ``rows``, 0 elsewhere."""
    return torch.zeros(like.shape[0], 1, dtype=like.dtype, device=like.device).index_fill_(0, rows, 1.0)


def cast_for_autocast(hidden_states: Tensor) -> Tensor:
    """The input in the dtype that autocast uses for a matmul; unchanged without autocast."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return hidden_states.to(torch.get_autocast_dtype(device))
    return hidden_states


def check_rows(hidden_states: Tensor, partition: TokenPartition) -> None:
    """Checks that there are as many flattened rows as labels that the partition was built from.

    Raises:
        ValueError: there are not.
    """
    rows, expected = hidden_states.shape[:-1].numel(), partition.shape[0] * partition.shape[1]
    if rows != expected:
        raise ValueError(
            f"The layer got {rows} tokens, but the labels of this forward count {expected} {tuple(partition.shape)}: "
            "was the input truncated inside the model (max_seq_length), or cut into tiles?"
        )


def lora_tensors(projection: Projection) -> tuple[Tensor | None, Tensor | None]:
    """``(A, B)`` of the LoRA branch, or two None."""
    return (None, None) if projection.lora is None else (projection.lora.A, projection.lora.B)


def lora_scale(projection: Projection) -> float:
    """The LoRA scale ``lora_alpha / r``, or 1 without a LoRA branch."""
    return 1.0 if projection.lora is None else projection.lora.scale


def row_projection(
    base: BaseWeight,
    dense: Tensor | None,
    lora: tuple[Tensor | None, Tensor | None],
    scale: float,
    dtype: torch.dtype,
    out_index: Tensor | None = None,
    in_index: Tensor | None = None,
) -> RowProjection:
    """The projection with the selected rows or columns of ``base``, in ``dtype``.

    They are taken from the dequantised weight ``dense`` if it is given, otherwise from the stored weight.
    """
    if out_index is not None:
        weight = base.rows(out_index, dtype) if dense is None else dense.index_select(0, out_index)
    elif in_index is not None:
        weight = base.columns(in_index, dtype) if dense is None else dense.index_select(1, in_index)
    else:
        weight = base.dense(dtype) if dense is None else dense
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    return RowProjection(weight, bias, *lora, scale, base.shape[0], out_index, in_index)


class _SparseLinear(torch.autograd.Function):
    """Applies the fused functions, or a `RowProjection` to each role and projection of a plan."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: _Plan, *loras: Tensor | None):
        ctx.plan, ctx.num_loras = plan, len(loras)
        x = hidden_states.flatten(0, -2)
        partition = plan.partition
        with torch.autocast(x.device.type, enabled=False):
            fused = _fused(plan, loras, x)
            if fused is not None:
                outputs, xA = fused.forward_natural(x)
                ctx.save_for_backward(hidden_states, *loras, xA)
                return tuple(y.view(*hidden_states.shape[:-1], -1) for y in outputs)
            ctx.save_for_backward(hidden_states, *loras)
            dense_input = x.index_select(0, partition.dense)
            context_input = x.index_select(0, partition.context)
            outputs = []
            for part, (dense, context) in zip(plan.parts, _projections(plan, loras, x.dtype), strict=True):
                y = x.new_zeros(len(x), part.base.shape[0])
                if dense is not None:
                    y.index_copy_(0, partition.dense, dense.forward(dense_input))
                if context is not None:
                    rows = context.forward(context_input)
                    y.index_copy_(0, partition.context, rows)
                outputs.append(y.unflatten(0, hidden_states.shape[:-1]))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        hidden_states, *loras = ctx.saved_tensors
        loras, saved = loras[: ctx.num_loras], loras[ctx.num_loras :]
        plan = ctx.plan
        x = hidden_states.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            fused = _fused(plan, loras, x)
            if fused is not None:
                dx, lora_gradients = fused.backward_natural([dy.flatten(0, -2) for dy in gradients], x, *saved)
                plan.fused = None
                return dx.view(hidden_states.shape), None, *as_loras(lora_gradients, loras)
            dense_input = x.index_select(0, plan.partition.dense)
            context_input = x.index_select(0, plan.partition.context)
            dx_dense, dx_context = torch.zeros_like(dense_input), torch.zeros_like(context_input)
            lora_gradients: list[Tensor | None] = []
            for number, (dense, context) in enumerate(_projections(plan, loras, x.dtype)):
                dy = gradients[number].flatten(0, -2)
                A, B = loras[2 * number : 2 * number + 2]
                dA = None if A is None else torch.zeros_like(A, dtype=x.dtype)
                dB = None if B is None else torch.zeros_like(B, dtype=x.dtype)
                if dense is not None:
                    dy_dense = dy.index_select(0, plan.partition.dense)
                    step = dense.backward(dy_dense, dense_input, dense.xA(dense_input))
                    dx_dense += step[0]
                    _accumulate(dA, dB, step)
                if context is not None:
                    dy_context = dy.index_select(0, plan.partition.context)
                    step = context.backward(dy_context, context_input, context.xA(context_input))
                    dx_context += step[0]
                    _accumulate(dA, dB, step)
                lora_gradients += [None if dA is None else dA.to(A.dtype), None if dB is None else dB.to(B.dtype)]
            dx = torch.zeros_like(x)
            dx.index_copy_(0, plan.partition.dense, dx_dense)
            dx.index_copy_(0, plan.partition.context, dx_context)
        return dx.unflatten(0, hidden_states.shape[:-1]), None, *lora_gradients


def _fused(plan: _Plan, loras: Sequence[Tensor | None], x: Tensor) -> FusedQKV | FusedOutputProjection | None:
    """The projections as a fused function, if the kernels support them; stored in the plan."""
    parts = plan.parts
    if plan.fused is not None or not (len(plan.partition.rows) and use_kernels(x)):
        return plan.fused
    if len(parts) > 3 or any(lora is None for lora in loras) or len({A.shape[0] for A in loras[::2]}) > 1:
        return None
    scales = [part.scale for part in parts]
    if all(part.in_index is None for part in parts):
        none = plan.partition.dense[:0]
        bases = [part.base for part in parts]
        indices = [none if part.out_index is None else part.out_index for part in parts]
        plan.fused = FusedQKV(plan.partition, bases, loras, scales, indices, x.dtype)
    elif len(parts) == 1:
        base, index = parts[0].base, parts[0].in_index
        plan.fused = FusedOutputProjection(plan.partition, base, loras, scales[0], index, x.dtype)
    return plan.fused


def as_loras(gradients: Sequence[Tensor | None], loras: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``gradients`` in the dtypes of their LoRA matrices."""
    return [
        gradient if gradient is None or gradient.dtype == lora.dtype else gradient.to(lora.dtype)
        for gradient, lora in zip(gradients, loras, strict=True)
    ]


def _projections(plan: _Plan, loras: Sequence[Tensor | None], dtype: torch.dtype):
    """Yields ``(dense, context)`` of each projection: those of loss and context tokens, None where there are none."""
    has_dense, has_context = plan.partition.dense.numel() > 0, plan.partition.context.numel() > 0
    for number, part in enumerate(plan.parts):
        lora = tuple(None if tensor is None else tensor.to(dtype) for tensor in loras[2 * number : 2 * number + 2])
        weight = part.base.dense(dtype) if has_dense else None
        project = partial(row_projection, part.base, weight, lora, part.scale, dtype)
        yield project() if has_dense else None, project(part.out_index, part.in_index) if has_context else None


def _accumulate(dA: Tensor | None, dB: Tensor | None, step) -> None:
    if dA is not None:
        dA += step[1]
        dB += step[2]
