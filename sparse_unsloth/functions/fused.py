"""The gated MLP through the kernels: one product in, one fused gated unit, one product out (design section 4).

``[A_gate; A_up; W_gate[selected]; W_up[selected]]`` is one weight, ``[W_down[:, selected] | scale * B_down]`` another.
Between them the kernels of `sparse_unsloth.kernels.glu` hold no ``[N, intermediate_size]`` tensor for context rows.

With few channels selected both products run over all rows: that costs next to nothing, spares gathering and scattering
the context rows, and gives the dense rows their LoRA products as well. Same mathematics, and same gradients, as
`sparse_unsloth.functions.mlp`; the launches are what this file saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.kernels.gated import gated_backward, gated_forward
from sparse_unsloth.kernels.glu import ALIGNMENT, glu_backward, glu_forward
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import BaseWeight

FEW_CHANNELS = 1024
"""Up to so many selected channels both products run over all rows."""


@dataclass(frozen=True)
class FusedWeights:
    """What context rows need of one MLP.

    Args:
        product_in: ``[2r + 2k, hidden]``: A_gate, A_up, and the selected rows of W_gate and W_up.
        product_out: ``[hidden, k + r]``: the selected columns of W_down, and ``scale * B_down``.
        gate_B, up_B, down_A: ``[I, r]`` (``down_A`` transposed), selected channels first.
        order: int64 ``[I]``: which channel stands at each of those places.
        k: the selected channels and, with zero base weights, as many others as bring it to a multiple of `ALIGNMENT`.
        scales: LoRA's scales of gate, up and down.
    """

    product_in: Tensor
    product_out: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    order: Tensor
    k: int
    scales: tuple[float, float, float]
    activation: str

    def unit(self, stacked: Tensor, rows: Tensor | None = None) -> Tensor:
        """``[h of the selected channels | h A_down']`` of ``rows``: `glu_forward`."""
        return glu_forward(stacked, self.gate_B, self.up_B, self.down_A, self.k, self.scales, self.activation, rows)

    def unit_backward(self, stacked: Tensor, d_unit: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`glu_backward`, for a gradient that came through `product_out` and so has its scale already."""
        scales = (*self.scales[:2], 1.0)
        return glu_backward(stacked, d_unit, self.gate_B, self.up_B, self.down_A, self.k, scales, self.activation, rows)


def fuse_weights(
    weights: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    order: Tensor,
    num_selected: int,
    scales: tuple[float, float, float],
    activation: str,
) -> FusedWeights:
    """`FusedWeights` of the selected ``weights`` (gate and up rows, down columns) and the LoRA ``pairs``.

    ``order`` are the channels of the LoRA branch, the ``num_selected`` ones of ``weights`` first.
    """
    (gate_A, gate_B), (up_A, up_B), (down_A, down_B) = pairs
    gate, up, down = weights
    k = min(triton.cdiv(num_selected, ALIGNMENT) * ALIGNMENT, len(order))
    pad = gate.new_zeros(k - num_selected, gate.shape[1])
    return FusedWeights(
        product_in=torch.cat((gate_A, up_A, gate, pad, up, pad)),
        product_out=torch.cat((down, pad.t(), down_B * scales[2]), dim=1),
        gate_B=gate_B.index_select(0, order),
        up_B=up_B.index_select(0, order),
        down_A=down_A.t().index_select(0, order),
        order=order,
        k=k,
        scales=scales,
        activation=activation,
    )


def channel_order(channels: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: ``channels`` first, then the others, both ascending; no host sync."""
    others = torch.ones(size, dtype=torch.uint8, device=channels.device).index_fill_(0, channels, 0)
    return others.argsort(stable=True)


@dataclass(frozen=True)
class FusedContextRows:
    """The gated MLP on gathered context rows, for many selected channels, or with compensation."""

    weights: FusedWeights
    compensation: Compensation | None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``y [n, hidden]``, and what backward needs: the first product ``[n, 2r + 2k]`` and ``h A_down' [n, r]``."""
        stacked = x @ self.weights.product_in.t()
        unit = self.weights.unit(stacked)
        y = unit @ self.weights.product_out.t()
        if self.compensation is not None:
            y += self.compensation.forward(x)
        return y, (stacked, unit[:, self.weights.k :].clone())

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor], gradients: list[Tensor | None]) -> Tensor:
        """``dx``; adds the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)`` into ``gradients``."""
        stacked, down_thin = saved
        weights, r = self.weights, self.weights.gate_B.shape[1]
        d_stacked, d_loras = weights.unit_backward(stacked, dy @ weights.product_out)
        dx = d_stacked @ weights.product_in
        if self.compensation is not None:
            dx += self.compensation.input_gradient(dy)
        dA = d_stacked[:, : 2 * r].t() @ x
        gate, up, down = d_loras.sum(0).to(x.dtype)
        gradients[0] += dA[:r]
        gradients[1].index_add_(0, weights.order, gate)
        gradients[2] += dA[r:]
        gradients[3].index_add_(0, weights.order, up)
        gradients[4].index_add_(1, weights.order, down.t())
        gradients[5].addmm_(dy.t(), down_thin, alpha=weights.scales[2])
        return dx


@dataclass(frozen=True)
class FusedMlp:
    """The gated MLP on all rows at once, for few selected channels.

    Args:
        partition: the roles of the rows; has context rows.
        weights: of the context rows.
        bases: gate, up, down, for the dense rows; each is dequantised where it is used and freed again.
        pairs: LoRA's ``(A, B)`` of gate, up, down, in the dtype of the products.
    """

    partition: TokenPartition
    weights: FusedWeights
    bases: Sequence[BaseWeight]
    pairs: Sequence[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``y [M, hidden]``, and what backward needs beside ``x``: the first product, ``h A_down'``, and e, g."""
        weights, partition = self.weights, self.partition
        gate_scale, up_scale, down_scale = weights.scales
        r = weights.gate_B.shape[1]
        stacked = x @ weights.product_in.t()
        unit = weights.unit(stacked, partition.context)
        if len(partition.padding):
            unit.index_fill_(0, partition.padding, 0)
        if not len(partition.dense):
            return unit @ weights.product_out.t(), (stacked, unit[:, weights.k :].clone())
        (_, gate_B), (_, up_B), (down_A, down_B) = self.pairs
        rows, thin = x.index_select(0, partition.dense), stacked[:, : 2 * r].index_select(0, partition.dense)
        e = (rows @ self.bases[0].dense(x.dtype).t()).addmm_(thin[:, :r], gate_B.t(), alpha=gate_scale)
        g = (rows @ self.bases[1].dense(x.dtype).t()).addmm_(thin[:, r:], up_B.t(), alpha=up_scale)
        h = gated_forward(e, g, weights.activation)
        thin = h @ down_A.t()
        unit[:, weights.k :].index_copy_(0, partition.dense, thin)
        dense = (h @ self.bases[2].dense(x.dtype).t()).addmm_(thin, down_B.t(), alpha=down_scale)
        down_thin = unit[:, weights.k :].clone()
        y = unit @ weights.product_out.t()
        return y.index_copy_(0, partition.dense, dense), (stacked, down_thin, e, g)

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)``."""
        stacked, down_thin, *dense_saved = saved
        weights, partition = self.weights, self.partition
        gate_scale, up_scale, down_scale = weights.scales
        r = weights.gate_B.shape[1]
        d_unit = dy @ weights.product_out
        d_stacked, d_loras = weights.unit_backward(stacked, d_unit, partition.context)
        if len(partition.padding):
            d_stacked.index_fill_(0, partition.padding, 0)
        (_, gate_B), (_, up_B), (down_A, _) = self.pairs
        gate_grad, up_grad, down_grad = (self._whole_width(part) for part in d_loras.sum(0))
        if dense_saved:
            e, g = dense_saved
            dense = partition.dense
            thin = stacked[:, : 2 * r].index_select(0, dense)
            down_dthin = d_unit[:, weights.k :].index_select(0, dense)
            dh = (dy.index_select(0, dense) @ self.bases[2].dense(x.dtype)).addmm_(down_dthin, down_A)
            h, de, dg = gated_backward(dh, e, g, weights.activation)
            d_dense = stacked.new_zeros(len(dense), stacked.shape[1])
            torch.mm(de, gate_B * gate_scale, out=d_dense[:, :r])
            torch.mm(dg, up_B * up_scale, out=d_dense[:, r : 2 * r])
            d_stacked.index_copy_(0, dense, d_dense)
            gate_grad.add_(de.t() @ thin[:, :r], alpha=gate_scale)
            up_grad.add_(dg.t() @ thin[:, r:], alpha=up_scale)
            down_grad.add_(h.t() @ down_dthin)
        dx = d_stacked @ weights.product_in
        if dense_saved:
            dx_dense = dx.index_select(0, dense).addmm_(de, self.bases[0].dense(x.dtype))
            dx_dense.addmm_(dg, self.bases[1].dense(x.dtype))
            dx.index_copy_(0, dense, dx_dense)
        dA = d_stacked[:, : 2 * r].t() @ x
        down_B_grad = (dy.t() @ down_thin).mul_(down_scale)
        return dx, [dA[:r], gate_grad, dA[r:], up_grad, down_grad.t(), down_B_grad]

    def _whole_width(self, gradient: Tensor) -> Tensor:
        """A gradient ``[places, r]`` with its channels where they belong, zero where ``lora_branch`` left them out."""
        size = self.pairs[0][1].shape[0]
        place = gradient.new_zeros if len(gradient) < size else gradient.new_empty
        return place(size, gradient.shape[1]).index_copy_(0, self.weights.order, gradient)
