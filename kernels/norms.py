"""Computes RMS norms and residual sums in one kernel, and sorts rows by role (docs/how-it-works.md, section 7).

`add_norm` adds a part's output to the residual stream and normalises the sum. `norm_backward` computes the gradient of
the norm and adds it to that of the residual stream. The stream is in natural order. A part's input or output may be
sorted by role: ``place`` (`tokens.partition.TokenPartition.place`) says where a row is then.

Bytes (bf16), M rows of H: `add_norm` reads ``4 M H`` and writes ``4 M H`` (half of each without the addition or without
the norm); `norm_backward` reads ``6 M H`` and writes ``2 M H``, or ``4 M H`` with the second copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.tokens.partition import PADDING_PLACE


@triton.jit
def _row_by_role(place, row, num_dense, PLACED: tl.constexpr, PADDED: tl.constexpr):
    """``(index of the row by role, whether it has one)``; its natural index where rows are not sorted."""
    number = row
    here = row >= 0
    if PLACED:
        value = tl.load(place + row)
        number = tl.where(value >= 0, value, num_dense - 1 - value)
        here = value > PADDED
    return number, here


@triton.jit
def add_norm_kernel(
    stream,  # [M, H]
    added,  # [n, H] by `added_place` (ADD only)
    added_place,  # int64 [M] (ADDED_PLACED only)
    weight,  # [H] (NORM only)
    norm_place,  # int64 [M] (NORM_PLACED only)
    total,  # [M, H]: the sum (ADD only)
    normed,  # [n, H] by `norm_place` (NORM only)
    scale,  # fp32 [M]: reciprocal root mean squares (NORM only)
    H,
    added_dense,
    norm_dense,
    eps,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    ADDED_PLACED: tl.constexpr,
    NORM_PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    dtype = stream.dtype.element_ty
    value = tl.load(stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    if ADD:
        number, here = _row_by_role(added_place, row, added_dense, ADDED_PLACED, PADDED)
        value += tl.load(added + number * H + o_h, mask=m_h & here, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + row * H + o_h, rounded, mask=m_h)
        value = rounded.to(tl.float32)
    if NORM:
        root = tl.math.rsqrt(tl.sum(value * value, 0) / H + eps)
        tl.store(scale + row, root)
        b_weight = tl.load(weight + o_h, mask=m_h, other=0.0)
        output = (value * root).to(b_weight.dtype) * b_weight  # rounded as transformers and Unsloth do
        number, here = _row_by_role(norm_place, row, norm_dense, NORM_PLACED, PADDED)
        tl.store(normed + number * H + o_h, output.to(dtype), mask=m_h & here)


@triton.jit
def norm_backward_kernel(
    d_normed,  # [n, H] by `norm_place`
    norm_place,  # int64 [M] (NORM_PLACED only)
    stream,  # [M, H]: the norm's input
    scale,  # fp32 [M]
    weight,  # [H]
    d_stream,  # [M, H]: the gradient of the residual stream
    output,  # [M, H]
    copy,  # [n, H] by `copy_place`: a copy of the output (COPY only)
    copy_place,  # int64 [M] (COPY only)
    H,
    norm_dense,
    copy_dense,
    NORM_PLACED: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    number, here = _row_by_role(norm_place, row, norm_dense, NORM_PLACED, PADDED)
    gradient = tl.load(d_normed + number * H + o_h, mask=m_h & here, other=0.0).to(tl.float32)
    gradient *= tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    root = tl.load(scale + row)
    value = tl.load(stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32) * root
    gradient = root * (gradient - value * (tl.sum(gradient * value, 0) / H))
    gradient += tl.load(d_stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    gradient = gradient.to(output.dtype.element_ty)
    tl.store(output + row * H + o_h, gradient, mask=m_h)
    if COPY:
        number, here = _row_by_role(copy_place, row, copy_dense, True, PADDED)
        tl.store(copy + number * H + o_h, gradient, mask=m_h & here)


class Order:
    """The order of a part's rows: loss tokens, then context tokens, without padding tokens; or the natural order.

    Args:
        place: int64 ``[M]``, as `TokenPartition.place`; None for the natural order.
        num_dense: the number of loss tokens.
        size: the number of loss and context tokens.
    """

    __slots__ = ("num_dense", "place", "size")

    def __init__(self, place: Tensor | None, num_dense: int, size: int):
        self.place, self.num_dense, self.size = place, num_dense, size


def add_norm(
    stream: Tensor,
    added: Tensor | None,
    added_order: Order | None,
    weight: Tensor,
    eps: float,
    norm_order: Order,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(stream + added [M, H], its RMS norm by role [n, H], reciprocal root mean squares fp32 [M])``.

    Args:
        stream: ``[M, H]``, contiguous.
        added: ``[n, H]`` by ``added_order``, contiguous, or None: the sum is ``stream`` itself.
        weight: ``[H]``.
        norm_order: the order of the norm's rows.
        normed: ``[n, H]``, contiguous: written if given, otherwise a new tensor is.
    """
    M, H = stream.shape
    total = stream if added is None else torch.empty_like(stream)
    normed = stream.new_empty((norm_order.size, H)) if normed is None else normed
    scale = stream.new_empty(M, dtype=torch.float32)
    _launch_add_norm(stream, added, added_order, weight, eps, norm_order, total, normed, scale)
    return total, normed, scale


def add_rows(stream: Tensor, added: Tensor, order: Order) -> Tensor:
    """``stream + added`` ``[M, H]``, with ``added [n, H]`` by ``order``; both contiguous."""
    total = torch.empty_like(stream)
    _launch_add_norm(stream, added, order, None, 0.0, None, total, None, None)
    return total


def norm_backward(
    d_normed: Tensor,
    norm_order: Order,
    stream: Tensor,
    scale: Tensor,
    weight: Tensor,
    d_stream: Tensor,
    copy_order: Order | None = None,
    output: Tensor | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of `add_norm`'s sum, ``[M, H]``, and a copy of it sorted by ``copy_order`` (or the same tensor).

    Args:
        d_normed: ``[n, H]`` by ``norm_order``, contiguous.
        stream, scale: the sum and the reciprocal root mean squares, from `add_norm`.
        d_stream: ``[M, H]``, contiguous, read only.
        output, copy: written if given, otherwise new tensors are.
    """
    M, H = stream.shape
    output = torch.empty_like(stream) if output is None else output
    copies = copy_order is not None and copy_order.place is not None
    if not copies:
        copy = output
    elif copy is None:
        copy = stream.new_empty((copy_order.size, H))
    if M:
        arguments = (
            d_normed, norm_order.place, stream, scale, weight, d_stream, output, copy,
            copy_order.place if copies else None, H, norm_order.num_dense, copy_order.num_dense if copies else 0,
        )  # fmt: skip
        constants = {
            "NORM_PLACED": norm_order.place is not None, "COPY": copies, "BLOCK": _block(H), "PADDED": PADDING_PLACE
        }  # fmt: skip
        launch(norm_backward_kernel, (M,), arguments, constants, _warps(H))
    return output, copy


def _launch_add_norm(stream, added, added_order, weight, eps, norm_order, total, normed, scale) -> None:
    M, H = stream.shape
    if not M:
        return
    added_place, added_dense = (None, 0) if added is None else (added_order.place, added_order.num_dense)
    norm_place, norm_dense = (None, 0) if norm_order is None else (norm_order.place, norm_order.num_dense)
    arguments = (
        stream, added, added_place, weight, norm_place, total, normed, scale, H, added_dense, norm_dense, eps,
    )  # fmt: skip
    constants = {
        "ADD": added is not None, "NORM": norm_order is not None, "ADDED_PLACED": added_place is not None,
        "NORM_PLACED": norm_place is not None, "BLOCK": _block(H), "PADDED": PADDING_PLACE,
    }  # fmt: skip
    launch(add_norm_kernel, (M,), arguments, constants, _warps(H))


def reference_add_norm(stream, added, added_order, weight, eps, norm_order) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm` in plain PyTorch; padding rows of the norm are left out."""
    total = stream if added is None else stream + to_natural(added, added_order, stream)
    value = total.float() if total.dtype != torch.float64 else total
    scale = (value.square().mean(1) + eps).rsqrt()
    normed = (value * scale[:, None]).to(weight.dtype) * weight
    return total, _by_role(normed.to(stream.dtype), norm_order), scale


def reference_norm_backward(d_normed, norm_order, stream, scale, weight, d_stream, copy_order=None):
    """`norm_backward` in plain PyTorch, in the dtype of its inputs."""
    gradient = to_natural(d_normed, norm_order, stream) * weight
    value = stream * scale[:, None].to(stream.dtype)
    gradient = scale[:, None].to(stream.dtype) * (gradient - value * (gradient * value).mean(1, keepdim=True))
    gradient = gradient + d_stream
    return gradient, gradient if copy_order is None else _by_role(gradient, copy_order)


def _numbers(order: Order) -> tuple[Tensor, Tensor]:
    """``(natural index, index by role)`` of the loss and context tokens."""
    rows = (order.place > PADDING_PLACE).nonzero().squeeze(1)
    place = order.place[rows]
    return rows, torch.where(place >= 0, place, order.num_dense - 1 - place)


def to_natural(values: Tensor, order: Order, like: Tensor) -> Tensor:
    """``values [n, H]`` by ``order`` in natural order, ``[M, H]``; padding rows are zero."""
    if order.place is None:
        return values
    rows, numbers = _numbers(order)
    return torch.zeros_like(like).index_copy(0, rows, values[numbers])


def _by_role(values: Tensor, order: Order) -> Tensor:
    if order.place is None:
        return values
    rows, numbers = _numbers(order)
    return values.new_empty((order.size, values.shape[1])).index_copy(0, numbers, values[rows])


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _warps(size: int) -> int:
    return 4 if size <= 2048 else 8
