"""The gated MLP through the kernels: one product in, one fused gated unit, one product out (design section 4).

``[A_gate; A_up; W_gate[selected]; W_up[selected]]`` is one weight, ``[W_down[:, selected] | B_down]`` another. Between
them the kernels of `sparse_unsloth.kernels.glu` hold no ``[N, intermediate_size]`` tensor for context rows. Dense rows
go through the same kernels, with base products on all channels.

With few channels selected both products run over all rows: that costs next to nothing, spares gathering and scattering
the context rows, and gives the dense rows their LoRA products as well. Same mathematics, and same gradients, as
`sparse_unsloth.functions.mlp`; few launches are what this file is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.functions.products import product_fp32
from sparse_unsloth.kernels.columns import add_rows
from sparse_unsloth.kernels.glu import ALIGNMENT, glu_backward, glu_forward
from sparse_unsloth.kernels.lora import mlp_gradients, pack_mlp
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import BaseWeight

FEW_CHANNELS = 1024
"""Up to so many selected channels both products run over all rows."""


@dataclass(frozen=True)
class FusedWeights:
    """What one MLP needs beside its base weights.

    Args:
        product_in: ``[2r + 2k, hidden]``: scaled A_gate and A_up, and the selected rows of W_gate and W_up.
        product_out: ``[hidden, k + r]``: the selected columns of W_down, and B_down.
        ordered: ``[3, P, r]``: B_gate, B_up, scaled A_down transposed, selected channels first.
        natural: ``[3, I, r]``: the same, all channels in their own order; None without dense rows.
        order: int64 ``[P]``: which channel stands at each place of ``ordered``.
        k: the selected channels and, with zero base weights, as many others as bring it to a multiple of `ALIGNMENT`.
        r: LoRA's rank.
    """

    product_in: Tensor
    product_out: Tensor
    ordered: Tensor
    natural: Tensor | None
    order: Tensor
    k: int
    r: int

    @property
    def nbytes(self) -> int:
        tensors = (self.product_in, self.product_out, self.ordered, self.natural)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def fuse_weights(
    bases: Sequence[BaseWeight],
    channels: Tensor,
    order: Tensor,
    loras: Sequence[Tensor],
    scales: tuple[float, float, float],
    dtype: torch.dtype,
    natural: bool,
) -> FusedWeights:
    """`FusedWeights` of gate, up and down.

    Args:
        channels: int64: the selected ones.
        order: int64 ``[P]``: the channels of the LoRA branch of context rows, ``channels`` first.
        loras: A and B of gate, up, down.
        scales: LoRA's, of gate, up, down.
        natural: whether there are dense rows.
    """
    r, hidden = loras[0].shape
    num_selected = len(channels)
    k = min(-(-num_selected // ALIGNMENT) * ALIGNMENT, len(order))
    product_in = channels.new_empty((2 * r + 2 * k, hidden), dtype=dtype)
    product_out = channels.new_empty((hidden, k + r), dtype=dtype)
    bases[0].rows(channels, dtype, out=product_in[2 * r : 2 * r + k])
    bases[1].rows(channels, dtype, out=product_in[2 * r + k :])
    bases[2].columns(channels, dtype, out=product_out[:, :k])
    loras = [lora.detach().contiguous() for lora in loras]
    ordered, whole = pack_mlp(loras, scales, order, product_in[: 2 * r], product_out[:, k:], natural)
    return FusedWeights(product_in, product_out, ordered, whole, order, k, r)


def channel_order(channels: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: ``channels`` first, then the others, both ascending; no host sync."""
    others = torch.ones(size, dtype=torch.uint8, device=channels.device).index_fill_(0, channels, 0)
    return others.argsort(stable=True)


class FusedMlp:
    """The gated MLP of one forward and its backward.

    Args:
        partition: the roles of the rows; has context rows.
        weights: of this MLP and these channels.
        bases: gate, up, down, for the dense rows; each is dequantised where it is used and freed again.
        scales: LoRA's, of gate, up, down.
        activation: key of `sparse_unsloth.kernels.glu.KINDS`.
        compensation: added to context rows, which are then gathered.
        keep: whether dequantised base weights stay from forward to backward: for a recompute, whose backward is next.
    """

    def __init__(
        self,
        partition: TokenPartition,
        weights: FusedWeights,
        bases: Sequence[BaseWeight],
        scales: tuple[float, float, float],
        activation: str,
        compensation: Compensation | None,
        keep: bool = False,
    ):
        self.partition, self.weights, self.bases = partition, weights, bases
        self.scales, self.activation, self.compensation = scales, activation, compensation
        self.gathered = weights.k > FEW_CHANNELS or compensation is not None
        self._kept: list[Tensor | None] | None = [None, None, None] if keep else None

    def forward(self, x: Tensor, unread: bool = False) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """``y [M, hidden]``, and what backward needs beside ``x [M, hidden]``.

        With ``unread`` nobody reads ``y``: it is zero, and only what backward needs is computed.
        """
        weights, partition = self.weights, self.partition
        k, r = weights.k, weights.r
        source = x.index_select(0, partition.context) if self.gathered else x
        stacked = source @ weights.product_in.t()
        if unread:
            return torch.zeros_like(x), self._save_only(x, source, stacked)
        unit = stacked.new_empty((len(stacked), k + r))
        rows = None if self.gathered else partition.context
        thin, base = self._views(stacked)
        glu_forward(thin, base, weights.ordered, unit[:, :k], unit[:, k:], self.activation, rows)
        if self.gathered:
            return self._forward_gathered(x, source, stacked, unit)
        if partition.num_padding:
            unit.index_fill_(0, partition.padding, 0)
        dense, e, g = None, None, None
        if partition.num_dense:
            dense_x = x.index_select(0, partition.dense)
            e, g = (dense_x @ self._base(place, x.dtype).t() for place in range(2))
            h = torch.empty_like(e)
            glu_forward(
                thin, (e, g), weights.natural, h, unit[:, k:], self.activation, partition.dense, True, unit[:, :k]
            )
            dense = h @ self._base(2, x.dtype).t()
        y = unit @ weights.product_out.t()
        if dense is not None:
            add_rows(y, partition.dense, dense)
        return y, (stacked, unit[:, k:], e, g)

    def _save_only(self, x: Tensor, source: Tensor, stacked: Tensor) -> tuple[Tensor | None, ...]:
        """What `forward` saves, without ``h A_down'``, which backward then computes along the way."""
        thin = e = g = None
        if self.partition.num_dense:
            dense_x = x.index_select(0, self.partition.dense)
            e, g = (dense_x @ self._base(place, x.dtype).t() for place in range(2))
            if self.gathered:
                thin = dense_x @ self.weights.product_in[: 2 * self.weights.r].t()
        return (stacked, None, source, thin, None, e, g) if self.gathered else (stacked, None, e, g)

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor], loras: Sequence[Tensor]):
        """``dx`` and the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)``; ``saved`` is what `forward` returned."""
        if self.gathered:
            return self._backward_gathered(dy, x, saved, loras)
        stacked, down_thin, e, g = saved
        weights, partition = self.weights, self.partition
        k, r = weights.k, weights.r
        d_unit = dy @ weights.product_out
        d_stacked = torch.empty_like(stacked)
        missing = dy.new_empty((len(dy), r)) if down_thin is None else None
        (thin, base), (d_thin, d_base) = self._views(stacked), self._views(d_stacked)
        d_context = glu_backward(
            thin, base, weights.ordered, d_unit[:, :k], d_unit[:, k:], d_base, d_thin, self.activation,
            partition.context, down_thin=missing,
        )  # fmt: skip
        if partition.num_padding:
            d_stacked.index_fill_(0, partition.padding, 0)
            if missing is not None:
                missing.index_fill_(0, partition.padding, 0)
        dense = d_dense = None
        if e is not None:
            d_h = dy.index_select(0, partition.dense) @ self._base(2, dy.dtype)
            de, dg = torch.empty_like(e), torch.empty_like(g)
            d_dense = glu_backward(
                thin, (e, g), weights.natural, d_h, d_unit[:, k:], (de, dg), d_thin, self.activation,
                partition.dense, True, d_stacked[:, 2 * r :], missing,
            )  # fmt: skip
            dense = (de @ self._base(0, dy.dtype)).addmm_(dg, self._base(1, dy.dtype))
        dx = d_stacked @ weights.product_in
        if dense is not None:
            add_rows(dx, partition.dense, dense)
        dA = product_fp32(d_thin.t(), x)
        down_B = product_fp32(dy.t(), down_thin if missing is None else missing)
        return dx, self._gradients(dA, down_B, d_context, d_dense, loras)

    def _forward_gathered(self, x: Tensor, context_x: Tensor, stacked: Tensor, unit: Tensor):
        weights, partition = self.weights, self.partition
        k, r = weights.k, weights.r
        context = unit @ weights.product_out.t()
        if self.compensation is not None:
            context += self.compensation.forward(context_x)
        y = (torch.zeros_like if partition.num_padding else torch.empty_like)(x)
        y.index_copy_(0, partition.context, context)
        if not partition.num_dense:
            return y, (stacked, unit[:, k:], context_x, None, None, None, None)
        dense_x = x.index_select(0, partition.dense)
        thin = dense_x @ weights.product_in[: 2 * r].t()
        e, g = (dense_x @ self._base(place, x.dtype).t() for place in range(2))
        h, down_thin = torch.empty_like(e), thin.new_empty((len(thin), r))
        glu_forward(thin, (e, g), weights.natural, h, down_thin, self.activation)
        dense = (h @ self._base(2, x.dtype).t()).addmm_(down_thin, weights.product_out[:, k:].t())
        y.index_copy_(0, partition.dense, dense)
        return y, (stacked, unit[:, k:], context_x, thin, down_thin, e, g)

    def _backward_gathered(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor], loras: Sequence[Tensor]):
        stacked, context_down_thin, context_x, thin, down_thin, e, g = saved
        weights, partition = self.weights, self.partition
        k, r = weights.k, weights.r
        context_dy = dy.index_select(0, partition.context)
        d_unit = context_dy @ weights.product_out
        d_stacked = torch.empty_like(stacked)
        (stacked_thin, base), (d_thin, d_base) = self._views(stacked), self._views(d_stacked)
        unread = context_down_thin is None
        missing = context_dy.new_empty((len(context_dy), r)) if unread else None
        d_context = glu_backward(
            stacked_thin, base, weights.ordered, d_unit[:, :k], d_unit[:, k:], d_base, d_thin, self.activation,
            down_thin=missing,
        )  # fmt: skip
        context_dx = d_stacked @ weights.product_in
        if self.compensation is not None:
            context_dx += self.compensation.input_gradient(context_dy)
        dx = (torch.zeros_like if partition.num_padding else torch.empty_like)(x)
        dx.index_copy_(0, partition.context, context_dx)
        dA = product_fp32(d_thin.t(), context_x)
        down_B = product_fp32(context_dy.t(), missing if unread else context_down_thin)
        d_dense = None
        if e is not None:
            dense_dy = dy.index_select(0, partition.dense)
            d_h, d_down_thin = dense_dy @ self._base(2, dy.dtype), dense_dy @ weights.product_out[:, k:]
            de, dg, d_thin = torch.empty_like(e), torch.empty_like(g), torch.empty_like(thin)
            missing = torch.empty_like(d_down_thin) if unread else None
            d_dense = glu_backward(
                thin, (e, g), weights.natural, d_h, d_down_thin, (de, dg), d_thin, self.activation, down_thin=missing
            )
            dense_dx = (de @ self._base(0, dy.dtype)).addmm_(dg, self._base(1, dy.dtype))
            dense_dx.addmm_(d_thin, weights.product_in[: 2 * r])
            dx.index_copy_(0, partition.dense, dense_dx)
            dA += product_fp32(d_thin.t(), x.index_select(0, partition.dense))
            down_B += product_fp32(dense_dy.t(), missing if unread else down_thin)
        return dx, self._gradients(dA, down_B, d_context, d_dense, loras)

    def _base(self, place: int, dtype: torch.dtype) -> Tensor:
        """The whole weight of gate, up or down."""
        if self._kept is None:
            return self.bases[place].dense(dtype)
        if self._kept[place] is None:
            self._kept[place] = self.bases[place].dense(dtype)
        return self._kept[place]

    def _views(self, stacked: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """gate and up thin ``[M, 2r]``, and their base products ``[M, k]``, of ``stacked [M, 2r + 2k]``."""
        k, r = self.weights.k, self.weights.r
        return stacked[:, : 2 * r], (stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :])

    def _gradients(
        self, dA: Tensor, down_B: Tensor, context: Tensor, dense: Tensor | None, loras: Sequence[Tensor]
    ) -> list[Tensor]:
        gate_scale, up_scale, down_scale = self.scales
        r, order = self.weights.r, self.weights.order
        gate_A, up_A = dA[:r], dA[r:]
        if gate_scale != 1:
            gate_A *= gate_scale
        if up_scale != 1:
            up_A *= up_scale
        kept = (loras[1], loras[3], loras[4])
        if len(order) == len(loras[1]):
            gate_B, up_B, down_A = mlp_gradients(context, dense, order, kept, down_scale)
        else:  # lora_branch="selected": context rows leave the other channels alone
            size = (3, *loras[1].shape)
            total = context.new_zeros(size) if dense is None else dense.sum(0)
            gate_B, up_B, down = total.index_add_(1, order, context.sum(0))
            down_A = down.t().mul_(down_scale)
        return [gate_A, gate_B, up_A, up_B, down_A, down_B]
