"""Q, K, V and O with few launches: LoRA over all rows, base products over compact dense and context rows.

Same mathematics, and same gradients, as `sparse_unsloth.functions.linear`, for one to three parts that all have LoRA of
one rank, and no compensation, with ``lora_branch="dense"``. The way in splits rows by role, the way out joins them
(`sparse_unsloth.kernels.columns`): Q, K, V join their outputs, O splits its input; backward mirrors that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_unsloth.functions.products import product_fp32
from sparse_unsloth.kernels.columns import add_rows, join_columns, split_columns
from sparse_unsloth.kernels.lora import pack_linear
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import BaseWeight


class FusedOutSelected:
    """Several projections of one input that select output channels (Q, K, V), for one forward and its backward.

    Args:
        partition: the roles of the rows; has context rows.
        bases: by part; each is dequantised where it is used and freed again.
        loras: A and B of each part in turn.
        scales: LoRA's, by part.
        indices: by part, int64 ``[k]``, ascending.
        dtype: of the products.
    """

    def __init__(
        self,
        partition: TokenPartition,
        bases: Sequence[BaseWeight],
        loras: Sequence[Tensor],
        scales: Sequence[float],
        indices: Sequence[Tensor],
        dtype: torch.dtype,
    ):
        self.partition, self.bases, self.scales = partition, bases, scales
        self.widths, self.counts = [base.shape[0] for base in bases], [len(index) for index in indices]
        self.A, self.B = _pack(loras, scales, dtype)
        self.index = indices[0] if len(indices) == 1 else torch.cat(list(indices))
        self.selected = self.A.new_empty((sum(self.counts), self.A.shape[1]))
        for base, index, out in zip(bases, indices, self.selected.split(self.counts), strict=True):
            base.rows(index, dtype, out=out)

    def forward(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """The outputs, and ``x A'`` of all parts side by side, which backward needs."""
        partition = self.partition
        thin = x @ self.A.t()
        compact = x.index_select(0, partition.rows)
        context = compact[partition.num_dense :] @ self.selected.t()
        dense = x.new_empty((partition.num_dense, sum(self.widths)))
        if partition.num_dense:
            for base, out in zip(self.bases, dense.split(self.widths, dim=1), strict=True):
                torch.mm(compact[: partition.num_dense], base.dense(x.dtype).t(), out=out)
        bias = None
        if any(base.bias is not None for base in self.bases):
            bias = torch.cat([
                x.new_zeros(base.shape[0]) if base.bias is None else base.bias.detach().to(x.dtype)
                for base in self.bases
            ])  # fmt: skip
        outputs = join_columns(
            thin, self.B, dense, context, partition.place, self.index, self.widths, self.counts, bias
        )
        return outputs, thin

    def backward(self, gradients: Sequence[Tensor], x: Tensor, thin: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``(dA, dB)`` of each part in turn."""
        partition, r = self.partition, self.A.shape[0] // len(self.bases)
        gradients = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in gradients]
        if partition.num_padding:
            gradients = [dy.index_fill(0, partition.padding, 0) for dy in gradients]
        dense, context = split_columns(gradients, partition.rows, partition.num_dense, self.index, self.counts)
        d_thin = torch.empty_like(thin)
        for dy, B, out in zip(gradients, self.B.split(self.widths), d_thin.split(r, dim=1), strict=True):
            torch.mm(dy, B, out=out)
        compact = x.new_empty((len(partition.rows), x.shape[1]))
        torch.mm(context, self.selected, out=compact[partition.num_dense :])
        if partition.num_dense:
            target = compact[: partition.num_dense]
            for part, (dy, base) in enumerate(zip(dense.split(self.widths, dim=1), self.bases, strict=True)):
                weight = base.dense(x.dtype)
                target = target.addmm_(dy, weight) if part else torch.mm(dy, weight, out=target)
        dx = add_rows(d_thin @ self.A, partition.rows, compact)
        dAs = product_fp32(d_thin.t(), x).split(r)
        loras: list[Tensor] = []
        for dy, part_thin, dA, scale in zip(gradients, thin.split(r, dim=1), dAs, self.scales, strict=True):
            loras += [dA if scale == 1 else dA.mul_(scale), product_fp32(dy.t(), part_thin)]
        return dx, loras


class FusedInSelected:
    """One projection that selects input channels (O); arguments as in `FusedOutSelected`, of its one part."""

    def __init__(
        self,
        partition: TokenPartition,
        base: BaseWeight,
        loras: Sequence[Tensor],
        scale: float,
        index: Tensor,
        dtype: torch.dtype,
    ):
        self.partition, self.base, self.scale, self.index = partition, base, scale, index
        self.A, self.B = _pack(loras, [scale], dtype)
        self.selected = self.A.new_empty((base.shape[0], len(index)))
        base.columns(index, dtype, out=self.selected)

    def forward(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """The output, and ``x A'``, which backward needs."""
        partition, bias = self.partition, self.base.bias
        x = x if x.stride(-1) == 1 else x.contiguous()
        thin = x @ self.A.t()
        dense, context = split_columns([x], partition.rows, partition.num_dense, self.index, [len(self.index)])
        compact = x.new_empty((len(partition.rows), self.base.shape[0]))
        torch.mm(context, self.selected.t(), out=compact[partition.num_dense :])
        if partition.num_dense:
            torch.mm(dense, self.base.dense(x.dtype).t(), out=compact[: partition.num_dense])
        y = thin @ self.B.t() if bias is None else torch.addmm(bias.detach().to(x.dtype), thin, self.B.t())
        add_rows(y, partition.rows, compact)
        return [y.index_fill_(0, partition.padding, 0) if partition.num_padding else y], thin

    def backward(self, gradients: Sequence[Tensor], x: Tensor, thin: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx`` and the LoRA gradients ``[dA, dB]``."""
        partition, (dy,) = self.partition, gradients
        if partition.num_padding:
            dy = dy.index_fill(0, partition.padding, 0)
        d_thin = dy @ self.B
        compact = dy.index_select(0, partition.rows)
        context = compact[partition.num_dense :] @ self.selected
        dense = x.new_empty((partition.num_dense, x.shape[1]))
        if partition.num_dense:
            torch.mm(compact[: partition.num_dense], self.base.dense(x.dtype), out=dense)
        (dx,) = join_columns(
            d_thin, self.A.t(), dense, context, partition.place, self.index, [x.shape[1]], [len(self.index)]
        )
        dA = product_fp32(d_thin.t(), x)
        return dx, [dA if self.scale == 1 else dA.mul_(self.scale), product_fp32(dy.t(), thin)]


def _pack(loras: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    As, Bs = ([lora.detach().contiguous() for lora in side] for side in (loras[::2], loras[1::2]))
    return pack_linear(As, Bs, scales, dtype)
