"""Computes the activations of gated MLPs and their derivatives in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation, elementwise."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def activation_and_slope(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """``act(x)`` and ``act'(x)``, elementwise in ``x``'s dtype; ``kind`` is a key of `ACTIVATIONS`."""
    if kind == "silu":
        gate = torch.sigmoid(x)
        value = x * gate
        return value, gate + value * (1 - gate)
    if kind == "gelu":
        normal = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * normal, normal + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    tanh = torch.tanh(inner)
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner_slope
