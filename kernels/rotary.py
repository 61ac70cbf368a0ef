"""Computes the head norms and the rotary embedding of queries and keys in one kernel, forward and backward.

A program takes one token and a block of heads, of the queries or of the keys. Channel c of a head becomes

    y[c] = x[c] cos[c] + s(c) x[p(c)] sin[c],    backward  dx[c] = dy[c] cos[c] + s(p(c)) dy[p(c)] sin[p(c)],

where p(c) is the other channel of its pair and s(c) is -1 for the first of the two, 1 for the second. Before that the
head is divided by its root mean square; backward recomputes it from the head, so nothing but the input is kept.

Bytes (bf16), M rows of W channels in queries and keys together, angles in fp32 of width n: forward reads ``2 M W`` and
writes ``2 M W``; backward reads ``2 M W`` (``4 M W`` with norms) and writes ``2 M W``; both read ``8 P n``. The second
read of a head (its pairs, "halves") and all but the first read of an angle are served by the caches.

Predicted on an H200 (4.8 TB/s, of which 80 % can be reached), 8192 tokens, 32 + 8 heads of 128, bf16: 176 MB, hence
46 us forward and as much backward without norms; 260 MB and 68 us backward with norms. Not yet measured.
"""

from __future__ import annotations

from torch import Tensor

from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch

TILE = 1024, 4096
"""Fewest and most elements of a program's tile; in between it has as many heads as the keys have."""
HeadNorm = tuple[Tensor | None, float, float]
"""``(weight [head_dim] or None, eps, offset)`` of an RMS norm of each head, as in `sparse_unsloth.ops.norms.Norm`."""
NO_NORM = None, None, 0.0


@triton.jit
def _angles(cosines, sines, position, o_channel, ROTATION: tl.constexpr, WIDTH: tl.constexpr):
    """Cosines and sines of the channels, the sine of a pair's first channel negated; 1 and 0 where none rotates."""
    at = position * WIDTH + (o_channel // 2 if ROTATION == "interleaved" else o_channel)
    cosine = tl.load(cosines + at, mask=o_channel < WIDTH, other=1.0).to(tl.float32)
    sine = tl.load(sines + at, mask=o_channel < WIDTH, other=0.0).to(tl.float32)
    first = o_channel < WIDTH // 2 if ROTATION == "halves" else o_channel % 2 == 0
    return cosine[None, :], tl.where(first, -sine, sine)[None, :]


@triton.jit
def _other_half(o_channel, WIDTH: tl.constexpr):
    """The other channel of each one's pair, if channels ``i`` and ``i + WIDTH / 2`` are a pair."""
    return tl.where(o_channel < WIDTH // 2, o_channel + WIDTH // 2, o_channel - WIDTH // 2)


@triton.jit
def _swap(x, HEADS: tl.constexpr, DIM: tl.constexpr):
    """``x [HEADS, DIM]`` with channels ``2i`` and ``2i + 1`` exchanged."""
    even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
    return tl.reshape(tl.join(odd, even), (HEADS, DIM))


@triton.jit
def _root(x, eps, HEAD_DIM: tl.constexpr):
    """The reciprocal root mean square of each head, ``[HEADS, 1]``."""
    return tl.math.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]


@triton.jit
def _weight(weight, o_channel, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr):
    return OFFSET + tl.load(weight + o_channel, mask=o_channel < HEAD_DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normalise(x, root, weight, like, o_channel, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The norm of ``x``, rounded to the dtype of ``like`` as transformers does."""
    dtype = like.dtype.element_ty
    x = x * root
    if weight is not None:
        if OFFSET == 0.0:
            x = x.to(dtype).to(tl.float32)
        x = x * _weight(weight, o_channel, OFFSET, HEAD_DIM)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _forward(
    x, output, weight, eps, stride, num_heads, row, block, cosines, sines, positions,
    ROTATION: tl.constexpr, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    o_head = block * HEADS + tl.arange(0, HEADS)
    o_channel = tl.arange(0, DIM)
    m_head = (o_head < num_heads)[:, None]
    mask = m_head & (o_channel < HEAD_DIM)[None, :]
    head = o_head[:, None] * HEAD_DIM
    x += row * stride
    value = tl.load(x + head + o_channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if eps is not None:
        root = _root(value, eps, HEAD_DIM)
        value = _normalise(value, root, weight, output, o_channel, OFFSET, HEAD_DIM)
    if ROTATION != "none":
        cosine, sine = _angles(cosines, sines, row % positions, o_channel, ROTATION, WIDTH)
        if ROTATION == "halves":
            o_other = _other_half(o_channel, WIDTH)
            m_other = m_head & (o_channel < WIDTH)[None, :]
            other = tl.load(x + head + o_other[None, :], mask=m_other, other=0.0).to(tl.float32)
            if eps is not None:
                other = _normalise(other, root, weight, output, o_other, OFFSET, HEAD_DIM)
        else:
            other = _swap(value, HEADS, DIM)
        value = value * cosine + other * sine
    at = output + row * num_heads * HEAD_DIM + head + o_channel[None, :]
    tl.store(at, value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def rotary_forward_kernel(
    query,  # [M, num_heads * HEAD_DIM]
    key,  # [M, num_kv_heads * HEAD_DIM]
    query_output,  # as `query`, contiguous
    key_output,  # as `key`, contiguous
    cosines,  # [positions, WIDTH] (unless ROTATION is none)
    sines,  # [positions, WIDTH] (unless ROTATION is none)
    query_weight,  # [HEAD_DIM]; None: ones
    key_weight,  # [HEAD_DIM]; None: ones
    query_eps,  # None: no norm
    key_eps,  # None: no norm
    query_stride,
    key_stride,
    num_heads,
    num_kv_heads,
    positions,
    QUERY_OFFSET: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    ROTATION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    query_blocks = tl.cdiv(num_heads, HEADS)
    blocks = query_blocks + tl.cdiv(num_kv_heads, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if block < query_blocks:
        _forward(
            query, query_output, query_weight, query_eps, query_stride, num_heads, row, block, cosines, sines,
            positions, ROTATION, QUERY_OFFSET, HEAD_DIM, WIDTH, HEADS, DIM,
        )  # fmt: skip
    else:
        _forward(
            key, key_output, key_weight, key_eps, key_stride, num_kv_heads, row, block - query_blocks, cosines, sines,
            positions, ROTATION, KEY_OFFSET, HEAD_DIM, WIDTH, HEADS, DIM,
        )  # fmt: skip


@triton.jit
def _backward(
    gradient, x, output, weight, eps, stride, num_heads, row, block, cosines, sines, positions,
    ROTATION: tl.constexpr, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    o_head = block * HEADS + tl.arange(0, HEADS)
    o_channel = tl.arange(0, DIM)
    m_head = (o_head < num_heads)[:, None]
    mask = m_head & (o_channel < HEAD_DIM)[None, :]
    head = o_head[:, None] * HEAD_DIM
    start = row * num_heads * HEAD_DIM
    dy = tl.load(gradient + start + head + o_channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTATION != "none":
        cosine, sine = _angles(cosines, sines, row % positions, o_channel, ROTATION, WIDTH)
        if ROTATION == "halves":
            o_other = _other_half(o_channel, WIDTH)
            m_other = m_head & (o_channel < WIDTH)[None, :]
            other = tl.load(gradient + start + head + o_other[None, :], mask=m_other, other=0.0).to(tl.float32)
            _, sine = _angles(cosines, sines, row % positions, o_other, ROTATION, WIDTH)
            other *= sine
        else:
            other = _swap(dy * sine, HEADS, DIM)
        dy = dy * cosine + other
    if eps is not None:
        value = tl.load(x + row * stride + head + o_channel[None, :], mask=mask, other=0.0).to(tl.float32)
        root = _root(value, eps, HEAD_DIM)
        value *= root
        if weight is not None:
            dy *= _weight(weight, o_channel, OFFSET, HEAD_DIM)
        dy = root * (dy - value * (tl.sum(dy * value, 1) / HEAD_DIM)[:, None])
    tl.store(output + start + head + o_channel[None, :], dy.to(output.dtype.element_ty), mask=mask)


@triton.jit
def rotary_backward_kernel(
    d_query,  # [M, num_heads * HEAD_DIM], contiguous
    d_key,  # [M, num_kv_heads * HEAD_DIM], contiguous
    query,  # as in the forward (with a norm only)
    key,  # as in the forward (with a norm only)
    query_output,
    key_output,
    cosines,
    sines,
    query_weight,
    key_weight,
    query_eps,
    key_eps,
    query_stride,
    key_stride,
    num_heads,
    num_kv_heads,
    positions,  # all of these as in the forward
    QUERY_OFFSET: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    ROTATION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    query_blocks = tl.cdiv(num_heads, HEADS)
    blocks = query_blocks + tl.cdiv(num_kv_heads, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if block < query_blocks:
        _backward(
            d_query, query, query_output, query_weight, query_eps, query_stride, num_heads, row, block, cosines, sines,
            positions, ROTATION, QUERY_OFFSET, HEAD_DIM, WIDTH, HEADS, DIM,
        )  # fmt: skip
    else:
        _backward(
            d_key, key, key_output, key_weight, key_eps, key_stride, num_kv_heads, row, block - query_blocks, cosines,
            sines, positions, ROTATION, KEY_OFFSET, HEAD_DIM, WIDTH, HEADS, DIM,
        )  # fmt: skip


def rotary_forward(
    query: Tensor,
    key: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    rotation: str,
    head_dim: int,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys with their head norms, rotated; new, contiguous, in the dtype and shape of the arguments.

    Args:
        query, key: ``[M, num_heads * head_dim]`` and ``[M, num_kv_heads * head_dim]``, unit stride in the rows.
        cosines, sines: ``[P, n]``, contiguous, ``n <= head_dim`` even: row ``i`` is at position ``i % P``, channels
            beyond n stay. None: no rotation.
        rotation: "halves", "pairs" or "interleaved" (`sparse_unsloth.ops.head_rotary.Rotation`).
    """
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    strides = query.stride(0), key.stride(0)
    arguments, constants, grid = _plan(outputs, strides, cosines, sines, rotation, head_dim, query_norm, key_norm)
    if query.shape[0]:
        launch(rotary_forward_kernel, grid, (query, key, *arguments), constants)
    return outputs


def rotary_backward(
    d_query: Tensor,
    d_key: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    rotation: str,
    head_dim: int,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``query`` and ``key`` of `rotary_forward`, contiguous, in the dtype of ``d_query, d_key``.

    Args:
        d_query, d_key: of its outputs, contiguous.
        query, key: its arguments; read where there is a norm, else they may be None. The others are as there.
    """
    outputs = d_query.new_empty(d_query.shape), d_key.new_empty(d_key.shape)
    strides = tuple(0 if x is None else x.stride(0) for x in (query, key))
    arguments, constants, grid = _plan(outputs, strides, cosines, sines, rotation, head_dim, query_norm, key_norm)
    if d_query.shape[0]:
        launch(rotary_backward_kernel, grid, (d_query, d_key, query, key, *arguments), constants)
    return outputs


def _plan(outputs, strides, cosines, sines, rotation, head_dim, query_norm, key_norm) -> tuple[tuple, dict, tuple[int]]:
    """``(the arguments from the outputs on, constants, grid)`` of either kernel."""
    weights, epsilons, offsets = zip(query_norm or NO_NORM, key_norm or NO_NORM, strict=True)
    positions, width = (1, 0) if cosines is None else cosines.shape
    heads, kv_heads = (output.shape[1] // head_dim for output in outputs)
    dim = max(16, 1 << (head_dim - 1).bit_length())
    tile = max(1, TILE[0] // dim, min(TILE[1] // dim, 1 << (kv_heads - 1).bit_length()))
    constants = {
        "QUERY_OFFSET": offsets[0], "KEY_OFFSET": offsets[1], "ROTATION": "none" if cosines is None else rotation,
        "HEAD_DIM": head_dim, "WIDTH": width, "HEADS": tile, "DIM": dim,
    }  # fmt: skip
    arguments = *outputs, cosines, sines, *weights, *epsilons, *strides, heads, kv_heads, positions
    return arguments, constants, (outputs[0].shape[0] * (-(-heads // tile) - (-kv_heads // tile)),)
