"""A kernel with a fault, to see that what looks for such faults finds it."""

import triton
import triton.language as tl
from torch import Tensor

from sparse_unsloth.kernels.launch import launch


@triton.jit
def overrun_kernel(output, size, TILE: tl.constexpr):
    offset = tl.arange(0, TILE)
    tl.store(output + offset, offset.to(output.dtype.element_ty), mask=offset < size + 1)


def overrun(output: Tensor) -> Tensor:
    """Writes one element more than ``output`` has, at most 1024."""
    launch(overrun_kernel, (1,), (output, output.numel()), {"TILE": 1024})
    return output
