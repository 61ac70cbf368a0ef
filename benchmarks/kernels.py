"""Each kernel against its PyTorch reference and its floor, on the GPU.

    python benchmarks/kernels.py [WORD]        (only kernels whose name contains WORD)

Sizes are those of one Llama-3-8B layer at the wizardlm shape (8192 rows, 6144 of them context). The floor is the larger
of bytes over memory bandwidth and FLOPs over the tensor cores' speed, both measured first. Nothing more is timed once a
kernel differs from its reference.

To add a kernel, write a function that yields a `Case` for each of its shapes, and decorate it with `benchmark`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

H, I, CONTEXT_ROWS, DENSE_ROWS = 4096, 14336, 6144, 2048


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    ``ours`` and ``reference`` return the same tensors; ``expected``, where given, returns better ones to compare with.
    ``bytes`` and ``flops`` are what any implementation has to move and compute.
    """

    kernel: str
    shape: str
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    bytes: float
    flops: float = 0.0
    tolerance: float = 0.02
    expected: Callable[[], Any] | None = None


BENCHMARKS: list[Callable[[], Iterator[Case]]] = []


def benchmark(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    BENCHMARKS.append(function)
    return function


def find(module: str, *names: str) -> list[Callable]:
    """Functions of a kernel's file, or the end with what is gone: a benchmark never shrinks in silence."""
    found = importlib.import_module(f"sparse_unsloth.kernels.{module}")
    if gone := [name for name in names if not hasattr(found, name)]:
        raise SystemExit(
            f"kernels/{module}.py has no {', '.join(gone)} any more: bring benchmarks/kernels.py up to date"
        )
    return [getattr(found, name) for name in names]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda").mul_(scale).to(torch.bfloat16)


@benchmark
def dequantize() -> Iterator[Case]:
    whole, rows, columns = find("dequantize", "dequantize_whole", "dequantize_rows", "dequantize_columns")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(draw(I, H, scale=0.02), quant_type="nf4", compress_statistics=True)
    dense = dequantize_4bit(packed, state)
    exact = {"tolerance": 1e-6}
    yield Case(
        "dequantise all",
        f"{I}x{H}",
        lambda: whole(packed, state, torch.bfloat16),
        lambda: dequantize_4bit(packed, state),
        2.5 * I * H,
        **exact,
    )
    for k in (143, 3584):
        for name, function, axis in (("rows", rows, 0), ("columns", columns, 1)):
            index = torch.randperm(dense.shape[axis], device="cuda")[:k].sort().values
            yield Case(
                f"dequantise {name}",
                f"{k} of {I}x{H}",
                lambda function=function, index=index: function(packed, state, index, torch.bfloat16),
                lambda axis=axis, index=index: dequantize_4bit(packed, state).index_select(axis, index),
                2.5 * k * dense.shape[1 - axis],
                **exact,
            )


@benchmark
def glu() -> Iterator[Case]:
    names = "glu_forward", "glu_backward", "reference_forward", "reference_backward"
    forward, backward, reference_forward, reference_backward = find("glu", *names)
    for N, k, r in ((CONTEXT_ROWS, 143, 16), (CONTEXT_ROWS, 3584, 16), (CONTEXT_ROWS, 143, 64), (DENSE_ROWS, I, 16)):
        thin, loras = draw(N, 2 * r, scale=0.5), draw(3, I, r, scale=0.1)
        base = draw(N, 2 * k, scale=0.5).split(k, dim=1)
        d_h, d_down_thin = draw(N, k, scale=0.5), draw(N, r, scale=0.5)
        h, down_thin = torch.empty_like(d_h), torch.empty_like(d_down_thin)
        d_base, d_thin = torch.empty(N, 2 * k, device="cuda", dtype=h.dtype).split(k, dim=1), torch.empty_like(thin)

        def run_forward(thin=thin, base=base, loras=loras, h=h, down_thin=down_thin):
            forward(thin, base, loras, h, down_thin, "silu")
            return h, down_thin

        def run_backward(thin=thin, base=base, loras=loras, d_h=d_h, d_down=d_down_thin, d_base=d_base, d_thin=d_thin):
            d_loras = backward(thin, base, loras, d_h, d_down, d_base, d_thin, "silu")
            return *d_base, d_thin, d_loras.sum(0)

        inputs = thin, base, loras
        wide = [tensor.float() for tensor in (thin, *base, loras, d_h, d_down_thin)]
        yield Case(
            "glu forward",
            f"N={N} k={k} r={r}",
            run_forward,
            lambda inputs=inputs: reference_forward(*inputs, "silu"),
            2 * N * (3 * r + 3 * k),
            6 * N * I * r,
        )
        yield Case(
            "glu backward",
            f"N={N} k={k} r={r}",
            run_backward,
            lambda inputs=inputs, gradients=(d_h, d_down_thin): reference_backward(*inputs, *gradients, "silu"),
            2 * N * (2 * (3 * r + 3 * k) + 2 * r + 2 * k),
            22 * N * I * r,
            expected=lambda wide=wide: reference_backward(wide[0], wide[1:3], *wide[3:], "silu"),
        )


def milliseconds(function: Callable) -> float:
    return do_bench(function, warmup=30, rep=100, return_mode="median")


def ceilings() -> tuple[float, float]:
    """Bytes and bf16 FLOPs in a millisecond that this GPU really reaches, by a copy and a matrix product."""
    source, factor = draw(2**29), draw(8192, 8192)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    return copied, 2 * 8192**3 / milliseconds(lambda: factor @ factor)


def check(case: Case) -> None:
    expected = (case.expected or case.reference)()
    pairs = zip(_tensors(case.ours()), _tensors(expected), strict=True)
    for number, (ours, reference) in enumerate(pairs):
        error = ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
        if not error < case.tolerance:
            raise SystemExit(f"{case.kernel} {case.shape}: output {number} has a relative error of {error:.3g}")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only kernels whose name contains this")
    word = parser.parse_args().word
    torch.manual_seed(0)
    bytes_per_ms, flops_per_ms = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {bytes_per_ms / 1e9:.2f} TB/s, "
        f"{flops_per_ms / 1e9:.0f} TFLOP/s\n"
        f"{'kernel':20} {'shape':22} {'ms':>8} {'PyTorch':>8} {'floor':>8} {'x PyTorch':>9} {'of floor':>8}"
    )
    for function in BENCHMARKS:
        for case in function():
            if word not in case.kernel:
                continue
            check(case)
            ours, reference = milliseconds(case.ours), milliseconds(case.reference)
            floor = max(case.bytes / bytes_per_ms, case.flops / flops_per_ms)
            print(
                f"{case.kernel:20} {case.shape:22} {ours:8.4f} {reference:8.4f} {floor:8.4f} "
                f"{reference / ours:8.2f}x {floor / ours:8.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
