"""A function of single rows whose forward is exact, and whose backward pass goes through few context rows.

What context rows contribute to a gradient is very uneven: with prompts of a hundred tokens, a tenth of them holds most
of it (benchmarks/results/quality-notes.md). So forward computes every row, and keeps its input alone; backward looks at
the norms of the incoming gradient, computes dense rows and the context rows of largest norm once more, and takes
gradients through these. Of the rows left out nothing reaches the function's weights or its input; a residual stream
around it passes their gradient on as it is.

The function itself is whatever the model has there: no weight is read here, so that any quantisation, adapter,
activation and bias will do, and Unsloth's own kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.rows.choice import RowChoice


def backward_rows(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    choice: RowChoice,
    residual: int | None = None,
    chooses: bool = True,
    output_unused: bool = False,
    again: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``function(*inputs)``, differentiated through the rows of ``choice`` alone.

    Args:
        function: row by row, ``[..., n, width]`` tensors to one such; deterministic. Called in backward again.
        inputs: its arguments, ``[..., width]``; flattened, their rows are those of the choice's partition.
        parameters: what it reads that gradients are wanted of.
        residual: the place in ``inputs`` of a residual stream that the output contains as it is, for every row.
        chooses: whether its backward chooses the rows; else those that are chosen already hold, if some are.
        output_unused: in a recompute the output is not computed: zeros of the shape of the last input.
        again: called in backward instead of ``function``: of the same gradients; its output is not read.
    """
    call = _Call(function, function if again is None else again, choice, residual, chooses, output_unused, len(inputs))
    return _BackwardRows.apply(call, *inputs, *parameters)


@dataclass(frozen=True)
class _Call:
    """The arguments of `backward_rows` that are no tensors."""

    function: Callable[..., Tensor]
    again: Callable[..., Tensor]
    choice: RowChoice
    residual: int | None
    chooses: bool
    output_unused: bool
    num_inputs: int


class _BackwardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor):
        inputs, ctx.parameters = tensors[: call.num_inputs], tensors[call.num_inputs :]
        ctx.call, ctx.autocast = call, _autocast_of(inputs[0])
        ctx.save_for_backward(*inputs)
        if call.output_unused:
            return inputs[-1].new_zeros(()).expand(inputs[-1].shape)
        return call.function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        inputs, choice = ctx.saved_tensors, ctx.call.choice
        flat = gradient.flatten(0, -2)
        rows = choice.choose(flat) if ctx.call.chooses or choice.rows is None else choice.rows
        wanted = ctx.needs_input_grad[-len(inputs) - len(ctx.parameters) :]
        leaves = [
            tensor.detach().flatten(0, -2).index_select(0, rows)[None].requires_grad_(needed)
            for tensor, needed in zip(inputs, wanted, strict=False)
        ]
        with torch.enable_grad(), ctx.autocast():
            output = ctx.call.again(*leaves)
        sources = [tensor for tensor, needed in zip((*leaves, *ctx.parameters), wanted, strict=True) if needed]
        found = iter(
            torch.autograd.grad(output, sources, flat.index_select(0, rows)[None].to(output.dtype), allow_unused=True)
        )
        gradients = [next(found) if needed else None for needed in wanted]
        for place, (tensor, needed) in enumerate(zip(inputs, wanted, strict=False)):
            if not needed:
                continue
            through = place == ctx.call.residual
            whole = flat.to(tensor.dtype, copy=True) if through else torch.zeros_like(tensor).flatten(0, -2)
            if gradients[place] is not None:
                whole.index_copy_(0, rows, gradients[place][0])
            gradients[place] = whole.view(tensor.shape)
        return None, *gradients


def _autocast_of(like: Tensor) -> Callable[[], AbstractContextManager]:
    """The autocast that is on now, for later."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype)
