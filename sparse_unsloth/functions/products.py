"""Products whose sums are wanted in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

_MIXED = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this PyTorch (2.8 on) writes a half-precision product in fp32."""


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of two matrices, in fp32 where the device can, else in their dtype: gradients of fp32 LoRA weights."""
    if _MIXED and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
