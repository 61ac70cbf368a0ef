"""Computes RMS norms and residual sums in one kernel, and sorts rows by role (docs/how-it-works.md, section 7).

`add_norm` adds a part's output, normalised first where the layer does so, to the residual stream, and normalises the
sum. `norm_backward` is its backward: the gradients of the sum and of the part's output. The stream is in natural order.
A part's input or output may be sorted by role: ``place`` (`tokens.partition.TokenPartition.place`) says where a row is.

Bytes (bf16), M rows of H: `add_norm` reads ``4 M H`` and writes ``4 M H`` (half of each without the addition or without
the norm); `norm_backward` reads ``6 M H`` and writes ``2 M H``, or ``4 M H`` where the part's gradient is not the
sum's. With a norm of the part's output it reads ``2 M H`` more, that output: root mean squares are computed again.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.tokens.partition import PADDING_PLACE


class RmsNorm(Protocol):
    """What is read of a norm (`ops.norms.Norm`): ``weight [H]`` (None: ones), and what is added to it (0 or 1)."""

    weight: Tensor | None
    eps: float
    offset: float


@triton.jit
def _row_by_role(place, row, num_dense, PADDED: tl.constexpr):
    """``(index of the row by role, whether it has one)``; its natural index where rows are not sorted."""
    number = row
    here = row >= 0
    if place is not None:
        value = tl.load(place + row)
        number = tl.where(value >= 0, value, num_dense - 1 - value)
        here = value > PADDED
    return number, here


@triton.jit
def _weighed(value, weight, o_h, m_h, OFFSET: tl.constexpr):
    """A normalised fp32 row times the norm's weight; rounded before as transformers and Unsloth do."""
    if weight is not None:
        b_weight = tl.load(weight + o_h, mask=m_h, other=0.0)
        if OFFSET == 0.0:
            value = value.to(b_weight.dtype) * b_weight
        else:
            value = value * (b_weight.to(tl.float32) + OFFSET)
    return value


@triton.jit
def _through_norm(gradient, value, root, weight, o_h, m_h, H, OFFSET: tl.constexpr):
    """The gradient of a norm's input ``value``, all in fp32."""
    if weight is not None:
        b_weight = tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            b_weight += OFFSET
        gradient *= b_weight
    value = value * root
    return root * (gradient - value * (tl.sum(gradient * value, 0) / H))


@triton.jit
def add_norm_kernel(
    stream,  # [M, H]
    added,  # [n, H] by `added_place`, or None
    added_place,  # int64 [M]; None: natural order
    added_weight,  # [H] of the added rows' norm, or None (ADDED_NORM only)
    weight,  # [H] of the sum's norm, or None: ones
    norm_place,  # int64 [M]; None: natural order
    total,  # [M, H]: the sum (with `added` only)
    normed,  # [n, H] by `norm_place`: the sum, normalised if there is a `scale`; or None
    scale,  # fp32 [M]: reciprocal root mean squares, or None: no norm
    H,
    added_dense,
    norm_dense,
    eps,
    added_eps,
    ADDED_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ADDED_OFFSET: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    dtype = stream.dtype.element_ty
    value = tl.load(stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    if added is not None:
        number, here = _row_by_role(added_place, row, added_dense, PADDED)
        part = tl.load(added + number * H + o_h, mask=m_h & here, other=0.0).to(tl.float32)
        if ADDED_NORM:
            part *= tl.math.rsqrt(tl.sum(part * part, 0) / H + added_eps)
            part = _weighed(part, added_weight, o_h, m_h, ADDED_OFFSET).to(dtype).to(tl.float32)
        if MULTIPLIER != 1.0:
            part *= MULTIPLIER
        value += part
        rounded = value.to(dtype)
        tl.store(total + row * H + o_h, rounded, mask=m_h)
        value = rounded.to(tl.float32)
    if normed is not None:
        output = value
        if scale is not None:
            root = tl.math.rsqrt(tl.sum(value * value, 0) / H + eps)
            tl.store(scale + row, root)
            output = _weighed(value * root, weight, o_h, m_h, OFFSET)
        number, here = _row_by_role(norm_place, row, norm_dense, PADDED)
        tl.store(normed + number * H + o_h, output.to(dtype), mask=m_h & here)


@triton.jit
def norm_backward_kernel(
    d_normed,  # [n, H] by `norm_place`
    norm_place,  # int64 [M]; None: natural order
    stream,  # [M, H]: the norm's input (with `scale` only)
    scale,  # fp32 [M], or None: no norm
    weight,  # [H], or None: ones
    d_stream,  # [M, H]: the gradient of the residual stream, or None
    output,  # [M, H], or None
    d_added,  # [n, H] by `added_place`: the gradient of the added rows, or None
    added_place,  # int64 [M]; None: natural order
    added,  # [n, H] by `added_place`: the input of the added rows' norm (ADDED_NORM only)
    added_weight,  # [H], or None: ones
    H,
    norm_dense,
    added_dense,
    added_eps,
    ADDED_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ADDED_OFFSET: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    dtype = d_normed.dtype.element_ty
    number, here = _row_by_role(norm_place, row, norm_dense, PADDED)
    gradient = tl.load(d_normed + number * H + o_h, mask=m_h & here, other=0.0).to(tl.float32)
    if scale is not None:
        value = tl.load(stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        gradient = _through_norm(gradient, value, tl.load(scale + row), weight, o_h, m_h, H, OFFSET)
    if d_stream is not None:
        gradient += tl.load(d_stream + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    gradient = gradient.to(dtype)
    if output is not None:
        tl.store(output + row * H + o_h, gradient, mask=m_h)
    if d_added is not None:
        number, here = _row_by_role(added_place, row, added_dense, PADDED)
        part = gradient.to(tl.float32)
        if MULTIPLIER != 1.0:
            part *= MULTIPLIER
        if ADDED_NORM:
            value = tl.load(added + number * H + o_h, mask=m_h & here, other=0.0).to(tl.float32)
            root = tl.math.rsqrt(tl.sum(value * value, 0) / H + added_eps)
            part = _through_norm(part, value, root, added_weight, o_h, m_h, H, ADDED_OFFSET)
        tl.store(d_added + number * H + o_h, part.to(dtype), mask=m_h & here)


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
    norm: RmsNorm | None,
    norm_order: Order,
    added_norm: RmsNorm | None = None,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``stream + multiplier added_norm(added)``, ``[M, H]``, its norm by role, and reciprocal root mean squares.

    Args:
        stream: ``[M, H]``, contiguous.
        added: ``[n, H]`` by ``added_order``, contiguous, or None: the sum is ``stream`` itself.
        norm: of the sum; None: the sum is sorted only.
        norm_order: the order of the norm's rows.
        added_norm: of ``added``, or None.

    Returns:
        The sum ``[M, H]``, the normalised rows ``[n, H]``, fp32 ``[M]`` (None without ``norm``).
    """
    M, H = stream.shape
    total = stream if added is None else torch.empty_like(stream)
    scale = None if norm is None else stream.new_empty(M, dtype=torch.float32)
    sum_is_normed = norm is None and norm_order.place is None
    normed = None if sum_is_normed else stream.new_empty((norm_order.size, H))
    if M and not (sum_is_normed and added is None):
        added_place, added_dense = (None, 0) if added is None else (added_order.place, added_order.num_dense)
        arguments = (
            stream, added, added_place, _weight(added_norm), _weight(norm), norm_order.place, total, normed, scale, H,
            added_dense, norm_order.num_dense, 0.0 if norm is None else norm.eps,
            0.0 if added_norm is None else added_norm.eps,
        )  # fmt: skip
        launch(add_norm_kernel, (M,), arguments, _constants(H, norm, added_norm, multiplier), _warps(H))
    return total, total if sum_is_normed else normed, scale


def add_rows(
    stream: Tensor, added: Tensor, order: Order, norm: RmsNorm | None = None, multiplier: float = 1.0
) -> Tensor:
    """``stream + multiplier norm(added)`` ``[M, H]``, with ``added [n, H]`` by ``order``; both contiguous."""
    return add_norm(stream, added, order, None, Order(None, 0, len(stream)), norm, multiplier)[0]


def norm_backward(
    d_normed: Tensor,
    norm_order: Order,
    stream: Tensor,
    scale: Tensor | None,
    norm: RmsNorm | None,
    d_stream: Tensor | None,
    added_order: Order | None = None,
    added: Tensor | None = None,
    added_norm: RmsNorm | None = None,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The gradients of `add_norm`'s sum, ``[M, H]``, and of its ``added``, ``[n, H]`` by ``added_order``.

    They are one tensor where nothing tells them apart, and without ``added_order``.

    Args:
        d_normed: ``[n, H]`` by ``norm_order``, contiguous.
        stream, scale: the sum and the reciprocal root mean squares, from `add_norm`.
        d_stream: ``[M, H]``, contiguous, read only; None: zeros.
        added: read with ``added_norm`` only.
    """
    output, d_added = torch.empty_like(stream), None
    if added_order is not None and (added_order.place is not None or added_norm is not None or multiplier != 1):
        d_added = stream.new_empty((added_order.size, stream.shape[1]))
    _launch_backward(
        d_normed, norm_order, stream, scale, norm, d_stream, output, d_added, added_order, added, added_norm, multiplier
    )
    return output, output if d_added is None else d_added


def added_backward(
    d_total: Tensor, order: Order, added: Tensor | None, norm: RmsNorm | None, multiplier: float
) -> Tensor:
    """The gradient of `add_rows`' ``added``, ``[n, H]`` by ``order``, from that of its sum.

    Args:
        d_total: ``[M, H]``, contiguous.
        added: read with ``norm`` only.
    """
    natural, d_added = Order(None, 0, len(d_total)), d_total.new_empty((order.size, d_total.shape[1]))
    _launch_backward(d_total, natural, d_total, None, None, None, None, d_added, order, added, norm, multiplier)
    return d_added


def _launch_backward(
    d_normed, norm_order, stream, scale, norm, d_stream, output, d_added, added_order, added, added_norm, multiplier
) -> None:
    M, H = stream.shape
    if not M:
        return
    place, num_dense = (None, 0) if d_added is None else (added_order.place, added_order.num_dense)
    arguments = (
        d_normed, norm_order.place, None if scale is None else stream, scale, _weight(norm), d_stream, output, d_added,
        place, None if added_norm is None else added, _weight(added_norm), H, norm_order.num_dense, num_dense,
        0.0 if added_norm is None else added_norm.eps,
    )  # fmt: skip
    launch(norm_backward_kernel, (M,), arguments, _constants(H, norm, added_norm, multiplier), _warps(H))


def _weight(norm: RmsNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _constants(H: int, norm: RmsNorm | None, added_norm: RmsNorm | None, multiplier: float) -> dict[str, object]:
    return {
        "ADDED_NORM": added_norm is not None, "OFFSET": 0.0 if norm is None else norm.offset,
        "ADDED_OFFSET": 0.0 if added_norm is None else added_norm.offset, "MULTIPLIER": multiplier,
        "BLOCK": max(16, 1 << (H - 1).bit_length()), "PADDED": PADDING_PLACE,
    }  # fmt: skip


def reference_add_norm(
    stream, added, added_order, norm, norm_order, added_norm=None, multiplier=1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`add_norm` in plain PyTorch; padding rows of the norm are left out."""
    if added is not None:
        added = to_natural(added if added_norm is None else _normalised(added, added_norm)[0], added_order, stream)
    total = stream if added is None else stream + multiplier * added
    normed, scale = (total, None) if norm is None else _normalised(total, norm)
    return total, _by_role(normed, norm_order), scale


def reference_norm_backward(
    d_normed, norm_order, stream, scale, norm, d_stream, added_order=None, added=None, added_norm=None, multiplier=1.0
) -> tuple[Tensor, Tensor]:
    """`norm_backward` in plain PyTorch, in the dtype of its inputs."""
    gradient = to_natural(d_normed, norm_order, stream)
    if norm is not None:
        gradient = _normalised_backward(gradient, stream, scale[:, None].to(stream.dtype), norm)
    gradient = gradient if d_stream is None else gradient + d_stream
    part = gradient if added_order is None else multiplier * _by_role(gradient, added_order)
    if added_norm is not None:
        root = (added.square().mean(1, keepdim=True) + added_norm.eps).rsqrt()
        part = _normalised_backward(part, added, root, added_norm)
    return gradient, part


def _normalised(value: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    exact = value.float() if value.dtype != torch.float64 else value
    scale = (exact.square().mean(1) + norm.eps).rsqrt()
    exact = exact * scale[:, None]
    if norm.weight is not None:
        rounded = exact.to(norm.weight.dtype) * norm.weight
        exact = exact * (norm.offset + norm.weight.to(exact.dtype)) if norm.offset else rounded
    return exact.to(value.dtype), scale


def _normalised_backward(gradient: Tensor, value: Tensor, scale: Tensor, norm: RmsNorm) -> Tensor:
    gradient = gradient if norm.weight is None else gradient * (norm.offset + norm.weight)
    value = value * scale
    return scale * (gradient - value * (gradient * value).mean(1, keepdim=True))


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


def _warps(size: int) -> int:
    return 4 if size <= 2048 else 8
