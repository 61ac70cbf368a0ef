"""Plans a layer of Unsloth's Llama form for the whole-layer functions, and proves that they compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import plain_forward
from sparse_unsloth.backends.probes import check, difference
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs.recorder import LayerCapture
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.decoder_layer import LayerPlan, Norm, RowOrder
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.projection import Projection, read_projection
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.state import LayerRuntime
from sparse_unsloth.tokens.partition import TokenPartition

OTHER_PARTS = "it has other parts than two norms, attention and MLP"
SKIPS_UNUSED_ROWS = "it skips unused rows instead (exact_removal)"


def why_not(runtime: LayerRuntime) -> str:
    """Why the layer's parts and LoRA do not fit the two functions; "" where they do.

    `prove` tests what its forward computes.
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
    """Compares ``compute`` with the layer's own forward in the probe forward, with every channel kept.

    Where ``compute`` fails or differs, ``runtime.not_whole`` says so, and attaching restores the layer's own forward.

    Returns:
        The output of the layer's own forward.
    """
    context, module = runtime.context, runtime.layer.module
    output = plain_forward(module, hidden_states, **arguments)
    reached, loss_only = set(context.ran), context.loss_only
    context.loss_only = False  # whole layers compute every row
    try:
        skips_rows = loss_only and runtime.loss_only_parts
        expected = plain_forward(module, hidden_states, **arguments) if skips_rows else output
        runtime.not_whole = why_different(compute, expected[0], module)
    finally:
        context.loss_only = loss_only
    if runtime.not_whole:
        context.ran = reached
    return output


def why_different(compute: Callable[[], Tensor | None], expected: Tensor, module: nn.Module) -> str:
    """How the result of ``compute`` differs from ``expected``, in a sentence; "" where it does not."""
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
    context: SparseContext, layer: DecoderLayer, projections: list[Projection], which: tuple, keep: bool
) -> LayerCapture | None:
    """The capture of one pass ``which`` through ``layer``; its graphs hold while these weights keep their addresses.

    Args:
        keep: whether this is a first forward with gradients, whose intermediates are kept until backward.

    Returns:
        None where it runs without capture (`GraphCache.open_kept`).

    Raises:
        SparsityError: see `GraphCache.check_forward`.
    """
    graphs, key = context.graphs, context.batch_key
    tensors = [t for projection in projections for t in (projection.lora.A, projection.lora.B, projection.base.weight)]
    scales = tuple(projection.lora.scale for projection in projections)
    if keep:
        capture = graphs.open_kept(layer.index, key, which, tensors, scales)
    else:
        graphs.check_forward(context)
        capture = graphs.open(layer.index, (key, *which), tensors, scales)
    if capture is not None:
        context.captured.add(layer.index)
    return capture


def plan_of_rows(
    layer: DecoderLayer, rows: Tensor, partition: TokenPartition, output_unused: bool = True
) -> LayerPlan | None:
    """The plan for computing ``rows`` densely; None where the functions do not apply.

    Args:
        rows: ``[1, n, hidden_size]``.
        partition: of these n rows, all dense.
        output_unused: whether the output is unused, so that it is not computed.
    """
    module = layer.module
    projections = read_projections(layer) if fits_kernels(rows, module.post_attention_layernorm.weight) else None
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


def fits_kernels(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of the two functions can take ``hidden_states`` and a norm's ``weight``."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    same = dtype == hidden_states.dtype == weight.dtype and hidden_states.is_contiguous()
    return same and not weight.requires_grad and use_kernels(hidden_states)


def read_projections(layer: DecoderLayer) -> list[Projection] | None:
    """The projections q, k, v, o, gate, up, down; None if one is merged, disabled or without LoRA now."""
    projections = [read_projection(module) for module in _modules(layer)]
    return None if any(found is None or found.lora is None for found in projections) else projections


def _modules(layer: DecoderLayer) -> Iterator[nn.Module]:
    """The modules of the projections q, k, v, o, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def norm_of(module: nn.Module) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _is_plain_norm(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is a frozen RMS norm without bias that multiplies by its weight (Gemma's adds one to it)."""
    return (
        norm is not None
        and hasattr(norm, "variance_epsilon")
        and getattr(norm, "bias", None) is None
        and not norm.weight.requires_grad
    )


def _unsuitable(layer: DecoderLayer) -> str:
    """Why the projections do not fit the functions: all need LoRA, and one rank within Q, K, V and within the MLP."""
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
