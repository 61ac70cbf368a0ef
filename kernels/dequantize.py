"""Dequantises a bitsandbytes 4-bit weight, or selected rows or columns of it (docs/how-it-works.md, section 6).

NF4 and FP4, with plain or nested absmax. Byte ``j`` holds element ``2j`` in its high nibble and ``2j + 1`` in its low
one.

Bytes (bf16): for ``n`` elements reads ``n / 2`` packed and ``n / blocksize`` absmax, writes ``2 n``. Selected columns
read more: a nibble costs a sector of 32 bytes of its row, unless columns are neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch


@triton.jit
def _whole_kernel(
    packed,  # uint8 [out * in / 2]
    absmax,  # uint8 [blocks] where nested, else fp32 [blocks]
    code,  # fp32 [16]
    nested_code,  # fp32 [256] (nested only)
    nested_absmax,  # fp32 [blocks / nested_blocksize] (nested only)
    offset,  # fp32 [1] (nested only)
    output,  # [out, in]
    num_bytes,
    in_features,
    output_stride,  # between rows (STRIDED only: no block crosses rows; otherwise contiguous)
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    o_block = i_block + tl.arange(0, TILE_BLOCKS)
    m_block = o_block * (BLOCKSIZE // 2) < num_bytes
    scale = tl.load(absmax + o_block, mask=m_block, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + o_block // NESTED_BLOCKSIZE, mask=m_block, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(offset)
    o_byte = o_block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]  # [TILE_BLOCKS, BLOCKSIZE / 2]
    m_byte = o_byte < num_bytes
    byte = tl.load(packed + o_byte, mask=m_byte, other=0).to(tl.int32)
    high = tl.load(code + (byte >> 4)) * scale[:, None]
    low = tl.load(code + (byte & 15)) * scale[:, None]
    value = tl.interleave(high, low).to(output.dtype.element_ty)  # [TILE_BLOCKS, BLOCKSIZE]
    o_element = o_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    mask = o_element < 2 * num_bytes
    if STRIDED:
        row = o_block * BLOCKSIZE // in_features
        o_element += (row * (output_stride - in_features))[:, None]
    tl.store(output + o_element, value, mask=mask)


@triton.jit
def _dequantize_kernel(
    packed,  # uint8 [out * in / 2]
    absmax,  # uint8 [blocks] where nested, else fp32 [blocks]
    code,  # fp32 [16]: value of each nibble
    nested_code,  # fp32 [256]: value of each 8-bit absmax (nested only)
    nested_absmax,  # fp32 [blocks / nested_blocksize] (nested only)
    offset,  # fp32 [1] (nested only)
    index,  # int64 [k]: the selected rows or columns
    output,  # [k, in] for rows, [out, k] for columns
    num_rows,
    num_columns,  # of the output
    num_selected,  # length of `index`; further rows or columns are zero
    in_features,
    output_stride,
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
    inside = m_row[:, None] & m_column[None, :]
    if COLUMNS:
        mask = inside & (o_column < num_selected)[None, :]
        source_row = o_row
        source_column = tl.load(index + o_column, mask=o_column < num_selected, other=0)
    else:
        mask = inside & (o_row < num_selected)[:, None]
        source_row = tl.load(index + o_row, mask=o_row < num_selected, other=0)
        source_column = o_column
    element = source_row[:, None] * in_features + source_column[None, :]  # [TILE_ROWS, TILE_COLUMNS]
    byte = tl.load(packed + element // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // BLOCKSIZE
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(offset)
    value = tl.where(mask, tl.load(code + nibble) * scale, 0.0)
    tl.store(
        output + o_row[:, None] * output_stride + o_column[None, :], value.to(output.dtype.element_ty), mask=inside
    )


def dequantize_whole(packed: Tensor, quant_state, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight, ``[out_features, in_features]`` in ``dtype``: new, or ``out``, which may have a row stride."""
    if not packed.is_cuda:
        whole = reference_whole(packed, quant_state, dtype)
        return whole if out is None else out.copy_(whole)
    if out is None:
        out = torch.empty(tuple(quant_state.shape), dtype=dtype, device=packed.device)
    elif not out.is_contiguous() and quant_state.shape[1] % quant_state.blocksize:
        return out.copy_(dequantize_whole(packed, quant_state, dtype))
    _launch_whole(packed, quant_state, out)
    return out


def dequantize_rows(
    packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Rows ``index`` (int64 ``[k]``) of the weight: ``[k, in_features]`` in ``dtype``.

    ``out``, if given, is written instead. If it has more rows, they become zero.
    """
    return _select(packed, quant_state, index, dtype, out, columns=False)


def dequantize_columns(
    packed: Tensor, quant_state, index: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Columns ``index`` (int64 ``[k]``) of the weight: ``[out_features, k]`` in ``dtype``; ``out`` as for rows."""
    return _select(packed, quant_state, index, dtype, out, columns=True)


def reference_whole(packed: Tensor, quant_state, dtype: torch.dtype) -> Tensor:
    """`dequantize_whole` by bitsandbytes. Where blocks cross rows its CPU kernel (0.50) is wrong and ours is used."""
    if quant_state.shape[1] % quant_state.blocksize:
        return reference_rows(packed, quant_state, torch.arange(quant_state.shape[0], device=packed.device), dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, quant_state).to(dtype)


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


def _select(packed: Tensor, quant_state, index: Tensor, dtype, out: Tensor | None, columns: bool) -> Tensor:
    if out is None:
        out_features, in_features = quant_state.shape
        shape = (out_features, len(index)) if columns else (len(index), in_features)
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    if packed.is_cuda:
        _launch_select(packed, quant_state, index, out, columns)
    elif columns:
        out[:, : len(index)] = reference_columns(packed, quant_state, index, dtype)
        out[:, len(index) :] = 0
    else:
        out[: len(index)] = reference_rows(packed, quant_state, index, dtype)
        out[len(index) :] = 0
    return out


class _Arguments(NamedTuple):
    """Launch arguments of one weight, cached on its quant_state to save host time."""

    pointer: int
    flat: Tensor
    scales: tuple[Tensor, ...]
    layout: dict[str, int | bool]
    shape: tuple[int, int]


def _arguments(packed: Tensor, quant_state) -> _Arguments:
    kept = quant_state.__dict__.get("_sparse_arguments")
    if kept is None or kept.pointer != packed.data_ptr() or kept.scales[0] is not quant_state.absmax:
        flat = packed.detach().reshape(-1).view(torch.uint8)
        kept = _Arguments(packed.data_ptr(), flat, _scales(quant_state), _layout(quant_state), tuple(quant_state.shape))
        quant_state.__dict__["_sparse_arguments"] = kept
    return kept


def _launch_whole(packed: Tensor, quant_state, output: Tensor) -> None:
    _, flat, scales, layout, (_, in_features) = _arguments(packed, quant_state)
    num_bytes, blocksize = flat.numel(), layout["BLOCKSIZE"]
    tile_blocks = max(1, 2048 // blocksize)
    grid = (-(-2 * num_bytes // (tile_blocks * blocksize)),)
    strided = output.stride(0) != in_features
    arguments = (flat, *scales, output, num_bytes, in_features, output.stride(0))
    launch(_whole_kernel, grid, arguments, {**layout, "STRIDED": strided, "TILE_BLOCKS": tile_blocks})


def _launch_select(packed: Tensor, quant_state, index: Tensor, output: Tensor, columns: bool) -> None:
    _, flat, scales, layout, (_, in_features) = _arguments(packed, quant_state)
    num_rows, num_columns = output.shape
    if not num_rows * num_columns:
        return
    # Columns: tall tiles would read a packed sector again for each column, so a tile spans all neighbouring columns.
    tile_rows, tile_columns = (8, 128) if columns else (1, 1024)
    arguments = (
        flat, *scales, index, output, num_rows, num_columns, len(index), in_features, output.stride(0),
    )  # fmt: skip
    constants = {**layout, "COLUMNS": columns, "TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}
    launch(_dequantize_kernel, (-(-num_rows // tile_rows), -(-num_columns // tile_columns)), arguments, constants)


def _scales(quant_state) -> tuple[Tensor, ...]:
    """``absmax, code, nested_code, nested_absmax, offset``; without nesting the last three are unused placeholders."""
    if not quant_state.nested:
        return quant_state.absmax, quant_state.code, quant_state.code, quant_state.absmax, quant_state.code
    inner = quant_state.state2
    return quant_state.absmax, quant_state.code, inner.code, inner.absmax, quant_state.offset


def _layout(quant_state) -> dict[str, int | bool]:
    nested = bool(quant_state.nested)
    return {
        "BLOCKSIZE": quant_state.blocksize,
        "NESTED_BLOCKSIZE": quant_state.state2.blocksize if nested else 1,
        "NESTED": nested,
    }
