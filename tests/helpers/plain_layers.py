"""Whole layers in plain PyTorch in any dtype, so that tests of what captures them need not interpret kernels."""

from types import SimpleNamespace

import torch

from sparse_unsloth import attachment
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.graphs import layer as graphed_layer
from sparse_unsloth.graphs import rows as graphed_rows
from sparse_unsloth.layer.reference import project
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.ops.decoder_layer import lora_tensors_of
from sparse_unsloth.ops.norms import normalise
from sparse_unsloth.rows.backward import BackwardRows, backward_rows

from recorded_layers import Rerun, share_memory


class Unused(torch.autograd.Function):
    """Zeros in place of an output that nothing may read; gradients pass."""

    @staticmethod
    def forward(ctx, output):
        return torch.zeros_like(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def masked(values, part, channels):
    """``values [..., width]``, of whose context rows the ``channels`` alone stay."""
    context = part.partition.context
    kept = torch.ones_like(values).flatten(0, -2)
    kept[context] = torch.zeros_like(kept[context]).index_fill(1, channels, 1)
    return values * kept.view_as(values)


def pre_attention(x, plan):
    """Context rows keep the selected channels of Q, K and V."""
    normed = normalise(x, plan.attention_norm)
    outputs = [project(normed, projection) for projection in plan.projections[:3]]
    if plan.attention.sparse:
        chosen = plan.choose_attention(normed.detach().flatten(0, -2)[plan.attention.partition.context])
        outputs = [
            masked(values, plan.attention, one)
            for values, one in zip(outputs, (chosen.q, chosen.k, chosen.v), strict=True)
        ]
    return *outputs, x


def post_attention(attention_output, residual, plan):
    """Context rows keep the selected channels of O and of the MLP."""
    if plan.attention.sparse:
        attention_output = masked(attention_output, plan.attention, plan.choose_attention(None).o)
    o, gate, up, down = plan.projections[3:]
    stream = residual + project(attention_output, o)
    normed = normalise(stream, plan.mlp_norm)
    mixed = ACTIVATIONS[plan.activation](project(normed, gate)) * project(normed, up)
    if plan.mlp.sparse:
        rows = normed.detach().flatten(0, -2)[plan.mlp.partition.context]
        mixed = masked(mixed, plan.mlp, plan.choose_mlp(rows).channels)
    output = stream + project(mixed, down)
    return Unused.apply(output) if plan.output_unused else output


def post_attention_by_rows(attention_output, residual, plan, choice, chosen):
    seen = SimpleNamespace(**{**vars(plan), "output_unused": False})
    return backward_rows(
        lambda a, stream: post_attention(a, stream, seen),
        [attention_output, residual],
        lora_tensors_of(plan.projections[3:]),
        BackwardRows(choice, residual_index=1, skip_output=plan.output_unused),
    )


def use_plain_layers(monkeypatch):
    """A stand-in for CUDA graphs that captures such layers; any tensor may be captured."""
    recorder = Rerun()
    share_memory(monkeypatch, recorder)
    for module in (whole_layer, graphed_layer):
        monkeypatch.setattr(module, "pre_attention", pre_attention)
        monkeypatch.setattr(module, "post_attention", post_attention)
    monkeypatch.setattr(graphed_rows, "pre_attention", pre_attention)
    for module in (whole_layer, graphed_rows):
        monkeypatch.setattr(module, "post_attention_by_rows", post_attention_by_rows)
    for module in (whole_layer, attachment):
        monkeypatch.setattr(module, "use_kernels", lambda tensor: True)
    return recorder
