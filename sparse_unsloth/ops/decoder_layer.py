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
from torch.nn import functional as F

from sparse_unsloth.config.sparsity import Precision
from sparse_unsloth.kernels.norms import Order, add_norm, add_rows, added_backward, norm_backward
from sparse_unsloth.ops.fused_linear import FusedOutputProjection, FusedQKV
from sparse_unsloth.ops.fused_mlp import FusedMlp, channel_order, natural_order
from sparse_unsloth.ops.linear import as_loras, lora_scale
from sparse_unsloth.ops.norms import Norm
from sparse_unsloth.ops.projection import Projection
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.tokens.partition import TokenPartition

RANK_WITHOUT_LORA = 16
"""Of the zeros that stand for the LoRA matrices of projections of which none has LoRA: rows stay aligned."""


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
    """What one call of a layer computes: ``h = x + r N2(attention(N1(x)))``, ``y = h + r N4(mlp(N3(h)))``.

    Args:
        attention_norm, attention_output_norm, mlp_norm, mlp_output_norm: N1 to N4, RMS norms without bias; None where
            there is none.
        attention, mlp: the order of each part's rows.
        projections: q, k, v, o, gate, up, down, with LoRA or without; the MLP's have no bias.
        activation: of the MLP, a key of `ACTIVATIONS`.
        choose_attention, choose_mlp: select a part's channels from its normalised context rows ``[n, hidden_size]``;
            called only if the part is sparse.
        output_unused: whether this is a recompute whose output is unused; its backward comes next.
        keep: whether backward follows, so that forward saves its intermediates.
        keep_context: with row sparsity, whether it saves those of context tokens, of which backward goes through few.
        residual_multiplier: r.
        precision: of products with frozen weights, see `SparsityConfig.precision`. With "fp8-context" sparse parts
            compute all channels, those of context tokens in FP8, and dense parts nothing in FP8.
    """

    attention_norm: Norm | None
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp_output_norm: Norm | None
    attention: RowOrder
    mlp: RowOrder
    projections: Sequence[Projection]
    activation: str
    choose_attention: Callable[[Tensor], AttentionSelection]
    choose_mlp: Callable[[Tensor], MlpSelection]
    output_unused: bool
    keep: bool
    keep_context: bool = True
    residual_multiplier: float = 1.0
    precision: Precision = "bf16"

    @property
    def fp8(self) -> tuple[bool, bool]:
        """Whether frozen weights are multiplied in FP8, for loss tokens (all rows of a dense part), for context."""
        return self.precision == "fp8", self.precision != "bf16"

    def attention_indices(self, normed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The selected channels of q, k, v, o; empty in a dense part. None as ``normed``: selected before."""
        if not self.attention.sparse:
            return (self.attention.partition.context,) * 4
        if self.precision != "bf16":
            bases = [projection.base for projection in self.projections[:4]]
            sizes = *(base.shape[0] for base in bases[:3]), bases[3].shape[1]
            return tuple(natural_order(size, bases[0].device) for size in sizes)
        selection = self.choose_attention(None if normed is None else self.attention.context(normed))
        return selection.q, selection.k, selection.v, selection.o

    def with_loras(self, loras: Sequence[Tensor]) -> LayerPlan:
        """The same plan with other LoRA matrices, in the order of `lora_tensors_of`."""
        others = iter(loras)
        projections = [
            projection
            if projection.lora is None
            else replace(projection, lora=replace(projection.lora, A=next(others), B=next(others)))
            for projection in self.projections
        ]
        return replace(self, projections=projections)

    def mlp_channels(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's selected channels, and all channels with these first; both empty in a dense part."""
        if not self.mlp.sparse or self.precision != "bf16":
            return (self.mlp.partition.context,) * 2
        selection = self.choose_mlp(self.mlp.context(normed))
        size = self.projections[4].base.shape[0]
        order = channel_order(selection.channels, size) if selection.order is None else selection.order
        return selection.channels, order

    def natural_gradient(self, d_total: Tensor, d_part: Tensor) -> Tensor | None:
        """The gradient of attention's output in natural order, if `norm_backward` computed it.

        Args:
            d_total, d_part: its results, the gradients of the sum and of the sorted output.
        """
        if not self.attention.sparse:
            return d_part
        return d_total if self.attention_output_norm is None and self.residual_multiplier == 1 else None

    @property
    def adds_mlp_output(self) -> bool:
        """Whether the MLP's output is added to the residual stream as it is."""
        return self.mlp_output_norm is None and self.residual_multiplier == 1


def pre_attention(hidden_states: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(Q, K, V, residual)`` of ``hidden_states [..., hidden_size]``; the residual is ``hidden_states``."""
    return _PreAttention.apply(hidden_states, plan, *padded_loras(plan.projections[:3]))


def post_attention(attention_output: Tensor, residual: Tensor, plan: LayerPlan) -> Tensor:
    """The layer's output ``[..., hidden_size]``.

    Args:
        attention_output: ``[..., heads * head_dim]``, before o_proj.
        residual: as returned by `pre_attention`.
    """
    return _PostAttention.apply(attention_output, residual, plan, *after_attention_loras(plan))


class _PreAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, plan: LayerPlan, *loras: Tensor):
        x = hidden_states.flatten(0, -2)
        with without_autocast(x):
            _, normed, scale = add_norm(x, None, None, plan.attention_norm, plan.attention.order)
            fused = fused_qkv(plan, loras, plan.attention_indices(normed)[:3], x.dtype)
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
            dx, _ = norm_backward(
                d_normed, plan.attention.order, x, scale, plan.attention_norm, d_residual.contiguous()
            )
        return dx.view(hidden_states.shape), None, *as_loras(lora_gradients, loras)


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention_output: Tensor, residual: Tensor, plan: LayerPlan, *loras: Tensor):
        a, stream = attention_output.flatten(0, -2), residual.flatten(0, -2)
        with without_autocast(a):
            result, parts, saved = after_attention(a, stream, plan, loras)
        ctx.plan, ctx.parts, ctx.shape, ctx.num_loras = plan, parts, attention_output.shape, len(loras)
        ctx.save_for_backward(*loras, *saved)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        tensors = ctx.saved_tensors
        loras, saved = tensors[: ctx.num_loras], tensors[ctx.num_loras :]
        dy = gradient.flatten(0, -2).contiguous()
        with without_autocast(dy):
            da, d_stream, lora_gradients = after_attention_backward(dy, ctx.plan, ctx.parts, saved)
        return da.view(ctx.shape), d_stream.view(gradient.shape), None, *as_loras(lora_gradients, loras)


def after_attention(
    a: Tensor, stream: Tensor, plan: LayerPlan, loras: Sequence[Tensor]
) -> tuple[Tensor, tuple[FusedOutputProjection, FusedMlp], list[Tensor | None]]:
    """`post_attention` of rows, without autograd: the output, and what `after_attention_backward` takes.

    Args:
        a: ``[M, heads * head_dim]``; ``stream [M, hidden_size]``.
        loras: the result of `after_attention_loras`.

    Returns:
        The output ``[M, hidden_size]`` (zeros if it is unused), the two parts, and the tensors to save.
    """
    o = output_projection(plan, loras[:2], plan.attention_indices(None)[3], a.dtype)
    y, xA = o.forward(a)
    norm, order = plan.attention_output_norm, plan.attention.order
    total, normed, scale = add_norm(stream, y, order, plan.mlp_norm, plan.mlp.order, norm, plan.residual_multiplier)
    saved = [a, xA, None if norm is None else y, total, normed, scale]
    del y
    mlp = fused_mlp(plan, loras[2:], *plan.mlp_channels(normed), normed.dtype)
    if plan.output_unused:
        return stream.new_zeros(()).expand(stream.shape), (o, mlp), saved
    y, kept = mlp.forward(normed, plan.keep)
    result = add_rows(total, y, plan.mlp.order, plan.mlp_output_norm, plan.residual_multiplier)
    if plan.keep:
        saved += kept if plan.mlp_output_norm is None else (*kept, y)
    return result, (o, mlp), saved


def after_attention_backward(
    dy: Tensor, plan: LayerPlan, parts: tuple[FusedOutputProjection, FusedMlp], saved: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of `after_attention`'s ``a`` and ``stream``, and of the LoRA matrices.

    Args:
        dy: ``[M, hidden_size]``, contiguous.
    """
    (o, mlp), (a, xA, y, total, normed, scale, *kept) = parts, saved
    d_normed, mlp_gradients = mlp_backward(dy, plan, mlp, normed, kept)
    d_total, d_part = norm_backward(
        d_normed, plan.mlp.order, total, scale, plan.mlp_norm, dy, plan.attention.order,
        added=y, added_norm=plan.attention_output_norm, multiplier=plan.residual_multiplier,
    )  # fmt: skip
    del d_normed
    da, o_gradients = o.backward(plan.natural_gradient(d_total, d_part), d_part, a, xA)
    return da, d_total, [*o_gradients, *mlp_gradients]


def mlp_backward(
    dy: Tensor, plan: LayerPlan, mlp: FusedMlp, normed: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of ``normed``, which `after_attention` gave the MLP, and of its LoRA matrices.

    An output norm's gradient needs the MLP's output: where nothing was kept, the MLP is computed here, for all rows at
    once (`CHUNK` does not bound its intermediates then).

    Args:
        dy: ``[M, hidden_size]``, of the layer's output, contiguous.
        kept: `FusedMlp.forward`'s intermediates (without an output norm of the first rows, see `FusedMlp.backward`),
            and its output where there is an output norm; or nothing.
    """
    norm, y = plan.mlp_output_norm, None
    if norm is not None:
        if kept:
            *kept, y = kept
        else:
            y, kept = mlp.forward(normed, True)
    if plan.adds_mlp_output:
        dy = plan.mlp.sort(dy)
    else:
        dy = added_backward(dy, plan.mlp.order, y, norm, plan.residual_multiplier)
    return mlp.backward(dy, normed, kept)


def fused_qkv(plan: LayerPlan, loras: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype) -> FusedQKV:
    """Q, K and V of ``plan`` with the channels ``indices``, and ``loras`` from `padded_loras`."""
    projections = plan.projections[:3]
    return FusedQKV(
        plan.attention.partition, [projection.base for projection in projections], loras,
        [lora_scale(projection) for projection in projections], indices, dtype, plan.output_unused, plan.fp8,
    )  # fmt: skip


def output_projection(
    plan: LayerPlan, loras: Sequence[Tensor], index: Tensor, dtype: torch.dtype
) -> FusedOutputProjection:
    """O of ``plan`` with the channels ``index``."""
    projection = plan.projections[3]
    return FusedOutputProjection(
        plan.attention.partition, projection.base, loras, lora_scale(projection), index, dtype, plan.output_unused,
        plan.fp8,
    )  # fmt: skip


def fused_mlp(
    plan: LayerPlan, loras: Sequence[Tensor], channels: Tensor, order: Tensor, dtype: torch.dtype
) -> FusedMlp:
    """The MLP of ``plan`` with ``channels`` and ``order`` from `LayerPlan.mlp_channels`."""
    partition, projections = plan.mlp.partition, plan.projections[4:]
    return FusedMlp(
        partition.num_dense, partition.num_context, [projection.base for projection in projections], loras,
        tuple(lora_scale(projection) for projection in projections), plan.activation, channels, order, dtype,
        plan.fp8,
    )  # fmt: skip


def lora_tensors_of(projections: Sequence[Projection]) -> list[Tensor]:
    """A and B of each projection that has LoRA, in turn."""
    return [
        tensor for projection in projections if (lora := projection.lora) is not None for tensor in (lora.A, lora.B)
    ]


def padded_loras(projections: Sequence[Projection]) -> list[Tensor]:
    """A and B of each projection in turn, all of one rank: with zeros where ranks differ or there is no LoRA.

    Gradients go to the real matrices alone. Those of one rank are returned as they are.
    """
    tensors = lora_tensors_of(projections)
    ranks = [A.shape[0] for A in tensors[::2]]
    if len(ranks) == len(projections) and len(set(ranks)) == 1:
        return tensors
    rank, padded = max(ranks, default=RANK_WITHOUT_LORA), []
    for projection in projections:
        (height, width), lora = projection.base.shape, projection.lora
        if lora is None:
            like = tensors[0] if tensors else torch.empty(0, device=projection.base.device)
            padded += [like.new_zeros((rank, width)), like.new_zeros((height, rank))]
        else:
            missing = rank - lora.A.shape[0]
            padded += [F.pad(lora.A, (0, 0, 0, missing)), F.pad(lora.B, (0, missing))] if missing else [lora.A, lora.B]
    return padded


def after_attention_loras(plan: LayerPlan) -> list[Tensor]:
    """A and B of o, gate, up and down: `padded_loras` of O, and of the MLP."""
    return padded_loras(plan.projections[3:4]) + padded_loras(plan.projections[4:])


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
