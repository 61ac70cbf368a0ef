"""Computes Q, K, V and O with few launches, by stacked weights and rows sorted by role.

See docs/how-it-works.md, section 7. Outputs and gradients are those of `sparse_unsloth.ops.linear`, for one to three
projections with LoRA of one rank. Q, K, V take rows sorted by role and return natural order; O takes natural order and
returns rows sorted by role (`sparse_unsloth.kernels.columns`); backward is the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_unsloth.kernels.columns import join_columns, split_columns
from sparse_unsloth.kernels.lora import pack_linear
from sparse_unsloth.ops.fp8 import Fp8Stack
from sparse_unsloth.ops.projection import BaseWeight
from sparse_unsloth.ops.weight_stack import WeightStack, product_fp32, stack_columns, stack_rows
from sparse_unsloth.tokens.partition import TokenPartition


class FusedQKV:
    """Projections of one input that select output channels (Q, K, V), for one forward and its backward.

    Args:
        partition: the token roles.
        bases: by projection; 4-bit weights are dequantised where they are used and freed again.
        loras: A and B of each projection in turn.
        scales: LoRA scales, by projection.
        indices: by projection, int64 ``[k]``, ascending: the channels that context tokens keep.
        dtype: of the matmuls.
        keep: whether the stacks are stacks for backward (in a recompute, whose backward comes next).
        fp8: whether the frozen weights are multiplied in FP8, for loss tokens and for context tokens. Those then keep
            all channels.
    """

    def __init__(
        self,
        partition: TokenPartition,
        bases: Sequence[BaseWeight],
        loras: Sequence[Tensor],
        scales: Sequence[float],
        indices: Sequence[Tensor],
        dtype: torch.dtype,
        keep: bool = False,
        fp8: tuple[bool, bool] = (False, False),
    ):
        self.partition, self.bases, self.scales, self.indices, self.dtype = partition, bases, scales, indices, dtype
        self.fp8 = fp8
        self.widths, self.counts = [base.shape[0] for base in bases], [len(index) for index in indices]
        self.A, self.B = _pack(loras, scales, dtype)
        self.index = indices[0] if len(indices) == 1 else torch.cat(list(indices))
        self._stacks: dict[bool, WeightStack | Fp8Stack] | None = {} if keep else None

    def forward_natural(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """`forward` of rows in natural order, ``x [M, in_features]``."""
        return self.forward(x.index_select(0, self.partition.rows))

    def backward_natural(self, gradients: Sequence[Tensor], x: Tensor, xA: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`backward` of rows in natural order: ``dx [M, in_features]``."""
        rows = self.partition.rows
        sorted_dx, loras = self.backward(gradients, x.index_select(0, rows), xA)
        return place_rows(sorted_dx, self.partition, x), loras

    def forward(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """The outputs, ``[M, width]`` each, and ``xA`` of all projections side by side, which backward needs.

        Args:
            x: ``[n, in_features]``, sorted by role.
        """
        partition, products = self.partition, []
        for rows, indices in _rows_of_roles(partition, self.indices):
            stack = self._stack(indices) if rows.stop > rows.start else None
            width = len(self.A) + sum(self.widths if indices is None else self.counts)
            products.append(x.new_empty((0, width)) if stack is None else stack.matmul(x[rows]))
        bias = None
        if any(base.bias is not None for base in self.bases):
            bias = torch.cat([
                x.new_zeros(base.shape[0]) if base.bias is None else base.bias.detach().to(x.dtype)
                for base in self.bases
            ])  # fmt: skip
        return join_columns(self.B, *products, partition.place, self.index, self.widths, self.counts, bias)

    def backward(self, gradients: Sequence[Tensor], x: Tensor, xA: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx [n, in_features]`` sorted by role, and the LoRA gradients ``(dA, dB)`` of each projection in turn."""
        partition, xA_width = self.partition, len(self.A)
        r = xA_width // len(self.bases)
        gradients = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in gradients]
        if partition.num_padding:
            gradients = [dy.index_fill(0, partition.padding, 0) for dy in gradients]
        d_xA = torch.empty_like(xA)
        for dy, B, out in zip(gradients, self.B.split(self.widths), d_xA.split(r, dim=1), strict=True):
            torch.mm(dy, B, out=out)
        split = split_columns(d_xA, gradients, partition.rows, partition.num_dense, self.index, self.counts)
        dx, dA = x.new_empty(x.shape), None
        for (rows, indices), dy in zip(_rows_of_roles(partition, self.indices), split, strict=True):
            if rows.stop > rows.start:
                self._stack(indices).matmul_transposed(dy, out=dx[rows])
                product = product_fp32(dy[:, :xA_width].t(), x[rows])
                dA = product if dA is None else dA.add_(product)
        loras: list[Tensor] = []
        parts = zip(gradients, xA.split(r, dim=1), dA.split(r), self.scales, strict=True)
        for dy, part_xA, part_dA, scale in parts:
            loras += [part_dA if scale == 1 else part_dA.mul_(scale), product_fp32(dy.t(), part_xA)]
        return dx, loras

    def _stack(self, indices: Sequence[Tensor] | None) -> WeightStack | Fp8Stack:
        def make() -> WeightStack | Fp8Stack:
            fp8 = self.fp8[indices is not None]
            stack = stack_rows(self.bases, len(self.A), self.dtype, None if fp8 else indices, fp8=fp8)
            stack.lora_rows.copy_(self.A)
            return stack

        return _cached(self._stacks, indices is None, make)


class FusedOutputProjection:
    """One projection that selects input channels (O); arguments as in `FusedQKV`, for one projection."""

    def __init__(
        self,
        partition: TokenPartition,
        base: BaseWeight,
        loras: Sequence[Tensor],
        scale: float,
        index: Tensor,
        dtype: torch.dtype,
        keep: bool = False,
        fp8: tuple[bool, bool] = (False, False),
    ):
        self.partition, self.base, self.scale, self.index, self.dtype = partition, base, scale, index, dtype
        self.fp8 = fp8
        self.A, self.B = _pack(loras, [scale], dtype)
        self._stacks: dict[bool, WeightStack | Fp8Stack] | None = {} if keep else None

    def forward_natural(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """`forward` with the output in natural order, ``[M, out_features]``."""
        y, xA = self.forward(x)
        return [place_rows(y, self.partition, x)], xA

    def backward_natural(self, gradients: Sequence[Tensor], x: Tensor, xA: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`backward` from the gradient in natural order only."""
        (dy,) = gradients
        return self.backward(dy, dy.index_select(0, self.partition.rows), x, xA)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output ``[n, out_features]`` sorted by role, bias included, and ``xA``, which backward needs.

        Args:
            x: ``[M, in_features]``, in natural order.
        """
        partition, bias = self.partition, self.base.bias
        x = x if x.stride(-1) == 1 else x.contiguous()
        xA = x @ self.A.t()
        if partition.num_padding:
            xA.index_fill_(0, partition.padding, 0)
        split = split_columns(xA, [x], partition.rows, partition.num_dense, self.index, [len(self.index)])
        y = x.new_empty((len(partition.rows), self.base.shape[0]))
        for (rows, index), part in zip(_rows_of_roles(partition, self.index), split, strict=True):
            if rows.stop > rows.start:
                self._stack(index).matmul_transposed(part, out=y[rows])
        return y if bias is None else y.add_(bias.detach().to(y.dtype)), xA

    def backward(self, dy: Tensor | None, sorted_dy: Tensor, x: Tensor, xA: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``dx [M, in_features]`` and the LoRA gradients ``[dA, dB]``.

        Args:
            dy: ``[M, out_features]`` in natural order, if the caller has it.
            sorted_dy: ``[n, out_features]``: the same sorted by role.
        """
        partition, products = self.partition, []
        xA_width, width = xA.shape[1], x.shape[1]
        for rows, index in _rows_of_roles(partition, self.index):
            columns = xA_width + (width if index is None else len(index))
            exist = rows.stop > rows.start
            products.append(self._stack(index).matmul(sorted_dy[rows]) if exist else xA.new_empty((0, columns)))
        (dx,), d_xA = join_columns(self.A.t(), *products, partition.place, self.index, [width], [len(self.index)])
        dA = product_fp32(d_xA.t(), x)
        if dy is None:  # xA is narrow, so its rows are sorted
            dy, xA = sorted_dy, xA.index_select(0, partition.rows)
        return dx, [dA if self.scale == 1 else dA.mul_(self.scale), product_fp32(dy.t(), xA)]

    def _stack(self, index: Tensor | None) -> WeightStack | Fp8Stack:
        def make() -> WeightStack | Fp8Stack:
            fp8 = self.fp8[index is not None]
            stack = stack_columns(self.base, len(self.A), self.dtype, None if fp8 else index, fp8=fp8)
            stack.lora_rows.copy_(self.B.t())
            return stack

        return _cached(self._stacks, index is None, make)


def _rows_of_roles(partition: TokenPartition, selected):
    """``(sorted rows, None)`` of the loss tokens, then ``(sorted rows, selected)`` of the context tokens."""
    num_dense = partition.num_dense
    return (slice(0, num_dense), None), (slice(num_dense, num_dense + partition.num_context), selected)


def _cached(
    stacks: dict[bool, WeightStack | Fp8Stack] | None, is_dense: bool, make: Callable[[], WeightStack | Fp8Stack]
) -> WeightStack | Fp8Stack:
    """``make()``, or its earlier result if results are stacks."""
    if stacks is None:
        return make()
    if is_dense not in stacks:
        stacks[is_dense] = make()
    return stacks[is_dense]


def place_rows(values: Tensor, partition: TokenPartition, like: Tensor) -> Tensor:
    """``values [n, width]`` sorted by role, back in natural order ``[M, width]``; padding rows are zero."""
    shape = (like.shape[0], values.shape[1])
    target = values.new_zeros(shape) if partition.num_padding else values.new_empty(shape)
    return target.index_copy_(0, partition.rows, values)


def _pack(loras: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    As, Bs = ([lora.detach().contiguous() for lora in side] for side in (loras[::2], loras[1::2]))
    return pack_linear(As, Bs, scales, dtype)
