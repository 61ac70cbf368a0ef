"""Computes attention whose scores have a soft cap, in plain PyTorch; nothing waits for the device.

Forward and backward compute the scores of some heads at a time, and backward computes them again, so what is kept is Q,
K, V alone. Working memory: 20 bytes for each of `MOST_SCORES` scores at most, or of one key head of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.ops.decoder_layer import without_autocast

MOST_SCORES = 2**25
"""Scores that are computed at a time."""


def capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """``softmax(c tanh(s Q K' / c) + mask) V``, ``[batch, sequence, heads, head_dim]``, in the dtype of ``value``.

    Args:
        query: ``[batch, heads, sequence, head_dim]``.
        key, value: ``[batch, kv_heads, sequence, head_dim]``.
        mask: ``[sequence, sequence]`` or ``[batch, 1, sequence, sequence]``, bool (True: seen) or added to the scores.
            Constant.
        scale, softcap: s and c.
    """
    return _CappedAttention.apply(query, key, value, mask, scale, softcap)


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float):
        ctx.save_for_backward(query, key, value, mask)
        ctx.constants = scale, softcap
        batch, heads, sequence, head_dim = query.shape
        output = query.new_empty(batch, sequence, heads, head_dim)
        by_key = output.transpose(1, 2).unflatten(1, (key.shape[1], -1))
        with without_autocast(query):
            for part, q, k, v, seen in _parts(query, key, value, mask):
                weights, _ = _weights(q, k, seen, scale, softcap)
                by_key[part] = (weights.to(v.dtype) @ v).view(by_key[part].shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, mask = ctx.saved_tensors
        scale, softcap = ctx.constants
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        by_key, incoming = (
            x.unflatten(1, (key.shape[1], -1)) for x in (d_query, gradient.to(value.dtype).transpose(1, 2))
        )
        with without_autocast(query):
            for part, q, k, v, seen in _parts(query, key, value, mask):
                weights, bent = _weights(q, k, seen, scale, softcap)
                dy = incoming[part].flatten(2, 3)
                d_value[part] = weights.to(v.dtype).transpose(-1, -2) @ dy
                d_weights = (dy @ v.transpose(-1, -2)).to(weights.dtype)
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                d_scores = d_scores.mul_(bent.square_().neg_().add_(1).mul_(scale)).to(q.dtype)
                by_key[part] = (d_scores @ k).view(by_key[part].shape)
                d_key[part] = d_scores.transpose(-1, -2) @ q
        return d_query, d_key, d_value, None, None, None


def _parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Iterator[tuple]:
    """``(where, q, k, v, mask)`` of some sequences, or of some key heads of one, with the queries of a head in a row.

    ``q`` is ``[n, kv_heads, queries per head * sequence, head_dim]``, the mask ``[n or 1, 1, 1, sequence, sequence]``.
    """
    batch, heads, sequence, _ = query.shape
    kv_heads = key.shape[1]
    by_key = query.unflatten(1, (kv_heads, -1))
    mask = mask.view(-1, 1, 1, sequence, sequence)
    at_once = max(1, min(batch, MOST_SCORES // (heads * sequence**2)))
    heads_at_once = kv_heads if at_once > 1 else max(1, min(kv_heads, MOST_SCORES * kv_heads // (heads * sequence**2)))
    for begin in range(0, batch, at_once):
        rows = slice(begin, begin + at_once)
        seen = mask if mask.shape[0] == 1 else mask[rows]
        for first in range(0, kv_heads, heads_at_once):
            part = rows, slice(first, first + heads_at_once)
            yield part, by_key[part].flatten(2, 3), key[part], value[part], seen


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The weights of the values, and the ``tanh`` of the scores, both in fp32 at least, in the shape of the scores."""
    scores = query @ key.transpose(-1, -2)
    bent = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale / softcap).tanh_()
    capped = (bent * softcap).unflatten(2, (-1, mask.shape[-1]))
    capped = capped.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else capped.add_(mask)
    return capped.softmax(-1).flatten(2, 3), bent
