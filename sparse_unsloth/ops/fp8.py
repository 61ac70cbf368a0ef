"""Multiplies by frozen weights in FP8 (`SparsityConfig.precision`; docs/how-it-works.md, section 7).

The weight stays as it is in memory. A product quantises its rows and converts the weight where it is used, by scales
that are computed once and kept beside the weight. LoRA's matrices are multiplied in the dtype of the rows, which are
not quantised for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sparse_unsloth.errors import AttachError
from sparse_unsloth.kernels.fp8 import FP8, exact_weight, quantize_rows, quantize_weight, scales_of
from sparse_unsloth.ops.projection import BaseWeight, Projection

MULTIPLE = 16
"""Both sizes of a weight must be multiples of it: a rule of ``torch._scaled_mm``."""
RANK_MULTIPLE = 8
"""LoRA's rank must be a multiple of it, so that products are written to aligned columns beside LoRA's."""
LEAST_CAPABILITY = (8, 9)
GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))
"""The projections whose weights are multiplied together: q, k, v; o; gate, up; down."""


@dataclass(frozen=True)
class Fp8Scales:
    """The scales of weights ``[N_i, K]``, one below the other, and their reciprocals, which `quantize_weight` takes.

    Attributes:
        rows: fp32 ``[2, sum of N_i]``, of their rows; ``columns``: fp32 ``[2, K]``, of their columns all together.
        source: what they were computed of.
    """

    rows: Tensor
    columns: Tensor
    source: tuple


def fp8_scales(bases: Sequence[BaseWeight]) -> Fp8Scales:
    """The scales of weights that share an input, kept beside the first one until one of them moves or changes."""
    kept = bases[0].weight.__dict__
    source = tuple((base.weight.data_ptr(), base.weight._version) for base in bases)
    known: Fp8Scales | None = kept.get("_sparse_fp8_scales")
    if known is None or known.source != source:
        rows, columns = [], None
        for base in bases:
            magnitudes = exact_weight(base.weight, base.quant_state).abs()
            rows.append(magnitudes.amax(1))
            columns = magnitudes.amax(0) if columns is None else torch.maximum(columns, magnitudes.amax(0))
        both = [torch.stack((scales, scales.reciprocal())) for scales in map(scales_of, (torch.cat(rows), columns))]
        known = kept["_sparse_fp8_scales"] = Fp8Scales(*both, source)
    return known


def scale_tensors(projections: Sequence[Projection]) -> list[Tensor]:
    """The scales, and their reciprocals, that products with q, k, v, o, gate, up and down read."""
    found = [fp8_scales([one.base for one in projections[first:end]]) for first, end in GROUPS]
    return [tensor for scales in found for tensor in (scales.rows, scales.columns)]


class Fp8Stack:
    """A `sparse_unsloth.ops.weight_stack.WeightStack` of whole weights that are multiplied in FP8.

    Args:
        lora_rows: the first rows, ``[lora, H]``; whoever makes the stack writes them.
        bases: the weights, one below the other; a single one where ``transposed``.
        transposed: whether the stack holds the weight's columns as rows.
    """

    __slots__ = ("_operands", "bases", "lora_rows", "size", "transposed")

    def __init__(self, lora_rows: Tensor, bases: Sequence[BaseWeight], transposed: bool):
        self.lora_rows, self.bases, self.transposed = lora_rows, bases, transposed
        self.size = len(lora_rows) + sum(base.shape[transposed] for base in bases)
        self._operands: dict[bool, tuple[Tensor, Tensor]] = {}

    def matmul(self, x: Tensor) -> Tensor:
        """``x S'``: ``[n, H]`` to ``[n, size]``."""
        y, count = x.new_empty((x.shape[0], self.size)), len(self.lora_rows)
        torch.mm(x, self.lora_rows.t(), out=y[:, :count])
        scaled_product(x, *self._operand(self.transposed), y[:, count:])
        return y

    def matmul_transposed(self, y: Tensor, out: Tensor) -> None:
        """Writes ``y S``, ``[n, size]`` to ``[n, H]``, into ``out``."""
        count = len(self.lora_rows)
        scaled_product(y[:, count:], *self._operand(not self.transposed), out)
        out.addmm_(y[:, :count], self.lora_rows)

    def _operand(self, of_gradient: bool) -> tuple[Tensor, Tensor]:
        """The weights in e4m3 and their scales: ``[sum of N_i, K]`` for ``x W'``, else ``[K, sum of N_i]``."""
        if of_gradient not in self._operands:
            scales = fp8_scales(self.bases)
            height, width = sum(base.shape[0] for base in self.bases), self.bases[0].shape[1]
            shape = (width, height) if of_gradient else (height, width)
            whole = torch.empty(shape, dtype=FP8, device=self.lora_rows.device)
            ends = list(accumulate(base.shape[0] for base in self.bases))
            for base, end in zip(self.bases, ends, strict=True):
                part = slice(end - base.shape[0], end)
                out, reciprocals = whole[part], scales.rows[1, part]
                if of_gradient:
                    out, reciprocals = whole[:, part], scales.columns[1]
                quantize_weight(base.weight.detach(), base.quant_state, reciprocals, out, of_gradient)
            self._operands[of_gradient] = whole, (scales.columns if of_gradient else scales.rows)[0]
        return self._operands[of_gradient]


def scaled_product(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> None:
    """Writes ``x weight'`` into ``out``, with the rows of ``x`` in FP8; sums are of fp32.

    Args:
        x: ``[n, K]``; both may have a row stride.
        weight: e4m3 ``[N, K]``, contiguous; ``scales``: fp32 ``[N]``.
        out: ``[n, N]``, on a GPU bf16.

    Raises:
        AttachError: ``out`` is of another dtype on a GPU, or not aligned as the product there needs it.
    """
    q, row_scales = quantize_rows(x)
    if not x.is_cuda:
        out.copy_((q.float() @ weight.float().t()) * row_scales * scales)
        return
    if out.dtype != torch.bfloat16:
        raise AttachError(
            f"precision: FP8 products with a scale for each row write bfloat16, and the layers compute in {out.dtype}. "
            "Train in bfloat16 (bf16=True), or set precision: bf16."
        )
    if out.data_ptr() % MULTIPLE or out.stride(0) % RANK_MULTIPLE:
        raise AttachError(
            f"precision: FP8 products need a LoRA rank that is a multiple of {RANK_MULTIPLE}. Set r to one, or "
            "precision: bf16."
        )
    torch._scaled_mm(q, weight.t(), row_scales, scales[None], out_dtype=out.dtype, use_fast_accum=True, out=out)


def check_device(device: torch.device) -> None:
    """Checks that ``device`` multiplies in FP8; a CPU computes the same roundings in float32.

    Raises:
        AttachError: a GPU that does not; the message names it.
    """
    if device.type == "cpu":
        return
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability >= LEAST_CAPABILITY:
            return
        name = f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))})"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    raise AttachError(
        f"precision: {name} has no FP8 products as they are used here; NVIDIA GPUs have them from compute capability "
        "8.9 on (Ada, Hopper, Blackwell). Set precision: bf16."
    )


def check_shapes(projections: dict[str, Projection], name: str) -> None:
    """Checks that the weights and LoRA branches of a layer fit FP8 products.

    Args:
        projections: by name; ``name``: the layer's.

    Raises:
        AttachError: one does not.
    """
    for each, projection in projections.items():
        base, lora = projection.base, projection.lora
        reason = ""
        if any(size % MULTIPLE for size in base.shape):
            reason = f"is {base.shape[0]} x {base.shape[1]}, and FP8 products need multiples of {MULTIPLE}"
        elif base.quant_state is not None and base.shape[1] % base.quant_state.blocksize:
            reason = (
                f"has rows of {base.shape[1]} values in blocks of {base.quant_state.blocksize}, and blocks must not "
                "cross rows"
            )
        elif lora is not None and lora.A.shape[0] % RANK_MULTIPLE:
            reason = f"has LoRA of rank {lora.A.shape[0]}, and FP8 products need a multiple of {RANK_MULTIPLE}"
        if reason:
            raise AttachError(f"precision: {name}.{each} {reason}. Set precision: bf16.")
