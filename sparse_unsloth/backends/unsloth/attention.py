"""Calls Unsloth's attention between the two functions of a layer, and makes it one that can be recorded.

The attention module still runs as it is, with Unsloth's RoPE, head norms and attention dispatch: its ``apply_qkv`` is
handed Q, K, V that are computed already, its ``apply_o`` leaves its input alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_unsloth.backends.unsloth.contract import ATTENTION
from sparse_unsloth.graphs import packed_attention
from sparse_unsloth.graphs.layer import Attention
from sparse_unsloth.runtime.state import LayerRuntime

COSINES, SINES = "position_embeddings, 0", "position_embeddings, 1"
OFFSETS, LENGTHS = "documents begin at", "packed_seq_lengths"
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


def attend(runtime: LayerRuntime, hidden_states: Tensor, qkv: Sequence[Tensor], arguments: dict[str, Any]) -> Tensor:
    """Unsloth's attention of Q, K, V, before o_proj."""
    runtime.precomputed_qkv, runtime.skip_output_projection = tuple(qkv), True
    try:
        return runtime.layer.self_attn(hidden_states=hidden_states, **arguments)[0]
    finally:
        runtime.precomputed_qkv, runtime.skip_output_projection = None, False


def capturable_attention(runtime: LayerRuntime, arguments: dict[str, Any], fixed: dict[str, Tensor]) -> Attention:
    """Unsloth's attention of Q, K, V and the ``fixed`` tensors, which stand for those of ``arguments``."""

    def attention(x: Tensor, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        named = dict(zip(fixed, tensors, strict=True))
        embeddings, offsets = (named.pop(COSINES), named.pop(SINES)), named.pop(OFFSETS, None)
        given = {**arguments, **named, "position_embeddings": embeddings, LENGTHS: None}
        given.pop(MASK, None)
        with _attending(runtime.layer.self_attn, offsets):
            return attend(runtime, x, qkv, given)

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
