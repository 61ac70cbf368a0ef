"""Whole decoder layers of Unsloth's Llama form: everything but the attention itself in two functions.

The attention module still runs as it is, with Unsloth's RoPE, head norms and attention dispatch: its ``apply_qkv`` is
handed Q, K, V that are computed already, its ``apply_o`` leaves its input alone. Wherever the two functions do not
apply, the layer's own forward runs, with the hooks that are in it. Exact, and for speed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_unsloth.backends import peft as peft_backend
from sparse_unsloth.backends.replaced import plain_forward, replace_forward
from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions import graphed_layer, graphed_parts, packed_attention
from sparse_unsloth.functions.graphs import GraphCache, LayerCapture
from sparse_unsloth.functions.implementation import use_kernels
from sparse_unsloth.functions.layer import LayerPlan, Norm, RowOrder, post_attention, pre_attention
from sparse_unsloth.functions.mlp import is_recompute
from sparse_unsloth.layer_rules import PARTS
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import Projection, read_projection

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
OTHER_PARTS = "it has other parts than two norms, attention and MLP"
LEAVES_OUT_ROWS = "it leaves out all rows without loss instead (exact_removal)"
UNREAD = ("position_embeddings", "num_items_in_batch")
"""Arguments that do not matter to the attention as they are."""


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


def replace(runtime: LayerRuntime) -> None:
    """Puts `layer_forward` on the layer, whose attention and MLP are hooked already."""
    replace_forward(runtime.layer.module, layer_forward, runtime)


def layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As Unsloth's ``LlamaDecoderLayer_fast_forward``, in a training forward without a cache."""
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.context is not None and runtime.context.probe:
        return prove(runtime, hidden_states, kwargs, lambda: _compute(runtime, hidden_states, kwargs))
    output = None if args else _compute(runtime, hidden_states, kwargs)
    return plain_forward(self, hidden_states, *args, **kwargs) if output is None else (output,)


def _compute(runtime: LayerRuntime, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output by the two functions, recorded or not; None where its own forward must run."""
    planned = _plan(runtime, hidden_states, kwargs)
    if planned is None:
        return None
    plan, capture = planned
    runtime.context.whole.add(runtime.layer.index)
    fixed = None if capture is None else fixed_tensors(runtime, hidden_states, kwargs)
    if fixed is not None:
        return _recorded(runtime, hidden_states, plan, capture, kwargs, fixed)
    before, behind = pre_attention, post_attention
    if capture is not None:
        before = partial(graphed_parts.pre_attention, capture=capture)
        behind = partial(graphed_parts.post_attention, capture=capture)
    *handed, residual = before(hidden_states, plan)
    attention_output = attend(runtime, hidden_states, handed, kwargs)
    for part in PARTS:
        if runtime.is_sparse(part):
            runtime.record_run(part)
    output = behind(attention_output, residual, plan)
    if runtime.state.graphs is not None and capture is None and not plan.unread:
        _reserve(runtime, runtime.state.graphs)
    return output


def attend(runtime: LayerRuntime, hidden_states: Tensor, handed: Sequence[Tensor], arguments: dict) -> Tensor:
    """Unsloth's attention of Q, K, V, before o_proj."""
    runtime.handed = tuple(handed)
    try:
        return runtime.layer.self_attn(hidden_states=hidden_states, **arguments)[0]
    finally:
        runtime.handed = None


def _recorded(
    runtime: LayerRuntime,
    hidden_states: Tensor,
    plan: LayerPlan,
    capture: LayerCapture,
    arguments: dict[str, Any],
    fixed: dict[str, Tensor],
) -> Tensor:
    """The layer's output from recordings of all of it; ``fixed``: what `fixed_tensors` gave."""
    for part in PARTS:
        if runtime.is_sparse(part):
            runtime.record_run(part)
    attention = recorded_attention(runtime, arguments, fixed)
    output = graphed_layer.whole_layer(hidden_states, plan, capture, attention, list(fixed.values()))
    for part, chosen in capture.kept.items():
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


def _reserve(runtime: LayerRuntime, graphs: GraphCache) -> None:
    """Makes room for the layer's choices, where forwards of this kind will be recorded."""
    context, index = runtime.context, runtime.layer.index
    if (index, context.kind) in graphs.ready or not graphs.captures_next(context.kind):
        return
    for part in PARTS:
        if runtime.is_sparse(part):
            graphed_layer.reserve(graphs, index, part, context.selections[index, part])
    graphs.ready.add((index, context.kind))


def fixed_tensors(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that Unsloth's attention depends on besides Q, K, V; None where that cannot be recorded.

    It can for plain causal attention, within packed documents too: no window, cosines and sines given for the whole
    length. Otherwise what Unsloth reads depends on the batch, or lies in a cache that it may replace.
    """
    module, length = runtime.layer.module, hidden_states.shape[1]
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
        every_row = plain_forward(module, hidden_states, **arguments) if loss_only and runtime.parts else own
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
    error = ((ours.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)).item()
    tolerance = 1e-3 if ours.dtype == torch.float32 else 3e-2
    if error <= tolerance:
        return ""
    return f"the forward of {type(module).__name__} differs from our functions (by more than {tolerance}, relative)"


def _plan(
    runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]
) -> tuple[LayerPlan, LayerCapture | None] | None:
    """What this call computes, and what records it if anything does; or None where the layer's own forward must."""
    context, layer = runtime.context, runtime.layer
    module = layer.module
    if context is None or context.scale <= 0 or (context.loss_only and runtime.parts):
        return None
    training = module.training and layer.self_attn.training and layer.mlp.training
    if not training or arguments.get("use_cache") or arguments.get("output_attentions"):
        return None
    if arguments.get("past_key_value") is not None or arguments.get("past_key_values") is not None:
        return None
    if not _takes(hidden_states, module.input_layernorm.weight):
        return None
    runtime.check_rows(module, hidden_states)
    memo = context.memo(layer.index)
    recompute = is_recompute(memo)
    projections = memo.pop("projections", None) if recompute else None
    if projections is None:
        projections = _read(layer)
        if projections is None:
            return None
        memo["projections"] = projections
    attention, mlp = (
        RowOrder(context.partition, True) if runtime.is_sparse(part) else RowOrder(context.every_row_dense(), False)
        for part in ("self_attn", "mlp")
    )
    unread = recompute and runtime.state.config.exact_removal
    if not torch.is_grad_enabled():  # a recompute goes the way of its first pass
        ready = context.graphs is not None and (layer.index, context.kind) in context.graphs.ready
        memo["graphs"] = ready and runtime.state.config.exact_removal
    capture = None
    if memo.get("graphs", False):
        context.graphs.check(context)
        context.captured.add(layer.index)
        capture = open_pass(context.graphs, layer, projections, (context.kind, attention.sparse, mlp.sparse, unread))
    plan = LayerPlan(
        input_norm=_norm(module.input_layernorm),
        output_norm=_norm(module.post_attention_layernorm),
        attention=attention,
        mlp=mlp,
        projections=projections,
        activation=layer.activation,
        choose_attention=runtime.attention_of_context,
        choose_mlp=runtime.mlp_of_context,
        unread=unread,
        keep=torch.is_grad_enabled(),
    )
    return plan, capture


def open_pass(graphs: GraphCache, layer: DecoderLayer, projections: list[Projection], which: Hashable) -> LayerCapture:
    """A pass through ``layer``, whose recordings hold as long as these weights are where they are."""
    tensors = [tensor for one in projections for tensor in (one.lora.A, one.lora.B, one.base.weight)]
    return graphs.open(layer.index, which, tensors, tuple(one.lora.scale for one in projections))


def plan_of_rows(layer: DecoderLayer, rows: Tensor, partition: TokenPartition, unread: bool = True) -> LayerPlan | None:
    """A plan for some ``rows`` alone, all dense; None where the functions do not apply.

    Args:
        rows: ``[1, n, hidden_size]``.
        partition: n dense rows.
        unread: the output is not used, and not computed.
    """
    module = layer.module
    projections = _read(layer) if _takes(rows, module.post_attention_layernorm.weight) else None
    if projections is None:
        return None
    every = RowOrder(partition, False)
    norms = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
    return LayerPlan(
        *norms, every, every, projections, layer.activation, _no_choice, _no_choice, unread=unread, keep=False
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


def _unsuitable(layer: DecoderLayer) -> str:
    """Why its projections are not as the functions need them: all with LoRA, of one rank where they are together."""
    try:
        for part in PARTS:
            peft_backend.check(layer, part)
    except AttachError as error:
        return str(error)
    found: list[Projection | None] = [read_projection(module) for module in _modules(layer)]
    if any(projection is None or projection.lora is None for projection in found):
        return "LoRA is not on all of q, k, v, o, gate, up and down (one active, unmerged adapter)"
    ranks = [projection.lora.A.shape[0] for projection in found]
    if not len(set(ranks[:3])) == len(set(ranks[4:])) == 1:
        return "LoRA's ranks of q, k, v differ, or those of gate, up, down"
    return "the MLP has a bias" if any(projection.base.bias is not None for projection in found[4:]) else ""
