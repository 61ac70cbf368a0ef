"""Compares each kernel of kernels/ with its PyTorch reference and its floor.

    python -m benchmarks.kernel_suite --out FOLDER [--seconds 120] [--only WORD]
    TRITON_INTERPRET=1 python -m benchmarks.kernel_suite --tiny      (a rehearsal without a GPU; its times mean nothing)

Sizes are those of one Llama-3-8B layer at the wizardlm shape (8192 rows, 6144 of them context). Inputs are fresh random
ones (`--seed` draws them again), outputs hold NaN before each run, and nothing more is timed once a kernel differs from
its reference (`checks.check`). The floor is the larger of bytes over memory bandwidth and FLOPs over the tensor
cores' speed, both measured first. A launch alone costs some microseconds, printed too; small kernels can't beat it.

FOLDER gets kernels.txt, what is printed, and kernels.csv, a row a case.
"""

from __future__ import annotations

import argparse
import datetime
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from benchmarks.kernel_suite.cases import cases
from benchmarks.kernel_suite.checks import WrongOutput, check
from benchmarks.kernel_suite.inputs import LLAMA_3_8B, TINY, Draw
from sparse_unsloth.reporting.tables import append_csv
from sparse_unsloth.utils.environment import commit_of
from sparse_unsloth.utils.options import real

COLUMNS = (
    "date", "commit", "device", "torch", "triton", "dtype", "seed", "kernel", "shape", "ms", "pytorch_ms", "floor_ms",
    "bytes", "flops", "error", "pytorch_error",
)  # fmt: skip


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Returns the median on a GPU, with empty caches before each run; under the interpreter one run's time."""
    if device == "cuda":
        return do_bench(function, warmup=10, rep=50, return_mode="median")
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def ceilings(draw: Draw, elements: int, side: int) -> tuple[float, float, float]:
    """Measures bytes and FLOPs per millisecond, by a copy and a matrix product, and the milliseconds of a launch."""
    source, factor = draw(elements), draw(side, side)
    target, small = torch.empty_like(source), draw(1)
    copied = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), draw.device)
    computed = 2 * side**3 / milliseconds(lambda: factor @ factor, draw.device)
    return copied, computed, milliseconds(small.zero_, draw.device)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder for kernels.txt and kernels.csv")
    parser.add_argument("--only", default="", metavar="WORD", help="kernels whose name contains this")
    parser.add_argument(
        "--seconds", type=real(least=0), default=300, help="no case is begun after so many (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the inputs; drawn if not given")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a rehearsal")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not (args.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("there is no CUDA GPU here; to rehearse on the CPU give --tiny, with TRITON_INTERPRET=1 set")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; returns 0 if every case was checked and timed, 1 if one is wrong or the time was up."""
    args = parse(argv)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter multiplies no bf16
    draw = Draw(device, dtype, args.seed)
    sizes, measured = (TINY, (2**20, 128)) if args.tiny else (LLAMA_3_8B, (2**29, 8192))
    bytes_per_ms, flops_per_ms, launch = ceilings(draw, *measured)
    common = describe(args, device, dtype)
    lines, rows = [], []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(
        f"{common['device']}, torch {common['torch']}, triton {common['triton']}, commit {common['commit']}, "
        f"seed {args.seed}: {bytes_per_ms / 1e9:.2f} TB/s, {flops_per_ms / 1e9:.0f} TFLOP/s, a launch {launch:.4f} ms"
    )
    if device == "cpu":
        say("rehearsal under Triton's interpreter: the times mean nothing")
    say(
        f"{'kernel':28} {'shape':34} {'ms':>8} {'PyTorch':>8} {'floor':>8} {'x PyTorch':>9} {'of floor':>8} "
        f"{'error':>8} {'PyTorch':>8}"
    )
    left_out, wrong = [], False
    try:
        for case in cases(sizes, draw, args.only):
            if time.perf_counter() - began > args.seconds:
                left_out.append(f"{case.kernel} {case.shape}")
                continue
            error, pytorch_error = check(case)
            ours = milliseconds(lambda case=case: case.ours(*case.inputs), device)
            pytorch = milliseconds(lambda case=case: case.reference(*case.inputs), device)
            floor = max(case.bytes / bytes_per_ms, case.flops / flops_per_ms)
            say(
                f"{case.kernel:28} {case.shape:34} {ours:8.4f} {pytorch:8.4f} {floor:8.4f} {pytorch / ours:8.2f}x "
                f"{floor / ours:8.0%} {error:8.1e} {pytorch_error:8.1e}"
            )
            values = (case.kernel, case.shape, ours, pytorch, floor, case.bytes, case.flops, error, pytorch_error)
            rows.append(common | dict(zip(COLUMNS[7:], values, strict=True)))
    except WrongOutput as found:
        wrong = True
        say(f"STOPPED: {found}")
    if left_out:
        say(f"{len(left_out)} cases were not run, the time was up: {'; '.join(left_out)}")
    if args.out is not None:
        write(args.out, lines, rows)
    return int(wrong or bool(left_out) or not rows)


def describe(args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, str]:
    """Returns the columns that all rows of a run share."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(Path(__file__).parent),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": str(args.seed),
    }


def write(folder: Path, lines: list[str], rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "kernels.csv").unlink(missing_ok=True)
    append_csv(folder / "kernels.csv", rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
