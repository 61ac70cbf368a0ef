"""Products with frozen weights in FP8, and a layer of them, as a CPU emulates them.

They equal float64 references in which rows and weights are rounded to FP8, and nothing else is.
"""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from sparse_unsloth.errors import AttachError
from sparse_unsloth.kernels import fp8 as kernels
from sparse_unsloth.ops import fp8
from sparse_unsloth.ops.decoder_layer import RowOrder, lora_tensors_of, post_attention
from sparse_unsloth.ops.norms import normalise
from sparse_unsloth.ops.projection import BaseWeight, Lora, Projection
from sparse_unsloth.ops.stored_rows import post_attention_of_rows
from sparse_unsloth.ops.weight_stack import stack_columns, stack_rows
from sparse_unsloth.rows.choice import RowChoice

from planned_layers import QUERIES, assert_close, attend, compute, make_layer, outcome, roles

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
RANK = 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    """Rows as FP8 holds them, float64."""
    q, scales = kernels.reference_quantize_rows(x)
    return q.double() * scales


def base_of(shape, four_bit=False, seed=0):
    weight = draw(*shape, seed=seed)
    return BaseWeight(*quantize_4bit(weight, quant_type="nf4")) if four_bit else BaseWeight(weight)


def exact(bases):
    return torch.cat([kernels.exact_weight(base.weight, base.quant_state) for base in bases])


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bits", "4 bits"])
def test_products(four_bit):
    bases = [base_of((rows, 128), four_bit, seed=rows) for rows in (64, 16, 16)]
    weight, x, dy = exact(bases), draw(9, 128, seed=1), draw(9, 96, seed=2)
    lora = draw(RANK, 128, seed=3)
    forward, gradient = rounded(weight), rounded(weight.t().contiguous()).t()
    rows = stack_rows(bases, RANK, torch.float32, fp8=True)
    rows.lora_rows.copy_(lora)
    y = rows.matmul(x)
    assert_close([y], [torch.cat((x.double() @ lora.double().t(), rounded(x) @ forward.t()), dim=1)])
    dx, d_stacked = torch.full((9, 128), torch.nan), torch.cat((draw(9, RANK, seed=4), dy), dim=1)
    rows.matmul_transposed(d_stacked, out=dx)
    assert_close([dx], [rounded(dy) @ gradient + d_stacked[:, :RANK].double() @ lora.double()])
    # The stack of a weight's columns: the products change places.
    columns = stack_columns(bases[0], RANK, torch.float32, fp8=True)
    columns.lora_rows.copy_(draw(RANK, 64, seed=5))
    y = torch.full((9, 64), torch.nan)
    columns.matmul_transposed(torch.cat((draw(9, RANK, seed=6), x), dim=1), out=y)
    plain = draw(9, RANK, seed=6).double() @ columns.lora_rows.double()
    assert_close([y], [plain + rounded(x) @ rounded(weight[:64]).t()])
    dx = columns.matmul(dy[:, :64].contiguous())[:, RANK:]
    assert_close([dx], [rounded(dy[:, :64]) @ rounded(weight[:64].t().contiguous()).t()])
    assert columns.size == RANK + 128


def test_the_error_of_a_product_is_that_of_rounding():
    """Of Gaussian values: 2.6 % for each factor, so 3.7 % of the product's norm, with an outlier in each row too."""
    base, x = base_of((256, 512)), draw(64, 512, seed=1)
    for outlier in (1.0, 100.0):
        x[:, 3] *= outlier
        y = stack_rows([base], 0, torch.float32, fp8=True).matmul(x).double()
        true, ideal = (a @ b.t() for a, b in ((x.double(), base.weight.double()), (rounded(x), rounded(base.weight))))
        error, of_rounding = ((one - true).norm() / true.norm() for one in (y, ideal))
        assert error <= 1.1 * of_rounding
        assert of_rounding < 0.05


def test_rows_that_are_not_finite_give_nan_and_leave_others_alone():
    base, x = base_of((32, 64)), draw(5, 64, seed=1)
    expected = stack_rows([base], 0, torch.float32, fp8=True).matmul(x)
    x[1, 2], x[2, 5], x[3] = torch.inf, torch.nan, 0
    y = stack_rows([base], 0, torch.float32, fp8=True).matmul(x)
    assert y[1:3].isnan().all()
    assert not y[3].any()
    assert torch.equal(y[[0, 4]], expected[[0, 4]])


def test_scales_are_kept_until_a_weight_changes():
    bases = [base_of((32, 64)), base_of((16, 64), seed=1)]
    first = fp8.fp8_scales(bases)
    assert fp8.fp8_scales(bases) is first
    assert torch.equal(first.columns[0], kernels.scales_of(exact(bases).abs().amax(0)))
    before = bases[0].weight.clone()
    bases[1].weight.mul_(3)
    assert torch.equal(bases[0].weight, before)
    second = fp8.fp8_scales(bases)
    assert torch.equal(second.rows[0], kernels.scales_of(exact(bases).abs().amax(1)))
    assert torch.equal(second.rows[1], second.rows[0].reciprocal())


class Product(torch.autograd.Function):
    """``x weight'`` in float64, with rows and weight rounded to FP8 in ``chosen`` rows, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, chosen):
        ctx.weight, ctx.chosen = weight, chosen
        return torch.where(chosen, rounded(x) @ rounded(weight).t(), x @ weight.double().t())

    @staticmethod
    def backward(ctx, dy):
        transposed = rounded(ctx.weight.t().contiguous()).t()
        return torch.where(ctx.chosen, rounded(dy) @ transposed, dy @ ctx.weight.double()), None, None


def reference(plan, x, chosen):
    """The layer in float64; projections of one input are multiplied together, as their gradients share scales."""

    def projected(x, projections):
        sizes = [one.base.shape[0] for one in projections]
        parts = Product.apply(x, exact([one.base for one in projections]), chosen).split(sizes, dim=1)
        found = []
        for part, one in zip(parts, projections, strict=True):
            if one.lora is not None:
                part = part + one.lora.scale * (x @ one.lora.A.double().t()) @ one.lora.B.double().t()
            found.append(part if one.base.bias is None else part + one.base.bias.double())
        return found

    def normed(x, norm):
        return normalise(x, norm and replace(norm, weight=None if norm.weight is None else norm.weight.double()))

    first, after_attention, before_mlp, last = (
        plan.attention_norm, plan.attention_output_norm, plan.mlp_norm, plan.mlp_output_norm
    )  # fmt: skip
    stream, projections = x.double().flatten(0, 1), plan.projections
    (y,) = projected(attend(*projected(normed(stream, first), projections[:3])), projections[3:4])
    stream = stream + plan.residual_multiplier * normed(y, after_attention)
    gate, up = projected(normed(stream, before_mlp), projections[4:6])
    (y,) = projected(torch.nn.functional.silu(gate) * up, projections[6:])
    return (stream + plan.residual_multiplier * normed(y, last)).view(x.shape)


NO_PADDING = "ccdcdcc dccccdc"


def apart(found, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("form", "ranks", "precision"),
    [("plain", "equal", "fp8"), ("output norms", "some", "fp8"), ("plain", "equal", "fp8-context"),
     ("multiplied output norms", "unequal", "fp8-context")],
)  # fmt: skip
def test_a_layer_is_the_one_of_rounded_factors(form, ranks, precision):
    partition, by_roles = roles(NO_PADDING), precision == "fp8-context"
    layer = make_layer(form, ranks, sparse=by_roles, partition=partition, precision=precision)
    chosen = torch.full((14, 1), not by_roles)
    if by_roles:
        chosen[partition.context] = True
    ours = outcome(layer, compute)
    expected = outcome(layer, lambda plan, x: reference(plan, x, chosen))
    exact_ones = outcome(layer, lambda plan, x: reference(plan, x, torch.zeros_like(chosen)))
    assert max(apart(ours, expected)) < 1e-3
    assert min(apart(expected[1:], exact_ones[1:])) > 0.005  # so that this test tells them apart


def test_a_recompute_has_the_same_gradients():
    layer = make_layer(ranks="equal", sparse=False, precision="fp8")
    again = layer.with_plan(output_unused=True, keep=False)
    assert_close(outcome(again, compute)[1:], outcome(layer, compute)[1:])


def test_chosen_rows_take_the_same_gradients_in_fp8():
    """Every row chosen: the stored rows of row sparsity are the dense layer's."""
    partition = roles(NO_PADDING)
    layer, generator = make_layer(sparse=False, partition=partition, precision="fp8"), torch.Generator().manual_seed(3)
    a = torch.randn(2, 7, QUERIES, generator=generator)
    choice = RowChoice(partition, 1.0)
    order = RowOrder(choice.as_partition(), False)
    found = []
    for function in (
        lambda x, a: post_attention(a, x, layer.plan),
        lambda x, a: post_attention_of_rows(a, x, layer.plan, choice, order),
    ):
        leaves = [layer.x, a.clone().requires_grad_(), *lora_tensors_of(layer.plan.projections[3:])]
        output = function(*leaves[:2])
        found.append([output, *torch.autograd.grad(output, leaves, layer.dy)])
    assert_close(*found)


def test_what_does_not_fit_is_refused():
    fits = Projection(base_of((32, 64), True), Lora(draw(RANK, 64), draw(32, RANK), 1.0))
    fp8.check_shapes({"q_proj": fits}, "layer 0")
    wrong = {
        "multiples of 16": replace(fits, base=BaseWeight(draw(40, 64))),
        "rank 4": replace(fits, lora=Lora(draw(4, 64), draw(32, 4), 1.0)),
        "blocks of 64": replace(fits, base=base_of((32, 96), True)),
    }
    for reason, projection in wrong.items():
        with pytest.raises(AttachError, match=rf"layer 0\.q_proj .*{reason}.*precision: bf16"):
            fp8.check_shapes({"q_proj": projection}, "layer 0")


def test_gpus_without_fp8_are_named(monkeypatch):
    fp8.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, hip, found in (
        ((8, 0), None, "A100 .*8.0.* bf16"),
        ((9, 4), "6.4", "A100 has no"),
        ((8, 9), None, ""),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        if found:
            with pytest.raises(AttachError, match=found):
                fp8.check_device(torch.device("cuda"))
        else:
            fp8.check_device(torch.device("cuda"))
