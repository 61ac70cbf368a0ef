"""Causal attention within documents that lie one behind the other in a row, as a recording can hold it.

Unsloth's own dispatch asks the host for the documents' lengths, and launches by them. Here a tensor says where they
begin, and what is launched depends on the row's length and on how many documents there is room for.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_unsloth.graphs.buckets import round_room

LONGEST_MEAN = 1024
"""Tokens of a document on average, up to which one launch for all is the faster way, as Unsloth has it."""
MOST_ROWS, KERNEL_TILE = 2**18, 128
"""The kernel's backward counts the elements of so many rows, rounded up for each document, in 32 bits."""
DTYPES = (torch.bfloat16, torch.float16)
TRIED = (0, 40, 64, 64, 64), (0, 7, 30, 50, 64)
"""Where documents begin in two rows that are tried."""
TOLERANCE = 0.03


@dataclass(frozen=True)
class Packing:
    """The documents of one row.

    Attributes:
        lengths: ``[documents]``, integers; what they leave of the row is a document of its own.
        tokens: of the row.
        room: how many documents recordings of this kind take.
        device: of the row.
    """

    lengths: Tensor
    tokens: int
    room: int
    device: torch.device

    @functools.cached_property
    def offsets(self) -> Tensor:
        """``[room + 1]``, int32: where documents begin; the rest are empty ones."""
        sums = self.lengths.cumsum(0, dtype=torch.int32).clamp_max(self.tokens)
        first, rest = sums.new_zeros(1), sums.new_full((self.room - len(sums),), self.tokens)
        return torch.cat((first, sums, rest)).to(self.device, non_blocking=True)


def packing_of(arguments: Mapping[str, Any], shape: torch.Size) -> Packing | None:
    """Of a forward's ``arguments``, whose rows have this ``shape``; None where no documents, or too long ones, come."""
    lengths, (batch, tokens) = arguments.get("packed_seq_lengths"), shape
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or batch != 1 or not len(lengths):
        return None
    room = round_room(len(lengths) + 1)
    if tokens > LONGEST_MEAN * len(lengths) or tokens + KERNEL_TILE * room > MOST_ROWS:
        return None
    return Packing(lengths, tokens, room, arguments["labels"].device)


def why_not_recorded(heads: int, kv_heads: int, head_dim: int, like: Tensor, recorder: Any) -> str:
    """Why `packed_attention` cannot be recorded here; empty where it can, which is tried.

    A recording of forward and backward is replayed with documents elsewhere, and compared with the reference.

    Args:
        like: of the dtype and on the device of the layers.
        recorder: as `graphs.recorder.GraphCapture`.
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
        _, again = recorder.capture(run)
        for offsets in layouts:
            place.copy_(offsets)
            expected = run(_by_mask, [values.float() for values in inputs], offsets)
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(again(), expected, strict=True)]
            if not max(errors) <= TOLERANCE:
                return f"a replay differs from the reference by {max(errors):.2g} (allowed {TOLERANCE})"
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return str(error).strip().partition("\n")[0]
    return ""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None = None) -> Tensor:
    """The output ``[1, tokens, heads, head_dim]``.

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
    """The reference: a mask of all pairs."""
    places = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    document = torch.searchsorted(offsets[1:].contiguous(), places, right=True)
    mask = (document[:, None] == document) & (places[:, None] >= places)
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


@functools.cache
def _has_kernel() -> bool:
    """torch has it since 2.11: earlier ones know no causal window."""
    if torch.version.hip is not None or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
