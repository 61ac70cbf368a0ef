"""Sums up, layer by layer, how much of the gradient's energy the chosen rows hold, without waiting for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GradientEnergy:
    """The energy (sum of squares) of the gradients by which layers choose rows: of the chosen rows, and of all.

    Backward passes add it up on the device. A layer's sums keep their address, so that CUDA graphs add to them, too.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def of(self, layer: int, device: torch.device) -> Tensor:
        """float32 ``[2]`` on ``device``: what the backward passes of ``layer`` add the two sums to."""
        sums = self._sums.get(layer)
        if sums is None or sums.device != device:
            with torch.inference_mode(False):
                sums = self._sums[layer] = torch.zeros(2, device=device)
        return sums

    def take(self) -> dict[int, float]:
        """The share of the energy that chosen rows held since the last call, in [0, 1], by layer.

        Layers without a backward pass, or with a gradient that was not finite, are left out. The host waits once.
        """
        if not self._sums:
            return {}
        first = next(iter(self._sums.values()))
        sums = torch.stack([one.to(first.device) for one in self._sums.values()]).tolist()
        self.clear()
        return {
            layer: chosen / everything
            for layer, (chosen, everything) in sorted(zip(self._sums, sums, strict=True))
            if 0 < everything < math.inf
        }

    def clear(self) -> None:
        """Begins anew."""
        for sums in self._sums.values():
            sums.zero_()
