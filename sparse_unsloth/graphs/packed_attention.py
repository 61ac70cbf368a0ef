"""Computes causal attention within packed documents or a window so that it can be captured (docs/how-it-works.md, 9.4).

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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_unsloth.graphs.buckets import round_room
from sparse_unsloth.tokens.batch import Batch

MOST_ROWS, KERNEL_TILE = 2**18, 128
"""The kernel's backward counts elements in 32 bits: of 2^18 tokens at most, each document rounded up to a tile."""
DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM = 256
TRIED = (0, 40, 64, 64, 64), (0, 7, 30, 50, 64)
"""Where documents begin in the two sequences that are tried."""
TRIED_WINDOWS = None, 9
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

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest document; the host waits for lengths that are on the device, as Unsloth's would."""
        lengths = self.lengths.tolist()
        return min(max(*lengths, self.tokens - sum(lengths)), self.tokens)


def packing_of(batch: Batch) -> Packing | None:
    """The documents of ``batch``; None where their lengths are not given, or the sequence is too long."""
    lengths, rows = batch.packed_seq_lengths, batch.inputs if batch.labels is None else batch.labels
    shape = rows.shape[:2]
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or len(shape) != 2 or shape[0] != 1 or not len(lengths):
        return None
    tokens = shape[1]
    room = round_room(len(lengths) + 1)
    return Packing(lengths, tokens, room, rows.device) if fits(tokens, room) else None


def fits(tokens: int, documents: int) -> bool:
    """Whether the kernel takes so many tokens in so many documents."""
    return tokens + KERNEL_TILE * documents <= MOST_ROWS


def takes(like: Tensor, head_dim: int) -> bool:
    """Whether `packed_attention` computes in the dtype and on the device of ``like``."""
    if not like.is_cuda:
        return True
    known = like.dtype in DTYPES and head_dim <= MOST_HEAD_DIM and head_dim % 8 == 0
    return known and _has_kernel() and torch.cuda.get_device_capability(like.device) >= (8, 0)


def why_not_captured(heads: int, kv_heads: int, head_dim: int, like: Tensor, recorder: Any) -> str:
    """Why `packed_attention` cannot be captured here; empty where it can.

    A graph of forward and backward is replayed with documents elsewhere, and compared with the masked reference.

    Args:
        like: a tensor of the layers' dtype and device.
        recorder: a `graphs.capture.GraphCapture`, or what stands for it.
    """
    if not takes(like, head_dim):
        dtype = str(like.dtype).removeprefix("torch.")
        return f"PyTorch {torch.__version__} has no kernel for it here, in {dtype} with {head_dim} channels a head"
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, TRIED[0][-1], head_dim, generator=generator).to(like)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    layouts = [torch.tensor(offsets, dtype=torch.int32, device=like.device) for offsets in TRIED]
    place = layouts[0].clone()

    def run(window: int | None, attention: Callable, inputs: Sequence[Tensor], offsets: Tensor):
        leaves = [values.detach().requires_grad_() for values in inputs[:3]]
        with torch.enable_grad():
            output = attention(*leaves, offsets, window=window)
        return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3].transpose(1, 2))]

    try:
        for window in TRIED_WINDOWS:
            ours = functools.partial(run, window, packed_attention, inputs, place)
            ours()  # what is loaded at first use is loaded now
            _, replay = recorder.capture(ours)
            for offsets in layouts:
                place.copy_(offsets)
                expected = run(window, _by_mask, [values.float() for values in inputs], offsets)
                errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(replay(), expected, strict=True)]
                if not max(errors) <= TOLERANCE:
                    return f"a replay differs from the reference by {max(errors):.2g} (allowed {TOLERANCE})"
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return str(error).strip().partition("\n")[0]
    return ""


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """Causal attention within documents: ``[batch, tokens, heads, head_dim]``.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key, value: ``[batch, kv_heads, tokens, head_dim]``.
        offsets: as `Packing.offsets`, on their device, for a batch of one sequence; None: each sequence is a document.
        scale: of the scores; None is ``head_dim ** -0.5``.
        window: how many keys a query sees, its own included; None: all before it.
        longest: tokens of a document at most; None: all of them. The kernel has work for so many in every document.
    """
    if query.is_cuda:
        return _by_kernel(query, key, value, offsets, scale, window, longest)
    return _by_mask(query, key, value, offsets, scale, window)


def visible(tokens: int, device: torch.device, offsets: Tensor | None = None, window: int | None = None) -> Tensor:
    """bool ``[tokens, tokens]``: which key (column) a query (row) sees; arguments as in `packed_attention`."""
    places = torch.arange(tokens, dtype=torch.int32, device=device)
    distance = places[:, None] - places
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if offsets is None:
        return seen
    document = torch.searchsorted(offsets[1:].contiguous(), places, right=True)
    return seen & (document[:, None] == document)


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    batch, _, tokens, _ = query.shape
    if offsets is None:
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    rows = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    options = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    return _Kernel.apply(*rows, offsets, longest or tokens, options).unflatten(0, (batch, tokens))


class _Kernel(torch.autograd.Function):
    """PyTorch's `varlen_attn` without the host time of a custom operator; ``[rows, heads, head_dim]``."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, options: dict[str, Any]
    ) -> Tensor:
        lengths = offsets, offsets, longest, longest, 0.0, options["window_size_left"] < 0
        output, *kept, _ = torch.ops.aten._flash_attention_forward(query, key, value, *lengths, False, **options)
        ctx.save_for_backward(query, key, value, output, *kept, offsets)
        ctx.longest, ctx.options = longest, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        *saved, logarithms, seed, unused, offsets = ctx.saved_tensors
        lengths = offsets, offsets, ctx.longest, ctx.longest, 0.0, ctx.options["window_size_left"] < 0
        given = gradient.contiguous(), *saved, logarithms, *lengths, seed, unused
        return *torch.ops.aten._flash_attention_backward(*given, **ctx.options), None, None, None


def _by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The masked reference: a mask of all pairs of tokens."""
    mask, grouped = visible(query.shape[2], query.device, offsets, window), query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


@functools.cache
def _has_kernel() -> bool:
    """Whether torch has variable-length attention with a causal window; it does since 2.11."""
    if torch.version.hip is not None or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
