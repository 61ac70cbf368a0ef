"""Chosen rows and columns of a matrix: gathered side by side, and added back where they belong.

Bytes (bf16), for ``n`` rows and ``k`` columns: gathering reads and writes ``2 n k``, adding reads ``4 n k`` and writes
``2 n k``, each in 32-byte sectors: columns that neighbour share them. No atomics: rows and columns are distinct.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_columns_kernel(
    source,  # [M, width], rows contiguous
    rows,  # int64 [n]
    columns,  # int64 [k]
    output,  # [n, k] at a row stride
    n,
    k,
    source_stride,
    output_stride,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    o_row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_column = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    m_row, m_column = o_row < n, o_column < k
    row = tl.load(rows + o_row, mask=m_row, other=0)
    column = tl.load(columns + o_column, mask=m_column, other=0)
    mask = m_row[:, None] & m_column[None, :]
    value = tl.load(source + row[:, None] * source_stride + column[None, :], mask=mask, other=0.0)
    tl.store(output + o_row[:, None].to(tl.int64) * output_stride + o_column[None, :], value, mask=mask)


@triton.jit
def add_columns_kernel(
    output,  # [M, width], rows contiguous
    rows,
    columns,
    values,  # [n, k] at a row stride
    n,
    k,
    output_stride,
    values_stride,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    o_row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_column = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    m_row, m_column = o_row < n, o_column < k
    row = tl.load(rows + o_row, mask=m_row, other=0)
    column = tl.load(columns + o_column, mask=m_column, other=0)
    mask = m_row[:, None] & m_column[None, :]
    value = tl.load(values + o_row[:, None].to(tl.int64) * values_stride + o_column[None, :], mask=mask, other=0.0)
    at = output + row[:, None] * output_stride + column[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + value.to(tl.float32)
    tl.store(at, total.to(output.dtype.element_ty), mask=mask)


def gather_columns(source: Tensor, rows: Tensor, columns: Tensor, output: Tensor) -> Tensor:
    """``output[i, j] = source[rows[i], columns[j]]``; ``output [n, k]`` may be a slice of columns. Returns it."""
    if output.numel():
        gather_columns_kernel[_grid(output)](
            source, rows, columns, output, *output.shape, source.stride(0), output.stride(0), **_TILE
        )
    return output


def add_columns(output: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``output[rows[i], columns[j]] += values[i, j]``, in place, summed in fp32. Returns ``output``."""
    if values.numel():
        add_columns_kernel[_grid(values)](
            output, rows, columns, values, *values.shape, output.stride(0), values.stride(0), **_TILE
        )
    return output


def reference_gather_columns(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`gather_columns` in plain PyTorch: ``[n, k]``."""
    return source.index_select(0, rows).index_select(1, columns)


def reference_add_columns(output: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`add_columns` in plain PyTorch, out of place."""
    return torch.index_put(output, (rows[:, None], columns[None, :]), values, accumulate=True)


_TILE = {"TILE_N": 16, "TILE_K": 128}


def _grid(tile_of: Tensor) -> tuple[int, int]:
    n, k = tile_of.shape
    return triton.cdiv(n, _TILE["TILE_N"]), triton.cdiv(k, _TILE["TILE_K"])
