"""Computes the gated unit of all channels with LoRA (docs/how-it-works.md, sections 4.1 and 7), in one kernel each way.

Per row ``e = gate_base + gate_xA gate_B'``, ``g = up_base + up_xA up_B'``, ``h = act(e) * g``. LoRA scales are folded
into ``gate_xA``, ``up_xA`` and ``down_A``. What sums over rows or channels is left to matmuls with ``r`` columns.

Bytes (bf16): forward reads ``4 N I`` and writes ``2 N I``; backward reads and writes ``6 N I``. The matmuls read
``2 N I`` more in forward, and ``10 N I`` in backward (``12 N I`` with ``h down_A'``). Kernels that sum as well, as
those of `sparse_unsloth.kernels.glu` do, read less and take longer: they hold so much in registers that few programs
run at a time, and nothing hides the latency of memory (benchmarks/results/one-layer).
"""

from __future__ import annotations

from torch import Tensor

from sparse_unsloth.kernels.activation import KINDS, activation
from sparse_unsloth.kernels.glu import low_rank
from sparse_unsloth.kernels.language import tl, triton
from sparse_unsloth.kernels.launch import launch
from sparse_unsloth.model.activations import ACTIVATIONS, activation_and_slope

TILE = (64, 64)
"""Rows and channels of a program."""


@triton.jit
def _load(pointer, stride, o_row, m_row, o_channel, m_channel):
    """``[rows, channels]`` of a matrix, in fp32."""
    at = pointer + o_row[:, None].to(tl.int64) * stride + o_channel[None, :]
    return tl.load(at, mask=m_row[:, None] & m_channel[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(value, pointer, stride, o_row, m_row, o_channel, m_channel):
    at = pointer + o_row[:, None].to(tl.int64) * stride + o_channel[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=m_row[:, None] & m_channel[None, :])


@triton.jit
def gated_lora_fwd_kernel(
    xA,  # [N, >= 2r]: gate_xA | up_xA
    gate_base,  # [N, I]
    up_base,  # [N, I]
    gate_B,  # [I, r]
    up_B,  # [I, r]
    output,  # h [N, I]
    N,
    I,
    r,
    xA_stride,
    base_stride,
    output_stride,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_channel = tl.program_id(0) * TILE_I + tl.arange(0, TILE_I)
    o_row = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m_channel, m_row = o_channel < I, o_row < N
    e = _load(gate_base, base_stride, o_row, m_row, o_channel, m_channel)
    g = _load(up_base, base_stride, o_row, m_row, o_channel, m_channel)
    b_gate = tl.trans(low_rank(gate_B, r, o_channel, m_channel, r, R))  # [R, TILE_I]
    b_up = tl.trans(low_rank(up_B, r, o_channel, m_channel, r, R))
    e += tl.dot(low_rank(xA, xA_stride, o_row, m_row, r, R), b_gate, input_precision=PRECISION)
    g += tl.dot(low_rank(xA + r, xA_stride, o_row, m_row, r, R), b_up, input_precision=PRECISION)
    value, _ = activation(e, KIND)
    _store(value * g, output, output_stride, o_row, m_row, o_channel, m_channel)


@triton.jit
def gated_lora_bwd_kernel(
    xA,
    gate_base,
    up_base,
    d_down_xA,  # [N, r]: the gradient of h down_A'
    d_h,  # [N, I]: the gradient of h; becomes h
    gate_B,
    up_B,
    down_A,  # [I, r] each; all of these as in the forward
    d_gate_base,  # [N, I]; may be gate_base itself
    d_up_base,
    N,
    I,
    r,
    xA_stride,
    base_stride,
    d_down_xA_stride,
    d_h_stride,
    d_base_stride,
    KIND: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_channel = tl.program_id(0) * TILE_I + tl.arange(0, TILE_I)
    o_row = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m_channel, m_row = o_channel < I, o_row < N
    e = _load(gate_base, base_stride, o_row, m_row, o_channel, m_channel)
    g = _load(up_base, base_stride, o_row, m_row, o_channel, m_channel)
    dh = _load(d_h, d_h_stride, o_row, m_row, o_channel, m_channel)
    b_gate = tl.trans(low_rank(gate_B, r, o_channel, m_channel, r, R))
    b_up = tl.trans(low_rank(up_B, r, o_channel, m_channel, r, R))
    b_down = tl.trans(low_rank(down_A, r, o_channel, m_channel, r, R))
    e += tl.dot(low_rank(xA, xA_stride, o_row, m_row, r, R), b_gate, input_precision=PRECISION)
    g += tl.dot(low_rank(xA + r, xA_stride, o_row, m_row, r, R), b_up, input_precision=PRECISION)
    dh += tl.dot(low_rank(d_down_xA, d_down_xA_stride, o_row, m_row, r, R), b_down, input_precision=PRECISION)
    value, slope = activation(e, KIND)
    _store(value * g, d_h, d_h_stride, o_row, m_row, o_channel, m_channel)
    _store(dh * g * slope, d_gate_base, d_base_stride, o_row, m_row, o_channel, m_channel)
    _store(dh * value, d_up_base, d_base_stride, o_row, m_row, o_channel, m_channel)


def gated_lora_forward(xA: Tensor, base: tuple[Tensor, Tensor], loras: Tensor, h: Tensor, kind: str) -> None:
    """Writes ``h [N, I]``.

    Args:
        xA: ``[N, 2r]``: gate_xA, up_xA, scaled.
        base: gate_base, up_base ``[N, I]`` with one row stride.
        loras: ``[3, I, r]``, contiguous: gate_B, up_B, and down_A scaled and transposed.
        kind: "silu", "gelu" or "gelu_tanh".
    """
    (N, I), r = h.shape, loras.shape[2]
    gate_B, up_B, _ = loras.unbind()
    arguments = xA, *base, gate_B, up_B, h, N, I, r, xA.stride(0), base[0].stride(0), h.stride(0)
    if N:
        launch(gated_lora_fwd_kernel, _grid(N, I), arguments, _constants(xA, r, kind))


def gated_lora_backward(
    xA: Tensor,
    base: tuple[Tensor, Tensor],
    loras: Tensor,
    d_h: Tensor,
    d_down_xA: Tensor,
    d_base: tuple[Tensor, Tensor],
    kind: str,
) -> None:
    """Writes the gradients of ``base``, and ``h`` over ``d_h``; other arguments as in `gated_lora_forward`.

    Args:
        d_h: ``[N, I]``, the gradient of h as an input of the base product.
        d_down_xA: ``[N, r]``, the gradient of ``h down_A'``.
        d_base: two ``[N, I]`` with one row stride; may be ``base`` itself.
    """
    (N, I), r = d_h.shape, loras.shape[2]
    strides = xA.stride(0), base[0].stride(0), d_down_xA.stride(0), d_h.stride(0), d_base[0].stride(0)
    arguments = xA, *base, d_down_xA, d_h, *loras.unbind(), *d_base, N, I, r, *strides
    if N:
        launch(gated_lora_bwd_kernel, _grid(N, I), arguments, _constants(xA, r, kind))


def reference_forward(xA: Tensor, base: tuple[Tensor, Tensor], loras: Tensor, kind: str) -> Tensor:
    """``h`` of `gated_lora_forward` in plain PyTorch."""
    e, g = _with_lora(xA, base, loras)
    return ACTIVATIONS[kind](e) * g


def reference_backward(xA, base, loras, d_h, d_down_xA, kind) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, d gate_base, d up_base)`` of `gated_lora_backward` in plain PyTorch."""
    e, g = _with_lora(xA, base, loras)
    value, slope = activation_and_slope(kind, e)
    dh = d_h + d_down_xA @ loras[2].t()
    return value * g, dh * g * slope, dh * value


def _with_lora(xA: Tensor, base: tuple[Tensor, Tensor], loras: Tensor) -> list[Tensor]:
    return [y + part @ B.t() for y, part, B in zip(base, xA.chunk(2, dim=1), loras[:2], strict=True)]


def _grid(N: int, I: int) -> tuple[int, int]:
    return -(-I // TILE[1]), -(-N // TILE[0])


def _constants(like: Tensor, r: int, kind: str) -> dict:
    """The ``constexpr`` parameters of the kernels, in order."""
    return {
        "KIND": KINDS[kind], "R": max(16, 1 << (r - 1).bit_length()), "TILE_N": TILE[0], "TILE_I": TILE[1],
        "PRECISION": "ieee" if like.dtype.itemsize == 4 else "tf32",
    }  # fmt: skip
