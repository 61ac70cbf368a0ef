"""The gated unit of context rows: selected base channels plus the whole LoRA branch, without ``[N, I]`` intermediates.

Channels come in an order of their own: the ``k`` selected ones first, then the others, which only the LoRA branch
reaches. ``gate_B``, ``up_B`` (rows) and ``down_A`` (columns) are in that order. With ``scale_*`` LoRA's scales,

    e = scale_gate * gate_thin gate_B' (+ gate_base on the first k channels),   g likewise,   h = act(e) * g

Forward returns ``[h[:, :k] | h down_A']``, ready for one product with ``[W_down[:, selected] | scale * down_B]``.
Backward recomputes ``e, g, h`` twice: with a program per rows (gradients that sum over channels), then with one per
channels (gradients that sum over rows); no atomics.

Bytes (bf16): forward reads ``2 N (2r + 2k)`` and the small LoRA matrices (L2), writes ``2 N (k + r)``; arithmetic is
``6 N I r`` tensor-core FLOPs and some 20 elementwise ones per ``N I``, which is what limits it. Backward: ``10 N I r``
FLOPs in rows and ``12 N I r`` in channels, each with twice the elementwise work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
TILES = {"forward": (64, 64, 4, 3), "rows": (128, 32, 4, 3), "channels": (64, 64, 4, 3)}
"""Rows and channels of a tile, warps, pipeline stages; found on an H100 with Llama-3-8B's sizes."""
ALIGNMENT = 16
"""`k` is best a multiple of it, so that rows of the stacked products stay aligned for wide loads."""


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """``act(x)`` and ``act'(x)`` in fp32."""
    if KIND == 0:
        gate = 1.0 / (1.0 + tl.exp(-x))
        value = x * gate
        slope = gate + value * (1.0 - gate)
    elif KIND == 1:
        normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * normal
        slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        value = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _thin(pointer, stride, o_row, m_row, r, R: tl.constexpr):
    """``[rows, R]`` of a matrix with ``r`` columns, zero beyond."""
    o_r = tl.arange(0, R)
    return tl.load(
        pointer + o_row[:, None].to(tl.int64) * stride + o_r[None, :],
        mask=m_row[:, None] & (o_r[None, :] < r),
        other=0.0,
    )


@triton.jit
def _base(pointer, stride, o_row, m_row, o_channel, k):
    """``[rows, channels]`` of the selected base products, zero on other channels."""
    return tl.load(
        pointer + o_row[:, None].to(tl.int64) * stride + o_channel[None, :],
        mask=m_row[:, None] & (o_channel[None, :] < k),
        other=0.0,
    ).to(tl.float32)


@triton.jit
def glu_fwd_kernel(
    stacked,  # [M, 2r + 2k]: gate_thin | up_thin | gate_base | up_base
    rows,  # int64 [N]: the rows of stacked and output to work on (INDEXED only; else the first N)
    gate_B,  # [I, r]
    up_B,  # [I, r]
    down_A,  # [I, r]: down_A transposed
    output,  # [M, k + r]: h of the selected channels; the rest is `sum_splits_kernel`'s
    partial,  # fp32 [SPLITS, N, r]: h down_A' over the channels of a split
    N,
    I,
    k,
    r,
    scale_gate,
    scale_up,
    stacked_stride,
    output_stride,
    channels_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_place = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_place < N
    o_row = tl.load(rows + o_place, mask=m_row, other=0) if INDEXED else o_place
    i_split = tl.program_id(1)
    b_gate_thin = _thin(stacked, stacked_stride, o_row, m_row, r, R)  # [TILE_N, R]
    b_up_thin = _thin(stacked + r, stacked_stride, o_row, m_row, r, R)
    total = tl.zeros([TILE_N, R], dtype=tl.float32)
    start = i_split * channels_per_split
    for i_channel in range(start, min(start + channels_per_split, I), TILE_I):
        o_channel = i_channel + tl.arange(0, TILE_I)
        m_channel = o_channel < I
        b_gate = _thin(gate_B, r, o_channel, m_channel, r, R)  # [TILE_I, R]
        b_up = _thin(up_B, r, o_channel, m_channel, r, R)
        e = tl.dot(b_gate_thin, tl.trans(b_gate), input_precision=PRECISION) * scale_gate  # [TILE_N, TILE_I]
        g = tl.dot(b_up_thin, tl.trans(b_up), input_precision=PRECISION) * scale_up
        if i_channel < k:
            e += _base(stacked + 2 * r, stacked_stride, o_row, m_row, o_channel, k)
            g += _base(stacked + 2 * r + k, stacked_stride, o_row, m_row, o_channel, k)
        value, _ = _activation(e, KIND)
        h = (value * g).to(output.dtype.element_ty)
        if i_channel < k:
            tl.store(
                output + o_row[:, None].to(tl.int64) * output_stride + o_channel[None, :],
                h,
                mask=m_row[:, None] & (o_channel[None, :] < k),
            )
        total += tl.dot(h, _thin(down_A, r, o_channel, m_channel, r, R), input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_row[:, None] & (o_r[None, :] < r)
    at = partial + (i_split.to(tl.int64) * N + o_place[:, None]) * r + o_r[None, :]
    tl.store(at, total, mask=mask)


@triton.jit
def glu_bwd_rows_kernel(
    stacked,  # [M, 2r + 2k] as in the forward
    gradient,  # [M, k + r]: dh of the selected channels from the base product, then dY down_B
    rows,  # int64 [N] as in the forward
    gate_B,
    up_B,
    down_A,  # [I, r] each
    output,  # [M, 2r + 2k]: d gate_base and d up_base; the rest is `sum_splits_kernel`'s
    partial,  # fp32 [SPLITS, N, 2r]: d gate_thin | d up_thin over the channels of a split
    N,
    I,
    k,
    r,
    scale_gate,
    scale_up,
    scale_down,
    stacked_stride,
    gradient_stride,
    output_stride,
    channels_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_place = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_place < N
    o_row = tl.load(rows + o_place, mask=m_row, other=0) if INDEXED else o_place
    i_split = tl.program_id(1)
    dtype = output.dtype.element_ty
    b_gate_thin = _thin(stacked, stacked_stride, o_row, m_row, r, R)
    b_up_thin = _thin(stacked + r, stacked_stride, o_row, m_row, r, R)
    b_down_thin = _thin(gradient + k, gradient_stride, o_row, m_row, r, R)
    d_gate = tl.zeros([TILE_N, R], dtype=tl.float32)
    d_up = tl.zeros([TILE_N, R], dtype=tl.float32)
    start = i_split * channels_per_split
    for i_channel in range(start, min(start + channels_per_split, I), TILE_I):
        o_channel = i_channel + tl.arange(0, TILE_I)
        m_channel = o_channel < I
        b_gate = _thin(gate_B, r, o_channel, m_channel, r, R)
        b_up = _thin(up_B, r, o_channel, m_channel, r, R)
        b_down = _thin(down_A, r, o_channel, m_channel, r, R)
        e = tl.dot(b_gate_thin, tl.trans(b_gate), input_precision=PRECISION) * scale_gate
        g = tl.dot(b_up_thin, tl.trans(b_up), input_precision=PRECISION) * scale_up
        dh = tl.dot(b_down_thin, tl.trans(b_down), input_precision=PRECISION) * scale_down
        if i_channel < k:
            e += _base(stacked + 2 * r, stacked_stride, o_row, m_row, o_channel, k)
            g += _base(stacked + 2 * r + k, stacked_stride, o_row, m_row, o_channel, k)
            dh += _base(gradient, gradient_stride, o_row, m_row, o_channel, k)
        value, slope = _activation(e, KIND)
        de = (dh * g * slope).to(dtype)
        dg = (dh * value).to(dtype)
        if i_channel < k:
            at = output + o_row[:, None].to(tl.int64) * output_stride + 2 * r + o_channel[None, :]
            mask = m_row[:, None] & (o_channel[None, :] < k)
            tl.store(at, de, mask=mask)
            tl.store(at + k, dg, mask=mask)
        d_gate += tl.dot(de, b_gate, input_precision=PRECISION)
        d_up += tl.dot(dg, b_up, input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_row[:, None] & (o_r[None, :] < r)
    at = partial + (i_split.to(tl.int64) * N + o_place[:, None]) * 2 * r + o_r[None, :]
    tl.store(at, d_gate * scale_gate, mask=mask)
    tl.store(at + r, d_up * scale_up, mask=mask)


@triton.jit
def sum_splits_kernel(
    partial,  # fp32 [SPLITS, N, width]
    rows,  # int64 [N] (INDEXED only)
    output,  # row `rows[n]` at `output + rows[n] * stride`
    N,
    width,
    stride,
    splits,
    INDEXED: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_place = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    m_row = o_place < N
    o_row = tl.load(rows + o_place, mask=m_row, other=0) if INDEXED else o_place
    o_column = tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_column[None, :] < width)
    total = tl.zeros([TILE_N, WIDTH], dtype=tl.float32)
    for i_split in range(splits):
        at = partial + (i_split * N + o_place[:, None]) * width + o_column[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(output + o_row[:, None] * stride + o_column[None, :], total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def glu_bwd_channels_kernel(
    stacked,
    gradient,
    rows,
    gate_B,
    up_B,
    down_A,
    partial,  # fp32 [SPLITS, 3, I, r]: d gate_B | d up_B | d down_A (transposed)
    N,
    I,
    k,
    r,
    scale_gate,
    scale_up,
    scale_down,
    stacked_stride,
    gradient_stride,
    rows_per_split,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_channel = tl.program_id(0) * TILE_I
    o_channel = i_channel + tl.arange(0, TILE_I)
    m_channel = o_channel < I
    i_split = tl.program_id(1)
    b_gate = tl.trans(_thin(gate_B, r, o_channel, m_channel, r, R))  # [R, TILE_I]
    b_up = tl.trans(_thin(up_B, r, o_channel, m_channel, r, R))
    b_down = tl.trans(_thin(down_A, r, o_channel, m_channel, r, R))
    dtype = gate_B.dtype.element_ty
    d_gate = tl.zeros([TILE_I, R], dtype=tl.float32)
    d_up = tl.zeros([TILE_I, R], dtype=tl.float32)
    d_down = tl.zeros([TILE_I, R], dtype=tl.float32)
    start = i_split * rows_per_split
    for i_row in range(start, min(start + rows_per_split, N), TILE_N):
        o_place = i_row + tl.arange(0, TILE_N)
        m_row = o_place < N
        o_row = tl.load(rows + o_place, mask=m_row, other=0) if INDEXED else o_place
        b_gate_thin = _thin(stacked, stacked_stride, o_row, m_row, r, R)
        b_up_thin = _thin(stacked + r, stacked_stride, o_row, m_row, r, R)
        b_down_thin = _thin(gradient + k, gradient_stride, o_row, m_row, r, R)
        e = tl.dot(b_gate_thin, b_gate, input_precision=PRECISION) * scale_gate
        g = tl.dot(b_up_thin, b_up, input_precision=PRECISION) * scale_up
        dh = tl.dot(b_down_thin, b_down, input_precision=PRECISION) * scale_down
        if i_channel < k:
            e += _base(stacked + 2 * r, stacked_stride, o_row, m_row, o_channel, k)
            g += _base(stacked + 2 * r + k, stacked_stride, o_row, m_row, o_channel, k)
            dh += _base(gradient, gradient_stride, o_row, m_row, o_channel, k)
        value, slope = _activation(e, KIND)
        d_gate += tl.dot(tl.trans((dh * g * slope).to(dtype)), b_gate_thin, input_precision=PRECISION)
        d_up += tl.dot(tl.trans((dh * value).to(dtype)), b_up_thin, input_precision=PRECISION)
        d_down += tl.dot(tl.trans((value * g).to(dtype)), b_down_thin, input_precision=PRECISION)
    o_r = tl.arange(0, R)
    mask = m_channel[:, None] & (o_r[None, :] < r)
    at = partial + (i_split.to(tl.int64) * 3 * I + o_channel[:, None]) * r + o_r[None, :]
    tl.store(at, d_gate * scale_gate, mask=mask)
    tl.store(at + I.to(tl.int64) * r, d_up * scale_up, mask=mask)
    tl.store(at + 2 * I.to(tl.int64) * r, d_down * scale_down, mask=mask)


def glu_forward(
    stacked: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor, k: int, scales, kind: str, rows: Tensor | None = None
) -> Tensor:
    """``[h[:, :k] | h down_A']``: ``[M, k + r]``.

    Args:
        stacked: ``[M, 2r + 2k]``: gate_thin, up_thin, gate_base, up_base side by side.
        gate_B, up_B, down_A: ``[I, r]``, channels in the order selected first; ``down_A`` transposed. Contiguous.
        k: selected channels.
        scales: LoRA's scales of gate and up (and down, unused here).
        kind: "silu", "gelu" or "gelu_tanh".
        rows: int64 ``[N]``: work on these rows alone, and leave the others of the output unwritten; None for all.
    """
    N, (I, r) = len(stacked if rows is None else rows), gate_B.shape
    output = stacked.new_empty(len(stacked), k + r)
    if N == 0:
        return output
    splits, per_split, tiles = _row_tiles("forward", N, I, stacked)
    partial = stacked.new_empty(splits, N, r, dtype=torch.float32)
    glu_fwd_kernel[(triton.cdiv(N, tiles["TILE_N"]), splits)](
        stacked, rows, gate_B, up_B, down_A, output, partial, N, I, k, r, scales[0], scales[1],
        stacked.stride(0), output.stride(0), per_split,
        INDEXED=rows is not None, **tiles, **_common(stacked, r, kind),
    )  # fmt: skip
    _sum_splits(partial, rows, output[:, k:])
    return output


def glu_backward(
    stacked: Tensor,
    gradient: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    k: int,
    scales,
    kind: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `glu_forward`'s inputs.

    Args:
        gradient: ``[M, k + r]``: ``dY`` times ``[W_down[:, selected] | down_B]``; ``scales[2]`` is still to be applied
            to the latter part.
        scales: LoRA's scales of gate, up and down; the others as in `glu_forward`.

    Returns:
        The gradient of ``stacked`` ``[M, 2r + 2k]`` (rows that are not in ``rows`` unwritten), and those of ``gate_B``,
        ``up_B``, ``down_A``: fp32 ``[splits, 3, I, r]``, still to be summed over the splits.
    """
    N, (I, r) = len(stacked if rows is None else rows), gate_B.shape
    d_stacked = torch.empty_like(stacked)
    if N == 0:
        return d_stacked, stacked.new_zeros(1, 3, I, r, dtype=torch.float32)
    common = {"INDEXED": rows is not None, **_common(stacked, r, kind)}
    splits, per_split, tiles = _row_tiles("rows", N, I, stacked)
    partial = stacked.new_empty(splits, N, 2 * r, dtype=torch.float32)
    glu_bwd_rows_kernel[(triton.cdiv(N, tiles["TILE_N"]), splits)](
        stacked, gradient, rows, gate_B, up_B, down_A, d_stacked, partial, N, I, k, r, *scales,
        stacked.stride(0), gradient.stride(0), d_stacked.stride(0), per_split, **tiles, **common,
    )  # fmt: skip
    _sum_splits(partial, rows, d_stacked)
    tiles = _tiles("channels")
    programs = triton.cdiv(I, tiles["TILE_I"])
    splits, per_split = _split(N, tiles["TILE_N"], programs, stacked)
    d_loras = stacked.new_empty(splits, 3, I, r, dtype=torch.float32)
    glu_bwd_channels_kernel[(programs, splits)](
        stacked, gradient, rows, gate_B, up_B, down_A, d_loras, N, I, k, r, *scales,
        stacked.stride(0), gradient.stride(0), per_split, **tiles, **common,
    )  # fmt: skip
    return d_stacked, d_loras


def reference_forward(
    stacked: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor, k: int, scales, kind: str
) -> Tensor:
    """`glu_forward` in plain PyTorch, with its intermediates; differentiable."""
    r = gate_B.shape[1]
    gate_thin, up_thin, gate_base, up_base = stacked.split([r, r, k, k], dim=1)
    pad = (0, gate_B.shape[0] - k)
    e = scales[0] * gate_thin @ gate_B.t() + F.pad(gate_base, pad)
    g = scales[1] * up_thin @ up_B.t() + F.pad(up_base, pad)
    activation = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[kind]
    h = activation(e) * g
    return torch.cat((h[:, :k], h @ down_A), dim=1)


def reference_backward(stacked, gradient, gate_B, up_B, down_A, k, scales, kind) -> tuple[Tensor, Tensor]:
    """`glu_backward` by autograd over `reference_forward`."""
    inputs = [tensor.detach().requires_grad_() for tensor in (stacked, gate_B, up_B, down_A)]
    with torch.enable_grad():
        output = reference_forward(*inputs, k, scales, kind)
        scaled = torch.cat((gradient[:, :k], scales[2] * gradient[:, k:]), dim=1)
        d_stacked, *d_loras = torch.autograd.grad(output, inputs, scaled)
    return d_stacked, torch.stack(d_loras).float()[None]


def _sum_splits(partial: Tensor, rows: Tensor | None, output: Tensor) -> None:
    """Writes ``partial [splits, N, width]``, summed, into the first ``width`` columns of ``output``'s rows."""
    splits, N, width = partial.shape
    sum_splits_kernel[(triton.cdiv(N, 64),)](
        partial, rows, output, N, width, output.stride(0), splits,
        INDEXED=rows is not None, TILE_N=64, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


def _tiles(kernel: str) -> dict[str, int]:
    tile_n, tile_i, warps, stages = TILES[kernel]
    return {"TILE_N": tile_n, "TILE_I": tile_i, "num_warps": warps, "num_stages": stages}


def _row_tiles(kernel: str, N: int, I: int, like: Tensor) -> tuple[int, int, dict[str, int]]:
    """Splits of the channels, channels of a split, and the tile of a kernel whose programs own rows."""
    tiles = _tiles(kernel)
    splits, per_split = _split(I, tiles["TILE_I"], triton.cdiv(N, tiles["TILE_N"]), like)
    return splits, per_split, tiles


def _split(size: int, tile: int, programs: int, like: Tensor) -> tuple[int, int]:
    """Into how many parts to cut a loop over ``size`` so that the device is filled, and the (tile-aligned) part."""
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 2
    splits = max(1, min(triton.cdiv(4 * processors, programs), triton.cdiv(size, 8 * tile)))
    part = triton.cdiv(triton.cdiv(size, splits), tile) * tile
    return triton.cdiv(size, part), part


def _common(like: Tensor, r: int, kind: str) -> dict[str, int | str]:
    precision = "ieee" if like.dtype == torch.float32 else "tf32"
    return {"KIND": KINDS[kind], "R": max(16, triton.next_power_of_2(r)), "PRECISION": precision}
