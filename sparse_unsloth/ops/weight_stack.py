"""Stacks LoRA rows and base weights into one matmul operand (docs/how-it-works.md, section 7).

4-bit weights and selected channels are written into one matrix, so a stack is one matmul. Whole 16-bit weights are not
copied: they are multiplied one by one, into adjacent columns of one output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_unsloth.ops.fp8 import Fp8Stack
from sparse_unsloth.ops.projection import BaseWeight

_MIXED = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this PyTorch (since 2.8) can write the matmul of half-precision matrices in fp32."""


class WeightStack:
    """Matrices ``[size_i, H]``, one below the other: ``[size, H]``.

    Args:
        lora_rows: the first rows, a view of the first block; whoever makes the stack writes them.
        blocks: the matrices in order, of any strides.
    """

    __slots__ = ("blocks", "lora_rows", "size")

    def __init__(self, lora_rows: Tensor, blocks: Sequence[Tensor]):
        self.lora_rows, self.blocks = lora_rows, tuple(blocks)
        self.size = sum(block.shape[0] for block in blocks)

    def matmul(self, x: Tensor) -> Tensor:
        """``x S'``: ``[n, H]`` to ``[n, size]``."""
        if len(self.blocks) == 1:
            return x @ self.blocks[0].t()
        y = x.new_empty((x.shape[0], self.size))
        start = 0
        for block in self.blocks:
            end = start + block.shape[0]
            torch.mm(x, block.t(), out=y[:, start:end])
            start = end
        return y

    def matmul_transposed(self, y: Tensor, out: Tensor) -> None:
        """Writes ``y S``, ``[n, size]`` to ``[n, H]``, into ``out``."""
        start = 0
        for block in self.blocks:
            end = start + block.shape[0]
            part = y if len(self.blocks) == 1 else y[:, start:end]
            if start:
                out.addmm_(part, block)
            else:
                torch.mm(part, block, out=out)
            start = end


def stack_rows(
    bases: Sequence[BaseWeight],
    lora_rows: int,
    dtype: torch.dtype,
    indices: Sequence[Tensor] | None = None,
    pad: int = 1,
    fp8: bool = False,
) -> WeightStack | Fp8Stack:
    """Stacks output channels (rows) of weights that share one input.

    Args:
        lora_rows: the number of rows to leave free for LoRA.
        indices: int64, ascending, by weight; None for whole weights.
        pad: each weight's rows are padded with zeros to a multiple of this.
        fp8: multiply by the weights in FP8; for whole weights.
    """
    width = bases[0].shape[1]
    if fp8:
        return Fp8Stack(torch.empty((lora_rows, width), dtype=dtype, device=bases[0].device), bases, False)
    if indices is None and _in_place(bases, dtype):
        front = bases[0].weight.new_empty((lora_rows, width))
        return WeightStack(front, (front, *(base.weight.detach() for base in bases)))
    sizes = [base.shape[0] for base in bases]
    if indices is not None:
        sizes = [min(-(-len(index) // pad) * pad, size) for index, size in zip(indices, sizes, strict=True)]
    whole = torch.empty((lora_rows + sum(sizes), width), dtype=dtype, device=bases[0].device)
    start = lora_rows
    for number, (base, size) in enumerate(zip(bases, sizes, strict=True)):
        out = whole[start : start + size]
        base.dense(dtype, out=out) if indices is None else base.rows(indices[number], dtype, out=out)
        start += size
    return WeightStack(whole[:lora_rows], (whole,))


def stack_columns(
    base: BaseWeight,
    lora_rows: int,
    dtype: torch.dtype,
    index: Tensor | None = None,
    pad: int = 1,
    fp8: bool = False,
) -> WeightStack | Fp8Stack:
    """Stacks input channels (columns) of a weight as rows: `WeightStack.matmul_transposed` multiplies by the weight.

    The LoRA rows are the transpose of B: ``[lora_rows, out_features]``. Other arguments as in `stack_rows`.
    """
    height, size = base.shape
    if fp8:
        return Fp8Stack(torch.empty((height, lora_rows), dtype=dtype, device=base.device).t(), [base], True)
    if index is None and _in_place([base], dtype):
        front = base.weight.new_empty((height, lora_rows)).t()
        return WeightStack(front, (front, base.weight.detach().t()))
    if index is not None:
        size = min(-(-len(index) // pad) * pad, size)
    whole = torch.empty((height, lora_rows + size), dtype=dtype, device=base.device)
    out = whole[:, lora_rows:]
    base.dense(dtype, out=out) if index is None else base.columns(index, dtype, out=out)
    return WeightStack(whole[:, :lora_rows].t(), (whole.t(),))


def _in_place(bases: Sequence[BaseWeight], dtype: torch.dtype) -> bool:
    return all(base.quant_state is None and base.weight.dtype == dtype for base in bases)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, in fp32 if the device supports it, else in their dtype: for gradients of fp32 LoRA weights."""
    if _MIXED and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
