"""Computes the gated unit without ``[N, I]`` intermediates (docs/how-it-works.md, sections 4.1 and 7).

The LoRA branch covers all ``I`` channels, the base product the first ``k``. For context tokens the channels are
reordered: the ``k`` selected ones come first. Where ``k`` is ``I``, `sparse_unsloth.kernels.gated_lora` is faster. Per
row

    e = gate_xA gate_B' (+ gate_base on the first k channels),   g likewise,   h = act(e) * g

and the results are ``h[:, :k]`` and ``h down_A'``. LoRA scales are folded into ``gate_xA``, ``up_xA`` and ``down_A``.
Backward recomputes ``e, g, h`` twice: one kernel loops over channels per row tile, one over rows per channel tile.
There are no atomics.

Bytes (bf16): forward reads ``2 N (2r + 2k)`` and the small LoRA matrices (L2), writes ``2 N (k + r)``; backward reads
``4 N (3r + 3k)`` and writes ``2 N (2r + 2k)``. Arithmetic is ``6 N I r`` tensor-core FLOPs forward, ``22 N I r``
backward, and about 20 elementwise operations per ``N I`` and pass, which are the limit where k is small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_unsloth.kernels.activation import KINDS, activation
from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.model.activations import ACTIVATIONS

TILES = {"forward": (64, 64), "streamed": (32, 64), "rows": (64, 64), "channels": (64, 64)}
"""Rows and channels of a tile. Of sixteen tiles these are the best, or within 3 % of it, on an H200 with Llama-3-8B's
sizes. With many selected channels the forward streams their base products and uses "streamed"."""
FEW_CHANNELS = 1024
"""Up to so many selected channels the forward uses the tile "forward"."""
ALIGNMENT = 16
"""`k` should be a multiple of this, so that rows of the stacked products stay aligned for wide loads."""


@triton.jit
def low_rank(pointer, stride, o_row, m_row, r, R: tl.constexpr):
    """``[rows, R]`` of a matrix with ``r`` columns; further columns are zero."""
    o_r = tl.arange(0, R)
    return tl.load(
        pointer + o_row[:, None].to(tl.int64) * stride + o_r[None, :],
        mask=m_row[:, None] & (o_r[None, :] < r),
        other=0.0,
    )


@triton.jit
def _base(pointer, stride, o_row, m_row, o_channel, k):
    """``[rows, channels]`` of the base products; zero on channels without one."""
    return tl.load(
        pointer + o_row[:, None].to(tl.int64) * stride + o_channel[None, :],
        mask=m_row[:, None] & (o_channel[None, :] < k),
        other=0.0,
    ).to(tl.float32)


@triton.jit
def glu_fwd_kernel(
    xA,  # [N, >= 2r]: gate_xA | up_xA
    gate_base,  # [N, k]
    up_base,  # [N, k]
    gate_B,  # [I, r]
    up_B,  # [I, r]
    down_A,  # [I, r]: down_A transposed
    output,  # h [N, k]
    partial,  # fp32 [SPLITS, N, r]: h down_A' over the channels of a split
    N,
    I,
    k,
    r,
    xA_stride,
    base_stride,
    output_stride,
    channels_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_row < N
    i_split = tl.program_id(1)
    b_gate_xA = low_rank(xA, xA_stride, o_row, m_row, r, R)  # [TILE_N, R]
    b_up_xA = low_rank(xA + r, xA_stride, o_row, m_row, r, R)
    total = tl.zeros([TILE_N, R], dtype=tl.float32)
    start = i_split * channels_per_split
    for i_channel in range(start, min(start + channels_per_split, I), TILE_I):
        o_channel = i_channel + tl.arange(0, TILE_I)
        m_channel = o_channel < I
        b_gate = low_rank(gate_B, r, o_channel, m_channel, r, R)  # [TILE_I, R]
        b_up = low_rank(up_B, r, o_channel, m_channel, r, R)
        e = tl.dot(b_gate_xA, tl.trans(b_gate), input_precision=PRECISION)  # [TILE_N, TILE_I]
        g = tl.dot(b_up_xA, tl.trans(b_up), input_precision=PRECISION)
        if i_channel < k:
            e += _base(gate_base, base_stride, o_row, m_row, o_channel, k)
            g += _base(up_base, base_stride, o_row, m_row, o_channel, k)
        value, _ = activation(e, KIND)
        h = (value * g).to(output.dtype.element_ty)
        if i_channel < k:
            tl.store(
                output + o_row[:, None].to(tl.int64) * output_stride + o_channel[None, :],
                h,
                mask=m_row[:, None] & (o_channel[None, :] < k),
            )
        total += tl.dot(h, low_rank(down_A, r, o_channel, m_channel, r, R), input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_row[:, None] & (o_r[None, :] < r)
    at = partial + (i_split.to(tl.int64) * N + o_row[:, None]) * r + o_r[None, :]
    tl.store(at, total, mask=mask)


@triton.jit
def glu_bwd_rows_kernel(
    xA,
    gate_base,
    up_base,
    d_down_xA,  # [N, r]: the gradient of h down_A'
    d_h,  # [N, k]: the gradient of h[:, :k]
    gate_B,
    up_B,
    down_A,  # [I, r] each; all of these as in the forward
    d_gate_base,  # [N, k]; may be gate_base itself
    d_up_base,
    partial,  # fp32 [SPLITS, N, width]: d gate_xA | d up_xA (| h down_A', DOWN) over the channels of a split
    N,
    I,
    k,
    r,
    xA_stride,
    base_stride,
    d_down_xA_stride,
    d_h_stride,
    d_base_stride,
    channels_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    PRECISION: tl.constexpr,
    DOWN: tl.constexpr,
):
    o_row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_row < N
    i_split = tl.program_id(1)
    dtype = d_gate_base.dtype.element_ty
    b_gate_xA = low_rank(xA, xA_stride, o_row, m_row, r, R)
    b_up_xA = low_rank(xA + r, xA_stride, o_row, m_row, r, R)
    b_down_xA = low_rank(d_down_xA, d_down_xA_stride, o_row, m_row, r, R)
    d_gate = tl.zeros([TILE_N, R], dtype=tl.float32)
    d_up = tl.zeros([TILE_N, R], dtype=tl.float32)
    total = tl.zeros([TILE_N, R], dtype=tl.float32)
    start = i_split * channels_per_split
    for i_channel in range(start, min(start + channels_per_split, I), TILE_I):
        o_channel = i_channel + tl.arange(0, TILE_I)
        m_channel = o_channel < I
        b_gate = low_rank(gate_B, r, o_channel, m_channel, r, R)
        b_up = low_rank(up_B, r, o_channel, m_channel, r, R)
        b_down = low_rank(down_A, r, o_channel, m_channel, r, R)
        e = tl.dot(b_gate_xA, tl.trans(b_gate), input_precision=PRECISION)
        g = tl.dot(b_up_xA, tl.trans(b_up), input_precision=PRECISION)
        dh = tl.dot(b_down_xA, tl.trans(b_down), input_precision=PRECISION)
        if i_channel < k:
            e += _base(gate_base, base_stride, o_row, m_row, o_channel, k)
            g += _base(up_base, base_stride, o_row, m_row, o_channel, k)
            dh += _base(d_h, d_h_stride, o_row, m_row, o_channel, k)
        value, slope = activation(e, KIND)
        de = (dh * g * slope).to(dtype)
        dg = (dh * value).to(dtype)
        if i_channel < k:
            at = o_row[:, None].to(tl.int64) * d_base_stride + o_channel[None, :]
            mask = m_row[:, None] & (o_channel[None, :] < k)
            tl.store(d_gate_base + at, de, mask=mask)
            tl.store(d_up_base + at, dg, mask=mask)
        d_gate += tl.dot(de, b_gate, input_precision=PRECISION)
        d_up += tl.dot(dg, b_up, input_precision=PRECISION)
        if DOWN:
            total += tl.dot((value * g).to(dtype), b_down, input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_row[:, None] & (o_r[None, :] < r)
    width = (3 if DOWN else 2) * r
    at = partial + (i_split.to(tl.int64) * N + o_row[:, None]) * width + o_r[None, :]
    tl.store(at, d_gate, mask=mask)
    tl.store(at + r, d_up, mask=mask)
    if DOWN:
        tl.store(at + 2 * r, total, mask=mask)


@triton.jit
def sum_splits_kernel(
    partial,  # fp32 [SPLITS, N, width]
    output,  # the first `first` columns
    rest,  # the others
    N,
    width,
    first,
    stride,
    rest_stride,
    splits,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_row < N
    o_column = tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_column[None, :] < width)
    total = tl.zeros([TILE_N, WIDTH], dtype=tl.float32)
    for i_split in range(splits):
        total += tl.load(partial + (i_split * N + o_row[:, None]) * width + o_column[None, :], mask=mask, other=0.0)
    total = total.to(output.dtype.element_ty)
    at = output + o_row[:, None] * stride + o_column[None, :]
    tl.store(at, total, mask=mask & (o_column < first)[None, :])
    at = rest + o_row[:, None] * rest_stride + (o_column - first)[None, :]
    tl.store(at, total, mask=mask & (o_column >= first)[None, :])


@triton.jit
def glu_bwd_channels_kernel(
    xA,
    gate_base,
    up_base,
    d_down_xA,
    d_h,
    gate_B,
    up_B,
    down_A,  # all of these as in `glu_bwd_rows_kernel`
    partial,  # fp32 [SPLITS, 3, I, r]: d gate_B | d up_B | d down_A (transposed)
    N,
    I,
    k,
    r,
    xA_stride,
    base_stride,
    d_down_xA_stride,
    d_h_stride,
    rows_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_channel = tl.program_id(0) * TILE_I
    o_channel = i_channel + tl.arange(0, TILE_I)
    m_channel = o_channel < I
    i_split = tl.program_id(1)
    b_gate = tl.trans(low_rank(gate_B, r, o_channel, m_channel, r, R))  # [R, TILE_I]
    b_up = tl.trans(low_rank(up_B, r, o_channel, m_channel, r, R))
    b_down = tl.trans(low_rank(down_A, r, o_channel, m_channel, r, R))
    dtype = gate_B.dtype.element_ty
    d_gate = tl.zeros([TILE_I, R], dtype=tl.float32)
    d_up = tl.zeros([TILE_I, R], dtype=tl.float32)
    d_down = tl.zeros([TILE_I, R], dtype=tl.float32)
    start = i_split * rows_per_split
    for i_row in range(start, min(start + rows_per_split, N), TILE_N):
        o_row = i_row + tl.arange(0, TILE_N)
        m_row = o_row < N
        b_gate_xA = low_rank(xA, xA_stride, o_row, m_row, r, R)
        b_up_xA = low_rank(xA + r, xA_stride, o_row, m_row, r, R)
        b_down_xA = low_rank(d_down_xA, d_down_xA_stride, o_row, m_row, r, R)
        e = tl.dot(b_gate_xA, b_gate, input_precision=PRECISION)
        g = tl.dot(b_up_xA, b_up, input_precision=PRECISION)
        dh = tl.dot(b_down_xA, b_down, input_precision=PRECISION)
        if i_channel < k:
            e += _base(gate_base, base_stride, o_row, m_row, o_channel, k)
            g += _base(up_base, base_stride, o_row, m_row, o_channel, k)
            dh += _base(d_h, d_h_stride, o_row, m_row, o_channel, k)
        value, slope = activation(e, KIND)
        d_gate += tl.dot(tl.trans((dh * g * slope).to(dtype)), b_gate_xA, input_precision=PRECISION)
        d_up += tl.dot(tl.trans((dh * value).to(dtype)), b_up_xA, input_precision=PRECISION)
        d_down += tl.dot(tl.trans((value * g).to(dtype)), b_down_xA, input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_channel[:, None] & (o_r[None, :] < r)
    at = partial + (i_split.to(tl.int64) * 3 * I + o_channel[:, None]) * r + o_r[None, :]
    tl.store(at, d_gate, mask=mask)
    tl.store(at + I.to(tl.int64) * r, d_up, mask=mask)
    tl.store(at + 2 * I.to(tl.int64) * r, d_down, mask=mask)


def glu_forward(xA: Tensor, base: tuple[Tensor, Tensor], loras: Tensor, h: Tensor, down_xA: Tensor, kind: str) -> None:
    """Writes ``h[:, :k]`` and ``h down_A'``.

    Args:
        xA: ``[N, 2r]``: gate_xA, up_xA, scaled.
        base: gate_base, up_base ``[N, k]`` with one row stride.
        loras: ``[3, I, r]``, contiguous: gate_B, up_B, and down_A scaled and transposed.
        h: ``[N, k]``, written.
        down_xA: ``[N, r]``, written.
        kind: "silu", "gelu" or "gelu_tanh".
    """
    N, (I, r), k = len(xA), loras.shape[1:], h.shape[1]
    if N == 0:
        return
    tile = TILES["forward" if k <= FEW_CHANNELS else "streamed"]
    splits, per_split = _split(I, tile[1], -(-N // tile[0]), xA)
    partial = xA.new_empty((splits, N, r), dtype=torch.float32)
    arguments = (
        xA, *base, *loras.unbind(), h, partial, N, I, k, r, xA.stride(0), base[0].stride(0), h.stride(0), per_split,
    )  # fmt: skip
    launch(glu_fwd_kernel, (-(-N // tile[0]), splits), arguments, _constants(xA, r, kind, tile))
    _sum_splits(partial, down_xA)


def glu_backward(
    xA: Tensor,
    base: tuple[Tensor, Tensor],
    loras: Tensor,
    d_h: Tensor,
    d_down_xA: Tensor,
    d_base: tuple[Tensor, Tensor],
    d_xA: Tensor,
    kind: str,
    down_xA: Tensor | None = None,
) -> Tensor:
    """Writes the gradients of ``base`` and ``xA``, and returns those of ``loras``; arguments as in `glu_forward`.

    Args:
        d_h: ``[N, k]``.
        d_down_xA: ``[N, r]``.
        d_base: two ``[N, k]`` with one row stride, written; may be ``base`` itself.
        d_xA: ``[N, 2r]``, written; may be ``xA`` itself.
        down_xA: ``[N, r]``, written if given: ``h down_A'``, where forward did not compute it.

    Returns:
        fp32 ``[splits, 3, I, r]``, still to be summed over the splits. The last of the three is the gradient of down_A,
        transposed and not scaled.
    """
    N, (I, r), k = len(xA), loras.shape[1:], d_h.shape[1]
    if N == 0:
        return xA.new_zeros(1, 3, I, r, dtype=torch.float32)
    parts = loras.unbind()
    strides = xA.stride(0), base[0].stride(0), d_down_xA.stride(0), d_h.stride(0)
    tile = TILES["channels"]
    programs = -(-I // tile[1])
    splits, per_split = _split(N, tile[0], programs, xA)
    d_loras = xA.new_empty((splits, 3, I, r), dtype=torch.float32)
    arguments = (xA, *base, d_down_xA, d_h, *parts, d_loras, N, I, k, r, *strides, per_split)
    launch(glu_bwd_channels_kernel, (programs, splits), arguments, _constants(xA, r, kind, tile))
    tile = TILES["rows"]  # last, because it may overwrite the inputs of the other kernel
    splits, per_split = _split(I, tile[1], -(-N // tile[0]), xA)
    partial = xA.new_empty((splits, N, (2 if down_xA is None else 3) * r), dtype=torch.float32)
    arguments = (
        xA, *base, d_down_xA, d_h, *parts, *d_base, partial, N, I, k, r, *strides, d_base[0].stride(0), per_split,
    )  # fmt: skip
    constants = _constants(xA, r, kind, tile) | {"DOWN": down_xA is not None}
    launch(glu_bwd_rows_kernel, (-(-N // tile[0]), splits), arguments, constants)
    _sum_splits(partial, d_xA, down_xA)
    return d_loras


def reference_forward(xA: Tensor, base: tuple[Tensor, Tensor], loras: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(h[:, :k], h down_A')`` of `glu_forward` on all rows, in plain PyTorch; differentiable."""
    gate_B, up_B, down_A = loras
    gate_xA, up_xA = xA.chunk(2, dim=1)
    k = base[0].shape[1]
    pad = (0, gate_B.shape[0] - k)
    h = ACTIVATIONS[kind](gate_xA @ gate_B.t() + F.pad(base[0], pad)) * (up_xA @ up_B.t() + F.pad(base[1], pad))
    return h[:, :k], h @ down_A


def reference_backward(xA, base, loras, d_h, d_down_xA, kind) -> tuple[Tensor, ...]:
    """``(d gate_base, d up_base, d xA, d loras)`` of `glu_backward`, by autograd over `reference_forward`."""
    xA, gate_base, up_base, loras = (tensor.detach().requires_grad_() for tensor in (xA, *base, loras))
    with torch.enable_grad():
        outputs = reference_forward(xA, (gate_base, up_base), loras, kind)
        return torch.autograd.grad(outputs, (gate_base, up_base, xA, loras), (d_h, d_down_xA))


def _sum_splits(partial: Tensor, output: Tensor, rest: Tensor | None = None) -> None:
    """Sums ``partial [splits, N, width]`` into ``output``; columns beyond its width go to ``rest``."""
    splits, N, width = partial.shape
    rest = output if rest is None else rest
    arguments = (partial, output, rest, N, width, output.shape[1], output.stride(0), rest.stride(0), splits)
    constants = {"TILE_N": 64, "WIDTH": 1 << (width - 1).bit_length()}
    launch(sum_splits_kernel, (-(-N // 64),), arguments, constants)


def _split(size: int, tile: int, programs: int, like: Tensor) -> tuple[int, int]:
    """The number of splits of a loop over ``size`` that fills the device, and the tile-aligned size of a split."""
    processors = _processors(like.device) if like.is_cuda else 2
    splits = max(1, min(-(-4 * processors // programs), -(-size // (8 * tile))))
    part = -(-size // (splits * tile)) * tile
    return -(-size // part), part


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(like: Tensor, r: int, kind: str, tile: tuple[int, ...]) -> dict:
    """The ``constexpr`` parameters of the kernels, in order."""
    return {
        "KIND": KINDS[kind], "R": max(16, 1 << (r - 1).bit_length()), "TILE_N": tile[0], "TILE_I": tile[1],
        "PRECISION": "ieee" if like.dtype == torch.float32 else "tf32",
    }  # fmt: skip
