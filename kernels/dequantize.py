"""Dequantise only chosen rows or columns of a bitsandbytes 4-bit weight (NF4, FP4; plain or nested absmax).

Layout (bitsandbytes): flat row-major ``[out, in]``; byte ``j`` holds element ``2j`` in its high nibble, ``2j + 1`` in its
low one; every ``blocksize`` elements share one absmax, itself 8-bit with blocks of 256 and an offset where nested.

Bytes, for k rows of ``[out, in]``: reads ``k in / 2`` packed + ``k in / blocksize`` absmax, writes ``2 k in`` (bf16).
For k columns ``out`` replaces ``in``, but each nibble costs a 32-byte sector of its row unless columns neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dequantize_kernel(
    packed,  # uint8 [out * in / 2]
    absmax,  # uint8 [blocks] where nested, else fp32 [blocks]
    code,  # fp32 [16]: value of each nibble
    nested_code,  # fp32 [256]: value of each 8-bit absmax (nested only)
    nested_absmax,  # fp32 [blocks / nested_blocksize] (nested only)
    offset,  # fp32 [1] (nested only)
    index,  # int64 [k]: the chosen rows or columns
    output,  # [k, in] for rows, [out, k] for columns
    num_rows,
    num_columns,  # of the output
    in_features,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o_column = tl.program_id(1).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    m_row = o_row < num_rows
    m_column = o_column < num_columns
    mask = m_row[:, None] & m_column[None, :]
    if COLUMNS:
        source_row = o_row
        source_column = tl.load(index + o_column, mask=m_column, other=0)
    else:
        source_row = tl.load(index + o_row, mask=m_row, other=0)
        source_column = o_column
    element = source_row[:, None] * in_features + source_column[None, :]  # [TILE_ROWS, TILE_COLUMNS]
    byte = tl.load(packed + element // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // BLOCKSIZE
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(offset)
    value = tl.load(code + nibble) * scale
    tl.store(output + o_row[:, None] * num_columns + o_column[None, :], value.to(output.dtype.element_ty), mask=mask)


def dequantize_rows(packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` (int64 ``[k]``) of the weight: ``[k, in_features]`` in ``dtype``."""
    if packed.is_cuda:
        return _launch(packed, quant_state, index, dtype, columns=False)
    return reference_rows(packed, quant_state, index, dtype)


def dequantize_columns(packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns ``index`` (int64 ``[k]``) of the weight: ``[out_features, k]`` in ``dtype``."""
    if packed.is_cuda:
        return _launch(packed, quant_state, index, dtype, columns=True)
    return reference_columns(packed, quant_state, index, dtype)


def reference_rows(packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_rows` in plain PyTorch."""
    in_features = quant_state.shape[1]
    element = index[:, None] * in_features + torch.arange(in_features, device=index.device)
    return _gather(packed, quant_state, element, dtype)


def reference_columns(packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_columns` in plain PyTorch."""
    out_features, in_features = quant_state.shape
    element = torch.arange(out_features, device=index.device)[:, None] * in_features + index
    return _gather(packed, quant_state, element, dtype)


def _gather(packed: Tensor, quant_state, element: Tensor, dtype: torch.dtype) -> Tensor:
    byte = packed.reshape(-1).view(torch.uint8)[element // 2].to(torch.int32)
    nibble = torch.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // quant_state.blocksize
    scale = quant_state.absmax[block]
    if quant_state.nested:
        inner = quant_state.state2
        scale = inner.code[scale.int()] * inner.absmax[block // inner.blocksize] + quant_state.offset
    return (quant_state.code[nibble] * scale.float()).to(dtype)


def _launch(packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype, columns: bool) -> Tensor:
    out_features, in_features = quant_state.shape
    shape = (out_features, len(index)) if columns else (len(index), in_features)
    output = torch.empty(shape, dtype=dtype, device=packed.device)
    if output.numel() == 0:
        return output
    nested = bool(quant_state.nested)
    inner = quant_state.state2 if nested else None
    # Columns: long tiles down the rows would re-read a packed sector for each column, so a tile spans all near columns.
    tile_rows, tile_columns = (8, 128) if columns else (1, 1024)
    grid = (triton.cdiv(shape[0], tile_rows), triton.cdiv(shape[1], tile_columns))
    _dequantize_kernel[grid](
        packed.reshape(-1).view(torch.uint8),
        quant_state.absmax,
        quant_state.code,
        inner.code if nested else quant_state.code,
        inner.absmax if nested else quant_state.absmax,
        quant_state.offset if nested else quant_state.code,
        index,
        output,
        shape[0],
        shape[1],
        in_features,
        BLOCKSIZE=quant_state.blocksize,
        NESTED_BLOCKSIZE=inner.blocksize if nested else 1,
        NESTED=nested,
        COLUMNS=columns,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
    )
    return output
