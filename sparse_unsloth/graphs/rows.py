"""Captures row-sparse layers in CUDA graphs (docs/how-it-works.md, sections 3.1 and 9.1).

Forward computes every row. The recompute, if there is one, ends with attention. The captured backward selects rows by
the incoming gradient, computes what follows attention again for these rows, and takes gradients through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.graphs.layer import Attention, flatten_gradients, run_captured, split_gradients
from sparse_unsloth.graphs.recorder import LayerCapture
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition


def row_sparse_whole_layer(
    hidden_states: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    attention: Attention,
    tensors: Sequence[Tensor],
    partition: TokenPartition,
    share: float,
    chosen: TokenPartition,
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros in a recompute, where it is unused.

    Args:
        plan: computes every row densely.
        capture, attention, tensors: as in `sparse_unsloth.graphs.layer.whole_layer`.
        partition: the token roles.
        share: the share of the context tokens that backward goes through.
        chosen: the chosen rows alone, see `RowChoice.as_partition`.
    """
    all_rows, chosen_rows = (RowOrder(capture.static_partition(rows), False) for rows in (plan.mlp.partition, chosen))
    roles = capture.static_partition(partition)
    static = replace(plan, attention=all_rows, mlp=all_rows, keep=False)

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = static.with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        attention_output = attention(x, projected, tensors)
        return _through_chosen_rows(attention_output, residual, trained, chosen_rows, RowChoice(roles, share))

    return run_captured(plan, capture, compute, hidden_states, tensors)


def row_sparse_post_attention(
    attention_output: Tensor,
    residual: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    partition: TokenPartition,
    share: float,
    chosen: TokenPartition,
) -> Tensor:
    """What follows attention in a recompute, where attention itself is not captured: zeros with a captured backward.

    Args:
        attention_output: ``[..., heads * head_dim]``, before o_proj.
        residual: what `sparse_unsloth.graphs.parts.pre_attention` returned. Other arguments as in
            `row_sparse_whole_layer`.
    """
    loras = lora_tensors_of(plan.projections[3:])
    return _RowSparsePostAttention.apply(attention_output, residual, plan, capture, partition, share, chosen, *loras)


class _RowSparsePostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, attention_output, residual, plan: LayerPlan, capture: LayerCapture, partition, share, chosen, *loras
    ):
        ctx.plan, ctx.capture, ctx.share, ctx.loras = plan, capture, share, loras
        ctx.roles, ctx.chosen_rows = (
            capture.static_partition(partition),
            RowOrder(capture.static_partition(chosen), False),
        )
        ctx.save_for_backward(attention_output, residual)
        return residual.new_zeros(()).expand(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        plan, loras = ctx.plan, ctx.loras
        attention_loras = lora_tensors_of(plan.projections[:3])

        def run(gradient: Tensor, *inputs: Tensor):
            with torch.enable_grad():
                sources = [tensor.detach().requires_grad_() for tensor in (*inputs, *loras)]
                trained = plan.with_loras([*attention_loras, *sources[2:]])
                output = _through_chosen_rows(*sources[:2], trained, ctx.chosen_rows, RowChoice(ctx.roles, ctx.share))
            d_attention, d_residual, *found = torch.autograd.grad(output, sources, gradient)
            return (d_attention, d_residual, flatten_gradients(found, loras)), None

        *d_inputs, found = ctx.capture.call("rows backward", run, (gradient, *ctx.saved_tensors))
        return *d_inputs, *(None,) * 5, *split_gradients(found, loras)


def _through_chosen_rows(
    attention_output: Tensor, residual: Tensor, plan: LayerPlan, chosen_rows: RowOrder, choice: RowChoice
) -> Tensor:
    """What follows attention, for all rows (zeros in a recompute); backward goes through the chosen rows alone."""
    chosen_plan = replace(plan, attention=chosen_rows, mlp=chosen_rows, output_unused=True, keep=False)
    return backward_rows(
        lambda rows, stream: post_attention(rows, stream, plan),
        [attention_output, residual],
        lora_tensors_of(plan.projections[3:]),
        BackwardRows(
            choice,
            lambda rows, stream: post_attention(rows, stream, chosen_plan),
            residual_index=1,
            skip_output=plan.output_unused,
        ),
    )
