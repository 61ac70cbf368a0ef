"""Times a layer's products with frozen weights in bf16 and in FP8, forward and input gradient.

    python -m benchmarks.fp8_products [--rows 1664 8192]       (under a minute on an H200)
    TRITON_INTERPRET=1 python -m benchmarks.fp8_products --tiny      (a rehearsal without a GPU; its times mean nothing)

Sizes are Llama-3-8B's, LoRA of rank 16, weights in NF4 (double quantisation) and bf16. Columns, in milliseconds:

- bf16: the stacked product, LoRA's rows included, of weights that are dequantised already; all: dequantised each time.
- bare: `torch._scaled_mm` alone; rows: with the quantisation of its rows; all: with the conversion of the weight and
  LoRA's product too, as a layer computes it.
- error: of the FP8 product from that in bf16, of its norm.

The quantisation kernels' times beside their bytes are printed by `python -m benchmarks.kernel_suite --only quantize`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from benchmarks.kernel_suite.__main__ import milliseconds
from sparse_unsloth.kernels.fp8 import quantize_rows
from sparse_unsloth.ops.fp8 import Fp8Stack, check_device, scaled_product
from sparse_unsloth.ops.projection import BaseWeight
from sparse_unsloth.ops.weight_stack import WeightStack, stack_columns, stack_rows
from sparse_unsloth.utils.environment import commit_of
from sparse_unsloth.utils.options import whole

RANK = 16
LLAMA_3_8B, TINY = (4096, 4096, 1024, 14336), (128, 128, 64, 192)
"""Hidden size, widths of queries and of keys, intermediate size."""
MOST = 0.06
"""The error of a product of Gaussian values is 0.04."""

Stack = WeightStack | Fp8Stack


def draw(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def groups(sizes: tuple[int, int, int, int]) -> dict[str, tuple[list[tuple[int, int]], bool]]:
    """The shapes of the weights that are multiplied together, and whether they are stacked by columns."""
    H, Q, K, I = sizes
    return {
        "q, k, v": ([(Q, H), (K, H), (K, H)], False),
        "o": ([(H, Q)], True),
        "gate, up": ([(I, H), (I, H)], False),
        "down": ([(H, I)], True),
    }


def make_stack(bases: Sequence[BaseWeight], by_columns: bool, dtype: torch.dtype, fp8: bool) -> Stack:
    rows = RANK * len(bases)
    if by_columns:
        return stack_columns(bases[0], rows, dtype, fp8=fp8)
    return stack_rows(bases, rows, dtype, fp8=fp8)


def times(bases: list[BaseWeight], by_columns: bool, n: int, gradient: bool, dtype: torch.dtype) -> list[float]:
    """The columns of the table for one product of ``n`` rows."""
    device = bases[0].device.type
    stacks = [make_stack(bases, by_columns, dtype, fp8) for fp8 in (False, True)]
    lora = draw(*stacks[0].lora_rows.shape, device=device, dtype=dtype) * 0.02
    count, size = len(lora), stacks[0].size
    # A stack of columns is the transposed weight: forward multiplies by it the other way round.
    transposed = by_columns != gradient
    x = draw(n, size if transposed else lora.shape[1], device=device, dtype=dtype)
    out = torch.empty((n, lora.shape[1]), device=device, dtype=dtype)

    def run(stack: Stack) -> Tensor:
        stack.lora_rows.copy_(lora)
        if not transposed:
            return stack.matmul(x)
        stack.matmul_transposed(x, out=out)
        return out

    expected, found = (run(stack).float().clone() for stack in stacks)
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < MOST:
        raise SystemExit(f"the FP8 product differs by {error:.3f} of its norm")
    operand, scales = stacks[1]._operand(gradient)
    read = x[:, count:] if transposed else x
    target = torch.empty((n, len(operand)), device=device, dtype=dtype)
    q, row_scales = quantize_rows(read)

    def bare() -> None:
        torch._scaled_mm(
            q, operand.t(), row_scales, scales[None], out_dtype=dtype, use_fast_accum=device == "cuda", out=target
        )

    measured: list[Callable[[], object]] = [
        lambda: run(stacks[0]),
        lambda: run(make_stack(bases, by_columns, dtype, False)),
        bare,
        lambda: scaled_product(read, operand, scales, target),
        lambda: run(make_stack(bases, by_columns, dtype, True)),
    ]
    return [*(milliseconds(function, device) for function in measured), error]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole(), nargs="+", default=[1664, 8192])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --tiny rehearses without one")
    device = "cpu" if args.tiny else "cuda"
    check_device(torch.device(device))
    torch.manual_seed(0)
    name = "cpu: the times mean nothing" if args.tiny else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, commit {commit_of(Path(__file__).parent)}")
    sizes, dtype = (TINY if args.tiny else LLAMA_3_8B), torch.bfloat16
    heading = ("bf16", "all", "bare", "rows", "all", "x", "error")
    print(f"{'base':5} {'rows':>5} {'product':18}" + "".join(f"{word:>8}" for word in heading))
    for base in ("nf4", "bf16"):
        for n in [24] if args.tiny else args.rows:
            totals = [0.0] * 5
            for group, (shapes, by_columns) in groups(sizes).items():
                weights = [0.02 * draw(*shape, device=device, dtype=dtype) for shape in shapes]
                if base == "nf4":
                    bases = [BaseWeight(*quantize_4bit(w, quant_type="nf4", compress_statistics=True)) for w in weights]
                else:
                    bases = [BaseWeight(w) for w in weights]
                for gradient in (False, True):
                    *found, error = times(bases, by_columns, n, gradient, dtype)
                    totals = [total + one for total, one in zip(totals, found, strict=True)]
                    what = f"{group}{', gradient' if gradient else ''}"
                    print(f"{base:5} {n:5} {what:18}" + _figures(found) + f"{error:8.3f}", flush=True)
            print(f"{base:5} {n:5} {'sum':18}" + _figures(totals), flush=True)
    return 0


def _figures(found: list[float]) -> str:
    return "".join(f"{one:8.3f}" for one in found) + f"{found[1] / found[4]:8.2f}"


if __name__ == "__main__":
    sys.exit(main())
