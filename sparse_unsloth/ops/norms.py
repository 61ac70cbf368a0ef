"""Defines the norms of a decoder layer: what they compute, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps) * (offset + weight) + bias`` over the last axis.

    Attributes:
        weight: ``[width]``, or ``[heads, width]`` where each head has its own; None for ones.
        offset: 1 where a weight of zero means one (Gemma), else 0.
        centred: whether the mean is taken off first; an RMS norm takes none.
        bias: as ``weight``, or None.
        keeps_dtype: whether the module's output has its input's dtype where the weight's is wider. `normalise` does.
    """

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    centred: bool = False
    bias: Tensor | None = None
    keeps_dtype: bool = True


def normalise(x: Tensor, norm: Norm | None) -> Tensor:
    """``x [..., width]`` by ``norm``, computed in at least float32, in ``x``'s dtype."""
    if norm is None:
        return x
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.centred:
        values = values - values.mean(-1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        values = values * (norm.offset + norm.weight.to(values.dtype))
    if norm.bias is not None:
        values = values + norm.bias.to(values.dtype)
    return values.to(x.dtype)
