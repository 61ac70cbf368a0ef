"""Quantises rows and frozen weights to FP8 (e4m3) for products with frozen weights (docs/how-it-works.md, section 7).

A row ``v`` becomes ``q = e4m3(v / scale)`` with ``scale = max|v| / 448`` in fp32. A row of zeros has scale 1. A row
with inf or NaN has scale inf, and NaN where it was not finite and in every product. The scales of a weight are one for
each output of the product: of its rows in ``x W'``, of its columns in ``dy W``, which takes the weight transposed.

Bytes (bf16): rows of width K read ``2 K`` and write ``K + 4`` each; above `LARGEST_ROW` they are read twice, the second
time from the L2 cache. A weight of ``n`` elements reads ``2 n`` (4-bit: ``n / 2 + n / blocksize``) and writes ``n``, in
either orientation: tiles are transposed in the kernel, so that reads and writes are both of whole sectors. A 4-bit
weight is bound by instructions, not by bytes: for sm_90, 10 an element, and 11 transposed (a look-up, its address, two
products, half a conversion).
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
"""Rows and columns of a program's part of a 16-bit weight that is not transposed; `TILE_TRANSPOSED` of one that is."""
TILE_TRANSPOSED = (128, 64)
TILE_4BIT = (16, 512)
"""The same of a 4-bit weight: 64 elements a thread in both kernels."""
TILE_4BIT_TRANSPOSED = (256, 64)


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
    source,  # [N, K] at a row stride
    reciprocals,  # fp32 [N], or [K] (TRANSPOSED)
    output,  # e4m3 [N, K], or [K, N] (TRANSPOSED), at a row stride
    N,
    K,
    source_stride,
    output_stride,
    TRANSPOSED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    o_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    o_k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    m_n, m_k = o_n < N, o_k < K
    row = o_n[:, None].to(tl.int64)
    mask = m_n[:, None] & m_k[None, :]
    value = tl.load(source + row * source_stride + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        value *= tl.load(reciprocals + o_k, mask=m_k, other=0.0)[None, :]
        at = output + o_k[:, None].to(tl.int64) * output_stride + o_n[None, :]
        tl.store(at, tl.trans(value.to(output.dtype.element_ty)), mask=m_k[:, None] & m_n[None, :])
    else:
        value *= tl.load(reciprocals + o_n, mask=m_n, other=0.0)[:, None]
        tl.store(output + row * output_stride + o_k[None, :], value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _absmax(absmax, nested_code, nested_absmax, offset, block, mask, NESTED_SIZE: tl.constexpr, NESTED: tl.constexpr):
    """The absmax of blocks, in fp32; arguments as in `sparse_unsloth.kernels.dequantize`."""
    value = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // NESTED_SIZE, mask=mask, other=0.0)
        value = tl.load(nested_code + value.to(tl.int32)) * outer + tl.load(offset)
    return value


@triton.jit
def _decoded(code, word, NUMBER: tl.constexpr):
    """Elements NUMBER of words of eight: byte ``j`` holds element ``2j`` in its high nibble, ``2j + 1`` in its low."""
    return tl.load(code + ((word >> (4 * (NUMBER ^ 1))) & 15))


@triton.jit
def _interleave(v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight tensors ``[...]`` as one, ``[..., 2, 2, 2]``: ``v6`` is ``[..., 1, 1, 0]``."""
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def quantize_4bit_kernel(
    words,  # int32 [N * K / 8]: bitsandbytes' bytes, four in a word
    absmax,  # this and the next four as in `sparse_unsloth.kernels.dequantize`
    code,
    nested_code,
    nested_absmax,
    offset,
    reciprocals,  # fp32 [N]
    output,  # e4m3 [N, K] at a row stride
    N,
    K,
    output_stride,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a block in the tile
    TILE_N: tl.constexpr,
    SPANS: tl.constexpr,  # of a row of the tile
):
    o_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    o_span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    m_n = o_n < N
    mask = m_n[:, None] & (o_span < K // SPAN)[None, :]
    block = o_n[:, None] * (K // BLOCKSIZE) + (o_span * SPAN // BLOCKSIZE)[None, :]
    size = _absmax(absmax, nested_code, nested_absmax, offset, block, mask, NESTED_BLOCKSIZE, NESTED)[:, :, None]
    reciprocal = tl.load(reciprocals + o_n, mask=m_n, other=0.0)[:, None, None]
    row, mask = o_n[:, None].to(tl.int64), mask[:, :, None]
    at = row * (K // 8) + (o_span * (SPAN // 8))[None, :]
    word = tl.load(words + at[:, :, None] + tl.arange(0, SPAN // 8)[None, None, :], mask=mask, other=0)
    value = _interleave(
        _decoded(code, word, 0) * size * reciprocal, _decoded(code, word, 1) * size * reciprocal,
        _decoded(code, word, 2) * size * reciprocal, _decoded(code, word, 3) * size * reciprocal,
        _decoded(code, word, 4) * size * reciprocal, _decoded(code, word, 5) * size * reciprocal,
        _decoded(code, word, 6) * size * reciprocal, _decoded(code, word, 7) * size * reciprocal,
    )  # fmt: skip
    value = tl.reshape(value, (TILE_N, SPANS, SPAN)).to(output.dtype.element_ty)
    at = row * output_stride + (o_span * SPAN)[None, :]
    tl.store(output + at[:, :, None] + tl.arange(0, SPAN)[None, None, :], value, mask=mask)


@triton.jit
def quantize_4bit_transposed_kernel(
    words,  # as in `quantize_4bit_kernel`
    absmax,
    code,
    nested_code,
    nested_absmax,
    offset,
    reciprocals,  # fp32 [K]
    output,  # e4m3 [K, N] at a row stride
    N,
    K,
    output_stride,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    TILE_N: tl.constexpr,
    WORDS: tl.constexpr,  # of a row of the tile; they are of one block
):
    i_word = tl.program_id(0) * WORDS
    o_word = i_word + tl.arange(0, WORDS)
    o_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m_n = o_n < N
    mask = (o_word < K // 8)[:, None] & m_n[None, :]
    block = o_n * (K // BLOCKSIZE) + i_word * 8 // BLOCKSIZE
    size = _absmax(absmax, nested_code, nested_absmax, offset, block, m_n, NESTED_BLOCKSIZE, NESTED)[None, :]
    word = tl.load(words + o_n[None, :].to(tl.int64) * (K // 8) + o_word[:, None], mask=mask, other=0)
    # The split moves words, which are read along K, to the threads that write along N: an eighth of the elements' bytes
    # in fp32, where a transposition after decoding would move all of them.
    even, odd = tl.split(tl.reshape(word, (WORDS, TILE_N // 8, 2, 2, 2)))
    (even_0, even_1), (odd_0, odd_1) = tl.split(even), tl.split(odd)
    (w0, w4), (w2, w6), (w1, w5), (w3, w7) = tl.split(even_0), tl.split(even_1), tl.split(odd_0), tl.split(odd_1)
    at = output + (o_word * 8)[:, None].to(tl.int64) * output_stride + o_n[None, :]
    for number in tl.static_range(8):
        value = _interleave(
            _decoded(code, w0, number), _decoded(code, w1, number), _decoded(code, w2, number),
            _decoded(code, w3, number), _decoded(code, w4, number), _decoded(code, w5, number),
            _decoded(code, w6, number), _decoded(code, w7, number),
        )  # fmt: skip
        reciprocal = tl.load(reciprocals + o_word * 8 + number, mask=o_word < K // 8, other=0.0)[:, None]
        value = tl.reshape(value, (WORDS, TILE_N)) * size * reciprocal
        tl.store(at + number * output_stride, value.to(output.dtype.element_ty), mask=mask)


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


def quantize_weight(source: Tensor, quant_state, reciprocals: Tensor, out: Tensor, transposed: bool) -> None:
    """Writes a weight in e4m3, times ``reciprocals``, into ``out``.

    Args:
        source: ``[N, K]``, or bitsandbytes' packed storage of it where ``quant_state`` is not None; then K is a
            multiple of its blocksize.
        reciprocals: fp32, of the scale of each row (``[N]``), or of each column (``[K]``) where ``transposed``.
        out: e4m3 ``[N, K]``, or ``[K, N]`` where ``transposed``; may have a row stride.
    """
    if not source.is_cuda:
        weight = exact_weight(source, quant_state)
        out.copy_(reference_quantize_weight(weight, reciprocals, transposed).view(out.shape))
        return
    _launch_weight(source, quant_state, reciprocals, out, transposed)


def scales_of(amax: Tensor) -> Tensor:
    """The scales, fp32, of rows whose largest magnitudes are ``amax``; NaN counts as inf."""
    amax = amax.float().nan_to_num(float("inf"), float("inf"))
    # By a tensor: by a number, a GPU multiplies with its reciprocal, and the last bit differs from the kernels'.
    return torch.where(amax == 0, 1.0, amax.clamp_min(SMALLEST_AMAX) / torch.full_like(amax, LARGEST))


def reference_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain PyTorch."""
    scales = scales_of(x.abs().amax(1, keepdim=True))
    return (x.float() * scales.reciprocal()).to(FP8), scales


def reference_quantize_weight(weight: Tensor, reciprocals: Tensor, transposed: bool) -> Tensor:
    """`quantize_weight` of ``weight [N, K]``, fp32, in plain PyTorch."""
    return (weight.t() if transposed else weight).mul(reciprocals[:, None]).to(FP8)


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


def _launch_weight(source: Tensor, quant_state, reciprocals: Tensor, out: Tensor, transposed: bool) -> None:
    if quant_state is None:
        N, K = source.shape
        rows, columns = TILE_TRANSPOSED if transposed else TILE
        constants = {"TRANSPOSED": transposed, "TILE_N": rows, "TILE_K": columns}
        arguments = (source, reciprocals, out, N, K, source.stride(0), out.stride(0))
        launch(quantize_weight_kernel, (-(-K // columns), -(-N // rows)), arguments, constants, 8)
        return
    _, flat, scales, layout, (N, K) = dequantize._arguments(source, quant_state)
    rows, columns = TILE_4BIT_TRANSPOSED if transposed else TILE_4BIT
    span = min(layout["BLOCKSIZE"], columns)
    arguments = (flat.view(torch.int32), *scales, reciprocals, out, N, K, out.stride(0))
    if transposed:
        constants = {**layout, "TILE_N": rows, "WORDS": span // 8}
        launch(quantize_4bit_transposed_kernel, (-(-K // span), -(-N // rows)), arguments, constants, 8)
    else:
        constants = {**layout, "SPAN": span, "TILE_N": rows, "SPANS": columns // span}
        launch(quantize_4bit_kernel, (-(-K // columns), -(-N // rows)), arguments, constants, 4)
