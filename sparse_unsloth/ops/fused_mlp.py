"""Computes the gated MLP with few launches: a stacked matmul, a fused gated unit, a stacked matmul.

See docs/how-it-works.md, section 7. Rows are sorted by role, loss tokens first. For each role ``[A_gate; A_up; W_gate;
W_up]`` is one stack and ``[B_down, W_down]`` another: whole weights for loss tokens, selected channels for context
tokens. The kernels of `sparse_unsloth.kernels.glu` between them store no ``[N, intermediate_size]`` tensor for context
tokens. Outputs and gradients are those of `sparse_unsloth.ops.mlp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.kernels.gated_lora import gated_lora_backward, gated_lora_forward
from sparse_unsloth.kernels.glu import ALIGNMENT, glu_backward, glu_forward
from sparse_unsloth.kernels.lora import mlp_gradients, pack_mlp
from sparse_unsloth.ops.fp8 import Fp8Stack
from sparse_unsloth.ops.projection import BaseWeight
from sparse_unsloth.ops.weight_stack import WeightStack, product_fp32, stack_columns, stack_rows

CHUNK = 2048
"""Loss tokens whose intermediates exist at a time, where they are not kept for backward."""


def channel_order(channels: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: ``channels`` first, then the others, both ascending; no host sync."""
    others = torch.ones(size, dtype=torch.uint8, device=channels.device).index_fill_(0, channels, 0)
    return others.argsort(stable=True)


@dataclass(frozen=True)
class _Weights:
    """The weights for the rows of one role.

    Args:
        gate_up: ``[2r + 2k, hidden]``: scaled A_gate and A_up, and the channels of W_gate and W_up.
        down: ``[r + k, hidden]``: B_down and the channels of W_down, transposed.
        loras: ``[3, P, r]``: B_gate, B_up, scaled A_down transposed, with channels by ``order``.
        order: int64 ``[P]``: the channel at each index of ``loras``.
        whole: whether these are all channels in natural order.
    """

    gate_up: WeightStack | Fp8Stack
    down: WeightStack | Fp8Stack
    loras: Tensor
    order: Tensor
    whole: bool


class FusedMlp:
    """The gated MLP of one forward and its backward.

    Args:
        num_dense, num_context: the numbers of loss and context tokens.
        bases: gate, up, down; 4-bit weights are dequantised where they are used and freed again.
        loras: A and B of gate, up, down.
        scales: LoRA scales of gate, up, down.
        activation: a key of `sparse_unsloth.kernels.activation.KINDS`.
        channels: int64: the channels that context tokens keep.
        order: int64 ``[intermediate_size]``: ``channels`` first, then the others.
        dtype: of the matmuls.
        fp8: whether the frozen weights are multiplied in FP8, for loss tokens and for context tokens. Those then keep
            all channels.
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
        fp8: tuple[bool, bool] = (False, False),
    ):
        self.num_dense, self.num_context, self.fp8 = num_dense, num_context, fp8
        self.bases, self.scales, self.activation = bases, scales, activation
        self.channels, self.order, self.dtype = channels, order, dtype
        self.loras = [lora.detach().contiguous() for lora in loras]
        self.r = loras[0].shape[0]

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``y [n, hidden]`` of ``x [n, hidden]``, and with ``keep`` the intermediates that backward can use."""
        y, saved = x.new_empty(x.shape), []
        for rows, weights in self._rows_and_weights():
            for chunk in self._chunks(rows, weights, keep):
                stacked = weights.gate_up.matmul(x[chunk])
                xA, base = self._views(stacked)
                unit = stacked.new_empty((len(stacked), weights.down.size))
                h, down_xA = unit[:, self.r :], unit[:, : self.r]
                if weights.whole:
                    gated_lora_forward(xA, base, weights.loras, h, self.activation)
                    torch.mm(h, weights.loras[2], out=down_xA)
                else:
                    glu_forward(xA, base, weights.loras, h, down_xA, self.activation)
                weights.down.matmul_transposed(unit, out=y[chunk])
            if keep:
                saved += [stacked, unit[:, : self.r].contiguous()]
        return y, tuple(saved)

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)``.

        Args:
            dy, x: ``[n, hidden]``.
            saved: the intermediates from `forward`, of all rows or of the first ones of a role; others are computed
                here. Empty: all.
        """
        dx, saved = dy.new_empty(dy.shape), list(saved)
        sums: list[Tensor] | None = None
        partial: dict[bool, list[Tensor]] = {False: [], True: []}
        for rows, weights in self._rows_and_weights():
            kept = (saved.pop(0), saved.pop(0)) if saved else None
            first = rows.start + (len(kept[0]) if kept else 0)
            chunks = [(slice(rows.start, first), kept)] if first > rows.start else []
            chunks += [(chunk, None) for chunk in self._chunks(slice(first, rows.stop), weights, False)]
            for chunk, known in chunks:
                d_loras, *products = self._backward_rows(weights, dy[chunk], x[chunk], known, dx[chunk])
                partial[weights.order is self.order].append(d_loras)
                sums = (
                    products if sums is None else [total.add_(part) for total, part in zip(sums, products, strict=True)]
                )
        return dx, self._gradients(*sums, *(partial[context] for context in (True, False)))

    def _backward_rows(self, weights: _Weights, dy: Tensor, x: Tensor, kept, dx: Tensor):
        """Writes ``dx``; returns the gradients of ``weights.loras``, of A_gate and A_up, and of B_down."""
        r = self.r
        d_unit = weights.down.matmul(dy)
        if kept is None:
            stacked, down_xA = weights.gate_up.matmul(x), dy.new_empty((len(dy), r))
            d_stacked, missing = stacked, down_xA  # computed here, so it may be overwritten
        else:
            (stacked, down_xA), missing = kept, None
            d_stacked = torch.empty_like(stacked)
        (xA, base), (d_xA, d_base) = self._views(stacked), self._views(d_stacked)
        unit_backward = _whole_backward if weights.whole else glu_backward
        d_loras = unit_backward(
            xA, base, weights.loras, d_unit[:, r:], d_unit[:, :r], d_base, d_xA, self.activation, missing
        )
        del d_unit
        weights.gate_up.matmul_transposed(d_stacked, out=dx)
        return d_loras, product_fp32(d_xA.t(), x), product_fp32(dy.t(), down_xA)

    def _chunks(self, rows: slice, weights: _Weights, whole: bool) -> Iterator[slice]:
        """``rows`` in chunks of `CHUNK`, or at once if ``whole`` or if they are context tokens."""
        count = rows.stop - rows.start
        number = 1 if whole or weights.order is self.order else max(1, -(-count // CHUNK))
        step = max(1, -(-count // number))
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def _rows_and_weights(self) -> Iterator[tuple[slice, _Weights]]:
        """Yields ``(rows, weights)`` of each role that has rows; the weights exist one role at a time."""
        end = self.num_dense + self.num_context
        for rows, channels in ((slice(0, self.num_dense), None), (slice(self.num_dense, end), self.channels)):
            if rows.stop > rows.start:
                fp8 = self.fp8[channels is not None]
                yield rows, self._weights(None if fp8 else channels, fp8)

    def _weights(self, channels: Tensor | None, fp8: bool) -> _Weights:
        gate, up, down = self.bases
        if channels is None:
            order = natural_order(gate.shape[0], self.loras[0].device)
            gate_up = stack_rows([gate, up], 2 * self.r, self.dtype, fp8=fp8)
            down = stack_columns(down, self.r, self.dtype, fp8=fp8)
        else:
            order = self.order
            gate_up = stack_rows([gate, up], 2 * self.r, self.dtype, [channels, channels], ALIGNMENT)
            down = stack_columns(down, self.r, self.dtype, channels, ALIGNMENT)
        loras = pack_mlp(self.loras, self.scales, order, gate_up.lora_rows, down.lora_rows.t())
        return _Weights(gate_up, down, loras, order, channels is None)

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
            gate_B, up_B, down_A = mlp_gradients(
                dense, None, natural_order(len(loras[1]), dense.device), kept, down_scale
            )
        return [gate_A, gate_B, up_A, up_B, down_A, down_B]


def _whole_backward(
    xA: Tensor,
    base: tuple[Tensor, Tensor],
    loras: Tensor,
    d_h: Tensor,
    d_down_xA: Tensor,
    d_base: tuple[Tensor, Tensor],
    d_xA: Tensor,
    kind: str,
    down_xA: Tensor | None,
) -> Tensor:
    """`glu_backward` of all channels; overwrites ``d_h``."""
    parts = [part.clone() for part in xA.chunk(2, dim=1)]  # d_xA may be xA itself
    gated_lora_backward(xA, base, loras, d_h, d_down_xA, d_base, kind)
    if down_xA is not None:
        torch.mm(d_h, loras[2], out=down_xA)
    for d_part, dy, B in zip(d_xA.chunk(2, dim=1), d_base, loras[:2], strict=True):
        torch.mm(dy, B, out=d_part)
    pairs = zip((*d_base, d_h), (*parts, d_down_xA), strict=True)
    return torch.stack([product_fp32(dy.t(), part) for dy, part in pairs])[None]


_orders: dict[tuple[int, torch.device], Tensor] = {}


def natural_order(size: int, device: torch.device) -> Tensor:
    """int64 ``[size]``: channels in natural order."""
    key = (size, device)
    if key not in _orders:
        _orders[key] = torch.arange(size, device=device)
    return _orders[key]
