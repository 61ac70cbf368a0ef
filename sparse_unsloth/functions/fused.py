"""The gated MLP of context rows as one product in, one fused gated unit, one product out (design section 4).

``[A_gate; A_up; W_gate[selected]; W_up[selected]]`` is one weight, ``[W_down[:, selected] | B_down]`` another; between
them the kernels of `sparse_unsloth.kernels.glu` never hold an ``[N, intermediate_size]`` tensor. Same mathematics, and
same gradients, as `sparse_unsloth.functions.mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.kernels.glu import glu_backward, glu_forward


@dataclass(frozen=True)
class FusedGluRows:
    """The gated MLP on context rows, through the kernels.

    Args:
        weight_in: ``[2r + 2k, hidden]``: A_gate, A_up, and the selected rows of W_gate and W_up.
        weight_out: ``[hidden, k + r]``: the selected columns of W_down, and B_down, unscaled.
        gate_B, up_B, down_A: ``[I, r]`` (``down_A`` transposed), selected channels first.
        order: int64 ``[I]``: which channel stands at each of those places.
        scales: LoRA's scales of gate, up and down.
    """

    weight_in: Tensor
    weight_out: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    order: Tensor
    k: int
    scales: tuple[float, float, float]
    activation: str
    compensation: Compensation | None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``y [n, hidden]``, and what backward needs: the first product ``[n, 2r + 2k]`` and ``h down_A' [n, r]``."""
        stacked = x @ self.weight_in.t()
        unit = glu_forward(stacked, self.gate_B, self.up_B, self.down_A, self.k, self.scales, self.activation)
        down_thin = unit[:, self.k :].clone()
        unit[:, self.k :] *= self.scales[2]
        y = unit @ self.weight_out.t()
        if self.compensation is not None:
            y += self.compensation.forward(x)
        return y, (stacked, down_thin)

    def backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor], gradients: list[Tensor | None]) -> Tensor:
        """``dx``; adds the LoRA gradients ``(dAg, dBg, dAu, dBu, dAd, dBd)`` into ``gradients``."""
        stacked, down_thin = saved
        r = self.gate_B.shape[1]
        d_unit = dy @ self.weight_out
        d_stacked, d_loras = glu_backward(
            stacked, d_unit, self.gate_B, self.up_B, self.down_A, self.k, self.scales, self.activation
        )
        dx = d_stacked @ self.weight_in
        if self.compensation is not None:
            dx += self.compensation.input_gradient(dy)
        dA = d_stacked[:, : 2 * r].t() @ x
        d_loras = d_loras.to(x.dtype)
        gradients[0] += dA[:r]
        gradients[1].index_add_(0, self.order, d_loras[0])
        gradients[2] += dA[r:]
        gradients[3].index_add_(0, self.order, d_loras[1])
        gradients[4].index_add_(1, self.order, d_loras[2].t())
        gradients[5].addmm_(dy.t(), down_thin, alpha=self.scales[2])
        return dx


def channel_order(channels: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: ``channels`` first, then the others, both ascending; no host sync."""
    others = torch.ones(size, dtype=torch.bool, device=channels.device).index_fill_(0, channels, False)
    return others.to(torch.uint8).argsort(stable=True)
