"""Computes one projection on a set of rows, and its gradients (docs/how-it-works.md, section 1.2).

The base product may cover selected channels only; ``out_index`` and ``in_index`` name them. The LoRA branch covers all
channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowProjection:
    """``y = scatter(x[:, in_index] weight') + bias + scale * (x A') B'`` on ``n`` rows.

    Args:
        weight: ``[o, i]``: the rows or columns of the index, if there is one.
        bias: ``[out]`` or None.
        A: ``[r, in]``, B: ``[out, r]``, scale: the LoRA branch; A and B are None without one.
        out_features: the width of ``y``.
        out_index: int64 ``[o]``, the columns of ``y`` that the base product fills, or None for all.
        in_index: int64 ``[i]``, the columns of ``x`` that the base product reads, or None for all.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scale: float
    out_features: int
    out_index: Tensor | None = None
    in_index: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``y [n, out]``."""
        return self.add_lora(self.base(x), self.xA(x))

    def base(self, x: Tensor) -> Tensor:
        """The base product of the selected channels, without bias: ``[n, o]``."""
        x = x if self.in_index is None else x.index_select(1, self.in_index)
        return x @ self.weight.t()

    def xA(self, x: Tensor) -> Tensor | None:
        """``x A' [n, r]``, or None without a LoRA branch."""
        return None if self.A is None else x @ self.A.t()

    def add_lora(self, base: Tensor, xA: Tensor | None) -> Tensor:
        """``y [n, out]`` from the base product and ``xA``; may overwrite ``base``."""
        if self.out_index is None:
            y = base if xA is None else base.addmm_(xA, self.B.t(), alpha=self.scale)
        else:
            y = base.new_zeros(len(base), self.out_features) if xA is None else (xA * self.scale) @ self.B.t()
            y.index_add_(1, self.out_index, base)
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, dy: Tensor, x: Tensor, xA: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(dx [n, in], dA [r, in], dB [out, r])`` from ``dy [n, out]``, as new tensors."""
        d_xA = self.xA_gradient(dy)
        return self.input_gradient(dy, d_xA, x), *self.lora_gradients(dy, d_xA, x, xA)

    def xA_gradient(self, dy: Tensor) -> Tensor | None:
        """The gradient of `xA`, ``[n, r]``."""
        return None if self.B is None else (dy @ self.B).mul_(self.scale)

    def input_gradient(self, dy: Tensor, d_xA: Tensor | None, like: Tensor) -> Tensor:
        """``dx [n, in]``, the shape of ``like``; ``d_xA`` is from `xA_gradient`."""
        base_dy = dy if self.out_index is None else dy.index_select(1, self.out_index)
        base_dx = base_dy @ self.weight
        if self.in_index is None:
            return base_dx if d_xA is None else base_dx.addmm_(d_xA, self.A)
        dx = torch.zeros_like(like) if d_xA is None else d_xA @ self.A
        return dx.index_add_(1, self.in_index, base_dx)

    def lora_gradients(self, dy: Tensor, d_xA: Tensor | None, x: Tensor, xA: Tensor | None):
        """``(dA [r, in], dB [out, r])``, or two None without a LoRA branch."""
        if xA is None:
            return None, None
        return d_xA.t() @ x, (dy.t() @ xA).mul_(self.scale)
