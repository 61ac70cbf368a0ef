"""Computes ``act(e) * g`` of all channels and its gradients, in one kernel each (docs/how-it-works.md, section 4.2).

Bytes (bf16) per channel: forward reads 4 and writes 2; backward reads 6 and writes 6 (unfused PyTorch: about 40).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unsloth.kernels.activation import KINDS, activation
from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.model.activations import ACTIVATIONS, activation_and_slope


@triton.jit
def gated_fwd_kernel(e, g, h, size, KIND: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offset < size
    value, _ = activation(tl.load(e + offset, mask=mask, other=0.0).to(tl.float32), KIND)
    product = value * tl.load(g + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + offset, product.to(h.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(dh, e, g, h, de, dg, size, KIND: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offset < size
    value, slope = activation(tl.load(e + offset, mask=mask, other=0.0).to(tl.float32), KIND)
    b_g = tl.load(g + offset, mask=mask, other=0.0).to(tl.float32)
    b_dh = tl.load(dh + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + offset, (value * b_g).to(h.dtype.element_ty), mask=mask)
    tl.store(de + offset, (b_dh * b_g * slope).to(h.dtype.element_ty), mask=mask)
    tl.store(dg + offset, (b_dh * value).to(h.dtype.element_ty), mask=mask)


def gated_forward(e: Tensor, g: Tensor, kind: str) -> Tensor:
    """``act(e) * g``: contiguous tensors of one shape and dtype, computed in fp32."""
    h = torch.empty_like(e)
    if h.numel():
        grid = (triton.cdiv(h.numel(), 1024),)
        launch(gated_fwd_kernel, grid, (e, g, h, h.numel()), {"KIND": KINDS[kind], "TILE": 1024})
    return h


def gated_backward(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, de, dg)`` from the gradient ``dh`` of ``h = act(e) * g``; contiguous tensors, none overwritten."""
    h, de, dg = (torch.empty_like(e) for _ in range(3))
    if h.numel():
        grid = (triton.cdiv(h.numel(), 1024),)
        launch(gated_bwd_kernel, grid, (dh, e, g, h, de, dg, h.numel()), {"KIND": KINDS[kind], "TILE": 1024})
    return h, de, dg


def reference_gated_forward(e: Tensor, g: Tensor, kind: str) -> Tensor:
    """`gated_forward` in plain PyTorch."""
    return ACTIVATIONS[kind](e) * g


def reference_gated_backward(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_backward` in plain PyTorch."""
    value, slope = activation_and_slope(kind, e)
    return value * g, dh * g * slope, dh * value
