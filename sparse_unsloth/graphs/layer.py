"""Captures a whole decoder layer in CUDA graphs: first forward, recompute and backward, or forward and backward.

The three are for a layer under gradient checkpointing, the two for one without: see docs/how-it-works.md, section 9.1,
and `sparse_unsloth.graphs.recorder` for what makes it safe to keep a forward's intermediates until its backward.
Captured are the functions of `sparse_unsloth.ops.decoder_layer`, attention, and autograd's backward through them.
Channel selection is captured as well and writes to fixed addresses. The layer's output and LoRA gradients are copied
out.

Attention must depend only on a few tensors of constant shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from sparse_unsloth.graphs.recorder import GraphCache, LayerCapture
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.ops.linear import as_loras
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection

Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Attention's output before o_proj, from hidden states (only their shape matters), Q, K and V, and further tensors."""
Compute = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A layer's output from hidden states, LoRA matrices (A and B of q, k, v, o, gate, up, down) and those tensors."""


def whole_layer(
    hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture, attention: Attention, tensors: Mapping[str, Tensor]
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros in a recompute, where it is unused.

    Args:
        plan: with ``keep`` and without ``output_unused`` this is a forward without checkpointing.
        capture: captures or replays this pass; a `KeptCapture` in a forward without checkpointing.
        attention: launches the same kernels in every pass with this batch signature.
        tensors: attention's last argument, by name; layers share one copy of those with the same name.
    """
    static = replace(
        plan,
        attention=RowOrder(capture.static_partition(plan.attention.partition), plan.attention.sparse),
        mlp=RowOrder(capture.static_partition(plan.mlp.partition), plan.mlp.sparse),
    )
    if not plan.output_unused:
        static = replace(
            static,
            choose_attention=_keep_selection(capture, "self_attn", plan.choose_attention),
            choose_mlp=_keep_selection(capture, "mlp", plan.choose_mlp),
        )

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = static.with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        return post_attention(attention(x, projected, tensors), residual, trained)

    return run_captured(plan, capture, compute, hidden_states, tensors)


def run_captured(
    plan: LayerPlan, capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Mapping[str, Tensor]
) -> Tensor:
    """``compute`` in the graphs of this pass: `recompute`, `forward_keeping` or `first_forward`."""
    run = recompute if plan.output_unused else forward_keeping if plan.keep else first_forward
    shared = [capture.constant(f"of attention, {name}", tensor) for name, tensor in tensors.items()]
    return run(capture, compute, hidden_states, shared, lora_tensors_of(plan.projections))


def first_forward(
    capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor:
    """``compute`` without gradients, in one graph."""

    def run(x: Tensor, *tensors: Tensor):
        return (compute(x, loras, tensors),), None

    (output,) = capture.call("layer", run, (capture.stage_input("hidden states", hidden_states), *tensors))
    capture.finish()
    return output.clone()


def recompute(
    capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor:
    """``compute`` with gradients and its backward, in two graphs; returns zeros, as the output is unused."""
    return _WithBackward.apply(hidden_states, capture, compute, list(tensors), True, *loras)


def forward_keeping(
    capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor:
    """``compute`` with gradients and its backward, in two graphs; the first one's intermediates live until the second.

    Args:
        capture: a `KeptCapture`, as other layers' forwards and backwards run in between.
        tensors: as in `whole_layer`; they do not change until backward.
    """
    return _WithBackward.apply(hidden_states, capture, compute, list(tensors), False, *loras)


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_states: Tensor,
        capture: LayerCapture,
        compute: Compute,
        tensors: list[Tensor],
        output_unused: bool,
        *loras: Tensor,
    ):
        def run(x: Tensor, *tensors: Tensor):
            if not output_unused:  # the next layer's input will overwrite the buffer, and backward reads this one
                x = x.clone()
            with torch.enable_grad():
                # New leaves: with the parameters autograd would make their stream wait for the capturing one.
                sources = [tensor.detach().requires_grad_() for tensor in (x, *loras)]
                output = compute(sources[0], sources[1:], tensors)
            # Without the output itself, whose memory is free once it is copied.
            return () if output_unused else (output.detach(),), (sources, get_gradient_edge(output))

        ctx.capture, ctx.loras, ctx.call = capture, loras, "recompute" if output_unused else "forward"
        inputs = capture.stage_input("hidden states", hidden_states), *tensors
        outputs = capture.call(ctx.call, run, inputs)
        return outputs[0].clone() if outputs else hidden_states.new_zeros(()).expand(hidden_states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        capture, loras = ctx.capture, ctx.loras

        def run(state, gradient: Tensor):
            sources, output = state
            dx, *found = torch.autograd.grad(output, sources, gradient)
            return (dx, _flatten_gradients(found, loras, dx)), None

        dx, found = capture.call("backward", run, (capture.stage_input("gradient", gradient),), after=ctx.call)
        capture.finish()
        # The address where the layer before reads it; nothing overwrites it until then.
        return capture.stage_input("gradient", dx), None, None, None, None, *_split_gradients(found, loras)


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


def _split_gradients(gradients: Tensor, loras: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `_flatten_gradients` by matrix, in new memory."""
    found = gradients.clone().split([lora.numel() for lora in loras])
    return [part.view(lora.shape) for part, lora in zip(found, loras, strict=True)]
