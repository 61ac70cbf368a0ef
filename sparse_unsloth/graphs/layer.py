"""Captures a whole decoder layer in CUDA graphs: first forward, recompute and backward, or forward and backward.

The three are for a layer under gradient checkpointing, the two for one without: see docs/how-it-works.md, section 9.1,
and `sparse_unsloth.graphs.recorder` for what makes it safe to keep a forward's intermediates until its backward.
Captured are the functions of `sparse_unsloth.ops.decoder_layer`, attention, and autograd's backward through them.
Channel selection is captured as well and writes to fixed addresses. The layer's output and all gradients are copied
out, as hooks and autograd may hold them for longer than the next layer's pass.

Where `LayerCapture.call` gives nothing, the layer runs without capture: at once, or, in a backward, from its input.

Attention must depend only on a few tensors of constant shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from sparse_unsloth.graphs.passes import CapturedForward, LayerCapture
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.model.training_flags import keeps_graph
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.ops.kept_attention import AttentionKeeper, KeptAttention
from sparse_unsloth.ops.linear import as_loras
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.rows.backward import current_autocast

Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Attention's output before o_proj, from hidden states (only their shape matters), Q, K and V, and further tensors."""
Compute = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A layer's output from hidden states, LoRA matrices (A and B of q, k, v, o, gate, up, down) and those tensors."""


@dataclass(frozen=True)
class GraphedPass:
    """One pass through a layer, by CUDA graphs as far as they can.

    Attributes:
        capture: captures or replays it; a `KeptCapture` in a forward without checkpointing.
        forward: the model's forward that it belongs to.
        uncaptured: computes the layer's output without capture, from hidden states and LoRA matrices.
        keeper: what attention keeps for the recompute, or gives there: ``compute`` gets it after the other tensors.
        form: in a first forward with a keeper, what a replay keeps besides tensors; None before the capture.
    """

    capture: LayerCapture
    forward: CapturedForward | None
    uncaptured: Callable[[Tensor, Sequence[Tensor]], Tensor]
    keeper: AttentionKeeper | None = None
    form: KeptAttention | None = None


def whole_layer(
    hidden_states: Tensor, plan: LayerPlan, graphed: GraphedPass, attention: Attention, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros in a recompute, where it is unused.

    None where this pass runs without capture.

    Args:
        plan: with ``keep`` and without ``output_unused`` this is a forward without checkpointing.
        attention: launches the same kernels in every pass with this batch signature.
        tensors: attention's last argument, by name; layers share one copy of those with the same name.
    """
    capture = graphed.capture
    attention_rows, mlp_rows = (capture.static_partition(part.partition) for part in (plan.attention, plan.mlp))

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        static = replace(
            plan,
            attention=RowOrder(attention_rows, plan.attention.sparse),
            mlp=RowOrder(mlp_rows, plan.mlp.sparse),
        )
        if not plan.output_unused:
            static = replace(
                static,
                choose_attention=_keep_selection(capture, "self_attn", plan.choose_attention),
                choose_mlp=_keep_selection(capture, "mlp", plan.choose_mlp),
            )
        trained = static.with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        return post_attention(attention(x, projected, tensors), residual, trained)

    return run_captured(plan, graphed, compute, hidden_states, tensors)


def run_captured(
    plan: LayerPlan, graphed: GraphedPass, compute: Compute, hidden_states: Tensor, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """``compute`` in the graphs of this pass: `recompute`, `forward_keeping` or `first_forward`; None as there."""
    run = recompute if plan.output_unused else forward_keeping if plan.keep else first_forward
    shared = [graphed.capture.constant(f"of attention, {name}", tensor) for name, tensor in tensors.items()]
    return run(graphed, compute, hidden_states, shared, lora_tensors_of(plan.projections))


def first_forward(
    graphed: GraphedPass, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor | None:
    """``compute`` without gradients, in one graph; None where it must run without capture."""

    keeper = graphed.keeper

    def run(x: Tensor, *tensors: Tensor):
        output = compute(x, loras, tensors)
        return (output, *(keeper.kept.tensors if keeper is not None and keeper.kept is not None else ())), None

    capture = graphed.capture
    outputs = capture.call("layer", run, (capture.stage_input("hidden states", hidden_states), *tensors))
    capture.finish()
    if outputs is None:
        return None
    if keeper is not None:
        form = keeper.kept or graphed.form
        keeper.kept = form and form.with_tensors([one.clone() for one in outputs[1:]])
    return outputs[0].clone()


def recompute(
    graphed: GraphedPass, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor | None:
    """``compute`` with gradients and its backward, in two graphs; returns zeros, as the output is unused, or None."""

    def run(x: Tensor, *tensors: Tensor):
        output, sources = _differentiable(x, compute, tensors, loras)
        return (), (sources, get_gradient_edge(output))

    capture = graphed.capture
    kept = () if graphed.keeper is None else graphed.keeper.kept.tensors
    with torch.no_grad():
        inputs = capture.stage_input("hidden states", hidden_states), *tensors, *kept
        found = capture.call("recompute", run, inputs)
    return None if found is None else _WithBackward.apply(hidden_states, None, graphed, *loras)


def forward_keeping(
    graphed: GraphedPass, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor | None:
    """``compute`` with gradients and its backward, in two graphs; the first one's intermediates live until the second.

    Args:
        graphed: of a `KeptCapture`, as other layers' forwards and backwards run in between.
        tensors: as in `whole_layer`; they do not change until backward.
    """

    def run(x: Tensor, *tensors: Tensor):
        x = x.clone()  # the next layer's input will overwrite the buffer, and backward reads this one
        output, sources = _differentiable(x, compute, tensors, loras)
        return (output.detach(), x), (sources, get_gradient_edge(output))

    capture = graphed.capture
    with torch.no_grad():
        found = capture.call("forward", run, (capture.stage_input("hidden states", hidden_states), *tensors))
    return None if found is None else _WithBackward.apply(hidden_states, found, graphed, *loras)


def _differentiable(
    x: Tensor, compute: Compute, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``compute``'s output, and the leaves that it can be differentiated by: hidden states and LoRA matrices."""
    with torch.enable_grad():
        # New leaves: with the parameters autograd would make their stream wait for the capturing one.
        sources = [tensor.detach().requires_grad_() for tensor in (x, *loras)]
        return compute(sources[0], sources[1:], tensors), sources


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, found: Sequence[Tensor] | None, graphed: GraphedPass, *loras: Tensor):
        ctx.graphed, ctx.kept, ctx.autocast = graphed, found is not None, current_autocast(hidden_states)
        ctx.save_for_backward(*loras)  # so that autograd refuses what it refuses without capture
        if found is None:
            ctx.call, ctx.x = "recompute", hidden_states.detach()
            return hidden_states.new_zeros(()).expand(hidden_states.shape)
        ctx.call, (output, ctx.x) = "forward", found
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        capture, loras, forward = ctx.graphed.capture, ctx.saved_tensors, ctx.graphed.forward
        second = keeps_graph()
        if second and ctx.kept:  # it comes when the pass has ended
            ctx.kept, ctx.x = False, ctx.x.clone()

        def run(state, gradient: Tensor):
            sources, output = state
            dx, *found = torch.autograd.grad(output, sources, gradient)
            return (dx, _flatten_gradients(found, loras, dx)), None

        found = capture.call("backward", run, (capture.stage_input("gradient", gradient),), after=ctx.call)
        if found is None:
            gradients = _uncaptured_gradients(ctx, gradient, loras)
        else:
            gradients = found[0].clone(), *_split_gradients(found[1], loras)
        if not second:
            ctx.x = None  # what is captured later may use its memory
        capture.finish()
        if forward is not None:
            forward.awaited.discard(capture.layer)
        return gradients[0], None, None, *gradients[1:]


def _uncaptured_gradients(ctx, gradient: Tensor, loras: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of hidden states and LoRA matrices, by computing the layer again from its input."""
    # New leaves, as gradients pass the hooks of the parameters once, after this.
    sources = [tensor.detach().requires_grad_() for tensor in (ctx.x, *loras)]
    with torch.enable_grad(), ctx.autocast():
        output = ctx.graphed.uncaptured(sources[0], sources[1:])
    return list(torch.autograd.grad(output, sources, gradient))


def reserve(graphs: GraphCache, layer: int, part: str, selection: MlpSelection | AttentionSelection) -> None:
    """Reserves buffers for the captured selections of ``part``, as large as ``selection``."""
    for name, value in _tensors(selection):
        graphs.reserve(layer, f"{part}.{name}", value)


def _keep_selection(capture: LayerCapture, part: str, choose: Callable) -> Callable:
    """``choose``, which also copies its result to reserved buffers and notes it in ``capture.selections``."""

    def choose_and_keep(rows: Tensor | None) -> MlpSelection | AttentionSelection:
        if rows is None:
            return capture.selections[part]
        selection = choose(rows)
        buffers = {
            name: capture.reserved_buffer(f"{part}.{name}", value).copy_(value) for name, value in _tensors(selection)
        }
        scores = tuple(buffers.pop(f"scores.{number}") for number in range(len(selection.scores)))
        capture.selections[part] = replace(selection, **buffers, scores=scores)
        return capture.selections[part]

    return choose_and_keep


def _tensors(selection: MlpSelection | AttentionSelection) -> Iterator[tuple[str, Tensor]]:
    for field in fields(selection):
        value = getattr(selection, field.name)
        if isinstance(value, tuple):
            yield from ((f"{field.name}.{number}", tensor) for number, tensor in enumerate(value))
        elif value is not None:
            yield field.name, value


def _flatten_gradients(gradients: Sequence[Tensor], loras: Sequence[Tensor], like: Tensor) -> Tensor:
    """LoRA gradients in the dtype of their matrices, concatenated; empty, as ``like``, without LoRA."""
    return torch.cat([gradient.flatten() for gradient in as_loras(gradients, loras)]) if loras else like.new_empty(0)


def _split_gradients(gradients: Tensor, loras: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of `_flatten_gradients` by matrix, in new memory."""
    return _unflatten_dense_tensors(gradients.clone(), loras)
