"""Calls Unsloth's attention between the two functions of a layer, and makes it capturable in CUDA graphs.

The attention module runs unchanged, with Unsloth's RoPE, head norms and attention dispatch. Only its ``apply_qkv``
returns precomputed Q, K, V, and its ``apply_o`` returns its input.
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
"""Unsloth's name for PyTorch's attention."""
MASK = "causal_mask"
"""The argument that holds xformers' mask; None without xformers."""
PLAIN_MASK = "LowerTriangularMask"
"""The class of xformers' plain causal mask, which holds no tensor."""
REPLACED = (LENGTHS, MASK)
"""Arguments that only the attention function reads, which is replaced within packed documents."""
UNUSED = ("position_embeddings", "num_items_in_batch")
"""Arguments that need no fixed tensor of their own."""


def attend(runtime: LayerRuntime, hidden_states: Tensor, qkv: Sequence[Tensor], arguments: dict[str, Any]) -> Tensor:
    """Unsloth's attention of the given Q, K, V, without the O projection."""
    runtime.precomputed_qkv, runtime.skip_output_projection = tuple(qkv), True
    try:
        return runtime.layer.self_attn(hidden_states=hidden_states, **arguments)[0]
    finally:
        runtime.precomputed_qkv, runtime.skip_output_projection = None, False


def capturable_attention(runtime: LayerRuntime, arguments: dict[str, Any], fixed: dict[str, Tensor]) -> Attention:
    """Unsloth's attention of Q, K, V and the ``fixed`` tensors, which replace those of ``arguments``."""

    def attention(x: Tensor, qkv: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        named = dict(zip(fixed, tensors, strict=True))
        embeddings, offsets = (named.pop(COSINES), named.pop(SINES)), named.pop(OFFSETS, None)
        replaced = {**arguments, **named, "position_embeddings": embeddings, LENGTHS: None}
        replaced.pop(MASK, None)
        with _pytorch_attention(runtime.layer.self_attn, offsets):
            return attend(runtime, x, qkv, replaced)

    return attention


@contextlib.contextmanager
def _pytorch_attention(attention: nn.Module, offsets: Tensor | None) -> Iterator[None]:
    """Makes Unsloth's attention module call PyTorch's attention inside this context.

    Within packed documents, which begin at ``offsets``, that is `packed_attention`; otherwise Unsloth's own dispatch
    with its SDPA backend. Capturing the kernels of xformers and flash-attn has not been tested.
    """
    names = _globals_of(attention)
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


def _globals_of(attention: nn.Module) -> dict[str, Any]:
    """The globals that the forward of an attention module sees."""
    return getattr(inspect.unwrap(type(attention).forward), "__globals__", {})


def fixed_tensors(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that Unsloth's attention reads besides Q, K, V; None where attention cannot be captured.

    Plain causal attention can be captured, also within packed documents: without a window, and with cosines and sines
    given for the whole length. Otherwise Unsloth reads tensors that depend on the batch, or a cache that it may
    replace.
    """
    module, length = runtime.layer.module, hidden_states.shape[1]
    embeddings = arguments.get("position_embeddings")
    window = getattr(module.self_attn.config, "sliding_window", None)
    if not embeddings or embeddings[0].shape[-2] < length or (window is not None and window < length):
        return None
    found = {COSINES: embeddings[0], SINES: embeddings[1]}
    packing = runtime.context.packing
    if packing is not None:
        if arguments.get("attention_mask") is not None or ATTENTION not in _globals_of(module.self_attn):
            return None
        found[OFFSETS] = packing.offsets
    for name, value in arguments.items():
        if (packing is not None and name in REPLACED) or (name == MASK and _is_plain_mask(module.self_attn, value)):
            continue
        mask = name == "attention_mask" and isinstance(value, Tensor) and value.dim() == 4
        if mask or (name == "position_ids" and isinstance(value, Tensor)):
            found[name] = value
        elif name not in UNUSED and not (value is None or isinstance(value, bool)):
            return None
    return found


def _is_plain_mask(attention: nn.Module, mask: Any) -> bool:
    """Whether ``mask`` is xformers' mask for plain causal attention, which PyTorch's attention can replace."""
    cls = type(mask)
    plain = cls.__name__ == PLAIN_MASK and cls.__module__.partition(".")[0] == "xformers"
    return plain and ATTENTION in _globals_of(attention)
