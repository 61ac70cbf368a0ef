"""A whole decoder layer, attention included, in CUDA graphs: one for its first forward, two for recompute and backward.

What is recorded are the functions of `ops.decoder_layer`, and autograd's own backward through them and the attention:
so every step launches what the first recorded one did. The choice of channels is recorded as well, and what it gave
lies where it lay. The output and LoRA's gradients are copied to memory of their own.

For attention that depends on nothing but a few tensors of constant shape; `graphs.parts` is for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.graphs.recorder import GraphCache, LayerCapture
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.ops.linear import as_loras
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection

Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""The output before o_proj of hidden states (whose shape alone counts), Q, K and V, and the tensors it depends on."""
Compute = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A layer's output of hidden states, LoRA matrices (A and B of q, k, v, o, gate, up, down), and those tensors."""


def whole_layer(
    hidden_states: Tensor, plan: LayerPlan, capture: LayerCapture, attention: Attention, tensors: Sequence[Tensor]
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros where ``plan`` says that nobody reads it.

    Args:
        capture: what records this call and replays it.
        attention: in every call of this kind the same.
        tensors: its last argument, often the same from layer to layer.
    """
    static = replace(
        plan,
        attention=RowOrder(capture.static_partition(plan.attention.partition), plan.attention.sparse),
        mlp=RowOrder(capture.static_partition(plan.mlp.partition), plan.mlp.sparse),
    )
    if not plan.output_unused:
        static = replace(
            static,
            choose_attention=_kept(capture, "self_attn", plan.choose_attention),
            choose_mlp=_kept(capture, "mlp", plan.choose_mlp),
        )

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = static.with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        return post_attention(attention(x, projected, tensors), residual, trained)

    loras = lora_tensors_of(plan.projections)
    return (recompute if plan.output_unused else first_forward)(capture, compute, hidden_states, tensors, loras)


def first_forward(
    capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor:
    """``compute`` without gradients, in a graph."""

    def run(x: Tensor, *tensors: Tensor):
        return (compute(x, loras, tensors),), None

    (output,) = capture.call(
        "layer", run, (capture.stage_input("hidden states", hidden_states), *_shared(capture, tensors))
    )
    capture.finish()
    return output.clone()


def recompute(
    capture: LayerCapture, compute: Compute, hidden_states: Tensor, tensors: Sequence[Tensor], loras: Sequence[Tensor]
) -> Tensor:
    """``compute`` with gradients, and its backward, in two graphs; nobody reads the output, which is zeros."""
    return _Recompute.apply(hidden_states, capture, compute, _shared(capture, tensors), *loras)


def _shared(capture: LayerCapture, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [capture.constant(f"of attention, {number}", tensor, shared=True) for number, tensor in enumerate(tensors)]


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, capture: LayerCapture, compute: Compute, tensors: list[Tensor], *loras: Tensor
    ):
        def run(x: Tensor, *tensors: Tensor):
            with torch.enable_grad():
                # Leaves of their own: autograd would have the parameters' stream wait for the one that records.
                sources = [tensor.detach().requires_grad_() for tensor in (x, *loras)]
                output = compute(sources[0], sources[1:], tensors)
            return (), (sources, output)

        capture.call("recompute", run, (capture.stage_input("hidden states", hidden_states), *tensors))
        ctx.capture, ctx.loras = capture, loras
        return hidden_states.new_zeros(()).expand(hidden_states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        capture, loras = ctx.capture, ctx.loras

        def run(state, gradient: Tensor):
            sources, output = state
            dx, *found = torch.autograd.grad(output, sources, gradient)
            return (dx, flatten_gradients(found, loras)), None

        dx, found = capture.call("backward", run, (capture.stage_input("gradient", gradient),), after="recompute")
        capture.finish()
        # Where the layer before will read it, and nothing writes until then.
        return capture.stage_input("gradient", dx), None, None, None, *split_gradients(found, loras)


def reserve(graphs: GraphCache, layer: int, part: str, chosen: MlpSelection | AttentionSelection) -> None:
    """Makes room for what ``part`` of the layer chooses in recordings, as large as ``chosen``."""
    for name, value in _tensors(chosen):
        graphs.reserve(layer, f"{part}.{name}", value)


def _kept(capture: LayerCapture, part: str, choose: Callable) -> Callable:
    """``choose``, where what it returns stays at one place and is noted in ``capture.selections``."""

    def choose_and_keep(rows: Tensor | None) -> MlpSelection | AttentionSelection:
        if rows is None:
            return capture.selections[part]
        chosen = choose(rows)
        places = {
            name: capture.reserved_buffer(f"{part}.{name}", value).copy_(value) for name, value in _tensors(chosen)
        }
        scores = tuple(places.pop(f"scores.{number}") for number in range(len(chosen.scores)))
        capture.selections[part] = replace(chosen, **places, scores=scores)
        return capture.selections[part]

    return choose_and_keep


def _tensors(chosen: MlpSelection | AttentionSelection) -> Iterator[tuple[str, Tensor]]:
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        if isinstance(value, tuple):
            yield from ((f"{field.name}.{number}", one) for number, one in enumerate(value))
        elif value is not None:
            yield field.name, value


def flatten_gradients(gradients: Sequence[Tensor], loras: Sequence[Tensor]) -> Tensor:
    """LoRA gradients, in the dtype of their matrices, one behind the other."""
    return torch.cat([gradient.flatten() for gradient in as_loras(gradients, loras)])


def split_gradients(gradients: Tensor, loras: Sequence[Tensor]) -> list[Tensor]:
    """A copy of what `flatten_gradients` gave, by matrix."""
    found = gradients.clone().split([lora.numel() for lora in loras])
    return [part.view(lora.shape) for part, lora in zip(found, loras, strict=True)]
