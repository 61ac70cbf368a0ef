"""Scores channels by low-rank factors, without ``[N, channels]`` intermediates (docs/how-it-works.md, section 4.3).

`low_rank_activations` gathers rows and multiplies them with all stacked ``down`` factors; `mlp_scores` and
`attention_energies` give each program a tile of channels, and it loops over the rows:

    mlp:        score[c] = sum_n (act(gate_low_rank[n] . gate_up[c] + bias) * (up_low_rank[n] . up_up[c] + bias))^2
    attention:  energy[c] = sum_n (low_rank[n] . up[c])^2,    with separate columns of low_rank for q, k and v

With a ``gain`` (estimator "prior") they write ``sqrt(score) * gain``. Products in the rows' dtype, sums in fp32.

Bytes (bf16): the first reads ``2 N hidden`` once and ``down`` once per program (L2), and writes ``2 N width``; the
others read ``2 N width`` per program (L2) and ``2 rank`` per channel, and write 4 per channel. Their time goes to about
20 elementwise operations per ``N I``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unsloth.kernels.activation import KINDS, activation
from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.model.activations import ACTIVATIONS

TILE_N = 64
TILE_C = 64
LOW_RANK_ROWS = 16
"""Rows per program of `low_rank_activations`: few, so that a thousand rows fill the GPU."""
MAX_RANK = 32
"""The highest rank that fits the tiles: in fp32 more would spill registers or exceed small GPUs' shared memory."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["N", "step"])
def low_rank_kernel(
    hidden,  # [M, hidden_size]
    rows,  # int64: the n-th row that is read is `rows[n * step]` (INDEXED), else `n * step`
    down,  # [width, hidden_size]
    low_rank,  # [N, width]
    N,
    step,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    W: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_H: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m_n = o_n < N
    o_row = o_n.to(tl.int64) * step
    if INDEXED:
        o_row = tl.load(rows + o_row, mask=m_n, other=0)
    p_row = hidden + o_row[:, None] * HIDDEN
    o_w = tl.arange(0, W)
    m_w = o_w < WIDTH
    b_low_rank = tl.zeros([TILE_ROWS, W], dtype=tl.float32)
    for start in range(0, HIDDEN, TILE_H):
        o_h = start + tl.arange(0, TILE_H)
        m_h = o_h < HIDDEN
        b_hidden = tl.load(p_row + o_h[None, :], mask=m_n[:, None] & m_h[None, :], other=0.0)
        b_down = tl.load(down + o_w[None, :] * HIDDEN + o_h[:, None], mask=m_w[None, :] & m_h[:, None], other=0.0)
        b_low_rank += tl.dot(b_hidden, b_down, input_precision=PRECISION)
    at = low_rank + o_n[:, None] * WIDTH + o_w[None, :]
    tl.store(at, b_low_rank.to(low_rank.dtype.element_ty), mask=m_n[:, None] & m_w[None, :])


@triton.jit
def _columns(low_rank, o_n, N, WIDTH: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """``[TILE_N, R]``: `RANK` columns from ``low_rank`` on; zero beyond them and beyond row ``N``."""
    o_r = tl.arange(0, R)
    mask = (o_n[:, None] < N) & (o_r[None, :] < RANK)
    return tl.load(low_rank + o_n[:, None] * WIDTH + o_r[None, :], mask=mask, other=0.0)


@triton.jit
def _factor(up, o_c, m_c, channels, RANK: tl.constexpr, R: tl.constexpr):
    """``[R, TILE_C]`` of ``up [RANK, channels]``, zero beyond."""
    o_r = tl.arange(0, R)
    return tl.load(up + o_r[:, None] * channels + o_c[None, :], mask=(o_r[:, None] < RANK) & m_c[None, :], other=0.0)


@triton.jit(do_not_specialize=["N"])
def mlp_scores_kernel(
    low_rank,  # [N, 2 * rank]: of gate, of up
    up,  # [2 * rank, channels]: of gate, of up
    gate_bias,  # [channels] (HAS_BIAS only)
    up_bias,  # [channels] (HAS_BIAS only)
    gain,  # fp32 [channels] (HAS_GAIN only)
    scores,  # fp32 [channels]
    N,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    m_c = o_c < CHANNELS
    b_gate_up = _factor(up, o_c, m_c, CHANNELS, RANK, R)
    b_up_up = _factor(up + RANK * CHANNELS, o_c, m_c, CHANNELS, RANK, R)
    if HAS_BIAS:
        b_gate_bias = tl.load(gate_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_up_bias = tl.load(up_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros([TILE_N, TILE_C], dtype=tl.float32)
    for start in range(0, N, TILE_N):
        o_n = start + tl.arange(0, TILE_N)
        e = tl.dot(_columns(low_rank, o_n, N, 2 * RANK, RANK, R), b_gate_up, input_precision=PRECISION)
        g = tl.dot(_columns(low_rank + RANK, o_n, N, 2 * RANK, RANK, R), b_up_up, input_precision=PRECISION)
        if HAS_BIAS:
            e += b_gate_bias
            g = tl.where(o_n[:, None] < N, g + b_up_bias, 0.0)
        value, _ = activation(e, KIND)
        h = value * g
        b_sum += h * h
    b_score = tl.sum(b_sum, 0)
    if HAS_GAIN:
        b_score = tl.sqrt(b_score) * tl.load(gain + o_c, mask=m_c, other=0.0)
    tl.store(scores + o_c, b_score, mask=m_c)


@triton.jit(do_not_specialize=["N"])
def attention_energy_kernel(
    low_rank,  # [N, 3 * rank]: of q, k, v
    up,  # [rank, queries + 2 * keys]: of q, k, v
    gain,  # fp32 [queries + 2 * keys] (HAS_GAIN only)
    energy,  # fp32 [queries + 2 * keys]
    N,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    after_q = i_tile - (QUERIES + TILE_C - 1) // TILE_C
    after_k = after_q - (KEYS + TILE_C - 1) // TILE_C
    part = (after_q >= 0).to(tl.int32) + (after_k >= 0).to(tl.int32)
    tile = tl.where(after_k >= 0, after_k, tl.where(after_q >= 0, after_q, i_tile))
    o_part = tile * TILE_C + tl.arange(0, TILE_C)
    m_c = o_part < tl.where(part == 0, QUERIES, KEYS)
    o_c = o_part + tl.where(part == 0, 0, QUERIES + (part - 1) * KEYS)
    b_up = _factor(up, o_c, m_c, QUERIES + 2 * KEYS, RANK, R)
    b_sum = tl.zeros([TILE_N, TILE_C], dtype=tl.float32)
    for start in range(0, N, TILE_N):
        o_n = start + tl.arange(0, TILE_N)
        value = tl.dot(_columns(low_rank + part * RANK, o_n, N, 3 * RANK, RANK, R), b_up, input_precision=PRECISION)
        b_sum += value * value
    b_energy = tl.sum(b_sum, 0)
    if HAS_GAIN:
        b_energy = tl.sqrt(b_energy) * tl.load(gain + o_c, mask=m_c, other=0.0)
    tl.store(energy + o_c, b_energy, mask=m_c)


def low_rank_activations(hidden: Tensor, rows: Tensor | None, step: int, down: Tensor) -> Tensor:
    """``hidden[rows[::step]] @ down'``: ``[N, width]`` in ``hidden``'s dtype, which is ``down``'s; fp16, bf16 or fp32.

    Args:
        hidden: ``[..., hidden_size]``; its leading dimensions count as one.
        rows: int64, or None for all rows.
        down: ``[width, hidden_size]``, contiguous.
    """
    if not hidden.is_contiguous():
        hidden = hidden.contiguous()
    width, size = down.shape
    total = hidden.numel() // size if rows is None else rows.shape[0]
    N = -(-total // step)
    low_rank = torch.empty(N, width, dtype=hidden.dtype, device=hidden.device)
    w = _padded(width)
    tile_h = max(32, 8192 // (w * hidden.element_size()))
    arguments = (hidden, rows, down, low_rank, N, step if rows is None else step * rows.stride(0))
    constants = {
        "HIDDEN": size, "WIDTH": width, "W": w, "TILE_ROWS": LOW_RANK_ROWS, "TILE_H": tile_h,
        "INDEXED": rows is not None, "PRECISION": _precision(hidden),
    }  # fmt: skip
    launch(low_rank_kernel, (-(-N // LOW_RANK_ROWS),), arguments, constants)
    return low_rank


def mlp_scores(
    low_rank: Tensor,
    up: Tensor,
    kind: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Energies of a gated MLP's channels over the rows of ``low_rank``: fp32 ``[channels]``.

    Args:
        low_rank: ``[N, 2 * rank]``, from `low_rank_activations`: the columns of gate, then those of up.
        up: ``[2 * rank, channels]``, contiguous, in ``low_rank``'s dtype; rows likewise.
        kind: "silu", "gelu" or "gelu_tanh".
        gate_bias, up_bias: ``[channels]``, both or neither.
        gain: fp32 ``[channels]``. If given, ``sqrt(energy) * gain`` is returned instead.
    """
    width, channels = up.shape
    scores = torch.empty(channels, dtype=torch.float32, device=low_rank.device)
    arguments = (low_rank, up, gate_bias, up_bias, gain, scores, low_rank.shape[0])
    constants = {
        "CHANNELS": channels, "RANK": width // 2, "R": _padded(width // 2), "KIND": KINDS[kind],
        "TILE_N": TILE_N, "TILE_C": TILE_C, "HAS_BIAS": gate_bias is not None, "HAS_GAIN": gain is not None,
        "PRECISION": _precision(low_rank),
    }  # fmt: skip
    launch(mlp_scores_kernel, (-(-channels // TILE_C),), arguments, constants)
    return scores


def attention_energies(low_rank: Tensor, up: Tensor, queries: int, keys: int, gain: Tensor | None = None) -> Tensor:
    """Energies of the channels of q, k and v over the rows of ``low_rank``: fp32 ``[queries + 2 * keys]``.

    Args:
        low_rank: ``[N, 3 * rank]``, from `low_rank_activations`: the columns of q, of k, of v.
        up: ``[rank, queries + 2 * keys]``, contiguous, in ``low_rank``'s dtype.
        queries, keys: the number of channels of q, and of each of k and v.
        gain: as in `mlp_scores`.
    """
    rank = up.shape[0]
    energy = torch.empty(queries + 2 * keys, dtype=torch.float32, device=low_rank.device)
    arguments = (low_rank, up, gain, energy, low_rank.shape[0])
    constants = {
        "QUERIES": queries, "KEYS": keys, "RANK": rank, "R": _padded(rank), "TILE_N": TILE_N, "TILE_C": TILE_C,
        "HAS_GAIN": gain is not None, "PRECISION": _precision(low_rank),
    }  # fmt: skip
    launch(attention_energy_kernel, (-(-queries // TILE_C) + 2 * -(-keys // TILE_C),), arguments, constants)
    return energy


def reference_low_rank_activations(hidden: Tensor, rows: Tensor | None, step: int, down: Tensor) -> Tensor:
    """`low_rank_activations` in plain PyTorch."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return (flat[::step] if rows is None else flat.index_select(0, rows[::step])) @ down.t()


def reference_mlp_scores(
    low_rank: Tensor,
    up: Tensor,
    kind: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """`mlp_scores` in plain PyTorch, in the dtype of its inputs."""
    e, g = (columns @ factor for columns, factor in zip(low_rank.chunk(2, 1), up.chunk(2), strict=True))
    if gate_bias is not None:
        e, g = e + gate_bias, g + up_bias
    scores = (ACTIVATIONS[kind](e) * g).square().sum(0)
    return scores if gain is None else scores.sqrt() * gain


def reference_attention_energies(
    low_rank: Tensor, up: Tensor, queries: int, keys: int, gain: Tensor | None = None
) -> Tensor:
    """`attention_energies` in plain PyTorch, in the dtype of its inputs."""
    parts = zip(low_rank.chunk(3, 1), up.split((queries, keys, keys), dim=1), strict=True)
    energy = torch.cat([(columns @ factor).square().sum(0) for columns, factor in parts])
    return energy if gain is None else energy.sqrt() * gain


def _padded(size: int) -> int:
    """The next power of 2 that `tl.dot` takes (`triton.next_power_of_2` costs the host 4 us a call)."""
    return max(16, 1 << (size - 1).bit_length())


def _precision(like: Tensor) -> str:
    return "ieee" if like.dtype == torch.float32 else "tf32"
