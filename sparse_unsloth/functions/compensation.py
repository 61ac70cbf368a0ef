"""A frozen, calibrated stand-in for what the dropped channels would have added (design section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compensation:
    """A low-rank map of the layer's input, added to the output of context rows: ``(x down') up' + bias``.

    Args:
        down: ``[rank, hidden_size]``; rank 0 leaves the mean output alone.
        up: ``[hidden_size, rank]``.
        bias: ``[hidden_size]``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Compensation:
        return Compensation(*(part.to(device, dtype) for part in (self.down, self.up, self.bias)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, hidden_size]`` to ``[N, hidden_size]``; plain operations, so autograd differentiates it too."""
        return torch.addmm(self.bias, x @ self.down.t(), self.up.t())

    def input_gradient(self, dy: Tensor) -> Tensor:
        """The gradient for ``x`` of `forward`, ``[N, hidden_size]``."""
        return (dy @ self.up) @ self.down
