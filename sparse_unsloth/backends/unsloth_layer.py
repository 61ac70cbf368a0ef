"""Whole decoder layers of Unsloth's Llama form: everything but the attention itself in two functions.

The attention module still runs as it is, with Unsloth's RoPE, head norms and attention dispatch: its ``apply_qkv`` is
handed Q, K, V that are computed already, its ``apply_o`` leaves its input alone. Wherever the two functions do not
apply, the layer's own forward runs, with the hooks that are in it. Exact, and for speed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_unsloth.backends import peft as peft_backend
from sparse_unsloth.backends.replaced import replace_forward
from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions import graphed_layer, graphed_parts, packed_attention
from sparse_unsloth.functions.graphs import Graphs, Pass
from sparse_unsloth.functions.implementation import use_kernels
from sparse_unsloth.functions.layer import LayerPlan, Norm, Rows, before_attention, behind_attention
from sparse_unsloth.functions.mlp import is_recompute
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import Projection, read_projection

FORWARD = "LlamaDecoderLayer_fast_forward"
"""The forward of ``unsloth.models.llama`` that is replaced: Llama's, Mistral's, Qwen2's and Qwen3's layers have it."""

COSINES, SINES = "position_embeddings, 0", "position_embeddings, 1"
OFFSETS, LENGTHS = "documents begin at", "packed_seq_lengths"
ATTENTION = "run_attention"
"""What Unsloth's attention modules call for the attention itself."""
SDPA = "sdpa"
"""Its name for PyTorch's."""
MASK = "causal_mask"
"""Its argument for xformers; None without it."""
PLAIN_MASK = "LowerTriangularMask"
"""The class of xformers' plain causal mask, which holds nothing."""
REPLACED = (LENGTHS, MASK)
"""Arguments that only the attention itself reads, which is another within packed documents."""
UNREAD = ("position_embeddings", "num_items_in_batch")
"""Arguments that do not matter to the attention as they are."""


def can_replace(runtime: LayerRuntime) -> bool:
    """Whether the layer has the form that the two functions compute, and LoRA as they need it."""
    layer = runtime.layer
    module = layer.module
    llama = sys.modules.get("unsloth.models.llama")
    norms = [getattr(module, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return (
        runtime.state.config.lora_branch == "dense"
        and type(module).forward is getattr(llama, FORWARD, None)
        and layer.adds_mlp_output
        and all(_is_plain_norm(norm) for norm in norms)
        and _suit(layer)
    )


def replace(runtime: LayerRuntime) -> None:
    """Puts `layer_forward` on the layer, whose attention and MLP are hooked already."""
    replace_forward(runtime.layer.module, layer_forward, runtime)


def layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As Unsloth's ``LlamaDecoderLayer_fast_forward``, in a training forward without a cache."""
    runtime: LayerRuntime = self._sparse_runtime
    plan = None if args else _plan(runtime, hidden_states, kwargs)
    if plan is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    fixed = None if plan.graphs is None else fixed_tensors(runtime, hidden_states, kwargs)
    if fixed is not None:
        return (_recorded(runtime, hidden_states, plan, kwargs, fixed),)
    before, behind = before_attention, behind_attention
    if plan.graphs is not None:
        before, behind = graphed_parts.before_attention, graphed_parts.behind_attention
    *handed, residual = before(hidden_states, plan)
    attention_output = attend(runtime, hidden_states, handed, kwargs)
    for part in peft_backend.PARTS:
        if runtime.is_sparse(part):
            runtime.record_run(part)
    output = behind(attention_output, residual, plan)
    if runtime.state.graphs is not None and plan.graphs is None and not plan.unread:
        _reserve(runtime, runtime.state.graphs)
    if runtime.context.probe:
        compare(runtime.layer, output, type(self).forward(self, hidden_states, **kwargs)[0])
    return (output,)


def attend(runtime: LayerRuntime, hidden_states: Tensor, handed: Sequence[Tensor], arguments: dict) -> Tensor:
    """Unsloth's attention of Q, K, V, before o_proj."""
    runtime.handed = tuple(handed)
    try:
        return runtime.layer.self_attn(hidden_states=hidden_states, **arguments)[0]
    finally:
        runtime.handed = None


def _recorded(
    runtime: LayerRuntime, hidden_states: Tensor, plan: LayerPlan, arguments: dict[str, Any], fixed: dict[str, Tensor]
) -> Tensor:
    """The layer's output from recordings of all of it; ``fixed``: what `fixed_tensors` gave."""
    for part in peft_backend.PARTS:
        if runtime.is_sparse(part):
            runtime.record_run(part)
    attention = recorded_attention(runtime, arguments, fixed)
    output = graphed_layer.whole_layer(hidden_states, plan, attention, list(fixed.values()))
    for part, chosen in plan.graphs.kept.items():
        runtime.context.selections[runtime.layer.index, part] = chosen
    return output


def recorded_attention(
    runtime: LayerRuntime, arguments: dict[str, Any], fixed: dict[str, Tensor]
) -> graphed_layer.Attention:
    """Unsloth's attention of Q, K, V and the ``fixed`` tensors, which stand for those of ``arguments``."""

    def attention(x: Tensor, handed: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        named = dict(zip(fixed, tensors, strict=True))
        embeddings, offsets = (named.pop(COSINES), named.pop(SINES)), named.pop(OFFSETS, None)
        given = {**arguments, **named, "position_embeddings": embeddings, LENGTHS: None}
        given.pop(MASK, None)
        with _attending(runtime.layer.self_attn, offsets):
            return attend(runtime, x, handed, given)

    return attention


@contextlib.contextmanager
def _attending(attention: nn.Module, offsets: Tensor | None) -> Iterator[None]:
    """Unsloth's attention of Q, K, V is PyTorch's meanwhile: `packed_attention` where documents have ``offsets``.

    Else it goes through Unsloth's own dispatch. What xformers and flash-attn launch has not been tried in a recording.
    """
    names = _names(attention)
    original = names.get(ATTENTION)
    if original is None:
        yield
        return

    def packed(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        scale = (config.flash_varlen_kwargs or {}).get("softmax_scale")
        return packed_attention.packed_attention(Q, K, V, offsets, scale)

    def plain(*, config: Any, **arguments: Any) -> Tensor:
        return original(config=dataclasses.replace(config, backend=SDPA), **arguments)

    names[ATTENTION] = plain if offsets is None else packed
    try:
        yield
    finally:
        names[ATTENTION] = original


def _names(attention: nn.Module) -> dict[str, Any]:
    """What the forward of an attention module finds under its names."""
    return getattr(inspect.unwrap(type(attention).forward), "__globals__", {})


def _reserve(runtime: LayerRuntime, graphs: Graphs) -> None:
    """Makes room for the layer's choices, where forwards of this kind will be recorded."""
    context, index = runtime.context, runtime.layer.index
    if (index, context.kind) in graphs.ready or not graphs.soon(context.kind):
        return
    for part in peft_backend.PARTS:
        if runtime.is_sparse(part):
            graphed_layer.reserve(graphs, index, part, context.selections[index, part])
    graphs.ready.add((index, context.kind))


def fixed_tensors(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that Unsloth's attention depends on besides Q, K, V; None where that cannot be recorded.

    It can for plain causal attention, within packed documents too: no window, cosines and sines given for the whole
    length. Otherwise what Unsloth reads depends on the batch, or lies in a cache that it may replace. Choices can where
    every forward makes its own.
    """
    module, length = runtime.layer.module, hidden_states.shape[1]
    if runtime.state.config.refresh_steps > 1:
        return None
    embeddings = arguments.get("position_embeddings")
    window = getattr(module.self_attn.config, "sliding_window", None)
    if not embeddings or embeddings[0].shape[-2] < length or (window is not None and window < length):
        return None
    found = {COSINES: embeddings[0], SINES: embeddings[1]}
    packing = runtime.context.packing
    if packing is not None:
        if arguments.get("attention_mask") is not None or ATTENTION not in _names(module.self_attn):
            return None
        found[OFFSETS] = packing.offsets
    for name, value in arguments.items():
        if (packing is not None and name in REPLACED) or (name == MASK and _is_plain_mask(module.self_attn, value)):
            continue
        mask = name == "attention_mask" and isinstance(value, Tensor) and value.dim() == 4
        if mask or (name == "position_ids" and isinstance(value, Tensor)):
            found[name] = value
        elif name not in UNREAD and not (value is None or isinstance(value, bool)):
            return None
    return found


def _is_plain_mask(attention: nn.Module, mask: Any) -> bool:
    """Whether ``mask`` is xformers' for plain causal attention, which PyTorch computes as well."""
    kind = type(mask)
    known = kind.__name__ == PLAIN_MASK and kind.__module__.partition(".")[0] == "xformers"
    return known and ATTENTION in _names(attention)


def compare(layer: DecoderLayer, ours: Tensor, expected: Tensor) -> None:
    """Raises AttachError unless the layer, with every channel kept, computes what its class does."""
    error = ((ours.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)).item()
    tolerance = 1e-3 if ours.dtype == torch.float32 else 3e-2
    if not error <= tolerance:
        raise AttachError(
            f"{layer.name}: with every channel kept, {type(layer.module).__name__} as a whole differs by {error:.2g} "
            f"(allowed {tolerance}) from what the installed Unsloth computes: its {FORWARD} does something else than "
            "the one that sparse_unsloth knows. Install a version that it is tested with (`sparse-unsloth doctor`), "
            "or use backend='peft'."
        )


def _plan(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> LayerPlan | None:
    """What this call computes, or None where the layer's own forward must."""
    context, layer = runtime.context, runtime.layer
    module = layer.module
    if context is None or context.scale <= 0 or (context.loss_only and runtime.parts) or runtime.state.tiers:
        return None
    training = module.training and layer.self_attn.training and layer.mlp.training
    if not training or arguments.get("use_cache") or arguments.get("output_attentions"):
        return None
    if arguments.get("past_key_value") is not None or arguments.get("past_key_values") is not None:
        return None
    if not _takes(hidden_states, module.input_layernorm.weight):
        return None
    memo = context.memo(layer.index)
    recompute = is_recompute(memo)
    projections = memo.pop("projections", None) if recompute else None
    if projections is None:
        projections = _read(layer)
        if projections is None:
            return None
        memo["projections"] = projections
    attention, mlp = (
        Rows(context.partition, True) if runtime.is_sparse(part) else Rows(context.every_row_dense(), False)
        for part in ("self_attn", "mlp")
    )
    unread = recompute and runtime.state.config.exact_removal
    compensation = runtime.compensation() if mlp.sparse else None
    if not torch.is_grad_enabled():  # a recompute goes the way of its first pass
        ready = context.graphs is not None and (layer.index, context.kind) in context.graphs.ready
        memo["graphs"] = ready and compensation is None and runtime.state.config.exact_removal
    graphs = None
    if memo.get("graphs", False):
        context.graphs.check(context)
        graphs = open_pass(context.graphs, layer, projections, (context.kind, attention.sparse, mlp.sparse, unread))
    return LayerPlan(
        input_norm=_norm(module.input_layernorm),
        output_norm=_norm(module.post_attention_layernorm),
        attention=attention,
        mlp=mlp,
        projections=projections,
        activation=layer.activation,
        compensation=compensation,
        choose_attention=runtime.attention_of_context,
        choose_mlp=runtime.mlp_of_context,
        unread=unread,
        keep=torch.is_grad_enabled(),
        graphs=graphs,
    )


def open_pass(graphs: Graphs, layer: DecoderLayer, projections: list[Projection], which: Hashable) -> Pass:
    """A pass through ``layer``, whose recordings hold as long as these weights are where they are."""
    tensors = [tensor for one in projections for tensor in (one.lora.A, one.lora.B, one.base.weight)]
    return graphs.open(layer.index, which, tensors, tuple(one.lora.scale for one in projections))


def plan_of_rows(layer: DecoderLayer, rows: Tensor, partition: TokenPartition) -> LayerPlan | None:
    """A plan for some ``rows`` alone, all dense, whose output nobody reads; None where the functions do not apply.

    Args:
        rows: ``[1, n, hidden_size]``.
        partition: n dense rows.
    """
    module = layer.module
    projections = _read(layer) if _takes(rows, module.post_attention_layernorm.weight) else None
    if projections is None:
        return None
    every = Rows(partition, False)
    norms = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
    return LayerPlan(
        *norms, every, every, projections, layer.activation, None, _no_choice, _no_choice, unread=True, keep=False
    )


def _no_choice(rows: Tensor | None) -> NoReturn:
    raise AssertionError("a dense part chooses no channels")


def _takes(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether the two functions can compute with these rows, next to a norm of this ``weight``."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    same = dtype == hidden_states.dtype == weight.dtype and hidden_states.is_contiguous()
    return same and not weight.requires_grad and use_kernels(hidden_states)


def _read(layer: DecoderLayer) -> list[Projection] | None:
    """Of q, k, v, o, gate, up, down; None if one is merged, disabled or without LoRA now."""
    projections = [read_projection(module) for module in _modules(layer)]
    return None if any(one is None or one.lora is None for one in projections) else projections


def _modules(layer: DecoderLayer) -> Iterator[nn.Module]:
    """The projections q, k, v, o, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _is_plain_norm(norm: nn.Module | None) -> bool:
    """A frozen RMS norm that multiplies with its weight as it is (Gemma's adds one)."""
    return (
        norm is not None
        and hasattr(norm, "variance_epsilon")
        and getattr(norm, "bias", None) is None
        and not norm.weight.requires_grad
    )


def _suit(layer: DecoderLayer) -> bool:
    """Whether every projection has LoRA, of one rank where they are computed together, and the MLP no bias."""
    try:
        for part in peft_backend.PARTS:
            peft_backend.check(layer, part)
    except AttachError:
        return False
    found: list[Projection | None] = [read_projection(module) for module in _modules(layer)]
    if any(projection is None or projection.lora is None for projection in found):
        return False
    ranks = [projection.lora.A.shape[0] for projection in found]
    biased = [projection for projection in found[4:] if projection.base.bias is not None]
    return len(set(ranks[:3])) == len(set(ranks[4:])) == 1 and not biased
