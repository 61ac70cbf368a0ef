"""Computes what follows attention for every row, and takes its backward pass through chosen rows.

Defined in docs/how-it-works.md, section 3.1. The gradients are those of `rows.backward.backward_rows` over
`ops.decoder_layer.post_attention`, which computes O, gate and up again for the n chosen rows of width H. Here forward
stores what they gave, for all rows or, without ``plan.keep_context``, for loss tokens: then O, gate and up of the
chosen context tokens are computed again, at ``2 H (heads * head_dim + 2 I)`` FLOPs of frozen products each.

Bytes stored a layer and row, e bytes an element: ``e (heads * head_dim + 2 H + 2 I + 4 r)``, and ``e H`` for each
output norm (Llama-3-8B in bf16: 82 KB); of a row that is not stored the inputs, which attention and the function before
it store anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.ops.decoder_layer import (
    LayerPlan,
    RowOrder,
    after_attention,
    after_attention_backward,
    after_attention_loras,
    fused_mlp,
    lora_tensors_of,
    output_projection,
    post_attention,
    without_autocast,
)
from sparse_unsloth.ops.linear import as_loras
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition


def post_attention_by_rows(
    attention_output: Tensor, residual: Tensor, plan: LayerPlan, choice: RowChoice, chosen: RowOrder | None
) -> Tensor:
    """The layer's output, whose backward goes through the rows of ``choice``; arguments of `post_attention_of_rows`.

    A recompute, whose output is unused, stores nothing and computes the chosen rows in backward. Otherwise forward
    stores the intermediates, see `post_attention_of_rows`. Without ``plan.keep`` no backward follows.
    """
    if not plan.keep:
        return post_attention(attention_output, residual, plan)
    if not plan.output_unused:
        return post_attention_of_rows(attention_output, residual, plan, choice, chosen)
    again = replace(plan, keep=False)
    return backward_rows(
        lambda rows, stream: post_attention(rows, stream, _of_chosen(again, choice, chosen)),
        [attention_output, residual],
        lora_tensors_of(plan.projections[3:]),
        BackwardRows(choice, residual_index=1, skip_output=True),
    )


def post_attention_of_rows(
    attention_output: Tensor, residual: Tensor, plan: LayerPlan, choice: RowChoice, chosen: RowOrder | None
) -> Tensor:
    """`post_attention`, differentiated through the rows of ``choice`` only; launches the same kernels each time.

    Other rows pass the gradient on by the residual stream alone.

    Args:
        attention_output: ``[..., heads * head_dim]``, before o_proj; ``residual [..., hidden_size]``. Flattened, their
            rows are those of the choice's partition.
        plan: computes every row densely; with ``keep``, as backward follows. ``keep_context`` says of which rows the
            intermediates are stored.
        choice: selects the rows in backward, by the gradient of the output.
        chosen: the natural order of the chosen rows alone, see `RowChoice.as_partition`; None: it is made in backward,
            where roles are awaited.
    """
    return _StoredRows.apply(attention_output, residual, plan, choice, chosen, *after_attention_loras(plan))


class _StoredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention_output: Tensor, residual: Tensor, plan: LayerPlan, choice: RowChoice, chosen, *loras):
        a, stream = attention_output.flatten(0, -2), residual.flatten(0, -2)
        with without_autocast(a):
            result, _, saved = after_attention(a, stream, plan, loras)
        if not plan.keep_context:
            saved = [a, stream, *gather(saved[1:], choice.partition.dense)]
        ctx.plan, ctx.choice, ctx.chosen, ctx.shape = plan, choice, chosen, attention_output.shape
        ctx.num_loras = len(loras)
        ctx.save_for_backward(*loras, *saved)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        tensors, dy = ctx.saved_tensors, gradient.flatten(0, -2)
        loras, saved = tensors[: ctx.num_loras], tensors[ctx.num_loras :]
        rows, plan = ctx.choice.select(dy), _of_chosen(ctx.plan, ctx.choice, ctx.chosen)
        with without_autocast(dy):
            selected_dy = dy.index_select(0, rows)
            saved = gather(saved, rows) if plan.keep_context else _with_context(saved, rows, plan, ctx.choice, loras)
            a, *_, normed, _ = saved[:6]
            o = output_projection(plan, loras[:2], plan.attention_indices(None)[3], a.dtype)
            mlp = fused_mlp(plan, loras[2:], *plan.mlp_channels(normed), normed.dtype)
            da, d_stream, lora_gradients = after_attention_backward(selected_dy, plan, (o, mlp), saved)
            d_attention = da.new_zeros((len(dy), da.shape[1])).index_copy_(0, rows, da)
            d_residual = dy.clone().index_copy_(0, rows, d_stream)
        d_inputs = d_attention.view(ctx.shape), d_residual.view(gradient.shape)
        return *d_inputs, None, None, None, *as_loras(lora_gradients, loras)


def _of_chosen(plan: LayerPlan, choice: RowChoice, chosen: RowOrder | None) -> LayerPlan:
    """``plan`` for the chosen rows alone."""
    order = RowOrder(choice.as_partition(), False) if chosen is None else chosen
    return replace(plan, attention=order, mlp=order)


def _with_context(
    saved: Sequence[Tensor | None], rows: Tensor, plan: LayerPlan, choice: RowChoice, loras: Sequence[Tensor]
) -> list[Tensor | None]:
    """What `after_attention` saves of the chosen ``rows``; the MLP's intermediates may be of loss tokens alone.

    Args:
        saved: the function's inputs, of all rows; what else it saved, of loss tokens.
        rows: int64 ``[n]``, loss tokens first.
        plan: of the chosen rows, in natural order.
    """
    a, stream, *of_loss = saved
    natural, count = plan.mlp.partition, len(rows) - choice.num_context
    (a,), (stream,) = gather([a], rows), gather([stream], rows[count:])
    first = natural.dense[: choice.num_context]
    again = TokenPartition((1, len(first)), first, first[:0], first[:0], first)
    again.__dict__.update(rows=first, place=natural.place[: len(first)])
    order = RowOrder(again, False)
    # The MLP's backward computes it, too, but not the output that an output norm's gradient needs.
    context = replace(plan, attention=order, mlp=order, output_unused=plan.mlp_output_norm is None)
    _, _, (_, *of_context) = after_attention(a[count:], stream, context, loras)
    joined = [None if one is None else torch.cat((one, two)) for one, two in zip(of_loss, of_context, strict=False)]
    return [a, *joined, *of_loss[len(joined) :]]


def gather(tensors: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """The ``rows`` of each tensor."""
    return [None if tensor is None else tensor.index_select(0, rows) for tensor in tensors]
