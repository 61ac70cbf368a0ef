"""Computes causal attention within packed documents so that it can be captured (docs/how-it-works.md, section 9.4).

Unsloth's own dispatch reads the documents' lengths on the host, and launches by them. Here a tensor on the device says
where documents begin, and what is launched depends on the sequence's length and the room for documents alone.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_unsloth.graphs.buckets import round_room
from sparse_unsloth.tokens.batch import Batch

MOST_ROWS, KERNEL_TILE = 2**18, 128
"""The kernel's backward counts elements in 32 bits: of 2^18 tokens at most, each document rounded up to a tile."""
DTYPES = (torch.bfloat16, torch.float16)
TRIED = (0, 40, 64, 64, 64), (0, 7, 30, 50, 64)
"""Where documents begin in the two sequences that are tried."""
TOLERANCE = 0.03


@dataclass(frozen=True)
class Packing:
    """The documents of one packed sequence.

    Attributes:
        lengths: ``[documents]``, integers; the tokens after them are one more document.
        tokens: of the sequence.
        room: how many documents a graph of this batch signature takes.
        device: of the sequence.
    """

    lengths: Tensor
    tokens: int
    room: int
    device: torch.device

    @functools.cached_property
    def offsets(self) -> Tensor:
        """``[room + 1]``, int32: where documents begin; unused places are empty documents."""
        sums = self.lengths.cumsum(0, dtype=torch.int32).clamp_max(self.tokens)
        first, rest = sums.new_zeros(1), sums.new_full((self.room - len(sums),), self.tokens)
        return torch.cat((first, sums, rest)).to(self.device, non_blocking=True)


def packing_of(batch: Batch) -> Packing | None:
    """The documents of ``batch``; None where their lengths are not given, or the sequence is too long."""
    lengths, (rows, tokens) = batch.packed_seq_lengths, batch.labels.shape
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or rows != 1 or not len(lengths):
        return None
    room = round_room(len(lengths) + 1)
    if tokens + KERNEL_TILE * room > MOST_ROWS:
        return None
    return Packing(lengths, tokens, room, batch.labels.device)


def why_not_captured(heads: int, kv_heads: int, head_dim: int, like: Tensor, recorder: Any) -> str:
    """Why `packed_attention` cannot be captured here; empty where it can.

    A graph of forward and backward is replayed with documents elsewhere, and compared with the masked reference.

    Args:
        like: a tensor of the layers' dtype and device.
        recorder: a `graphs.capture.GraphCapture`, or what stands for it.
    """
    if like.is_cuda and not (like.dtype in DTYPES and _has_kernel()):
        return f"PyTorch {torch.__version__} has no kernel for it in {str(like.dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, TRIED[0][-1], head_dim, generator=generator).to(like)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    layouts = [torch.tensor(offsets, dtype=torch.int32, device=like.device) for offsets in TRIED]
    place = layouts[0].clone()

    def run(attention: Callable = packed_attention, inputs: Sequence[Tensor] = inputs, offsets: Tensor = place):
        leaves = [values.detach().requires_grad_() for values in inputs[:3]]
        with torch.enable_grad():
            output = attention(*leaves, offsets)
        return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3].transpose(1, 2))]

    try:
        run()  # what is loaded at first use is loaded now
        _, replay = recorder.capture(run)
        for offsets in layouts:
            place.copy_(offsets)
            expected = run(_by_mask, [values.float() for values in inputs], offsets)
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(replay(), expected, strict=True)]
            if not max(errors) <= TOLERANCE:
                return f"a replay differs from the reference by {max(errors):.2g} (allowed {TOLERANCE})"
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return str(error).strip().partition("\n")[0]
    return ""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention within documents: ``[1, tokens, heads, head_dim]``.

    Args:
        query: ``[1, heads, tokens, head_dim]``.
        key, value: ``[1, kv_heads, tokens, head_dim]``.
        offsets: as `Packing.offsets`, on their device.
        scale: of the scores; None is ``head_dim ** -0.5``.
    """
    attention = _by_kernel if query.is_cuda else _by_mask
    return attention(query, key, value, offsets, scale)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None = None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped = {"enable_gqa": True}
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    causal = (-1, 0)
    output = varlen_attn(q, k, v, offsets, offsets, tokens, tokens, scale=scale, window_size=causal, **grouped)
    return output[None]


def _by_mask(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None = None) -> Tensor:
    """The masked reference: a mask of all pairs of tokens."""
    places = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    document = torch.searchsorted(offsets[1:].contiguous(), places, right=True)
    mask = (document[:, None] == document) & (places[:, None] >= places)
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


@functools.cache
def _has_kernel() -> bool:
    """Whether torch has variable-length attention with a causal window; it does since 2.11."""
    if torch.version.hip is not None or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
