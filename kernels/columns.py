"""Splits rows by role into compact matrices, and joins the results (docs/how-it-works.md, section 7).

For Q, K and V side by side (outputs) and O (input), loss tokens use all channels and context tokens the selected ones.
A matmul works on the compact rows of one role; their first columns hold ``xA`` of all parts (one projection is a part).
``place`` says where a row is: ``d`` among the loss tokens, ``-1 - c`` among the context tokens, or `PADDING_PLACE`.

Bytes (bf16) for M rows, w channels, k selected ones, n_d loss tokens, n_c context tokens: `split_columns` reads and
writes ``2 (n_d w + n_c k)`` each; `join_columns` reads as much and ``xA``, and writes ``2 M w``. A selected column
costs a sector of 32 bytes, unless columns are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.tokens.partition import PADDING_PLACE

JOIN_TILES = (64, 64, 4)
"""`join_columns_kernel`: rows and columns of a tile, and the number of row tiles that share one column search."""


@triton.jit
def _load_part(source_0, source_1, source_2, part, at, mask, PARTS: tl.constexpr):
    """Elements of the part's tensor. A load that is masked off entirely costs next to nothing."""
    value = tl.load(source_0 + at, mask=mask & (part == 0), other=0.0)
    if PARTS > 1:
        value += tl.load(source_1 + at, mask=mask & (part == 1), other=0.0)
    if PARTS > 2:
        value += tl.load(source_2 + at, mask=mask & (part == 2), other=0.0)
    return value


@triton.jit
def _part_of(i_tile, size_0, size_1, TILE: tl.constexpr, PARTS: tl.constexpr):
    """The part of a tile, and the tile's number within that part; no tile crosses parts."""
    part = i_tile * 0
    if PARTS > 1:
        tiles_0 = tl.cdiv(size_0, TILE)
        tiles_1 = tl.cdiv(size_1, TILE)
        part = (i_tile >= tiles_0).to(tl.int32) + (i_tile >= tiles_0 + tiles_1).to(tl.int32)
        i_tile -= tl.where(part > 0, tiles_0, 0) + tl.where(part > 1, tiles_1, 0)
    return part, i_tile


@triton.jit
def _of_part(part, value_0, value_1, value_2):
    return tl.where(part == 0, value_0, tl.where(part == 1, value_1, value_2))


@triton.jit
def split_columns_kernel(
    source_0,  # [M, width_p] by part
    source_1,
    source_2,
    xA,  # [M, xA_width]
    rows,  # int64 [n_d + n_c]: loss tokens, then context tokens
    index,  # int64 [k_0 + k_1 + k_2]: selected columns by part, each ascending
    dense,  # [n_d, xA_width + width_0 + width_1 + width_2]
    context,  # [n_c, xA_width + k_0 + k_1 + k_2]
    n_dense,
    n_context,
    width_0,
    width_1,
    width_2,
    k_0,
    k_1,
    k_2,
    stride_0,
    stride_1,
    stride_2,
    xA_width,
    dense_tiles,  # number of programs for loss tokens; the others compute context tokens
    PARTS: tl.constexpr,
    XA_TILE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
):
    i_program = tl.program_id(0)
    o_xA = tl.arange(0, XA_TILE)
    m_xA_width = (o_xA < xA_width)[None, :]
    if i_program < dense_tiles:
        row_tiles = tl.cdiv(n_dense, TILE_N)
        part, i_tile = _part_of(i_program // row_tiles, width_0, width_1, TILE_C, PARTS)
        width = _of_part(part, width_0, width_1, width_2)
        o_place = (i_program % row_tiles) * TILE_N + tl.arange(0, TILE_N)
        o_column = i_tile * TILE_C + tl.arange(0, TILE_C)
        mask = (o_place < n_dense)[:, None] & (o_column < width)[None, :]
        row = tl.load(rows + o_place, mask=o_place < n_dense, other=0)
        at = row[:, None] * _of_part(part, stride_0, stride_1, stride_2) + o_column[None, :]
        value = _load_part(source_0, source_1, source_2, part, at, mask, PARTS)
        offset = xA_width + _of_part(part, 0, width_0, width_0 + width_1)
        total = xA_width + width_0 + width_1 + width_2
        p_row = dense + o_place[:, None].to(tl.int64) * total
        tl.store(p_row + offset + o_column[None, :], value, mask=mask)
        if (part == 0) & (i_tile == 0):
            m_xA = (o_place < n_dense)[:, None] & m_xA_width
            b_xA = tl.load(xA + row[:, None] * xA_width + o_xA[None, :], mask=m_xA, other=0.0)
            tl.store(p_row + o_xA[None, :], b_xA, mask=m_xA)
    else:
        i_program -= dense_tiles
        row_tiles = tl.cdiv(n_context, TILE_N)
        part, i_tile = _part_of(i_program // row_tiles, k_0, k_1, TILE_C, PARTS)
        k = _of_part(part, k_0, k_1, k_2)
        offset = _of_part(part, 0, k_0, k_0 + k_1)
        o_place = (i_program % row_tiles) * TILE_N + tl.arange(0, TILE_N)
        o_column = i_tile * TILE_C + tl.arange(0, TILE_C)
        mask = (o_place < n_context)[:, None] & (o_column < k)[None, :]
        row = tl.load(rows + n_dense + o_place, mask=o_place < n_context, other=0)
        column = tl.load(index + offset + o_column, mask=o_column < k, other=0)
        at = row[:, None] * _of_part(part, stride_0, stride_1, stride_2) + column[None, :]
        value = _load_part(source_0, source_1, source_2, part, at, mask, PARTS)
        total = xA_width + k_0 + k_1 + k_2
        p_row = context + o_place[:, None].to(tl.int64) * total
        tl.store(p_row + xA_width + offset + o_column[None, :], value, mask=mask)
        if (part == 0) & (i_tile == 0):
            m_xA = (o_place < n_context)[:, None] & m_xA_width
            b_xA = tl.load(xA + row[:, None] * xA_width + o_xA[None, :], mask=m_xA, other=0.0)
            tl.store(p_row + o_xA[None, :], b_xA, mask=m_xA)


@triton.jit
def join_columns_kernel(
    lora,  # [width_0 + width_1 + width_2, r] at two strides
    dense,  # [n_d, PARTS * r + width_0 + width_1 + width_2]
    context,  # [n_c, PARTS * r + k_0 + k_1 + k_2]
    place,  # int64 [M]
    index,  # int64 [k_0 + k_1 + k_2]
    bias,  # [width_0 + width_1 + width_2] (HAS_BIAS only)
    output,  # [M, width_p] by part, concatenated
    xA,  # [M, PARTS * r], written: the first columns of dense and context
    M,
    width_0,
    width_1,
    width_2,
    k_0,
    k_1,
    k_2,
    r,
    lora_channel_stride,
    lora_rank_stride,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, i_tile = _part_of(tl.program_id(1), width_0, width_1, TILE_C, PARTS)
    width = _of_part(part, width_0, width_1, width_2)
    k = _of_part(part, k_0, k_1, k_2)
    offset = _of_part(part, 0, width_0, width_0 + width_1)
    k_offset = _of_part(part, 0, k_0, k_0 + k_1)
    o_column = i_tile * TILE_C + tl.arange(0, TILE_C)
    m_column = o_column < width
    # The column's index among the selected ones, by binary search: they are ascending.
    low = tl.zeros([TILE_C], dtype=tl.int32)
    high = low + k
    for _ in range(STEPS):
        middle = (low + high) // 2
        value = tl.load(index + k_offset + middle, mask=low < high, other=0)
        below = (value < o_column) & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, tl.minimum(high, middle))
    selected = m_column & (low < k)
    selected = selected & (tl.load(index + k_offset + low, mask=selected, other=-1) == o_column)
    o_r = tl.arange(0, R)
    m_r = o_r < r
    o_lora = (offset + o_column)[None, :] * lora_channel_stride + o_r[:, None] * lora_rank_stride
    b_lora = tl.load(lora + o_lora, mask=m_r[:, None] & m_column[None, :], other=0.0)  # [R, TILE_C]
    if HAS_BIAS:
        b_bias = tl.load(bias + offset + o_column, mask=m_column, other=0.0).to(tl.float32)
    base = output + offset.to(tl.int64) * M
    xA_width = PARTS * r
    for i_row in range(ROW_TILES):
        o_row = (tl.program_id(0).to(tl.int64) * ROW_TILES + i_row) * TILE_N + tl.arange(0, TILE_N)
        m_row = o_row < M
        b_place = tl.load(place + o_row, mask=m_row, other=PADDED)
        is_dense = b_place >= 0
        is_context = (b_place < 0) & (b_place > PADDED)
        p_dense = dense + b_place[:, None] * (xA_width + width_0 + width_1 + width_2)
        p_context = context + (-1 - b_place)[:, None] * (xA_width + k_0 + k_1 + k_2)
        o_xA = part * r + o_r[None, :]
        b_xA = tl.load(p_dense + o_xA, mask=is_dense[:, None] & m_r[None, :], other=0.0)
        b_xA += tl.load(p_context + o_xA, mask=is_context[:, None] & m_r[None, :], other=0.0)
        if i_tile == 0:
            tl.store(xA + o_row[:, None] * xA_width + o_xA, b_xA, mask=m_row[:, None] & m_r[None, :])
        total = tl.dot(b_xA, b_lora, input_precision=PRECISION)
        if HAS_BIAS:
            total += b_bias[None, :]
        mask = is_dense[:, None] & m_column[None, :]
        total += tl.load(p_dense + xA_width + offset + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = is_context[:, None] & selected[None, :]
        total += tl.load(p_context + xA_width + k_offset + low[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.where((b_place > PADDED)[:, None], total, 0.0)
        mask = m_row[:, None] & m_column[None, :]
        tl.store(base + o_row[:, None] * width + o_column[None, :], total.to(output.dtype.element_ty), mask=mask)


def split_columns(
    xA: Tensor, sources: Sequence[Tensor], rows: Tensor, num_dense: int, index: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``(all columns of the loss tokens, selected columns of the context tokens)``: ``xA``, then the parts.

    Args:
        xA: ``[M, xA_width]``, contiguous.
        sources: one to three ``[M, width_p]``, rows contiguous.
        rows: int64 ``[n]``: loss tokens, then context tokens.
        num_dense: the number of loss tokens.
        index: int64: the selected columns of each part, concatenated; ``counts`` are their numbers.
    """
    widths = [source.shape[1] for source in sources]
    num_context, xA_width = len(rows) - num_dense, xA.shape[1]
    dense = sources[0].new_empty((num_dense, xA_width + sum(widths)))
    context = sources[0].new_empty((num_context, xA_width + sum(counts)))
    tile_n, tile_c = 16, 128
    dense_tiles = -(-num_dense // tile_n) * sum(-(-width // tile_c) for width in widths)
    context_tiles = -(-num_context // tile_n) * sum(-(-count // tile_c) for count in counts)
    if dense_tiles + context_tiles:
        arguments = (
            *_three(sources), xA, rows, index, dense, context, num_dense, num_context, *_three(widths, 0),
            *_three(counts, 0), *_three([source.stride(0) for source in sources], 0), xA_width, dense_tiles,
        )  # fmt: skip
        constants = {
            "PARTS": len(sources), "XA_TILE": 1 << (xA_width - 1).bit_length(), "TILE_N": tile_n, "TILE_C": tile_c
        }  # fmt: skip
        launch(split_columns_kernel, (dense_tiles + context_tiles,), arguments, constants)
    return dense, context


def join_columns(
    lora: Tensor,
    dense: Tensor,
    context: Tensor,
    place: Tensor,
    index: Tensor,
    widths: Sequence[int],
    counts: Sequence[int],
    bias: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """``[M, width_p]`` by part: the LoRA branch (and bias) on all channels, the base products on the computed ones.

    Args:
        lora: ``[sum of widths, r]``, any strides.
        dense, context: contiguous, as from `split_columns`: ``parts * r`` columns of ``xA`` come first.
        place: int64 ``[M]``, see the module's docstring.
        index, counts: as in `split_columns`.
        bias: ``[sum of widths]`` or None.

    Returns:
        The parts, and ``xA [M, parts * r]``. Padding rows are zero.
    """
    M, r = len(place), lora.shape[1]
    output, xA = lora.new_empty(M * sum(widths)), lora.new_empty((M, len(widths) * r))
    tile_n, tile_c, row_tiles = JOIN_TILES
    if M:
        arguments = (
            lora, dense, context, place, index, bias, output, xA, M, *_three(widths, 0), *_three(counts, 0), r,
            *lora.stride(),
        )  # fmt: skip
        constants = {
            "PARTS": len(widths), "HAS_BIAS": bias is not None, "STEPS": max(counts).bit_length(),
            "R": max(16, 1 << (r - 1).bit_length()), "TILE_N": tile_n, "TILE_C": tile_c,
            "ROW_TILES": row_tiles, "PADDED": PADDING_PLACE,
            "PRECISION": "ieee" if lora.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        grid = -(-M // (tile_n * row_tiles)), sum(-(-width // tile_c) for width in widths)
        launch(join_columns_kernel, grid, arguments, constants)
    parts = output.split([M * width for width in widths])
    return [part.view(M, width) for part, width in zip(parts, widths, strict=True)], xA


def reference_split(xA, sources, rows, num_dense, index, counts) -> tuple[Tensor, Tensor]:
    """`split_columns` in plain PyTorch."""
    dense, context = rows[:num_dense], rows[num_dense:]
    selected = [
        source.index_select(0, context).index_select(1, part)
        for source, part in zip(sources, index.split(list(counts)), strict=True)
    ]
    whole = [source.index_select(0, dense) for source in (xA, *sources)]
    return torch.cat(whole, dim=1), torch.cat([xA.index_select(0, context), *selected], dim=1)


def reference_join(lora, dense, context, place, index, widths, counts, bias=None) -> tuple[list[Tensor], Tensor]:
    """`join_columns` in plain PyTorch."""
    outputs, xA_width = [], len(widths) * lora.shape[1]
    is_dense, is_context = place >= 0, (place < 0) & (place > PADDING_PLACE)
    xA = lora.new_zeros(len(place), xA_width)
    xA[is_dense] = dense[place[is_dense], :xA_width]
    xA[is_context] = context[-1 - place[is_context], :xA_width]
    parts = zip(
        xA.chunk(len(widths), dim=1), lora.split(list(widths)), dense[:, xA_width:].split(list(widths), dim=1),
        context[:, xA_width:].split(list(counts), dim=1), index.split(list(counts)),
        [None] * len(widths) if bias is None else bias.split(list(widths)), strict=True,
    )  # fmt: skip
    for part_xA, part_lora, part_dense, part_context, part_index, part_bias in parts:
        y = part_xA @ part_lora.t()
        y = y if part_bias is None else y + part_bias
        y[is_dense] += part_dense[place[is_dense]]
        rows = is_context.nonzero().squeeze(1)
        y[rows[:, None], part_index[None, :]] += part_context[-1 - place[rows]]
        y[place == PADDING_PLACE] = 0
        outputs.append(y)
    return outputs, xA


def _three(items: Sequence, filler=None) -> tuple:
    """Three of them: missing tensors repeat the first, which is not read."""
    return (*items, *([items[0] if filler is None else filler] * (3 - len(items))))
