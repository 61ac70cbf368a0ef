"""Defines cases of every launcher of kernels/ with inputs of given sizes.

`python -m benchmarks.kernel_suite` times these cases, `tests/gpu/sanitize.py` runs them at odd sizes under a memory
checker. To add a kernel, write a function that yields a `Case` for each of its shapes, and decorate it with `kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from benchmarks.kernel_suite.checks import Case
from benchmarks.kernel_suite.inputs import Draw, Sizes
from sparse_unsloth.kernels import columns, dequantize, fp8, gated, gated_lora, glu, lora, norms, rotary, scores, select
from sparse_unsloth.kernels.norms import Order
from sparse_unsloth.ops.head_rotary import HeadForm, reference_heads
from sparse_unsloth.ops.norms import Norm

WRITTEN = fp8.FP8 if torch.cuda.is_available() else torch.float32
"""By quantisation: without a GPU what it rounds, as Triton's interpreter rounds to FP8 wrongly."""
KERNELS: list[Callable[[Sizes, Draw], Iterator[Case]]] = []


def kernel(function: Callable[[Sizes, Draw], Iterator[Case]]) -> Callable[[Sizes, Draw], Iterator[Case]]:
    KERNELS.append(function)
    return function


def cases(sizes: Sizes, draw: Draw, word: str = "") -> Iterator[Case]:
    """Yields the cases whose kernel's name contains ``word``; inputs are drawn when a case is requested."""
    for function in KERNELS:
        yield from (case for case in function(sizes, draw) if word in case.kernel)


@kernel
def dequantise(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    I, H, e = sizes.intermediate, sizes.hidden, draw.dtype.itemsize
    for kind, nested in (("nf4", True), ("fp4", False)):
        weight = draw(I, H, scale=0.02, dtype=torch.float32)
        packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        everything = torch.arange(I, device=weight.device)
        like = draw(1)
        whole = {
            "reference": lambda packed, state, like: dequantize_4bit(packed, state).to(like.dtype),
            "exact": lambda packed, state, like, every=everything: dequantize.reference_rows(
                packed, state, every.to(packed.device), like.dtype
            ),
            "bytes": (0.5 + 1 / state.blocksize + e) * I * H,
        }
        layouts = {"": slice(None), " strided": slice(8, -8)}  # the latter into columns of a wider matrix
        for name, part in layouts.items() if H % state.blocksize == 0 and nested else (("", slice(None)),):
            wide = H if name == "" else H + 16
            yield Case(
                f"dequantize_whole {kind}{name}", f"{I}x{H}", (packed, state, like),
                lambda packed, state, like, wide=wide, part=part: _written(
                    like.new_empty(I, wide)[:, part], lambda out: dequantize._launch_whole(packed, state, out)
                ), **whole,
            )  # fmt: skip
        for k in sizes.kept:
            for axis, name in enumerate(("rows", "columns")):
                index = draw.index(weight.shape[axis], min(k, weight.shape[axis]))
                shape = [len(index), H] if axis == 0 else [I, len(index)]
                exact = getattr(dequantize, f"reference_{name}")
                yield Case(
                    f"dequantize_{name} {kind}", f"{len(index)} of {I}x{H}", (packed, state, index, like),
                    lambda packed, state, index, like, shape=shape, axis=axis: _written(
                        like.new_empty(shape),
                        lambda out: dequantize._launch_select(packed, state, index, out, columns=axis == 1),
                    ),
                    lambda packed, state, index, like, axis=axis: (
                        dequantize_4bit(packed, state).index_select(axis, index).to(like.dtype)
                    ), (0.5 + e) * shape[0] * shape[1],
                    exact=lambda packed, state, index, like, exact=exact: exact(packed, state, index, like.dtype),
                )  # fmt: skip


def _written(out: Tensor, write: Callable[[Tensor], None]) -> Tensor:
    """The launches themselves: on a CPU their callers take the reference."""
    write(out)
    return out


@kernel
def quantise(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Rows of activations and of the gradients of gate and up; a weight as products forward and backward take it."""
    N, I, H, e = sizes.rows, sizes.intermediate, sizes.hidden, draw.dtype.itemsize
    for width in (H, I, 2 * I):
        inputs = (draw(N, width + 16)[:, 16:],)
        yield Case("quantize_rows", f"{N}x{width}", inputs, _fp8_rows, _fp8_rows_reference, (e + 1) * N * width)
    weight = draw(I, H, scale=0.02)
    sources = {"16 bits": (weight, None, e)}
    if H % 64 == 0:
        packed = quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=False)
        sources["nf4"] = (*packed, 0.5 + 4 / 64)
    for name, (source, state, size) in sources.items():
        for transposed in (False, True):
            scales = fp8.scales_of(fp8.exact_weight(source, state).abs().amax(0 if transposed else 1))
            inputs = (source, state, scales.reciprocal())
            yield Case(
                f"quantize_weight {name}{' transposed' if transposed else ''}", f"{I}x{H}", inputs,
                lambda source, state, reciprocals, transposed=transposed: _written(
                    reciprocals.new_empty((H, I) if transposed else (I, H), dtype=WRITTEN),
                    lambda out: fp8._launch_weight(source, state, reciprocals, out, transposed),
                ),
                lambda source, state, reciprocals, transposed=transposed: _fp8_weight_reference(
                    source, state, reciprocals, transposed
                ), (size + 1) * I * H,
            )  # fmt: skip


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scales = x.new_empty(x.shape, dtype=WRITTEN), x.new_empty((len(x), 1), dtype=torch.float32)
    fp8._launch_rows(x, q, scales)
    return q, scales


def _fp8_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scales = fp8.reference_quantize_rows(x)
    return q if WRITTEN == fp8.FP8 else x.float() * scales.reciprocal(), scales


def _fp8_weight_reference(source: Tensor, state: QuantState | None, reciprocals: Tensor, transposed: bool) -> Tensor:
    weight, reciprocals = fp8.exact_weight(source, state), reciprocals.float()
    if WRITTEN == fp8.FP8:
        return fp8.reference_quantize_weight(weight, reciprocals, transposed)
    return (weight.t() if transposed else weight) * reciprocals[:, None]


@kernel
def gated_unit(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    N, I, e = sizes.dense, sizes.intermediate, draw.dtype.itemsize
    for kind in glu.KINDS if N < 100 else ("silu",):
        inputs = tuple(draw(N, I) for _ in range(3))
        yield Case(
            f"gated_forward {kind}", f"{N}x{I}", inputs[1:],
            lambda e, g, kind=kind: gated.gated_forward(e, g, kind),
            lambda e, g, kind=kind: gated.reference_gated_forward(e, g, kind), 3 * e * N * I,
        )  # fmt: skip
        yield Case(
            f"gated_backward {kind}", f"{N}x{I}", inputs,
            lambda dh, e, g, kind=kind: gated.gated_backward(dh, e, g, kind),
            lambda dh, e, g, kind=kind: gated.reference_gated_backward(dh, e, g, kind), 6 * e * N * I,
        )  # fmt: skip


@kernel
def gated_lora_unit(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """All channels with LoRA. The matmuls that go with it are not timed."""
    N, I, e, r = sizes.dense, sizes.intermediate, draw.dtype.itemsize, sizes.ranks[0]
    stacked, loras = draw(N, 2 * r + 2 * I, scale=0.5), draw(3, I, r, scale=0.1)
    xA, base = stacked[:, : 2 * r], stacked[:, 2 * r :].split(I, dim=1)
    d_down_xA, d_h = draw(N, r + I, scale=0.5).split([r, I], dim=1)
    for kind in glu.KINDS if N < 100 else ("silu",):
        yield Case(
            f"gated_lora_forward {kind}", f"N={N} r={r}", (xA, base, loras),
            lambda *inputs, kind=kind: _gated_lora_forward(*inputs, kind),
            lambda *inputs, kind=kind: gated_lora.reference_forward(*inputs, kind), 3 * e * N * I, 4 * N * I * r,
        )  # fmt: skip
        yield Case(
            f"gated_lora_backward {kind}", f"N={N} r={r}", (xA, base, loras, d_h, d_down_xA),
            lambda *inputs, kind=kind: _gated_lora_backward(*inputs, kind),
            lambda *inputs, kind=kind: gated_lora.reference_backward(*inputs, kind), 8 * e * N * I, 6 * N * I * r,
        )  # fmt: skip


def _gated_lora_forward(xA, base, loras, kind) -> Tensor:
    h = base[0].new_empty(base[0].shape)
    gated_lora.gated_lora_forward(xA, base, loras, h, kind)
    return h


def _gated_lora_backward(xA, base, loras, d_h, d_down_xA, kind) -> tuple[Tensor, ...]:
    h, d_base = d_h.clone(), tuple(torch.empty_like(base[0]) for _ in base)  # h takes the place of d_h
    gated_lora.gated_lora_backward(xA, base, loras, h, d_down_xA, d_base, kind)
    return h, *d_base


@kernel
def glu_unit(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Context rows with k selected channels, and with all of them."""
    I, e, r = sizes.intermediate, draw.dtype.itemsize, sizes.ranks[0]
    shapes = [(sizes.context, k, r) for k in sizes.kept]
    shapes += [(sizes.context, sizes.kept[0], rank) for rank in sizes.ranks[1:]] + [(sizes.dense, I, r)]
    for number, (N, k, r) in enumerate(shapes):
        kind = list(glu.KINDS)[number % len(glu.KINDS)] if N < 100 else "silu"
        stacked = draw(N, 2 * r + 2 * k, scale=0.5)  # as the product in leaves it: slices of one matrix
        xA, base = stacked[:, : 2 * r], stacked[:, 2 * r :].split(k, dim=1)
        gradient, loras = draw(N, r + k, scale=0.5), draw(3, I, r, scale=0.1)
        d_down_xA, d_h = gradient[:, :r], gradient[:, r:]
        shape = f"N={N} k={k} r={r}"
        yield Case(
            "glu_forward", shape, (xA, base, loras),
            lambda *inputs, kind=kind: _glu_forward(*inputs, kind),
            lambda *inputs, kind=kind: glu.reference_forward(*inputs, kind),
            e * N * (3 * r + 3 * k), 6 * N * I * r,
        )  # fmt: skip
        yield Case(
            "glu_backward", shape, (xA, base, loras, d_h, d_down_xA),
            lambda *inputs, kind=kind: _glu_backward(*inputs, kind),
            lambda *inputs, kind=kind: _glu_reference_backward(*inputs, kind),
            e * N * (6 * r + 5 * k), 18 * N * I * r,
        )  # fmt: skip


def _glu_forward(xA, base, loras, kind) -> tuple[Tensor, Tensor]:
    k, r = base[0].shape[1], loras.shape[2]
    unit = xA.new_empty(len(xA), r + k)
    glu.glu_forward(xA, base, loras, unit[:, r:], unit[:, :r], kind)
    return unit[:, r:], unit[:, :r]


def _glu_backward(xA, base, loras, d_h, d_down_xA, kind) -> tuple[Tensor, ...]:
    """With ``h down_A'``, which a recompute leaves to it."""
    k, r = base[0].shape[1], loras.shape[2]
    d_stacked, down_xA = xA.new_empty(len(xA), 2 * r + 2 * k), xA.new_empty(len(xA), r)
    d_xA, d_base = d_stacked[:, : 2 * r], d_stacked[:, 2 * r :].split(k, dim=1)
    d_loras = glu.glu_backward(xA, base, loras, d_h, d_down_xA, d_base, d_xA, kind, down_xA)
    return *d_base, d_xA, d_loras.sum(0), down_xA


def _glu_reference_backward(xA, base, loras, d_h, d_down_xA, kind) -> tuple[Tensor, ...]:
    gradients = glu.reference_backward(xA, base, loras, d_h, d_down_xA, kind)
    return *gradients, glu.reference_forward(xA, base, loras, kind)[1]


@kernel
def projections(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Q, K, V with a bias (Qwen2's), O without; where all rows are context, and where none is."""
    e, keys = draw.dtype.itemsize, sizes.keys
    groups = sizes.groups
    kinds = [
        ("qkv", sizes.widths, (groups * keys, keys, keys), (sizes.dense, sizes.context, sizes.padding)),
        ("o", sizes.widths[:1], (groups * keys,), (sizes.dense, sizes.context, sizes.padding)),
        ("o, no dense rows", sizes.widths[:1], (groups * keys,), (0, sizes.context, sizes.padding)),
        ("qkv, a dense part", sizes.widths, (0, 0, 0), (sizes.dense, 0, 0)),
    ]
    for name, widths, counts, (dense, context, padding) in kinds:
        partition, r = draw.partition(dense, context, padding), sizes.ranks[-1 if name == "o" else 0]
        lead, width, kept, M = len(widths) * r, sum(widths), sum(counts), dense + context + padding
        index = torch.cat([draw.index(size, count) for size, count in zip(widths, counts, strict=True)])
        sources = [draw(M, size + 8)[:, 4:-4] for size in widths]  # rows that lie apart, as attention's gradients do
        shape = f"{dense}+{context} rows {kept} of {width}"
        compact = dense * (lead + width) + context * (lead + kept)
        yield Case(
            f"split_columns {name}", shape, (draw(M, lead), sources, partition.rows, index),
            lambda xA, sources, rows, index, n=dense, counts=counts: columns.split_columns(
                xA, sources, rows, n, index, counts
            ),
            lambda xA, sources, rows, index, n=dense, counts=counts: columns.reference_split(
                xA, sources, rows, n, index, counts
            ), 2 * e * compact,
        )  # fmt: skip
        matrix, bias = (draw(width, r), draw(width)) if len(widths) > 1 else (draw(r, width).t(), None)
        yield Case(
            f"join_columns {name}", shape,
            (matrix, draw(dense, lead + width), draw(context, lead + kept), partition.place, index, bias),
            lambda *inputs, widths=widths, counts=counts: columns.join_columns(*inputs[:5], widths, counts, inputs[5]),
            lambda *inputs, widths=widths, counts=counts: columns.reference_join(
                *inputs[:5], widths, counts, inputs[5]
            ), e * (compact + M * (width + lead)), 2 * M * width * r,
        )  # fmt: skip


@kernel
def lora_matrices(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Trained in fp32, as Unsloth and PEFT keep them."""
    H, I, e = sizes.hidden, sizes.intermediate, draw.dtype.itemsize
    for r in sizes.ranks:
        shapes = ((r, H), (I, r), (r, H), (I, r), (r, I), (H, r))
        loras = [draw(*shape, dtype=torch.float32) for shape in shapes]
        scales = (0.5, 2.0, 1.5)
        yield Case(
            "pack_mlp", f"H={H} I={I} r={r}", (loras, draw.order(I), draw(1)),
            lambda loras, order, like, scales=scales: _pack_mlp(loras, scales, order, like),
            lambda loras, order, like, scales=scales: lora.reference_pack_mlp(loras, scales, order, like.dtype),
            (4 + e) * 3 * r * (H + I),
        )  # fmt: skip
        for name, widths in (("qkv", sizes.widths), ("o", (H,))):
            As = [draw(r, H, dtype=torch.float32) for _ in widths]
            Bs = [draw(width, r, dtype=torch.float32) for width in widths]
            parts = len(widths)
            yield Case(
                f"pack_linear {name}", f"in={H} out={sum(widths)} r={r}", (As, Bs, draw(1)),
                lambda As, Bs, like, n=parts, scales=scales: lora.pack_linear(As, Bs, scales[:n], like.dtype),
                lambda As, Bs, like, n=parts, scales=scales: lora.reference_pack_linear(As, Bs, scales[:n], like.dtype),
                (4 + e) * r * (parts * H + sum(widths)),
            )  # fmt: skip
        context, dense = (draw(splits, 3, I, r, dtype=torch.float32) for splits in (3, 2))
        for both in (dense, None):
            yield Case(
                "mlp_gradients", f"I={I} r={r}{'' if both is None else ', dense rows too'}",
                (context, both, draw.order(I), (loras[1], loras[3], loras[4])),
                lambda *inputs: lora.mlp_gradients(*inputs, 0.5),
                lambda context, dense, order, loras: lora.reference_mlp_gradients(context, dense, order, 0.5),
                4 * 3 * I * r * (len(context) + (0 if both is None else len(dense)) + 1),
            )  # fmt: skip


def _pack_mlp(loras, scales, order, like) -> tuple[Tensor, Tensor, Tensor]:
    (r, H), k = loras[0].shape, 16
    product_in, product_out = like.new_empty(2 * r, H), like.new_empty(H, k + r)
    ordered = lora.pack_mlp(loras, scales, order, product_in, product_out[:, k:])
    return product_in, product_out[:, k:], ordered


@kernel
def norm_rows(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Rows by role and in their natural order, on either side."""
    H, M, e = sizes.hidden, sizes.rows, draw.dtype.itemsize
    partition = draw.partition(sizes.dense, sizes.context, sizes.padding)
    role = Order(partition.place, sizes.dense, sizes.dense + sizes.context)
    natural = Order(None, 0, M)
    norm, offset, full = Norm(draw(H), 1e-5), Norm(draw(H), 1e-6, 1.0), e * M * H
    for name, added, normed in (
        ("before attention", None, role), ("before a dense part", None, natural), ("after attention", role, role),
        ("after a dense part", natural, role), ("before a dense part, added", role, natural),
    ):  # fmt: skip
        values = None if added is None else draw(added.size, H)
        yield Case(
            "add_norm", f"{M}x{H} {name}", (draw(M, H), values, added, norm, normed),
            norms.add_norm, norms.reference_add_norm, full * (2 if added is None else 4),
        )  # fmt: skip
    yield Case(
        "add_norm", f"{M}x{H} after a normalised part", (draw(M, H), draw(role.size, H), role, norm, natural, offset),
        norms.add_norm, norms.reference_add_norm, full * 4,
    )  # fmt: skip
    for name, order in (("by role", role), ("in order", natural)):
        yield Case(
            "add_rows", f"{M}x{H} {name}", (draw(M, H), draw(order.size, H), order), norms.add_rows,
            lambda stream, values, order: stream + norms.to_natural(values, order, stream), 3 * full,
        )  # fmt: skip
    for name, order, again in (("", role, None), (" natural", natural, None), (" twice", role, role)):
        stream = draw(M, H)
        scale = (stream.float().square().mean(1) + norm.eps).rsqrt()
        yield Case(
            "norm_backward", f"{M}x{H}{name}", (draw(order.size, H), order, stream, scale, norm, draw(M, H), again),
            norms.norm_backward, norms.reference_norm_backward, full * (4 if again is None else 5),
        )  # fmt: skip
    values = draw(role.size, H)
    yield Case(
        "norm_backward", f"{M}x{H} of a normalised part",
        (draw(M, H), natural, stream, scale, norm, draw(M, H), role, values, offset),
        norms.norm_backward, norms.reference_norm_backward, full * 6,
    )  # fmt: skip


@kernel
def estimates(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Energies of the MLP's and of attention's channels, over a sample of the context rows."""
    H, I, rank, e = sizes.hidden, sizes.intermediate, sizes.factors, draw.dtype.itemsize
    N, (queries, keys, _) = sizes.looked_at, sizes.widths
    step = max(1, sizes.context // N)
    rows = draw.index(sizes.rows, sizes.context)
    for name, indexed, width in (("mlp", rows, 2 * rank), ("attention", rows, 3 * rank), ("all rows", None, 2 * rank)):
        count = -(-(sizes.rows if indexed is None else sizes.context) // step)
        yield Case(
            f"low_rank_activations {name}", f"{count}x{H} to {width}",
            (draw(sizes.rows, H), indexed, draw(width, H, scale=H**-0.5)),
            lambda hidden, rows, down: scores.low_rank_activations(hidden, rows, step, down),
            lambda hidden, rows, down: scores.reference_low_rank_activations(hidden, rows, step, down),
            e * (count * (H + width) + width * H), 2 * count * H * width,
        )  # fmt: skip
    gain, up = draw(I, dtype=torch.float32).abs(), draw(2 * rank, I, scale=rank**-0.5)
    for name, extras in (("", (None, None, None)), (" prior", (None, None, gain)), (" bias", (draw(I), draw(I), gain))):
        kind = "gelu" if name == " bias" else "silu"
        yield Case(
            f"mlp_scores{name}", f"N={N} I={I} rank={rank}", (draw(N, 2 * rank), up, *extras),
            lambda low_rank, up, *extras, kind=kind: scores.mlp_scores(low_rank, up, kind, *extras),
            lambda low_rank, up, *extras, kind=kind: scores.reference_mlp_scores(low_rank, up, kind, *extras),
            e * 2 * rank * (N + I) + 4 * I, 4 * N * I * rank,
        )  # fmt: skip
    width = queries + 2 * keys
    for name, gain in (("", None), (" prior", draw(width, dtype=torch.float32).abs())):
        yield Case(
            f"attention_energies{name}", f"N={N} channels={width} rank={rank}",
            (draw(N, 3 * rank), draw(rank, width), gain),
            lambda low_rank, up, gain: scores.attention_energies(low_rank, up, queries, keys, gain),
            lambda low_rank, up, gain: scores.reference_attention_energies(low_rank, up, queries, keys, gain),
            e * rank * (3 * N + width) + 4 * width, 2 * N * width * rank,
        )  # fmt: skip


@kernel
def selection(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    I, (queries, size, _), keys = sizes.intermediate, sizes.widths, sizes.keys
    wide = 2 * select.CHUNK + 5  # more than one program holds in registers
    for channels, k in [(I, k) for k in sizes.kept] + [(wide, sizes.kept[0])]:
        yield Case(
            "top_order", f"{k} of {channels}", (draw(channels, dtype=torch.float32).square(),),
            lambda values, k=k: select.top_order(values, k),
            lambda values, k=k: select.reference_top_order(values, k), 12 * channels,
        )  # fmt: skip
    layout = keys // 2, keys, sizes.groups, sizes.head_dim
    # Whole numbers: their sums are the same in any order.
    energies = tuple(draw.order(width).to(torch.float32) for width in (queries, size, size))
    yield Case(
        "attention_channels", f"{keys} of {size}, RoPE pairs", energies,
        lambda *energies: select.attention_channels(*energies, *layout),
        lambda *energies: select.reference_attention_channels(*energies, *layout),
        4 * (queries + 2 * size) + 8 * 2 * keys * (1 + sizes.groups),
    )  # fmt: skip


@kernel
def head_rotary(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Queries and keys side by side in one tensor, several sequences at the same positions."""
    M, D, (q, k, _), e = sizes.rows, sizes.head_dim, sizes.widths, draw.dtype.itemsize
    positions = M // next(parts for parts in (4, 3, 1) if M % parts == 0)
    eps, offsets = 1e-5, (0.0, 1.0)
    forms = [("halves", False, D), ("halves", True, D), ("pairs", True, D)]
    if M < 1000:
        forms += [("halves", True, D // 4 * 2), ("interleaved", True, D // 4 * 2), ("none", True, 0)]
    for rotation, normed, width in forms:
        query, key = draw(M, q + k + 8)[:, : q + k].split((q, k), dim=1)
        angles = [draw(positions, width, dtype=torch.float32) for _ in range(2)] if width else [None, None]
        weights = [draw(D), draw(D)] if normed else [None, None]

        def run(function, *inputs, rotation=rotation, normed=normed):
            *tensors, query_weight, key_weight = inputs
            pair = ((query_weight, eps, offsets[0]), (key_weight, eps, offsets[1])) if normed else (None, None)
            return function(*tensors, rotation, D, *pair)

        name, shape = f"{rotation}{' norms' if normed else ''}", f"{M}x{q}+{k} heads of {D}, {width} turn"
        moved, read = e * M * (q + k), 8 * positions * width
        inputs = (query, key, *angles, *weights)
        yield Case(
            f"rotary_forward {name}", shape, inputs, partial(run, rotary.rotary_forward),
            partial(run, _reference_heads), 2 * moved + read,
        )  # fmt: skip
        yield Case(
            f"rotary_backward {name}", shape, (draw(M, q), draw(M, k), *inputs), partial(run, rotary.rotary_backward),
            partial(run, _reference_heads_backward), (3 if normed else 2) * moved + read,
        )  # fmt: skip


def _reference_heads(query, key, cosines, sines, rotation, head_dim, *norms) -> tuple[Tensor, ...]:
    positions = len(query) if cosines is None else len(cosines)
    form = HeadForm(head_dim, rotation, *(norm and Norm(*norm) for norm in norms))
    angles = (None if one is None else one[None] for one in (cosines, sines))
    outputs = reference_heads(*(x.unflatten(0, (-1, positions)) for x in (query, key)), *angles, form)
    return tuple(y.flatten(0, 1).flatten(1) for y in outputs)


def _reference_heads_backward(d_query, d_key, query, key, *rest) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (query, key)]
    return torch.autograd.grad(_reference_heads(*leaves, *rest), leaves, (d_query, d_key))
