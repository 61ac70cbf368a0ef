"""Selects the channels of highest score in one launch per part (docs/how-it-works.md, section 4.4).

A program reads fp32 scores as integers of the same order and finds the ``k``-th largest by bisection. Higher scores are
selected, and of equal ones the lowest channels. NaN ranks below every score. No host sync.

Bytes: the MLP's program reads ``4 size`` once (beyond `CHUNK` channels once per bisection step) and writes ``8 size``;
attention's two read ``4 (q + 2 k)`` and write 8 per selected channel. Latency decides: a program runs for about 10 us,
as long as the host takes to launch it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch

CHUNK = 16384
"""Scores that one program holds in registers."""


@triton.jit
def _ordered(score):
    """int32 keys in the order of fp32 ``score``; NaN is the lowest."""
    key = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, key, -2147483648)


@triton.jit
def _keys(scores, start, size, BLOCK: tl.constexpr):
    """The keys of one chunk; beyond ``size`` the lowest key."""
    o_channel = start + tl.arange(0, BLOCK)
    return _ordered(tl.load(scores + o_channel, mask=o_channel < size, other=float("nan")))


@triton.jit
def _at_least(b_key, bound):
    """The number of keys that are at least ``bound``, an int64 in the range of int32."""
    return tl.sum((b_key >= bound.to(tl.int32)).to(tl.int32))


@triton.jit
def _bisect(low, high, count, middle, k):
    """The half of ``[low, high]`` with the ``k``-th largest key; only ``middle`` if exactly ``k`` keys reach it."""
    new_low = tl.where(count >= k, middle, low)
    new_high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    return new_low, new_high


@triton.jit(do_not_specialize=["k"])
def top_order_kernel(
    scores,  # fp32 [SIZE]
    order,  # int64 [SIZE]: the selected channels, then the others, both ascending
    k,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_key = _keys(scores, 0, SIZE, BLOCK)  # stays in registers; other chunks are read again
    low = tl.min(tl.where(tl.arange(0, BLOCK) < SIZE, b_key, 2147483647)).to(tl.int64)
    high = tl.max(b_key).to(tl.int64)
    for start in range(BLOCK, SIZE, BLOCK):
        b_next = _keys(scores, start, SIZE, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(start + tl.arange(0, BLOCK) < SIZE, b_next, 2147483647)).to(tl.int64))
        high = tl.maximum(high, tl.max(b_next).to(tl.int64))
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count = _at_least(b_key, middle)
        for start in range(BLOCK, SIZE, BLOCK):
            count += _at_least(_keys(scores, start, SIZE, BLOCK), middle)
        low, high = _bisect(low, high, count, middle, k)
    bound = low.to(tl.int32)
    ties = k - tl.sum((b_key > bound).to(tl.int32))
    for start in range(BLOCK, SIZE, BLOCK):
        ties -= tl.sum((_keys(scores, start, SIZE, BLOCK) > bound).to(tl.int32))
    above_before = tl.zeros([], dtype=tl.int32)
    equal_before = tl.zeros([], dtype=tl.int32)
    for start in range(0, SIZE, BLOCK):
        o_channel = start + tl.arange(0, BLOCK)
        m_channel = o_channel < SIZE
        if SIZE > BLOCK:
            b_key = _keys(scores, start, SIZE, BLOCK)
        above = (b_key > bound).to(tl.int32)
        equal = ((b_key == bound) & m_channel).to(tl.int32)
        both = above + (equal << 16)  # one scan counts both: a chunk has fewer than 2^15 channels
        before = tl.cumsum(both, 0) - both
        equal_rank = equal_before + (before >> 16)
        place = above_before + (before & 0xFFFF) + tl.minimum(equal_rank, ties)
        is_selected = (above == 1) | ((equal == 1) & (equal_rank < ties))
        tl.store(order + tl.where(is_selected, place, k + o_channel - place), o_channel.to(tl.int64), mask=m_channel)
        total = tl.sum(both)
        above_before += total & 0xFFFF
        equal_before += total >> 16


@triton.jit
def _select_in_heads(
    b_score,  # fp32 [HEADS, SPAN]: one score for each `HALVES` channels of a head, `span` apart
    m_score,
    k,
    selected,  # int64 [HALVES * k]: channels of the key or value heads
    members,  # int64 [groups * HALVES * k]: the same channels of the query heads that share them
    groups,
    span,
    o_head,  # [HEADS, 1]
    o_dim,  # [1, SPAN]
    HALVES: tl.constexpr,
):
    b_key = tl.where(m_score, _ordered(b_score), -2147483648)
    low = tl.min(tl.where(m_score, b_key, 2147483647)).to(tl.int64)
    high = tl.max(b_key).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        low, high = _bisect(low, high, _at_least(b_key, middle), middle, k)
    bound = low.to(tl.int32)
    above = (b_key > bound).to(tl.int32)
    equal = ((b_key == bound) & m_score).to(tl.int32)
    both = above + (equal << 16)
    in_head = tl.sum(both, 1)
    head_end = tl.cumsum(in_head, 0)
    head_start = head_end - in_head
    before = head_start[:, None] + tl.cumsum(both, 1) - both
    ties = k - tl.sum(above)
    is_selected = (above == 1) | ((equal == 1) & ((before >> 16) < ties))
    start = (head_start & 0xFFFF) + tl.minimum(head_start >> 16, ties)
    count = ((head_end & 0xFFFF) + tl.minimum(head_end >> 16, ties) - start)[:, None]
    start = start[:, None]
    rank = (before & 0xFFFF) + tl.minimum(before >> 16, ties) - start
    for half in tl.static_range(HALVES):
        o_channel = half * span + o_dim
        at = HALVES * start + half * count + rank
        tl.store(selected + at, (o_head * HALVES * span + o_channel).to(tl.int64), mask=is_selected)
        for member in range(groups):
            at = HALVES * groups * start + (member * HALVES + half) * count + rank
            channel = (o_head * groups + member) * HALVES * span + o_channel
            tl.store(members + at, channel.to(tl.int64), mask=is_selected)


@triton.jit(do_not_specialize=["num_keys", "num_values", "k_start", "v_start", "o_start"])
def attention_channels_kernel(
    query_energy,  # fp32 [KV_HEADS * GROUPS * HEAD_DIM]
    key_energy,  # fp32 [KV_HEADS * HEAD_DIM]
    value_energy,  # fp32 [KV_HEADS * HEAD_DIM]
    output,  # int64: channels of q from 0, of k from k_start, of v from v_start, of o from o_start
    num_keys,  # RoPE pairs of key channels to select
    num_values,
    k_start,
    v_start,
    o_start,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SPAN: tl.constexpr,
    VALUE_SPAN: tl.constexpr,
):
    o_head = tl.arange(0, HEADS)[:, None]
    if tl.program_id(0) == 0:
        span: tl.constexpr = HEAD_DIM // 2
        o_pair = tl.arange(0, KEY_SPAN)[None, :]
        m_pair = (o_head < KV_HEADS) & (o_pair < span)
        b_pair = tl.zeros([HEADS, KEY_SPAN], dtype=tl.float32)
        for half in tl.static_range(2):
            o_channel = half * span + o_pair
            b_query = tl.zeros([HEADS, KEY_SPAN], dtype=tl.float32)
            for member in range(GROUPS):
                at = (o_head * GROUPS + member) * HEAD_DIM + o_channel
                b_query += tl.load(query_energy + at, mask=m_pair, other=0.0)
            b_pair += b_query * tl.load(key_energy + o_head * HEAD_DIM + o_channel, mask=m_pair, other=0.0)
        _select_in_heads(b_pair, m_pair, num_keys, output + k_start, output, GROUPS, span, o_head, o_pair, 2)
    else:
        o_value = tl.arange(0, VALUE_SPAN)[None, :]
        m_value = (o_head < KV_HEADS) & (o_value < HEAD_DIM)
        b_value = tl.load(value_energy + o_head * HEAD_DIM + o_value, mask=m_value, other=0.0)
        at = output + o_start
        _select_in_heads(b_value, m_value, num_values, output + v_start, at, GROUPS, HEAD_DIM, o_head, o_value, 1)


def top_order(scores: Tensor, count: int) -> Tensor:
    """int64 ``[size]``: the ``count`` channels of highest score, then the others, both ascending.

    Args:
        scores: fp32 ``[size]``, contiguous.
        count: 1 to ``size``.
    """
    size = scores.shape[0]
    order = torch.empty(size, dtype=torch.int64, device=scores.device)
    block = min(CHUNK, max(256, 1 << (size - 1).bit_length()))
    launch(top_order_kernel, (1,), (scores, order, count), {"SIZE": size, "BLOCK": block}, _warps(block))
    return order


def attention_channels(
    query_energy: Tensor, key_energy: Tensor, value_energy: Tensor, keys: int, values: int, groups: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selected channels of q, k, v and o, int64 and ascending: `reference_attention_channels` in one launch.

    Args:
        query_energy: fp32 ``[num_kv_heads * groups * head_dim]``, contiguous, as are the others.
        key_energy, value_energy: fp32 ``[num_kv_heads * head_dim]``; at most `CHUNK`, see `fits_attention`.
        keys, values: the numbers of RoPE pairs of key channels and of value channels to select.
        groups: query heads that share a key head.
    """
    num_k, kv_heads = 2 * keys, key_energy.shape[0] // head_dim
    counts = (groups * num_k, num_k, values, groups * values)
    sizes = [size for count in counts for size in (count, count % 2)]  # starts stay aligned for wide loads
    output = torch.empty(sum(sizes), dtype=torch.int64, device=key_energy.device)
    q, _, k, _, v, _, o, _ = output.split_with_sizes(sizes)
    k_start = sizes[0] + sizes[1]
    v_start = k_start + sizes[2] + sizes[3]
    o_start = v_start + sizes[4] + sizes[5]
    heads, key_span, value_span = _tile(kv_heads, head_dim // 2, head_dim)
    arguments = (query_energy, key_energy, value_energy, output, keys, values, k_start, v_start, o_start)
    constants = {
        "KV_HEADS": kv_heads, "GROUPS": groups, "HEAD_DIM": head_dim, "HEADS": heads,
        "KEY_SPAN": key_span, "VALUE_SPAN": value_span,
    }  # fmt: skip
    launch(attention_channels_kernel, (2,), arguments, constants, _warps(heads * value_span))
    return q, k, v, o


def fits_attention(kv_heads: int, head_dim: int) -> bool:
    """Whether one program of `attention_channels` can hold the scores."""
    heads, _, span = _tile(kv_heads, head_dim, head_dim)
    return heads * span <= CHUNK


def top_channels(scores: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: the channels of highest score, ascending; of equal scores the lowest channels, NaN last."""
    return _without_nan(scores).argsort(descending=True, stable=True)[:count].sort().values


def reference_top_order(scores: Tensor, count: int) -> Tensor:
    """`top_order` in plain PyTorch."""
    others = torch.ones(len(scores), dtype=torch.uint8, device=scores.device)
    return others.index_fill_(0, top_channels(scores, count), 0).argsort(stable=True)


def query_channels(key_channels: Tensor, groups: int, head_dim: int) -> Tensor:
    """The channels of the query heads that share ``key_channels``, ascending (docs/how-it-works.md, section 4.4).

    The same function maps value channels to columns of o_proj.
    """
    head, dim = key_channels // head_dim, key_channels % head_dim
    member = torch.arange(groups, device=key_channels.device)
    return ((head[:, None] * groups + member) * head_dim + dim[:, None]).flatten().sort().values


def key_channel_scores(query_energy: Tensor, key_energy: Tensor, groups: int, head_dim: int) -> Tensor:
    """The score of each key channel: its energy times the summed energy of its group's query channels.

    Args:
        query_energy: ``[num_kv_heads * groups * head_dim]``.
        key_energy: ``[num_kv_heads * head_dim]``.
    """
    return query_energy.view(-1, groups, head_dim).sum(1).flatten() * key_energy


def reference_attention_channels(
    query_energy: Tensor, key_energy: Tensor, value_energy: Tensor, keys: int, values: int, groups: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention_channels` in plain PyTorch; the scores of a RoPE pair are added."""
    scores = key_channel_scores(query_energy, key_energy, groups, head_dim)
    half = head_dim // 2
    pairs = top_channels(scores.view(-1, 2, half).sum(1).flatten(), keys)
    first = pairs // half * head_dim + pairs % half
    k = torch.cat((first, first + half)).sort().values
    v = top_channels(value_energy, values)
    return query_channels(k, groups, head_dim), k, v, query_channels(v, groups, head_dim)


def _without_nan(scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), -torch.inf, scores)


@lru_cache
def _tile(kv_heads: int, key_span: int, value_span: int) -> tuple[int, int, int]:
    heads, *spans = (triton.next_power_of_2(size) for size in (kv_heads, key_span, value_span))
    return max(2, heads), *(max(16, span) for span in spans)


def _warps(elements: int) -> int:
    return max(4, min(32, elements // 256))
