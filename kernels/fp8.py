"""Quantises rows and frozen weights to FP8 (e4m3) for products with frozen weights (docs/how-it-works.md, section 7).

A row ``v`` becomes ``q = e4m3(v / scale)`` with ``scale = max|v| / 448`` in fp32. A row of zeros has scale 1. A row
with inf or NaN has scale inf, and NaN where it was not finite and in every product. The scales of a weight are one for
each output of the product: of its rows in ``x W'``, of its columns in ``dy W``, which takes the weight transposed.

Bytes (bf16): rows of width K read ``2 K`` and write ``K + 4`` each; above `LARGEST_ROW` they are read twice, the second
time from the L2 cache. A weight of ``n`` elements reads ``2 n`` (4-bit: ``n / 2 + n / blocksize``) and writes ``n``, in
either orientation: tiles are transposed in the kernel, so that reads and writes are both of whole sectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unsloth.kernels import dequantize
from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch

FP8 = torch.float8_e4m3fn
LARGEST: float = torch.finfo(FP8).max
SMALLEST_AMAX = 2.0**-100
"""The largest value of a row counts as this at least, unless it is zero: its reciprocal must be finite."""
LARGEST_ROW = 32768
"""The width up to which a program keeps a whole row in registers."""
TILE = (32, 512)
"""Rows and columns of a program's part of a weight that is not transposed; `TILE_TRANSPOSED` of one that is."""
TILE_TRANSPOSED = (128, 64)


@triton.jit
def _magnitude(value):
    """The largest magnitude; inf where a value is NaN, which a maximum would pass over."""
    return tl.max(tl.where(value == value, tl.abs(value), float("inf")), axis=0)


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr):
    return tl.where(amax == 0, 1.0, tl.div_rn(tl.maximum(amax, SMALLEST_AMAX), LARGEST))


@triton.jit
def quantize_rows_kernel(
    x,  # [n, K] at a row stride
    q,  # e4m3 [n, K]
    scales,  # fp32 [n]
    K,
    x_stride,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_block = tl.arange(0, BLOCK)
    x += i_row * x_stride
    q += i_row * K
    if WHOLE:
        value = tl.load(x + o_block, mask=o_block < K, other=0.0).to(tl.float32)
        scale = _scale(_magnitude(value), LARGEST, SMALLEST_AMAX)
        tl.store(q + o_block, (value * tl.div_rn(1.0, scale)).to(q.dtype.element_ty), mask=o_block < K)
    else:
        amax = 0.0
        for i_start in range(0, K, BLOCK):
            o_column = i_start + o_block
            value = tl.load(x + o_column, mask=o_column < K, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, _magnitude(value))
        scale = _scale(amax, LARGEST, SMALLEST_AMAX)
        inverse = tl.div_rn(1.0, scale)
        for i_start in range(0, K, BLOCK):
            o_column = i_start + o_block
            value = tl.load(x + o_column, mask=o_column < K, other=0.0).to(tl.float32)
            tl.store(q + o_column, (value * inverse).to(q.dtype.element_ty), mask=o_column < K)
    tl.store(scales + i_row, scale)


@triton.jit
def quantize_weight_kernel(
    source,  # [N, K] at a row stride, or uint8 [N * K / 2] (FOUR_BIT)
    absmax,  # this and the next four as in `sparse_unsloth.kernels.dequantize` (FOUR_BIT only)
    code,
    nested_code,
    nested_absmax,
    offset,
    scales,  # fp32 [N], or [K] (TRANSPOSED)
    output,  # e4m3 [N, K], or [K, N] (TRANSPOSED), at a row stride
    N,
    K,
    source_stride,
    output_stride,
    FOUR_BIT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SPAN: tl.constexpr,  # elements in a row of the tile that share an absmax
):
    i_k = tl.program_id(0) * TILE_K
    o_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    o_k = i_k + tl.arange(0, TILE_K)
    m_n, m_k = o_n < N, o_k < K
    row = o_n[:, None].to(tl.int64)
    if FOUR_BIT:
        BLOCKS: tl.constexpr = TILE_K // SPAN
        o_start = i_k + tl.arange(0, BLOCKS) * SPAN
        m_block = m_n[:, None] & (o_start < K)[None, :]
        block = (row * K + o_start[None, :]) // BLOCKSIZE  # [TILE_N, BLOCKS]
        size = tl.load(absmax + block, mask=m_block, other=0)
        if NESTED:
            outer = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=m_block, other=0.0)
            size = tl.load(nested_code + size.to(tl.int32)) * outer + tl.load(offset)
        size = tl.reshape(tl.broadcast_to(size[:, :, None], (TILE_N, BLOCKS, SPAN)), (TILE_N, TILE_K))
        o_byte = i_k // 2 + tl.arange(0, TILE_K // 2)
        m_byte = m_n[:, None] & (2 * o_byte < K)[None, :]
        byte = tl.load(source + row * (K // 2) + o_byte[None, :], mask=m_byte, other=0).to(tl.int32)
        value = tl.interleave(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * size
    else:
        mask = m_n[:, None] & m_k[None, :]
        value = tl.load(source + row * source_stride + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        value *= tl.div_rn(1.0, tl.load(scales + o_k, mask=m_k, other=1.0))[None, :]
        at = output + o_k[:, None].to(tl.int64) * output_stride + o_n[None, :]
        tl.store(at, tl.trans(value.to(output.dtype.element_ty)), mask=m_k[:, None] & m_n[None, :])
    else:
        value *= tl.div_rn(1.0, tl.load(scales + o_n, mask=m_n, other=1.0))[:, None]
        at = output + row * output_stride + o_k[None, :]
        tl.store(at, value.to(output.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each row of ``x [n, K]``, which may have a row stride.

    Returns:
        e4m3 ``[n, K]`` and its scales, fp32 ``[n, 1]``.
    """
    if not x.is_cuda:
        return reference_quantize_rows(x)
    q, scales = x.new_empty(x.shape, dtype=FP8), x.new_empty((len(x), 1), dtype=torch.float32)
    _launch_rows(x, q, scales)
    return q, scales


def quantize_weight(source: Tensor, quant_state, scales: Tensor, out: Tensor, transposed: bool) -> None:
    """Writes a weight in e4m3, divided by ``scales``, into ``out``.

    Args:
        source: ``[N, K]``, or bitsandbytes' packed storage of it where ``quant_state`` is not None; then K is a
            multiple of its blocksize.
        scales: fp32, of each row (``[N]``), or of each column (``[K]``) where ``transposed``.
        out: e4m3 ``[N, K]``, or ``[K, N]`` where ``transposed``; may have a row stride.
    """
    if not source.is_cuda:
        out.copy_(reference_quantize_weight(exact_weight(source, quant_state), scales, transposed).view(out.shape))
        return
    _launch_weight(source, quant_state, scales, out, transposed)


def scales_of(amax: Tensor) -> Tensor:
    """The scales, fp32, of rows whose largest magnitudes are ``amax``; NaN counts as inf."""
    amax = amax.float().nan_to_num(float("inf"), float("inf"))
    # By a tensor: by a number, a GPU multiplies with its reciprocal, and the last bit differs from the kernels'.
    return torch.where(amax == 0, 1.0, amax.clamp_min(SMALLEST_AMAX) / torch.full_like(amax, LARGEST))


def reference_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain PyTorch."""
    scales = scales_of(x.abs().amax(1, keepdim=True))
    return (x.float() * scales.reciprocal()).to(FP8), scales


def reference_quantize_weight(weight: Tensor, scales: Tensor, transposed: bool) -> Tensor:
    """`quantize_weight` of ``weight [N, K]``, fp32, in plain PyTorch."""
    return (weight.t() if transposed else weight).mul(scales.reciprocal()[:, None]).to(FP8)


def exact_weight(source: Tensor, quant_state) -> Tensor:
    """A weight of `quantize_weight` in fp32, ``[N, K]``, without an intermediate rounding."""
    if quant_state is None:
        return source.detach().float()
    if source.is_cuda:
        return dequantize.dequantize_whole(source.detach(), quant_state, torch.float32)
    every = torch.arange(quant_state.shape[0], device=source.device)
    return dequantize.reference_rows(source.detach(), quant_state, every, torch.float32)


def _launch_rows(x: Tensor, q: Tensor, scales: Tensor) -> None:
    n, K = x.shape
    if n:
        block = min(max(16, 1 << (K - 1).bit_length()), LARGEST_ROW)
        constants = {"LARGEST": LARGEST, "SMALLEST_AMAX": SMALLEST_AMAX, "WHOLE": block >= K, "BLOCK": block}
        warps = 4 if block <= 4096 else 8 if block <= 8192 else 16
        launch(quantize_rows_kernel, (n,), (x, q, scales, K, x.stride(0)), constants, warps)


def _launch_weight(source: Tensor, quant_state, scales: Tensor, out: Tensor, transposed: bool) -> None:
    if quant_state is None:
        (N, K), stride, values = source.shape, source.stride(0), (source, None, None, None, None, None)
        layout = {"BLOCKSIZE": 1, "NESTED_BLOCKSIZE": 1, "NESTED": False}
    else:
        _, flat, absmax, layout, (N, K) = dequantize._arguments(source, quant_state)
        stride, values = K, (flat, *absmax)
    rows, columns = TILE_TRANSPOSED if transposed else TILE
    constants = {
        "FOUR_BIT": quant_state is not None, **layout, "TRANSPOSED": transposed, "TILE_N": rows, "TILE_K": columns,
        "SPAN": min(layout["BLOCKSIZE"], columns),
    }  # fmt: skip
    arguments = (*values, scales, out, N, K, stride, out.stride(0))
    launch(quantize_weight_kernel, (-(-K // columns), -(-N // rows)), arguments, constants, 8)
