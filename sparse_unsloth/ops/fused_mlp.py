"""The gated MLP through the kernels: one product in, one fused gated unit, one product out (design section 4).

Rows come sorted by role, dense ones first. For either kind ``[A_gate; A_up; W_gate; W_up]`` is one stack and
``[B_down | W_down]`` another: whole weights for dense rows, their selected channels for context rows. Between them the
kernels of `sparse_unsloth.kernels.glu` hold no ``[N, intermediate_size]`` tensor for context rows. Same mathematics,
and same gradients, as `sparse_unsloth.ops.mlp`; few launches are what this file is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.kernels.glu import ALIGNMENT, glu_backward, glu_forward
from sparse_unsloth.kernels.lora import mlp_gradients, pack_mlp
from sparse_unsloth.ops.projection import BaseWeight
from sparse_unsloth.ops.weight_stack import WeightStack, product_fp32, stack_columns, stack_rows

CHUNK = 2048
"""Rows whose wide intermediates are held at a time where they are not kept for backward."""


def channel_order(channels: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: ``channels`` first, then the others, both ascending; no host sync."""
    others = torch.ones(size, dtype=torch.uint8, device=channels.device).index_fill_(0, channels, 0)
    return others.argsort(stable=True)


@dataclass(frozen=True)
class _Weights:
    """What one kind of rows is multiplied with.

    Args:
        into: ``[2r + 2k, hidden]``: scaled A_gate and A_up, and the channels of W_gate and W_up.
        out: ``[r + k, hidden]``: B_down and the channels of W_down, transposed.
        ordered: ``[3, P, r]``: B_gate, B_up, scaled A_down transposed, by ``order``.
        order: int64 ``[P]``: which channel stands at each place of ``ordered``.
    """

    into: WeightStack
    out: WeightStack
    ordered: Tensor
    order: Tensor


class FusedMlp:
    """The gated MLP of one forward and its backward.

    Args:
        num_dense, num_context: rows of either kind.
        bases: gate, up, down; 4-bit ones are dequantised where they are used and freed again.
        loras: A and B of gate, up, down.
        scales: LoRA's, of gate, up, down.
        activation: key of `sparse_unsloth.kernels.activation.KINDS`.
        channels: int64: the channels of context rows.
        order: int64 ``[intermediate_size]``: ``channels`` first, then the others.
        dtype: of the products.
    """

    def __init__(
        self,
        num_dense: int,
        num_context: int,
        bases: Sequence[BaseWeight],
        loras: Sequence[Tensor],
        scales: tuple[float, float, float],
        activation: str,
        channels: Tensor,
        order: Tensor,
        dtype: torch.dtype,
    ):
        self.num_dense, self.num_context = num_dense, num_context
        self.bases, self.scales, self.activation = bases, scales, activation
        self.channels, self.order, self.dtype = channels, order, dtype
        self.loras = [lora.detach().contiguous() for lora in loras]
        self.r = loras[0].shape[0]

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``y [n, hidden]``, and with ``keep`` what backward need not compute anew; ``x [n, hidden]``."""
        y, saved = x.new_empty(x.shape), []
        for rows, weights in self._kinds():
            for chunk in self._chunks(rows, weights, keep):
                stacked = weights.into.matmul(x[chunk])
                xA, base = self._views(stacked)
                unit = stacked.new_empty((len(stacked), weights.out.size))
                glu_forward(xA, base, weights.ordered, unit[:, self.r :], unit[:, : self.r], self.activation)
                weights.out.matmul_transposed(unit, out=y[chunk])
            if keep:
                saved += [stacked, unit[:, : self.r].contiguous()]
        return y, tuple(saved)

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)``.

        Args:
            dy, x: ``[n, hidden]``.
            saved: what `forward` returned; empty: its products are computed here.
        """
        dx, saved = dy.new_empty(dy.shape), list(saved)
        sums: list[Tensor] | None = None
        partial: dict[bool, list[Tensor]] = {False: [], True: []}
        for rows, weights in self._kinds():
            kept = (saved.pop(0), saved.pop(0)) if saved else None
            for chunk in self._chunks(rows, weights, kept is not None):
                d_loras, *products = self._backward_rows(weights, dy[chunk], x[chunk], kept, dx[chunk])
                partial[weights.order is self.order].append(d_loras)
                sums = (
                    products if sums is None else [total.add_(one) for total, one in zip(sums, products, strict=True)]
                )
        return dx, self._gradients(*sums, *(partial[context] for context in (True, False)))

    def _backward_rows(self, weights: _Weights, dy: Tensor, x: Tensor, kept, dx: Tensor):
        """Writes ``dx``; returns the partial gradients of `glu_backward`, and those of A_gate, A_up and of B_down."""
        r = self.r
        d_unit = weights.out.matmul(dy)
        if kept is None:
            stacked, down_xA = weights.into.matmul(x), dy.new_empty((len(dy), r))
            d_stacked, missing = stacked, down_xA  # nobody else reads it
        else:
            (stacked, down_xA), missing = kept, None
            d_stacked = torch.empty_like(stacked)
        (xA, base), (d_xA, d_base) = self._views(stacked), self._views(d_stacked)
        d_loras = glu_backward(
            xA, base, weights.ordered, d_unit[:, r:], d_unit[:, :r], d_base, d_xA, self.activation, missing
        )
        del d_unit
        weights.into.matmul_transposed(d_stacked, out=dx)
        return d_loras, product_fp32(d_xA.t(), x), product_fp32(dy.t(), down_xA)

    def _chunks(self, rows: slice, weights: _Weights, whole: bool) -> Iterator[slice]:
        """``rows`` in parts, unless ``whole`` or those of context rows."""
        number = 1 if whole or weights.order is self.order else -(-(rows.stop - rows.start) // CHUNK)
        step = -(-(rows.stop - rows.start) // number)
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def _kinds(self) -> Iterator[tuple[slice, _Weights]]:
        """Yields ``(rows, weights)`` of each kind of rows that there are, one kind's weights at a time."""
        end = self.num_dense + self.num_context
        for rows, channels in ((slice(0, self.num_dense), None), (slice(self.num_dense, end), self.channels)):
            if rows.stop > rows.start:
                yield rows, self._weights(channels)

    def _weights(self, channels: Tensor | None) -> _Weights:
        gate, up, down = self.bases
        if channels is None:
            order = _natural(gate.shape[0], self.loras[0].device)
            into, out = stack_rows([gate, up], 2 * self.r, self.dtype), stack_columns(down, self.r, self.dtype)
        else:
            order = self.order
            into = stack_rows([gate, up], 2 * self.r, self.dtype, [channels, channels], ALIGNMENT)
            out = stack_columns(down, self.r, self.dtype, channels, ALIGNMENT)
        ordered = pack_mlp(self.loras, self.scales, order, into.lora_rows, out.lora_rows.t())
        return _Weights(into, out, ordered, order)

    def _views(self, stacked: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """gate and up xA ``[n, 2r]``, and their base products ``[n, k]``, of ``stacked [n, 2r + 2k]``."""
        r = self.r
        k = (stacked.shape[1] - 2 * r) // 2
        return stacked[:, : 2 * r], (stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :])

    def _gradients(self, dA: Tensor, down_B: Tensor, context: list[Tensor], dense: list[Tensor]) -> list[Tensor]:
        gate_scale, up_scale, down_scale = self.scales
        r, order, loras = self.r, self.order, self.loras
        gate_A, up_A = dA[:r], dA[r:]
        if gate_scale != 1:
            gate_A *= gate_scale
        if up_scale != 1:
            up_A *= up_scale
        kept = (loras[1], loras[3], loras[4])
        dense = None if not dense else dense[0] if len(dense) == 1 else torch.cat(dense)
        if context:
            gate_B, up_B, down_A = mlp_gradients(context[0], dense, order, kept, down_scale)
        else:
            gate_B, up_B, down_A = mlp_gradients(dense, None, _natural(len(loras[1]), dense.device), kept, down_scale)
        return [gate_A, gate_B, up_A, up_B, down_A, down_B]


_orders: dict[tuple[int, torch.device], Tensor] = {}


def _natural(size: int, device: torch.device) -> Tensor:
    """int64 ``[size]``: channels in their own order."""
    key = (size, device)
    if key not in _orders:
        _orders[key] = torch.arange(size, device=device)
    return _orders[key]
