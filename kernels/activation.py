"""Computes the activations of gated MLPs in kernels; `KINDS` numbers the names of `ACTIVATIONS`."""

from __future__ import annotations

from sparse_unsloth.kernels.language import tl, triton

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def activation(x, KIND: tl.constexpr):
    """``act(x)`` and ``act'(x)`` in fp32."""
    if KIND == 0:
        root = tl.math.rsqrt(1.0 + tl.exp(-x))  # its square is the sigmoid, without a division
        gate = root * root
        value = x * gate
        slope = gate + value * (1.0 - gate)
    elif KIND == 1:
        normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * normal
        slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        value = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope
