"""Reads off a decoder layer of Unsloth's Llama form what the whole-layer functions compute; tries whether they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import plain_forward
from sparse_unsloth.backends.probes import check, difference
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs.recorder import GraphCache, LayerCapture
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.decoder_layer import LayerPlan, Norm, RowOrder
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.projection import Projection, read_projection
from sparse_unsloth.runtime.state import LayerRuntime
from sparse_unsloth.tokens.partition import TokenPartition

OTHER_PARTS = "it has other parts than two norms, attention and MLP"
LEAVES_OUT_ROWS = "it leaves out all rows without loss instead (exact_removal)"


def why_not(runtime: LayerRuntime) -> str:
    """What keeps the layer from the two functions, of what its parts and its LoRA tell; "" for nothing.

    What its forward computes is not read, but tried (`prove`).
    """
    layer = runtime.layer
    norms = [getattr(layer.module, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    if not layer.adds_mlp_output:
        return OTHER_PARTS
    if not all(_is_plain_norm(norm) for norm in norms):
        return "a norm is trained, has a bias, or is no RMS norm"
    return _unsuitable(layer)


def prove(
    runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any], compute: Callable[[], Tensor | None]
) -> Any:
    """In the probe forward: what the layer's own forward returns, beside which ``compute`` is tried.

    Where ``compute`` fails or differs, with every channel kept, ``runtime.not_whole`` says so, and attaching gives the
    layer its own forward back.
    """
    context, module = runtime.context, runtime.layer.module
    own = plain_forward(module, hidden_states, **arguments)
    reached, loss_only = set(context.ran), context.loss_only
    context.loss_only = False  # the whole forward is for batches in which every row of the last layer is read
    try:
        every_row = plain_forward(module, hidden_states, **arguments) if loss_only and runtime.loss_only_parts else own
        runtime.not_whole = why_different(compute, every_row[0], module)
    finally:
        context.loss_only = loss_only
    if runtime.not_whole:
        context.ran = reached
    return own


def why_different(compute: Callable[[], Tensor | None], expected: Tensor, module: nn.Module) -> str:
    """What is wrong with the tensor that ``compute`` gives, in a sentence; "" where it is as ``expected``."""
    try:
        ours = compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"our functions failed on {type(module).__name__}: {type(error).__name__}: {first[:200]}"
    if ours is None:
        return f"our functions do not take hidden states of {expected.dtype} on {expected.device.type} with these norms"
    error, tolerance = difference(ours, expected)
    if error <= tolerance:
        return ""
    return f"the forward of {type(module).__name__} differs from our functions (by more than {tolerance}, relative)"


def open_capture(
    graphs: GraphCache, layer: DecoderLayer, projections: list[Projection], which: Hashable
) -> LayerCapture:
    """A pass through ``layer``, whose recordings hold as long as these weights are where they are."""
    tensors = [tensor for one in projections for tensor in (one.lora.A, one.lora.B, one.base.weight)]
    return graphs.open(layer.index, which, tensors, tuple(one.lora.scale for one in projections))


def plan_of_rows(
    layer: DecoderLayer, rows: Tensor, partition: TokenPartition, output_unused: bool = True
) -> LayerPlan | None:
    """A plan for some ``rows`` alone, all dense; None where the functions do not apply.

    Args:
        rows: ``[1, n, hidden_size]``.
        partition: n dense rows.
        output_unused: the output is not used, and not computed.
    """
    module = layer.module
    projections = read_projections(layer) if takes(rows, module.post_attention_layernorm.weight) else None
    if projections is None:
        return None
    every = RowOrder(partition, False)
    norms = norm_of(module.input_layernorm), norm_of(module.post_attention_layernorm)
    return LayerPlan(
        *norms,
        every,
        every,
        projections,
        layer.activation,
        _no_choice,
        _no_choice,
        output_unused=output_unused,
        keep=False,
    )


def _no_choice(rows: Tensor | None) -> NoReturn:
    raise AssertionError("a dense part chooses no channels")


def takes(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether the two functions can compute with these rows, next to a norm of this ``weight``."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    same = dtype == hidden_states.dtype == weight.dtype and hidden_states.is_contiguous()
    return same and not weight.requires_grad and use_kernels(hidden_states)


def read_projections(layer: DecoderLayer) -> list[Projection] | None:
    """Of q, k, v, o, gate, up, down; None if one is merged, disabled or without LoRA now."""
    projections = [read_projection(module) for module in _modules(layer)]
    return None if any(one is None or one.lora is None for one in projections) else projections


def _modules(layer: DecoderLayer) -> Iterator[nn.Module]:
    """The projections q, k, v, o, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def norm_of(module: nn.Module) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _is_plain_norm(norm: nn.Module | None) -> bool:
    """A frozen RMS norm that multiplies with its weight as it is (Gemma's adds one)."""
    return (
        norm is not None
        and hasattr(norm, "variance_epsilon")
        and getattr(norm, "bias", None) is None
        and not norm.weight.requires_grad
    )


def _unsuitable(layer: DecoderLayer) -> str:
    """Why its projections are not as the functions need them: all with LoRA, of one rank where they are together."""
    try:
        for part in PARTS:
            check(layer, part)
    except AttachError as error:
        return str(error)
    found: list[Projection | None] = [read_projection(module) for module in _modules(layer)]
    if any(projection is None or projection.lora is None for projection in found):
        return "LoRA is not on all of q, k, v, o, gate, up and down (one active, unmerged adapter)"
    ranks = [projection.lora.A.shape[0] for projection in found]
    if not len(set(ranks[:3])) == len(set(ranks[4:])) == 1:
        return "LoRA's ranks of q, k, v differ, or those of gate, up, down"
    return "the MLP has a bias" if any(projection.base.bias is not None for projection in found[4:]) else ""
