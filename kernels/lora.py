"""Casts and packs the LoRA matrices of a part for its stacked matmuls, in one launch (docs/how-it-works.md, section 7).

Bytes: reads the matrices once (usually fp32) and writes them in the matmuls' dtype, those of the gated unit twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch


@triton.jit
def _copy(
    source, target, o_row, o_column, m_row, m_column, scale,
    source_row_stride, source_column_stride, target_row_stride, target_column_stride,
):  # fmt: skip
    mask = m_row[:, None] & m_column[None, :]
    at = o_row[:, None].to(tl.int64) * source_row_stride + o_column[None, :] * source_column_stride
    value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32) * scale
    at = o_row[:, None].to(tl.int64) * target_row_stride + o_column[None, :] * target_column_stride
    tl.store(target + at, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def pack_mlp_kernel(
    gate_A,  # [r, H]
    gate_B,  # [I, r]
    up_A,
    up_B,
    down_A,  # [r, I]
    down_B,  # [H, r]
    order,  # int64 [P]: channels of the ordered copies
    product_in,  # first 2r rows, H wide: scaled gate_A, up_A
    product_out,  # H rows of r columns at a stride: down_B
    ordered,  # [3, P, r]: gate_B, up_B, scaled down_A transposed, channels by `order`
    H,
    I,
    P,
    r,
    gate_scale,
    up_scale,
    down_scale,
    product_out_stride,
    R: tl.constexpr,
    TILE: tl.constexpr,
):
    i_tile = tl.program_id(0)
    o_r = tl.arange(0, R)
    m_r = o_r < r
    hidden_tiles = tl.cdiv(H, TILE)
    if i_tile < hidden_tiles:
        o_h = i_tile * TILE + tl.arange(0, TILE)
        m_h = o_h < H
        _copy(gate_A, product_in, o_r, o_h, m_r, m_h, gate_scale, H, 1, H, 1)
        _copy(up_A, product_in + r * H, o_r, o_h, m_r, m_h, up_scale, H, 1, H, 1)
        _copy(down_B, product_out, o_h, o_r, m_h, m_r, 1.0, r, 1, product_out_stride, 1)
    else:
        i_tile -= hidden_tiles
        o_place = i_tile * TILE + tl.arange(0, TILE)
        m_place = o_place < P
        mask = m_place[:, None] & m_r[None, :]
        channel = tl.load(order + o_place, mask=m_place, other=0)
        dtype = ordered.dtype.element_ty
        at = channel[:, None] * r + o_r[None, :]
        target = ordered + o_place[:, None] * r + o_r[None, :]
        b_gate = tl.load(gate_B + at, mask=mask, other=0.0).to(dtype)
        b_up = tl.load(up_B + at, mask=mask, other=0.0).to(dtype)
        value = tl.load(down_A + o_r[None, :] * I + channel[:, None], mask=mask, other=0.0).to(tl.float32) * down_scale
        tl.store(target, b_gate, mask=mask)
        tl.store(target + P * r, b_up, mask=mask)
        tl.store(target + 2 * P * r, value.to(dtype), mask=mask)


@triton.jit
def pack_linear_kernel(
    A_0,  # [r, in] by part
    A_1,
    A_2,
    B_0,  # [width_p, r] by part
    B_1,
    B_2,
    A,  # [parts * r, in]: scaled
    B,  # [width_0 + width_1 + width_2, r]
    in_features,
    width_0,
    width_1,
    width_2,
    r,
    scale_0,
    scale_1,
    scale_2,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
):
    i_tile = tl.program_id(0)
    o_r = tl.arange(0, R)
    m_r = o_r < r
    in_tiles = tl.cdiv(in_features, TILE)
    if i_tile < in_tiles:
        o_in = i_tile * TILE + tl.arange(0, TILE)
        m_in = o_in < in_features
        _copy(A_0, A, o_r, o_in, m_r, m_in, scale_0, in_features, 1, in_features, 1)
        if PARTS > 1:
            _copy(A_1, A + r * in_features, o_r, o_in, m_r, m_in, scale_1, in_features, 1, in_features, 1)
        if PARTS > 2:
            _copy(A_2, A + 2 * r * in_features, o_r, o_in, m_r, m_in, scale_2, in_features, 1, in_features, 1)
    else:
        o_out = (i_tile - in_tiles) * TILE + tl.arange(0, TILE)
        _copy(B_0, B, o_out, o_r, o_out < width_0, m_r, 1.0, r, 1, r, 1)
        if PARTS > 1:
            _copy(B_1, B + width_0 * r, o_out, o_r, o_out < width_1, m_r, 1.0, r, 1, r, 1)
        if PARTS > 2:
            _copy(B_2, B + (width_0 + width_1) * r, o_out, o_r, o_out < width_2, m_r, 1.0, r, 1, r, 1)


@triton.jit
def mlp_gradients_kernel(
    context,  # fp32 [SPLITS, 3, P, r], channels by `order`
    dense,  # fp32 [SPLITS, 3, I, r] (HAS_DENSE only)
    order,  # int64 [P]
    gate_B,  # [I, r]
    up_B,
    down_A,  # [r, I]
    P,
    I,
    r,
    context_splits,
    dense_splits,
    down_scale,
    HAS_DENSE: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
):
    o_place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_place = o_place < P
    o_r = tl.arange(0, R)
    mask = m_place[:, None] & (o_r < r)[None, :]
    channel = tl.load(order + o_place, mask=m_place, other=0)
    at = o_place[:, None].to(tl.int64) * r + o_r[None, :]
    b_gate = tl.zeros([TILE, R], dtype=tl.float32)
    b_up = tl.zeros([TILE, R], dtype=tl.float32)
    b_down = tl.zeros([TILE, R], dtype=tl.float32)
    for i_split in range(context_splits):
        part = context + i_split * 3 * P * r + at
        b_gate += tl.load(part, mask=mask, other=0.0)
        b_up += tl.load(part + P * r, mask=mask, other=0.0)
        b_down += tl.load(part + 2 * P * r, mask=mask, other=0.0)
    at = channel[:, None] * r + o_r[None, :]
    if HAS_DENSE:
        for i_split in range(dense_splits):
            part = dense + i_split * 3 * I * r + at
            b_gate += tl.load(part, mask=mask, other=0.0)
            b_up += tl.load(part + I * r, mask=mask, other=0.0)
            b_down += tl.load(part + 2 * I * r, mask=mask, other=0.0)
    tl.store(gate_B + at, b_gate.to(gate_B.dtype.element_ty), mask=mask)
    tl.store(up_B + at, b_up.to(up_B.dtype.element_ty), mask=mask)
    at = o_r[None, :] * I + channel[:, None]
    tl.store(down_A + at, (b_down * down_scale).to(down_A.dtype.element_ty), mask=mask)


def pack_mlp(
    loras: Sequence[Tensor], scales: tuple[float, float, float], order: Tensor, product_in: Tensor, product_out: Tensor
) -> Tensor:
    """Writes the LoRA rows of the two weight stacks; returns the gated unit's LoRA matrices in the same dtype.

    Args:
        loras: gate_A ``[r, H]``, gate_B ``[I, r]``, up_A, up_B, down_A ``[r, I]``, down_B ``[H, r]``, contiguous.
        scales: LoRA scales of gate, up and down: the first two are applied in ``product_in``, the last to down_A.
        order: int64 ``[P]``: the channels in the gated unit's order.
        product_in: ``[2r, H]``, contiguous, written: gate_A, up_A.
        product_out: ``[H, r]`` at any row stride, written: down_B.

    Returns:
        ``[3, P, r]``: gate_B, up_B, down_A transposed, channels by ``order``.
    """
    (r, H), (I, _), P = loras[0].shape, loras[1].shape, len(order)
    ordered = product_in.new_empty((3, P, r))
    tile = 128
    programs = -(-H // tile) + -(-P // tile)
    arguments = (*loras, order, product_in, product_out, ordered, H, I, P, r, *scales, product_out.stride(0))
    launch(pack_mlp_kernel, (programs,), arguments, {"R": 1 << (r - 1).bit_length(), "TILE": tile})
    return ordered


def pack_linear(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(stacked scaled A [parts * r, in], stacked B [sum of widths, r])`` in ``dtype``.

    Takes contiguous matrices of one to three projections of one rank.
    """
    r, in_features = As[0].shape
    widths = [len(B) for B in Bs]
    A = As[0].new_empty((len(As) * r, in_features), dtype=dtype)
    B = As[0].new_empty((sum(widths), r), dtype=dtype)
    tile, fill = 128, 3 - len(As)
    arguments = (
        *As, *[As[0]] * fill, *Bs, *[Bs[0]] * fill, A, B, in_features, *widths, *[0] * fill, r,
        *scales, *[0.0] * fill,
    )  # fmt: skip
    constants = {"PARTS": len(As), "R": 1 << (r - 1).bit_length(), "TILE": tile}
    launch(pack_linear_kernel, (-(-in_features // tile) + -(-max(widths) // tile),), arguments, constants)
    return A, B


def mlp_gradients(
    context: Tensor, dense: Tensor | None, order: Tensor, loras: Sequence[Tensor], down_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate_B, up_B and down_A in their shapes and dtypes, from `glu_backward` of both roles.

    Args:
        context: ``[splits, 3, I, r]``, channels by ``order``, a permutation.
        dense: ``[splits, 3, I, r]`` or None.
        loras: gate_B, up_B ``[I, r]``, down_A ``[r, I]``.
    """
    I, r = loras[0].shape
    gradients = tuple(torch.empty_like(lora, memory_format=torch.contiguous_format) for lora in loras)
    tile = 64
    arguments = (
        context, dense, order, *gradients, I, I, r, len(context), 0 if dense is None else len(dense), down_scale,
    )  # fmt: skip
    constants = {"HAS_DENSE": dense is not None, "R": 1 << (r - 1).bit_length(), "TILE": tile}
    launch(mlp_gradients_kernel, (-(-I // tile),), arguments, constants)
    return gradients


def reference_pack_mlp(loras, scales, order, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`pack_mlp` in plain PyTorch: the LoRA rows of both stacks, and the ordered copy."""
    gate_A, gate_B, up_A, up_B, down_A, down_B = loras
    product_in = torch.cat((gate_A * scales[0], up_A * scales[1])).to(dtype)
    natural = torch.stack((gate_B, up_B, down_A.t() * scales[2])).to(dtype)
    return product_in, down_B.to(dtype), natural[:, order]


def reference_pack_linear(As, Bs, scales, dtype) -> tuple[Tensor, Tensor]:
    """`pack_linear` in plain PyTorch."""
    return torch.cat([A * scale for A, scale in zip(As, scales, strict=True)]).to(dtype), torch.cat(list(Bs)).to(dtype)


def reference_mlp_gradients(context, dense, order, down_scale) -> tuple[Tensor, Tensor, Tensor]:
    """`mlp_gradients` in plain PyTorch, fp32."""
    total = torch.zeros_like(context[0]).index_copy_(1, order, context.sum(0))
    gate, up, down = total if dense is None else total + dense.sum(0)
    return gate, up, down.t() * down_scale
