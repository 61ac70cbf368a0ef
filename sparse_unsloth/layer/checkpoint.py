"""Checkpoints a layer by itself within PyTorch's non-reentrant gradient checkpointing.

There the first forward runs with gradients, and the recompute only restores what it saved. So a layer that saves its
input alone is recomputed twice: by the checkpoint, which needs nothing but that input, and by its own backward pass.
The function here computes nothing in the first of the two. Its backward pass runs the layer again as a recompute under
reentrant checkpointing does, where the output is unused and layers can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.rows.backward import current_autocast


def checkpointed(
    hidden_states: Tensor, first: Callable[[Tensor], Tensor] | None, again: Callable[[Tensor], Tensor],
    parameters: Callable[[], Sequence[Tensor]],
) -> Tensor:  # fmt: skip
    """The layer's output ``[batch, sequence, hidden_size]``.

    Args:
        first: the layer's forward, which runs without gradients; None in the checkpoint's recompute: returns zeros.
        again: the layer's forward with gradients, in the backward pass.
        parameters: the trained tensors that it reads now; FSDP may give others in the backward pass.
    """
    return _Checkpointed.apply(hidden_states, first, again, parameters, *parameters())


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, first, again, parameters, *tensors: Tensor):
        ctx.again, ctx.parameters, ctx.autocast = again, parameters, current_autocast(hidden_states)
        ctx.save_for_backward(hidden_states)
        return hidden_states.new_zeros(()).expand(hidden_states.shape) if first is None else first(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (hidden_states,) = ctx.saved_tensors  # runs the checkpoint's recompute
        needs_input, _, _, _, *needs = ctx.needs_input_grad
        with torch.enable_grad(), ctx.autocast():
            x = hidden_states.detach().requires_grad_(needs_input)
            output = ctx.again(x)
        wanted = [needs_input, *needs]
        sources = [tensor for tensor, needed in zip((x, *ctx.parameters()), wanted, strict=True) if needed]
        found = iter(torch.autograd.grad(output, sources, gradient))
        dx, *gradients = (next(found) if needed else None for needed in wanted)
        return dx, None, None, None, *gradients
