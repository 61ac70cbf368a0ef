"""Each kernel, and the sparse MLP made of them, against plain PyTorch and against its floor, on the GPU.

    python benchmarks/kernels.py

Sizes are those of one Llama-3-8B layer at the wizardlm shape (8192 rows, 6144 of them context). The floor is the larger
of bytes over 3.0 TB/s and tensor-core FLOPs over 790 TFLOP/s (measured ceilings of an H100).
"""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from sparse_unsloth.functions.mlp import GatedMlp, masked_mlp, sparse_mlp
from sparse_unsloth.kernels import dequantize, gated, glu
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import BaseWeight, Lora, Projection

BYTES_PER_MS, FLOPS_PER_MS = 3.0e9, 790e9
H, I = 4096, 14336


def time(function) -> float:
    return do_bench(function, warmup=30, rep=100, return_mode="median")


def show(name: str, ms: float, floor: float | None = None, other: float | None = None, what: str = "") -> None:
    parts = [f"{name:46} {ms:8.4f} ms"]
    if floor is not None:
        parts.append(f"floor {floor:.4f}")
    if other is not None:
        parts.append(f"{what} {other:.4f} ({other / ms:.2f}x)")
    print("   ".join(parts), flush=True)


def draw(*shape: int, scale: float = 1.0, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).mul_(scale).to(dtype)


def check(name: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 0.02) -> None:
    error = ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
    if not error < tolerance:
        raise SystemExit(f"{name}: relative error {error:.3g}")


def bench_glu(N: int, k: int, r: int) -> None:
    stacked, gradient = draw(N, 2 * r + 2 * k, scale=0.5), draw(N, k + r, scale=0.5)
    loras = [draw(I, r, scale=0.1) for _ in range(3)]
    arguments = (*loras, k, (1.0, 1.0, 1.0), "silu")
    check("glu forward", glu.glu_forward(stacked, *arguments), glu.reference_forward(stacked, *arguments))
    for name, ours, reference in zip(
        ("stacked", "loras"),
        glu.glu_backward(stacked, gradient, *arguments),
        glu.reference_backward(stacked.float(), gradient.float(), *(t.float() for t in loras), *arguments[3:]),
        strict=True,
    ):
        check(f"glu backward {name}", ours, reference)
    forward = max(2 * N * (3 * r + 3 * k) / BYTES_PER_MS, 6 * N * I * r / FLOPS_PER_MS)
    backward = max(2 * N * (5 * r + 5 * k) * 2 / BYTES_PER_MS, 22 * N * I * r / FLOPS_PER_MS)
    plain = time(lambda: glu.reference_forward(stacked, *arguments))
    plain_backward = time(lambda: glu.reference_backward(stacked, gradient, *arguments))
    label = f"N={N} k={k} r={r}"
    show(f"glu forward  {label}", time(lambda: glu.glu_forward(stacked, *arguments)), forward, plain, "PyTorch")
    show(
        f"glu backward {label}",
        time(lambda: glu.glu_backward(stacked, gradient, *arguments)),
        backward,
        plain_backward,
        "PyTorch (with a forward)",
    )


def bench_gated(N: int) -> None:
    e, g, dh = (draw(N, I) for _ in range(3))
    check("gated", gated.gated_forward(e, g, "silu"), gated.reference_gated_forward(e.float(), g.float(), "silu"))
    show(
        f"gated forward N={N}",
        time(lambda: gated.gated_forward(e, g, "silu")),
        6 * N * I / BYTES_PER_MS,
        time(lambda: gated.reference_gated_forward(e, g, "silu")),
        "PyTorch",
    )
    show(
        f"gated backward N={N}",
        time(lambda: gated.gated_backward(dh, e, g, "silu")),
        12 * N * I / BYTES_PER_MS,
        time(lambda: gated.reference_gated_backward(dh, e, g, "silu")),
        "PyTorch",
    )


def bench_dequantize(k: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = draw(I, H, scale=0.02)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    whole = dequantize_4bit(packed, state)
    show(f"dequantise the whole [{I}, {H}]", time(lambda: dequantize_4bit(packed, state)), 2.5 * I * H / BYTES_PER_MS)
    for name, size, function, axis in (
        ("rows", I, dequantize.dequantize_rows, 0),
        ("columns", H, dequantize.dequantize_columns, 1),
    ):
        index = torch.randperm(size, device="cuda")[:k].sort().values
        check(name, function(packed, state, index, torch.bfloat16), whole.index_select(axis, index), 1e-6)
        other = H if axis == 0 else I
        show(
            f"dequantise {k} {name}",
            time(lambda f=function, i=index: f(packed, state, i, torch.bfloat16)),
            2.5 * k * other / BYTES_PER_MS,
            time(lambda a=axis, i=index: whole.index_select(a, i)),
            "gather of the dequantised",
        )


def bench_mlp(N: int, dense_rows: int, k: int, r: int, four_bit: bool) -> None:
    def projection(out: int, inner: int) -> Projection:
        weight = draw(out, inner, scale=inner**-0.5)
        base = BaseWeight(weight)
        if four_bit:
            from bitsandbytes.functional import quantize_4bit

            base = BaseWeight(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        A, B = (draw(r, inner, scale=0.02, dtype=torch.float32), draw(out, r, scale=0.02, dtype=torch.float32))
        return Projection(base, Lora(A.requires_grad_(), B.requires_grad_(), 1.0))

    mlp = GatedMlp(projection(I, H), projection(I, H), projection(H, I), "silu")
    x = draw(1, N, H).requires_grad_()
    rows = torch.randperm(N, device="cuda")
    context, dense = rows[dense_rows:].sort().values, rows[:dense_rows].sort().values
    partition = TokenPartition((1, N), dense, context, rows[:0], dense)
    everything = TokenPartition((1, N), rows.sort().values, rows[:0], rows[:0], rows)
    channels = torch.randperm(I, device="cuda")[:k].sort().values
    inputs = [x, *(t for p in (mlp.gate, mlp.up, mlp.down) for t in (p.lora.A, p.lora.B))]
    dy = draw(1, N, H)

    def run(function, partition):
        with torch.autocast("cuda", torch.bfloat16):
            y = function(x, partition, channels, mlp)
        return y, *torch.autograd.grad(y, inputs, dy)

    for ours, masked in zip(run(sparse_mlp, partition), run(masked_mlp, partition), strict=True):
        check("sparse mlp", ours, masked, 0.03)
    torch.cuda.empty_cache()
    with torch.no_grad():
        forward = time(lambda: sparse_mlp(x, partition, channels, mlp))
        dense_forward = time(lambda: sparse_mlp(x, everything, channels, mlp))
    both = time(lambda: run(sparse_mlp, partition))
    dense_both = time(lambda: run(sparse_mlp, everything))
    label = f"{'4bit' if four_bit else 'bf16'} dense={dense_rows} k={k} r={r}"
    show(f"mlp forward            {label}", forward, None, dense_forward, "all dense")
    show(f"mlp forward + backward {label}", both, None, dense_both, "all dense")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    for k in (144, 3584, 7168):
        bench_glu(6144, k, 16)
    bench_glu(6144, 144, 64)
    bench_gated(2048)
    bench_dequantize(143)
    for four_bit in (False, True):
        for k in (143, 3584, 7168):
            bench_mlp(8192, 2048, k, 16, four_bit)
    bench_mlp(8192, 48, 143, 16, True)


if __name__ == "__main__":
    main()
