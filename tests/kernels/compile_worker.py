"""Compiles every kernel for a GPU, which need not be present, with the arguments of its launcher.

    python tests/kernels/compile_worker.py

CI has no GPU, and Triton's interpreter accepts what its compiler refuses, such as types that change in a loop. Run it
without ``TRITON_INTERPRET``. It prints a line per kernel; an exception is a failure.

A kernel's first form is compiled to the end. Its others end where Triton does and LLVM begins, which takes nearly all
of the time and sees less of what makes them different; a GPU compiles those.
"""

from __future__ import annotations

import torch
import triton
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_unsloth.kernels import columns, dequantize, fp8, gated, gated_lora, glu, lora, norms, rotary, scores, select
from sparse_unsloth.ops.norms import Norm

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8", torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
compiled: set[str] = set()
whole: set[str] = set()
"""Names of the kernels of which a form was compiled to the end."""


class LoweredError(Exception):
    """A form has passed all of Triton's own stages."""


def end_before_llvm(backend=None, stages=None, *_) -> tuple[str, str] | None:
    """Triton's hook to change the stages; it asks without arguments for what the change adds to a cache's key."""
    if stages is None:
        return "ends before LLVM", ""

    def end(*_):
        raise LoweredError

    stages["llir"] = end
    return None


def compile_instead(kernel, grid, arguments, constants, num_warps=4, num_stages=3) -> None:
    """Replaces `sparse_unsloth.kernels.launch.launch`: compiles once per specialisation of the arguments."""
    signature, fixed = {}, {}
    for name, value in zip(kernel.arg_names, (*arguments, *constants.values()), strict=True):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif name in constants or value is None:
            signature[name], fixed[(kernel.arg_names.index(name),)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = f"{kernel.__name__} {signature} {fixed}"
    if key not in compiled:
        compiled.add(key)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        source = ASTSource(kernel, signature, fixed)
        triton.knobs.runtime.add_stages_inspection_hook = end_before_llvm if kernel.__name__ in whole else None
        try:
            binary = triton.compile(source, target=TARGET, options=options)
        except LoweredError:
            return
        whole.add(kernel.__name__)
        print(f"{kernel.__name__}: {binary.metadata.shared} bytes of shared memory", flush=True)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def compile_glu(kind: str, r: int = 16) -> None:
    M, k, I = 40, 32, 96
    stacked, loras = draw(M, 2 * r + 2 * k), draw(3, I, r)
    unit, xA = draw(M, k + r), stacked[:, : 2 * r]
    base = stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :]
    glu.glu_forward(xA, base, loras, unit[:, r:], unit[:, :r], kind)
    full, gradient = draw(M, 2 * r + 2 * I), draw(M, r + I)
    pair = full[:, 2 * r :].split(I, dim=1)
    gated_lora.gated_lora_forward(full[:, : 2 * r], pair, loras, draw(M, I + r)[:, r:], kind)
    gated_lora.gated_lora_backward(full[:, : 2 * r], pair, loras, gradient[:, r:], gradient[:, :r], pair, kind)
    for down_xA in (None, draw(M, r)) if kind == "silu" else (draw(M, r),):  # the kind decides nothing else
        glu.glu_backward(xA, base, loras, unit[:, r:], unit[:, :r], base, xA, kind, down_xA)


def compile_columns() -> None:
    for widths, counts, bias in (([70, 20, 20], [9, 4, 20], True), ([130], [33], False)):
        lead, total = 16 * len(widths), sum(widths)
        index, place = torch.zeros(sum(counts), dtype=torch.int64), torch.arange(40)
        sources = [draw(40, width) for width in widths]
        columns.split_columns(draw(40, lead), sources, torch.arange(40), 10, index, counts)
        columns.join_columns(
            draw(total, 16), draw(10, lead + total), draw(30, lead + sum(counts)), place, index, widths, counts,
            draw(total) if bias else None,
        )  # fmt: skip


def compile_norms() -> None:
    natural, sorted_rows = norms.Order(None, 0, 40), norms.Order(torch.arange(40), 10, 40)
    plain, offset, weightless = Norm(draw(64), 1e-5), Norm(draw(64), 1e-5, 1.0), Norm(None, 1e-5)
    for order in (natural, sorted_rows):
        norms.add_norm(draw(40, 64), None, None, plain, order)
        norms.add_rows(draw(40, 64), draw(40, 64), order)
        norms.added_backward(draw(40, 64), order, draw(40, 64), offset, 0.5)
        forms = ((plain, None, 1.0), (offset, offset, 1.0), (weightless, weightless, 0.5), (None, plain, 1.0))
        for norm, added_norm, multiplier in forms:
            norms.add_norm(draw(40, 64), draw(40, 64), order, norm, order, added_norm, multiplier)
            norms.norm_backward(
                draw(40, 64), order, draw(40, 64), None if norm is None else torch.rand(40), norm, draw(40, 64), order,
                added=draw(40, 64), added_norm=added_norm, multiplier=multiplier,
            )  # fmt: skip


def compile_rotary() -> None:
    bare, both, one = (None, None), ((draw(96), 1e-6, 0.0), (draw(96), 1e-6, 1.0)), ((None, 1e-6, 0.0), None)
    forms = ("halves", bare), ("halves", both), ("pairs", bare), ("interleaved", one), ("none", both)
    for rotation, pair in forms:
        angles = (None, None) if rotation == "none" else (torch.randn(20, 64), torch.randn(20, 64))
        query, key = draw(40, 6 * 96), draw(40, 2 * 96)
        rotary.rotary_forward(query, key, *angles, rotation, 96, *pair)
        kept = (None, None) if pair == (None, None) else (query, key)
        rotary.rotary_backward(query, key, *kept, *angles, rotation, 96, *pair)


def compile_dequantize() -> None:
    for kind, nested in (("nf4", True), ("fp4", False)):
        packed, state = quantize_4bit(torch.randn(64, 128), quant_type=kind, compress_statistics=nested)
        for output in (draw(64, 128), draw(64, 130)[:, 2:]):
            dequantize._launch_whole(packed, state, output)
        for in_columns in (False, True):
            output = draw(64, 16) if in_columns else draw(16, 128)
            dequantize._launch_select(packed, state, torch.arange(9), output, in_columns)


def compile_fp8() -> None:
    for width in (48, 4096, 28672, 40000):  # in registers, and in blocks
        x = draw(3, width + 8)[:, 8:]
        fp8._launch_rows(x, x.new_empty(x.shape, dtype=fp8.FP8), torch.empty(3, 1))
    for form in (None, ("nf4", True, 64), ("fp4", False, 128)):
        source, state = torch.randn(64, 128), None
        if form is not None:
            source, state = quantize_4bit(source, quant_type=form[0], compress_statistics=form[1], blocksize=form[2])
        for transposed in (False, True):
            out = torch.empty((128, 96) if transposed else (64, 128), dtype=fp8.FP8)
            reciprocals = torch.empty(128 if transposed else 64)
            fp8._launch_weight(source, state, reciprocals, out[:, 32:] if transposed else out, transposed)


def compile_lora() -> None:
    H, I, r = 64, 96, 16
    loras = [torch.randn(*shape) for shape in ((r, H), (I, r), (r, H), (I, r), (r, I), (H, r))]
    lora.pack_mlp(loras, (1.0, 2.0, 0.5), torch.arange(I), draw(2 * r, H), draw(H, r + 8)[:, 8:])
    for both in (True, False):
        lora.mlp_gradients(
            torch.randn(2, 3, I, r), torch.randn(2, 3, I, r) if both else None, torch.arange(I),
            (loras[1], loras[3], loras[4]), 0.5,
        )  # fmt: skip
    for parts in (1, 3):
        lora.pack_linear([loras[0]] * parts, [loras[1]] * parts, [1.0] * parts, torch.bfloat16)


def compile_selection() -> None:
    for gain in (None, torch.rand(96)):
        low_rank = scores.low_rank_activations(draw(40, 64), torch.arange(30), 2, draw(16, 64))
        scores.mlp_scores(low_rank, draw(16, 96), "silu", gain=gain)
        energies = scores.low_rank_activations(draw(40, 64), None, 1, draw(24, 64))
        scores.attention_energies(energies, draw(8, 128), 64, 32, None if gain is None else torch.rand(128))
    for size in (300, 40000):  # in registers, and in chunks
        select.top_order(torch.rand(size), 10)
    select.attention_channels(torch.rand(64), torch.rand(32), torch.rand(32), 4, 4, 2, 16)


def main() -> None:
    for module in (columns, dequantize, fp8, gated, gated_lora, glu, lora, norms, rotary, scores, select):
        module.launch = compile_instead
    for kind in glu.KINDS:
        compile_glu(kind)
        gated.gated_forward(draw(8, 64), draw(8, 64), kind)
        gated.gated_backward(draw(8, 64), draw(8, 64), draw(8, 64), kind)
    compile_columns()
    compile_norms()
    compile_rotary()
    compile_dequantize()
    compile_fp8()
    compile_lora()
    compile_selection()


if __name__ == "__main__":
    main()
