"""Applies a row-wise function exactly in forward, and takes its backward pass through few rows.

Defined in docs/how-it-works.md, section 3.1. Forward saves the inputs only. Backward receives the gradient of the
output, selects rows (`sparse_unsloth.rows.choice`), computes the function for these rows again and differentiates it.
Other rows add nothing to the parameters' gradients, and their input gradient is zero, except in a residual stream.

No weight is read here: any quantisation, adapter, activation and bias works that the function computes. It is the
model's own code, or that of a whole layer after attention (`sparse_unsloth.ops.stored_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.errors import SparsityError
from sparse_unsloth.rows.choice import RowChoice


@dataclass(frozen=True)
class BackwardRows:
    """What the backward pass of `backward_rows` goes through.

    Args:
        choice: the rows.
        select_rows: whether this backward selects the rows. Otherwise rows that were selected before are used, if any.
        residual_index: index of the input that is a residual stream: the output contains it unchanged, in every row.
        skip_output: forward computes nothing and returns zeros of the last input's shape (in a recompute).
    """

    choice: RowChoice
    select_rows: bool = True
    residual_index: int | None = None
    skip_output: bool = False


def backward_rows(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor], rows: BackwardRows
) -> Tensor:
    """``function(*inputs)``, differentiated through the rows of ``rows.choice`` only.

    Args:
        function: row-wise and deterministic, from ``[..., n, width]`` tensors to one such tensor. Backward calls it
            again, with ``[n, width]`` where the input has two dimensions, else with ``[1, n, width]``.
        inputs: ``[..., width]``; flattened, their rows are those of the choice's partition.
        parameters: the tensors that it reads and that need gradients.
    """
    return _BackwardRows.apply(function, rows, len(inputs), *inputs, *parameters)


class _BackwardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], rows: BackwardRows, num_inputs: int, *tensors: Tensor):
        inputs, ctx.parameters = tensors[:num_inputs], tensors[num_inputs:]
        ctx.function, ctx.rows, ctx.autocast = function, rows, current_autocast(inputs[0])
        ctx.save_for_backward(*inputs)
        if rows.skip_output:
            return inputs[-1].new_zeros(()).expand(inputs[-1].shape)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        inputs, choice = ctx.saved_tensors, ctx.rows.choice
        dy = gradient.flatten(0, -2)
        rows = choice.select(dy) if ctx.rows.select_rows or choice.rows is None else choice.rows
        needs_grad = ctx.needs_input_grad[3:]
        leaves = [
            _rows_of(tensor, rows).requires_grad_(needed) for tensor, needed in zip(inputs, needs_grad, strict=False)
        ]
        with torch.enable_grad(), ctx.autocast():
            output = ctx.function(*leaves)
        sources = [tensor for tensor, needed in zip((*leaves, *ctx.parameters), needs_grad, strict=True) if needed]
        selected_dy = dy.index_select(0, rows).view(output.shape).to(output.dtype)
        found = iter(torch.autograd.grad(output, sources, selected_dy, allow_unused=True))
        gradients = [next(found) if needed else None for needed in needs_grad]
        for index, (tensor, needed) in enumerate(zip(inputs, needs_grad, strict=False)):
            if not needed:
                continue
            is_residual = index == ctx.rows.residual_index
            dx = dy.to(tensor.dtype, copy=True) if is_residual else torch.zeros_like(tensor).flatten(0, -2)
            if gradients[index] is not None:
                dx.index_copy_(0, rows, gradients[index].flatten(0, -2))
            gradients[index] = dx.view(tensor.shape)
        return None, None, None, *gradients


def refuse_gradient(value: object, output: Tensor, where: str) -> object:
    """``value``, whose backward raises SparsityError; ``where`` is the module that returned it beside ``output``."""
    if isinstance(value, Tensor) and value.is_floating_point() and output.requires_grad:
        return _RefuseGradient.apply(value, output, where)
    return value


class _RefuseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, output: Tensor, where: str):
        ctx.where = where
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise SparsityError(
            f"{ctx.where}: the loss depends on what it returns beside its output (a router's logits, say), and row "
            "sparsity gives that no gradient. Leave such a loss out (output_router_logits=False), or train dense "
            "(sparsity=None)."
        )


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    chosen = tensor.detach().flatten(0, -2).index_select(0, rows)
    return chosen if tensor.ndim == 2 else chosen[None]


def current_autocast(like: Tensor) -> Callable[[], AbstractContextManager]:
    """Makes the autocast context that is active now, for use in backward."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype)
