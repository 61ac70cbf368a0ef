"""Q, K, V and O with few launches: the LoRA branches of all parts over all rows, base products only where they belong.

Same mathematics, and same gradients, as `sparse_unsloth.functions.linear`, for parts that all have LoRA and no
compensation, with ``lora_branch="dense"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.kernels.columns import add_columns, gather_columns
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import BaseWeight


@dataclass(frozen=True)
class FusedWeights:
    """What stays of one layer's projections from the forward to its backward.

    Args:
        A: ``[sum of ranks, in]``: the parts' A below each other.
        B: by part, ``[out, r]``, with LoRA's scale.
        selected: out-selected parts: their selected rows below each other, ``[sum of k, in]``; an in-selected part: its
            selected columns, ``[out, k]``.
        scales: LoRA's scales by part.
    """

    A: Tensor
    B: Sequence[Tensor]
    selected: Tensor
    scales: Sequence[float]


@dataclass(frozen=True)
class FusedOutSelected:
    """Several projections of one input that select output channels (Q, K, V).

    Args:
        bases: by part, for the dense rows; each is dequantised where it is used and freed again.
        biases: by part, ``[out]`` or None.
        indices: by part, int64 ``[k]``.
    """

    partition: TokenPartition
    weights: FusedWeights
    bases: Sequence[BaseWeight]
    biases: Sequence[Tensor | None]
    indices: Sequence[Tensor]

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The outputs, and ``x A'`` of all parts side by side, which backward needs."""
        dense, context, padding = self.partition.dense, self.partition.context, self.partition.padding
        thin = x @ self.weights.A.t()
        thins = thin.split([B.shape[1] for B in self.weights.B], dim=1)
        selected = x.index_select(0, context) @ self.weights.selected.t()
        selected = selected.split([len(index) for index in self.indices], dim=1)
        dense_x = x.index_select(0, dense) if len(dense) else None
        outputs = []
        for part, (B, bias) in enumerate(zip(self.weights.B, self.biases, strict=True)):
            y = thins[part] @ B.t() if bias is None else torch.addmm(bias, thins[part], B.t())
            if dense_x is not None:
                y.index_copy_(0, dense, y.index_select(0, dense).addmm_(dense_x, self.bases[part].dense(x.dtype).t()))
            add_columns(y, context, self.indices[part], selected[part])
            outputs.append(y.index_fill_(0, padding, 0) if len(padding) else y)
        return tuple(outputs), thin

    def backward(self, gradients: Sequence[Tensor], x: Tensor, thin: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``(dA, dB)`` of each part in turn."""
        dense, context, padding = self.partition.dense, self.partition.context, self.partition.padding
        if len(padding):
            gradients = [dy.index_fill(0, padding, 0) for dy in gradients]
        ranks = [B.shape[1] for B in self.weights.B]
        dthin = torch.cat([dy @ B for dy, B in zip(gradients, self.weights.B, strict=True)], dim=1)
        dx = dthin @ self.weights.A
        if len(dense):
            dx_dense = dx.index_select(0, dense)
            for dy, weight in zip(gradients, self.bases, strict=True):
                dx_dense.addmm_(dy.index_select(0, dense), weight.dense(x.dtype))
            dx.index_copy_(0, dense, dx_dense)
        d_base = x.new_empty(len(context), len(self.weights.selected))
        for dy, index, place in zip(
            gradients, self.indices, d_base.split([len(index) for index in self.indices], dim=1), strict=True
        ):
            gather_columns(dy, context, index, place)
        dx.index_copy_(0, context, dx.index_select(0, context).addmm_(d_base, self.weights.selected))
        dAs = (dthin.t() @ x).split(ranks)
        loras: list[Tensor] = []
        for dy, part_thin, dA, scale in zip(gradients, thin.split(ranks, dim=1), dAs, self.weights.scales, strict=True):
            loras += [dA, (dy.t() @ part_thin).mul_(scale)]
        return dx, loras


@dataclass(frozen=True)
class FusedInSelected:
    """One projection that selects input channels (O); arguments as in `FusedOutSelected`, of its one part."""

    partition: TokenPartition
    weights: FusedWeights
    base: BaseWeight
    bias: Tensor | None
    index: Tensor

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The output, and ``x A'``, which backward needs."""
        dense, context, padding = self.partition.dense, self.partition.context, self.partition.padding
        thin, (B,) = x @ self.weights.A.t(), self.weights.B
        y = thin @ B.t() if self.bias is None else torch.addmm(self.bias, thin, B.t())
        if len(dense):
            weight = self.base.dense(x.dtype)
            y.index_copy_(0, dense, y.index_select(0, dense).addmm_(x.index_select(0, dense), weight.t()))
        selected = gather_columns(x, context, self.index, x.new_empty(len(context), len(self.index)))
        y.index_copy_(0, context, y.index_select(0, context).addmm_(selected, self.weights.selected.t()))
        return (y.index_fill_(0, padding, 0) if len(padding) else y,), thin

    def backward(self, gradients: Sequence[Tensor], x: Tensor, thin: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``[dA, dB]``."""
        dense, context, padding = self.partition.dense, self.partition.context, self.partition.padding
        (dy,), (B,) = gradients, self.weights.B
        if len(padding):
            dy = dy.index_fill(0, padding, 0)
        dthin = dy @ B
        dx = dthin @ self.weights.A
        if len(dense):
            weight = self.base.dense(x.dtype)
            dx.index_copy_(0, dense, dx.index_select(0, dense).addmm_(dy.index_select(0, dense), weight))
        add_columns(dx, context, self.index, dy.index_select(0, context) @ self.weights.selected)
        return dx, [dthin.t() @ x, (dy.t() @ thin).mul_(self.weights.scales[0])]
