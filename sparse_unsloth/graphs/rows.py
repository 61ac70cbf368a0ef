"""CUDA graphs for `backward_rows`: `graphs.layer` and `graphs.parts` for layers by rows.

Forward computes every row densely. The recompute ends at the attention, and backward, recorded as well, chooses rows by
the gradient that comes, computes them behind the attention once more, and takes gradients through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.graphs.layer import Attention, first_forward, flat, parts, recompute
from sparse_unsloth.graphs.recorder import LayerCapture
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.rows.backward import backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition


def whole_layer_by_rows(
    hidden_states: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    attention: Attention,
    tensors: Sequence[Tensor],
    partition: TokenPartition,
    share: float,
    chosen: TokenPartition,
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros where ``plan`` says that nobody reads it.

    Args:
        plan: of all rows, dense.
        capture, attention, tensors: as in `graphed_layer.whole_layer`.
        partition: the roles of the rows.
        share: of the context rows, that backward goes through.
        chosen: as many dense rows as are chosen: `RowChoice.alone`.
    """
    every, few = (RowOrder(capture.rows(rows), False) for rows in (plan.mlp.partition, chosen))
    roles = capture.rows(partition)
    static = replace(plan, attention=every, mlp=every)

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = static.with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        attention_output = attention(x, projected, tensors)
        if not plan.output_unused:
            return post_attention(attention_output, residual, trained)
        return _through_few(attention_output, residual, trained, few, RowChoice(roles, share))

    loras = lora_tensors_of(plan.projections)
    return (recompute if plan.output_unused else first_forward)(capture, compute, hidden_states, tensors, loras)


def post_attention_by_rows(
    attention_output: Tensor,
    residual: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    partition: TokenPartition,
    share: float,
    chosen: TokenPartition,
) -> Tensor:
    """Behind an attention that runs as it is, in a recompute: zeros, whose backward is a recording.

    Args:
        attention_output: ``[..., heads * head_dim]``, before o_proj.
        residual: as `graphed_parts.pre_attention` gave it; other arguments as in `whole_layer_by_rows`.
    """
    loras = lora_tensors_of(plan.projections[3:])
    return _PostAttentionByRows.apply(attention_output, residual, plan, capture, partition, share, chosen, *loras)


class _PostAttentionByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, attention_output, residual, plan: LayerPlan, capture: LayerCapture, partition, share, chosen, *loras
    ):
        ctx.plan, ctx.capture, ctx.share, ctx.loras = plan, capture, share, loras
        ctx.roles, ctx.few = capture.rows(partition), RowOrder(capture.rows(chosen), False)
        ctx.save_for_backward(attention_output, residual)
        return residual.new_zeros(()).expand(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        plan, loras = ctx.plan, ctx.loras
        before = lora_tensors_of(plan.projections[:3])

        def run(gradient: Tensor, *inputs: Tensor):
            with torch.enable_grad():
                sources = [tensor.detach().requires_grad_() for tensor in (*inputs, *loras)]
                trained = plan.with_loras([*before, *sources[2:]])
                output = _through_few(*sources[:2], trained, ctx.few, RowChoice(ctx.roles, ctx.share))
            d_attention, d_residual, *found = torch.autograd.grad(output, sources, gradient)
            return (d_attention, d_residual, flat(found, loras)), None

        *d_inputs, found = ctx.capture.call("rows backward", run, (gradient, *ctx.saved_tensors))
        return *d_inputs, *(None,) * 5, *parts(found, loras)


def _through_few(
    attention_output: Tensor, residual: Tensor, plan: LayerPlan, few: RowOrder, choice: RowChoice
) -> Tensor:
    """Zeros, whose backward goes through few rows, by the LoRA matrices of ``plan``."""
    again = replace(plan, attention=few, mlp=few, output_unused=True, keep=False)
    return backward_rows(
        _not_called,
        [attention_output, residual],
        lora_tensors_of(plan.projections[3:]),
        choice,
        residual=1,
        output_unused=True,
        again=lambda rows, stream: post_attention(rows, stream, again),
    )


def _not_called(*rows: Tensor) -> NoReturn:
    raise AssertionError("the output of a recompute is not computed")
