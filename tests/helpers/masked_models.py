"""Masked references: dense models with channel masks in the forward, or row masks in the backward pass."""

import torch

from sparse_unsloth import get_state
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.runtime import forward
from sparse_unsloth.tokens.partition import TokenPartition

from tiny_models import loss_and_gradients

SHARE = 0.25


def assert_gradients_close(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def masked_by_hooks(model, selections, partition):
    """The masked forward (docs/how-it-works.md, section 4.1) by hooks; ``selections``: by (layer, part)."""

    def mask(channels, width):
        rows = torch.ones(partition.shape[0] * partition.shape[1], width)
        rows[partition.context] = torch.zeros(width).index_fill_(0, channels, 1.0)
        return rows.unflatten(0, partition.shape)

    def output_hook(channels):
        def hook(module, args, output):
            bias = 0 if module.bias is None else module.bias
            return (output - bias) * mask(channels, output.shape[-1]) + bias

        return hook

    def input_hook(channels):
        return lambda module, args: (args[0] * mask(channels, args[0].shape[-1]),)

    for index, layer in enumerate(model.get_base_model().model.layers):
        mlp, attention = selections[index, "mlp"], selections[index, "self_attn"]
        layer.mlp.gate_proj.base_layer.register_forward_hook(output_hook(mlp.channels))
        layer.mlp.up_proj.base_layer.register_forward_hook(output_hook(mlp.channels))
        layer.mlp.down_proj.base_layer.register_forward_pre_hook(input_hook(mlp.channels))
        for name in "qkv":
            base = getattr(layer.self_attn, f"{name}_proj").base_layer
            base.register_forward_hook(output_hook(getattr(attention, name)))
        layer.self_attn.o_proj.base_layer.register_forward_pre_hook(input_hook(attention.o))
    return model


def record_selections(model, monkeypatch):
    """The list to which the contexts of later forwards are added, in order."""
    state, contexts, open_forward = get_state(model), [], forward.open_forward

    def recording(of, *args):
        context = open_forward(of, *args)
        if of is state:
            contexts.append(context)
        return context

    monkeypatch.setattr(forward, "open_forward", recording)
    return contexts


def every_step(**changes):
    return {"backward_rows": SHARE, **changes}


def chosen_rows(gradient, partition, share):
    """The rows that `RowChoice` selects, computed row by row."""
    count = -(-round(share * 1000) * len(partition.context) // 1000)
    norms = gradient.flatten(0, -2).norm(dim=-1)
    order = sorted(partition.context.tolist(), key=lambda row: -norms[row].item())
    return set(order[:count]) | set(partition.dense.tolist())


def masked_gradients(model, batch, share=SHARE, whole=False, layers=None, partition=None, run=loss_and_gradients):
    """Loss and gradients of a model that is not attached, with gradients of outputs masked by hooks.

    Rows are chosen by the gradient of the MLP's output, or of the ``whole`` layer's, which a norm may come before.
    ``layers`` are those with row parts; `find_layers` finds the usual ones. ``partition``: roles
    other than the labels'. ``run``: a step with another loss.
    """
    layers, masks, handles = layers or find_layers(model), {}, []
    mask = batch.get("attention_mask")
    partition = partition or TokenPartition.from_labels(batch["labels"], mask, batch.get("position_ids"))

    def hook(index, chooses):
        def masked(module, gradients):
            gradient, *others = gradients
            if chooses:
                masks[index] = chosen_rows(gradient, partition, share)
            if module is layers[index].module:
                return None
            keep = torch.zeros(gradient.flatten(0, -2).shape[0], 1, dtype=gradient.dtype)
            keep[sorted(masks[index])] = 1
            return (gradient.flatten(0, -2) * keep).view(gradient.shape), *others

        return masked

    for index, layer in enumerate(layers):
        if whole:
            handles.append(layer.module.register_full_backward_pre_hook(hook(index, True)))
        for part in layer.row_parts:
            chooses = part.selects_rows and not whole
            handles.append(part.module.register_full_backward_pre_hook(hook(index, chooses)))
    try:
        return run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
