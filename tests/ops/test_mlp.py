"""The autograd functions against their masked references: values, gradients, dtypes, 4-bit weights."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from sparse_unsloth.errors import BackendError
from sparse_unsloth.model.activations import ACTIVATIONS, activation_and_slope
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.linear import SelectedProjection, masked_linear, sparse_linear
from sparse_unsloth.ops.mlp import GatedMlp, MlpMemo, masked_mlp, sparse_mlp
from sparse_unsloth.ops.projection import BaseWeight, Lora, Projection
from sparse_unsloth.tokens.partition import TokenPartition

HIDDEN, INTERMEDIATE, RANK = 6, 10, 2

# (batch, sequence) and the role of each row: d dense, c context, p padding.
PARTITIONS = {
    "mixed": "ccdd ccpd",
    "no-context": "dddd dddd",
    "no-dense": "cccc ccpp",
    "one-row-dense": "d",
    "one-row-context": "c",
    "one-of-each": "cd",
    "only-padding": "pp",
}


def make_partition(roles: str) -> TokenPartition:
    lines = roles.split()
    flat = "".join(lines)
    rows = {role: torch.tensor([i for i, r in enumerate(flat) if r == role], dtype=torch.int64) for role in "dcp"}
    return TokenPartition(
        shape=(len(lines), len(lines[0])), dense=rows["d"], context=rows["c"], padding=rows["p"], loss=rows["d"]
    )


def make_projection(out_features, in_features, generator, lora=True, bias=False, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    branch = None
    if lora:
        branch = Lora(draw(RANK, in_features).requires_grad_(), draw(out_features, RANK).requires_grad_(), scale=0.7)
    base = BaseWeight(draw(out_features, in_features), None, draw(out_features) if bias else None)
    return Projection(base, branch)


def subset(size, keep, generator):
    return torch.randperm(size, generator=generator)[:keep].sort().values


def loras_of(*projections):
    return [tensor for p in projections if p.lora is not None for tensor in (p.lora.A, p.lora.B)]


def assert_same(ours, masked, inputs, weights):
    """Values and every gradient of ``sum(weights * output)``."""
    torch.testing.assert_close(ours, masked)
    ours_gradients = torch.autograd.grad((ours * weights).sum(), inputs, allow_unused=True)
    masked_gradients = torch.autograd.grad((masked * weights).sum(), inputs, allow_unused=True)
    for left, right in zip(ours_gradients, masked_gradients, strict=True):
        torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_slopes(kind):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[kind](x).sum(), x)
    value, ours = activation_and_slope(kind, x.detach())
    torch.testing.assert_close(value, ACTIVATIONS[kind](x.detach()))
    torch.testing.assert_close(ours, slope)


@pytest.mark.parametrize(
    ("roles", "activation", "lora", "bias"),
    [
        *((roles, "silu", "gud", False) for roles in PARTITIONS.values()),
        *((roles, "gelu", "gd", True) for roles in ("ccd cpd", "dd", "cc", "c", "pp")),
        *((roles, "gelu_tanh", "", False) for roles in ("ccd cpd", "cc")),
        *((roles, "silu", "u", True) for roles in ("ccd cpd", "cd")),
    ],
)
def test_mlp_gradcheck(roles, activation, lora, bias):
    generator = torch.Generator().manual_seed(0)
    partition = make_partition(roles)
    gate = make_projection(INTERMEDIATE, HIDDEN, generator, "g" in lora, bias)
    up = make_projection(INTERMEDIATE, HIDDEN, generator, "u" in lora, bias)
    down = make_projection(HIDDEN, INTERMEDIATE, generator, "d" in lora, bias)
    mlp = GatedMlp(gate, up, down, activation)
    x = torch.randn(*partition.shape, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    channels = subset(INTERMEDIATE, 4, generator)
    arguments = (partition, channels, mlp)
    inputs = [x, *loras_of(gate, up, down)]
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    assert_same(sparse_mlp(x, *arguments), masked_mlp(x, *arguments), inputs, weights)
    assert gradcheck(lambda x, *_: sparse_mlp(x, *arguments), inputs)


@pytest.mark.parametrize(
    ("roles", "lora", "bias", "groups"),
    [
        *((roles, "qkv", True, 3) for roles in PARTITIONS.values()),
        *(("ccd cpd", lora, bias, groups) for lora, bias in (("v", False), ("", True)) for groups in (1, 4)),
        *((roles, "v", False, 1) for roles in ("dd", "cc", "pp")),
    ],
)
def test_qkv_gradcheck(roles, lora, bias, groups):
    generator = torch.Generator().manual_seed(1)
    partition = make_partition(roles)
    head_dim, kv_heads = 2, 2
    sizes = {"q": kv_heads * groups * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    projections = {name: make_projection(size, HIDDEN, generator, name in lora, bias) for name, size in sizes.items()}
    parts = [
        SelectedProjection(projections[name], out_index=subset(size, max(1, size // 3), generator))
        for name, size in sizes.items()
    ]
    x = torch.randn(*partition.shape, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    inputs = [x, *loras_of(*projections.values())]
    weights = torch.randn(*partition.shape, sum(sizes.values()), dtype=torch.float64, generator=generator)
    ours = torch.cat(sparse_linear(x, partition, parts), -1)
    masked = torch.cat(masked_linear(x, partition, parts), -1)
    assert_same(ours, masked, inputs, weights)
    assert gradcheck(lambda x, *_: sparse_linear(x, partition, parts), inputs)


@pytest.mark.parametrize("roles", PARTITIONS.values(), ids=PARTITIONS.keys())
@pytest.mark.parametrize(("lora", "bias"), [(True, False), (False, True)])
def test_output_projection_gradcheck(roles, lora, bias):
    generator = torch.Generator().manual_seed(2)
    partition = make_partition(roles)
    projection = make_projection(HIDDEN, 8, generator, lora, bias)
    parts = [SelectedProjection(projection, in_index=subset(8, 3, generator))]
    x = torch.randn(*partition.shape, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    inputs = [x, *loras_of(projection)]
    weights = torch.randn(*partition.shape, HIDDEN, dtype=torch.float64, generator=generator)
    (ours,), (masked,) = (f(x, partition, parts) for f in (sparse_linear, masked_linear))
    assert_same(ours, masked, inputs, weights)
    assert gradcheck(lambda x, *_: sparse_linear(x, partition, parts), inputs)


def four_bit(out_features, in_features, generator, kind, nested):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(out_features, in_features, generator=generator) * 0.1
    return BaseWeight(*quantize_4bit(weight, quant_type=kind, compress_statistics=nested))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("roles", ["ccdd", "cccc"], ids=["mixed", "no-dense"])
def test_four_bit_base_equals_its_dequantised_weight(kind, nested, roles):
    generator = torch.Generator().manual_seed(3)
    partition, hidden, intermediate = make_partition(roles), 64, 128
    packed = [
        four_bit(*shape, generator, kind, nested)
        for shape in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    ]
    loras = [make_projection(*base.shape, generator, dtype=torch.float32).lora for base in packed]
    x = torch.randn(*partition.shape, hidden, generator=generator, requires_grad=True)
    channels = subset(intermediate, 37, generator)
    results = []
    for bases in (packed, [BaseWeight(base.dense(torch.float32)) for base in packed]):
        mlp = GatedMlp(*(Projection(b, l) for b, l in zip(bases, loras, strict=True)), "silu")
        y = sparse_mlp(x, partition, channels, mlp)
        inputs = [x, *(tensor for lora in loras for tensor in (lora.A, lora.B))]
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_no_more_than_plain_low_precision(dtype):
    """Against float64, our error is at most twice that of the masked reference in the same low precision."""
    generator = torch.Generator().manual_seed(4)
    partition = make_partition("ccccdd ccdddp")
    hidden, intermediate = 32, 64
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    exact = [make_projection(*shape, generator) for shape in shapes]
    x = torch.randn(*partition.shape, hidden, dtype=torch.float64, generator=generator)
    channels = subset(intermediate, 20, generator)

    def run(function, to, lora_dtype):
        projections = [
            Projection(
                BaseWeight((0.1 * p.base.weight).to(to)),  # trained weights are small: fp16 must not overflow
                Lora(*((0.1 * t.detach()).to(lora_dtype).requires_grad_() for t in (p.lora.A, p.lora.B)), p.lora.scale),
            )
            for p in exact
        ]
        source = x.to(to).requires_grad_()
        y = function(source, partition, channels, GatedMlp(*projections, "silu"))
        assert y.dtype == to
        inputs = [source, *loras_of(*projections)]
        gradients = torch.autograd.grad(y.double().square().sum(), inputs)
        assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
        return [t.double() for t in (y, *gradients)]

    truth = run(masked_mlp, torch.float64, torch.float64)
    plain = run(masked_mlp, dtype, dtype)
    ours = run(sparse_mlp, dtype, torch.float32)  # LoRA masters in fp32, as PEFT and Unsloth keep them
    for reference, low, mine in zip(truth, plain, ours, strict=True):
        assert (mine - reference).norm() <= 2 * (low - reference).norm() + 1e-6


def test_autocast_computes_in_its_dtype():
    generator = torch.Generator().manual_seed(5)
    partition = make_partition("ccdd")
    mlp = GatedMlp(
        make_projection(INTERMEDIATE, HIDDEN, generator, dtype=torch.float32),
        make_projection(INTERMEDIATE, HIDDEN, generator, dtype=torch.float32),
        make_projection(HIDDEN, INTERMEDIATE, generator, dtype=torch.float32),
        "silu",
    )
    x = torch.randn(1, 4, HIDDEN, generator=generator, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_mlp(x, partition, torch.arange(3), mlp)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert mlp.gate.lora.A.grad.dtype == torch.float32


def test_rows_that_do_not_fit_the_labels_are_refused():
    generator = torch.Generator().manual_seed(6)
    partition = make_partition("ccdd")
    part = SelectedProjection(make_projection(4, HIDDEN, generator), out_index=torch.tensor([1]))
    with pytest.raises(ValueError, match="got 3 tokens, but the labels of this forward count 4"):
        sparse_linear(torch.randn(1, 3, HIDDEN, dtype=torch.float64), partition, [part])


def test_incoming_gradient_is_not_modified():
    """The residual branch shares it. Unsloth's norm overwrites the one that we return, so that must be a new tensor."""
    generator = torch.Generator().manual_seed(7)
    partition = make_partition("ccdd")
    mlp = GatedMlp(
        make_projection(INTERMEDIATE, HIDDEN, generator),
        make_projection(INTERMEDIATE, HIDDEN, generator),
        make_projection(HIDDEN, INTERMEDIATE, generator),
        "silu",
    )
    x = torch.randn(1, 4, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    y = sparse_mlp(x, partition, torch.arange(3), mlp)
    dy = torch.randn_like(y)
    before = dy.clone()
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dy, before, rtol=0, atol=0)
    assert dx.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr(), dy.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("roles", "chunk"),
    [
        ("ccdd ccpd", 4096),
        ("ccdd ccpd", 2),
        ("cccc cccc", 4096),
        ("dddd dddd", 2),
        ("c", 2),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it")
def test_kernels_on_and_off_agree(roles, chunk, monkeypatch):
    monkeypatch.setattr("sparse_unsloth.ops.fused_mlp.CHUNK", chunk)
    generator = torch.Generator().manual_seed(8)
    partition = make_partition(roles)
    float32 = {"dtype": torch.float32}
    gate, up = (make_projection(INTERMEDIATE, HIDDEN, generator, **float32) for _ in range(2))
    mlp = GatedMlp(gate, up, make_projection(HIDDEN, INTERMEDIATE, generator, **float32), "silu")
    poison = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda *a, **o: poison(*a, **o).fill_(float("nan") if o.get("dtype", a[0].dtype).is_floating_point else 7),
    )
    x = torch.randn(*partition.shape, HIDDEN, generator=generator, requires_grad=True)
    channels, weights = subset(INTERMEDIATE, 4, generator), torch.randn(x.shape, generator=generator)
    outcomes = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", choice)
        y = sparse_mlp(x, partition, channels, mlp)
        inputs = [x, *loras_of(mlp.gate, mlp.up, mlp.down)]
        outcomes.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    for left, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("choice", "roles", "chunk"),
    [
        *itertools.product(["torch"], ["ccdd ccpd", "cccc cccc", "dddd dddp"], [4096, 2]),
        ("triton", "ccdd ccpd", 2),
        ("triton", "cccc cccc", 4096),
        ("triton", "dddd dddp", 2),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it")
def test_a_recompute_whose_output_is_unused(roles, chunk, choice, monkeypatch, poison):
    """After a forward without gradients: no output, the same gradients. After one with gradients: the usual output."""
    monkeypatch.setattr("sparse_unsloth.ops.fused_mlp.CHUNK", chunk)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", choice)
    generator = torch.Generator().manual_seed(8)
    partition = make_partition(roles)
    float32 = {"dtype": torch.float32}
    gate, up = (make_projection(INTERMEDIATE, HIDDEN, generator, **float32) for _ in range(2))
    mlp = GatedMlp(gate, up, make_projection(HIDDEN, INTERMEDIATE, generator, **float32), "silu")
    x = torch.randn(*partition.shape, HIDDEN, generator=generator, requires_grad=True)
    inputs, weights = [x, *loras_of(gate, up, mlp.down)], torch.randn(x.shape, generator=generator)
    channels = subset(INTERMEDIATE, 4, generator)

    def run(first_with_gradients, **changes):
        memo = MlpMemo()
        with torch.set_grad_enabled(first_with_gradients):
            first = sparse_mlp(x, partition, channels, mlp, memo, **changes)
        again = sparse_mlp(x, partition, channels, mlp, memo, **changes)
        return first, again, torch.autograd.grad((again * weights).sum(), inputs)

    first, again, expected = run(False)
    torch.testing.assert_close(again, first)
    assert first.any()
    for with_gradients in (False, True):
        other_first, other, gradients = run(with_gradients, skip_unused_output=True)
        torch.testing.assert_close(other_first, first)
        assert other.any() == with_gradients
        for left, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_an_unknown_choice_of_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "cuda")
    with pytest.raises(BackendError, match="must be auto, torch or triton"):
        use_kernels(torch.zeros(1))


@pytest.mark.parametrize(
    ("roles", "bias"),
    [("ccdd ccpd", True), ("ccdd ccpd", False), ("cccc cccp", True), ("dddd dddd", True), ("c", False)],
)
@pytest.mark.parametrize("which", ["qkv", "o"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it")
def test_projection_kernels_on_and_off_agree(roles, which, bias, monkeypatch):
    generator = torch.Generator().manual_seed(9)
    partition = make_partition(roles)
    sizes = {"q": 12, "k": 4, "v": 4}
    if which == "qkv":
        parts = [
            SelectedProjection(
                make_projection(size, HIDDEN, generator, True, bias, torch.float32),
                out_index=subset(size, size // 3, generator),
            )
            for size in sizes.values()
        ]
    else:
        projection = make_projection(8, HIDDEN, generator, True, bias, torch.float32)
        parts = [SelectedProjection(projection, in_index=subset(HIDDEN, 2, generator))]
    x = torch.randn(*partition.shape, HIDDEN, generator=generator, requires_grad=True)
    inputs = [x, *loras_of(*(part.projection for part in parts))]
    outcomes, weights = [], None
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", choice)
        y = torch.cat(sparse_linear(x, partition, parts), -1)
        weights = torch.randn(y.shape, generator=generator) if weights is None else weights
        outcomes.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    for left, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
