"""Reads what Unsloth's model forward hands to a decoder layer, for our attention (`sparse_unsloth.layer.attention`).

The result equals that of Unsloth's attention modules, whose forwards are in `contract.ATTENTIONS`:

- Queries and keys turn by the rows ``position_ids`` of the model's tables of cosines and sines, or by the first ones.
- Llama's and Qwen3's forward know no window, whatever the configuration says. Mistral's has the configuration's, Gemma
  2's has it where the model's forward says so, in every other layer.
- A padding mask, which Unsloth drops in training unless it is told to keep it, says all: no window, no documents.
- Gemma 2 gets a mask tensor where FlashAttention with a soft cap is not installed, which says all, too; so documents
  see each other there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.unsloth.contract import ATTENTIONS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs import packed_attention
from sparse_unsloth.graphs.packed_attention import Packing, packing_of
from sparse_unsloth.layer.attention import COSINES, MASK, OFFSETS, SINES, AttentionCall, causal
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.state import LayerRuntime
from sparse_unsloth.tokens.batch import Batch

WINDOWED, CAPPED = "MistralAttention_fast_forward", "Gemma2Attention_fast_forward"
NOT_OURS = ("past_key_value", "past_key_values", "prefix_seg_info")
"""Arguments by which attention reads other keys than those of the layer's input."""
LENGTHS, GIVEN_MASK, CAUSAL_MASK = "packed_seq_lengths", "attention_mask", "causal_mask"
XFORMERS_PLAIN, XFORMERS_WINDOW = "LowerTriangularMask", "BlockDiagonalCausalLocalAttentionMask"
"""The classes of xformers' masks for plain causal attention, and for the same with a window."""


def read_attention(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> AttentionCall | None:
    """What Unsloth's attention computes in this call of a layer; None where its own forward must run.

    Raises:
        AttachError: the attention module's forward is none that is known.
    """
    attention, context = runtime.layer.self_attn, runtime.context
    family, (batch, length, _) = inspect.unwrap(type(attention).forward).__name__, hidden_states.shape
    if family not in ATTENTIONS:
        raise AttachError(f"{type(attention).__name__} runs {family}, which is none of {', '.join(ATTENTIONS)}.")
    if context.split or arguments.get("use_cache") or any(arguments.get(name) is not None for name in NOT_OURS):
        return None
    softcap = attention.config.attn_logit_softcapping if family == CAPPED else None
    window, mask = _window(attention, family, arguments), _mask(context, family, length, arguments)
    tensors, capturable = _angles(context, attention, hidden_states, arguments), True
    packing: Packing | None = None
    if mask is None and window is not None and window >= length:
        window = None
    if mask is not None:
        tensors[MASK] = mask
    elif arguments.get(GIVEN_MASK) is not None:
        return None
    elif (lengths := arguments.get(LENGTHS)) is not None:
        packing = _packing(context, hidden_states, lengths)
        if packing is None:
            return None
        tensors[OFFSETS], capturable = packing.offsets, packing is context.packing
    elif not _is_causal(arguments.get(CAUSAL_MASK), family, window, length):
        return None
    if softcap is None and mask is None and (OFFSETS in tensors or window is not None):
        fits = packing is not None or packed_attention.fits(batch * length, batch)
        if not fits or not packed_attention.takes(hidden_states, runtime.layer.head_dim):
            return None
        graphs = runtime.state.graphs
        capturable = capturable and graphs is not None and graphs.captures_documents
    return causal(runtime.fast.spec.scaling, tensors, window, softcap, capturable, packing)


def _angles(
    context: SparseContext, attention: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Cosines and sines of this forward's positions, ``[1 or batch, sequence, head_dim]``."""
    length, tables = hidden_states.shape[1], arguments.get("position_embeddings")
    if not tables or tables[0].shape[0] < length:
        attention.rotary_emb.extend_rope_embedding(hidden_states, seq_len=length)
        tables = attention.rotary_emb.get_cached(length, hidden_states.device.index)
    positions = arguments.get("position_ids")

    def take() -> tuple[list[Tensor], Any]:
        if positions is None:
            return [table[None, :length] for table in tables], None
        rows = positions.flatten()
        return [table.index_select(0, rows).unflatten(0, positions.shape) for table in tables], (tables, positions)

    # By address, as checkpointing makes other objects of them. What was read is kept, so that it stays the only one.
    place = None if positions is None else positions.data_ptr()
    (cosines, sines), _ = context.once(("angles", tables[0].data_ptr(), place, length), take)
    return {COSINES: cosines, SINES: sines}


def _window(attention: nn.Module, family: str, arguments: dict[str, Any]) -> int | None:
    """How many keys a query sees, its own included; None for all before it."""
    window = getattr(attention.config, "sliding_window", None)
    if family == CAPPED:
        windowed = arguments.get("use_sliding_window", arguments.get(CAUSAL_MASK) is True)
    else:
        windowed = family == WINDOWED
    return window if windowed and isinstance(window, int) and window > 0 else None


def _mask(context: SparseContext, family: str, length: int, arguments: dict[str, Any]) -> Tensor | None:
    """The mask tensor that says all; None without one."""
    if family == CAPPED:
        mask = arguments.get(CAUSAL_MASK)
        if not isinstance(mask, Tensor):
            return None
        return context.once(("mask", mask.data_ptr(), length), lambda: mask[..., :length, :length])
    mask = arguments.get(GIVEN_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != (length, length):
        return None

    def seen() -> tuple[Tensor, Tensor]:
        keep = mask if mask.dtype == torch.bool else mask == 0
        return keep | ~keep.any(-1, keepdim=True), mask  # a token that sees none is padding: it sees all

    return context.once(("mask", mask.data_ptr(), length), seen)[0]


def _packing(context: SparseContext, hidden_states: Tensor, lengths: Tensor) -> Packing | None:
    """The documents of ``lengths``, which Unsloth may have read from position ids."""
    if context.packing is not None:
        return context.packing
    return context.once(
        ("documents", id(lengths)),  # the packing keeps it
        lambda: packing_of(Batch(labels=hidden_states[..., 0].detach(), packed_seq_lengths=lengths)),
    )


def _is_causal(mask: Any, family: str, window: int | None, length: int) -> bool:
    """Whether ``mask`` says no more than causality and the window: None, or what Unsloth makes for other kernels."""
    if family == CAPPED:
        return isinstance(mask, bool)
    if mask is None:
        return True
    cls = type(mask)
    if cls.__module__.partition(".")[0] != "xformers":
        return False
    every = getattr(getattr(mask, "q_seqinfo", None), "min_seqlen", None) == length
    return cls.__name__ == XFORMERS_PLAIN or (cls.__name__ == XFORMERS_WINDOW and window is not None and every)
