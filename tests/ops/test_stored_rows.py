"""The three ways of row sparsity give the same values and gradients: all stored, loss tokens stored, all recomputed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sparse_unsloth.ops import decoder_layer, stored_rows
from sparse_unsloth.ops.decoder_layer import RowOrder, lora_tensors_of, post_attention
from sparse_unsloth.ops.norms import normalise
from sparse_unsloth.ops.stored_rows import post_attention_of_rows
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice

from planned_layers import HIDDEN, INTERMEDIATE, NORMS, QUERIES, RANKS, assert_close, make_layer, roles

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


def outcome(layer, function):
    """Output and gradients of ``function(attention_output, residual)``."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(*layer.x.shape[:-1], QUERIES, generator=generator).requires_grad_()
    output = function(a, layer.x)
    leaves = [a, layer.x, *lora_tensors_of(layer.plan.projections[3:])]
    return [output, *torch.autograd.grad(output, leaves, layer.dy)]


def stored(layer, partition, share):
    """The outcome of `post_attention_of_rows`, and its chosen rows; their order is made in backward or before."""
    choice = RowChoice(partition, share)
    chosen = None if layer.plan.keep_context else RowOrder(choice.as_partition(), False)
    found = outcome(layer, lambda a, x: post_attention_of_rows(a, x, layer.plan, choice, chosen))
    return found, choice.rows


def recomputed(layer, partition, share):
    """The same with `backward_rows`, which computes the chosen rows again."""
    choice = RowChoice(partition, share)
    chosen = RowOrder(choice.as_partition(), False)
    rows_plan = replace(layer.plan, attention=chosen, mlp=chosen, output_unused=True, keep=False)

    def compute(a, x):
        def function(rows, stream):
            return post_attention(rows, stream, layer.plan if rows is a else rows_plan)

        loras = lora_tensors_of(layer.plan.projections[3:])
        return backward_rows(function, [a, x], loras, BackwardRows(choice, residual_index=1))

    return outcome(layer, compute), choice.rows


KEPT = pytest.mark.parametrize("keep_context", [True, False], ids=["all", "loss tokens"])
LAYOUTS = ["ccdpcdc dccpdcc", "cccpccc cccpccc"]
"""The second one has no loss token."""


@KEPT
@pytest.mark.parametrize(
    ("form", "ranks", "layout"),
    [
        *((form, "equal", LAYOUTS[0]) for form in NORMS),
        *(("output norms", one, LAYOUTS[0]) for one in RANKS),
        ("plain", "equal", LAYOUTS[1]),
    ],
)
def test_stored_rows_equal_recomputed_rows(form, ranks, layout, keep_context):
    partition = roles(layout)
    layer = make_layer(form, ranks, sparse=False, partition=partition, keep_context=keep_context)
    (ours, rows), (others, same_rows) = (one(layer, partition, 0.4) for one in (stored, recomputed))
    assert torch.equal(rows, same_rows)
    assert len(rows) == partition.num_dense + -(-2 * partition.num_context // 5) < layer.x[..., 0].numel()
    assert_close(ours, others)
    elsewhere = torch.ones(ours[1].shape[:2], dtype=torch.bool).view(-1).index_fill_(0, rows, False)
    assert not ours[1].flatten(0, 1)[elsewhere].any()
    assert torch.equal(ours[2].flatten(0, 1)[elsewhere], layer.dy.flatten(0, 1)[elsewhere])


@KEPT
def test_every_row_is_the_dense_layer(keep_context):
    partition = roles("ccdcdcd cccdccc")
    layer = make_layer("output norms", "some", sparse=False, partition=partition, keep_context=keep_context)
    ours, _ = stored(layer, partition, 1.0)
    assert_close(ours, outcome(layer, lambda a, x: post_attention(a, x, layer.plan)))


@pytest.mark.parametrize("form", ["plain", "output norms"])
def test_what_is_stored_is_not_multiplied_again(form, monkeypatch):
    """All stored: the products of dense training. Else O, gate and up of the 4 chosen context tokens, and no others."""
    partition, counts = roles(), []
    layer, original = make_layer(form, sparse=False, partition=partition), decoder_layer.after_attention

    def products(function):
        with torch.profiler.profile() as profile:
            function()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")

    def noted(a, stream, plan, loras):
        counts.append((len(a), plan.output_unused))
        return original(a, stream, plan, loras)

    monkeypatch.setattr(stored_rows, "after_attention", noted)
    dense, all_stored, few_stored = (
        products(function)
        for function in (
            lambda: outcome(layer, lambda a, x: post_attention(a, x, layer.plan)),
            lambda: stored(layer, partition, 0.4),
            lambda: stored(layer.with_plan(keep_context=False), partition, 0.4),
        )
    )
    assert 0 < dense == all_stored < few_stored
    assert counts == [(14, False)] * 2 + [(4, form == "plain")]


@KEPT
@pytest.mark.parametrize("form", ["plain", "output norms"])
def test_what_is_stored(form, keep_context):
    """Of rows whose intermediates are not stored, the function's inputs alone."""
    partition, sizes = roles(), {}
    layer = make_layer(form, sparse=False, partition=partition, keep_context=keep_context)
    choice = RowChoice(partition, 0.4)
    a = torch.randn(*layer.x.shape[:-1], QUERIES).requires_grad_()
    known = {one.untyped_storage().data_ptr() for one in (a, layer.x, *lora_tensors_of(layer.plan.projections))}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = post_attention_of_rows(a, layer.x, layer.plan, choice, RowOrder(choice.as_partition(), False))
    outputs = 2 if form == "output norms" else 0  # of O and of the MLP
    row = (2 + outputs) * HIDDEN + 2 * INTERMEDIATE + 4 * 4 + 1  # with the norm's reciprocal root mean square
    assert sum(sizes.values()) == row * (14 if keep_context else partition.num_dense)
    del kept


@KEPT
@pytest.mark.parametrize("which", range(9))
def test_a_wrong_row_of_any_stored_tensor_is_found(which, keep_context, monkeypatch):
    partition = roles()
    layer = make_layer("output norms", sparse=False, partition=partition, keep_context=keep_context)
    others, _ = recomputed(layer, partition, 0.4)
    gather = stored_rows.gather

    def wrong(tensors, rows):
        found = gather(tensors, rows)
        found[which % len(tensors)] = gather(tensors, rows.roll(1))[which % len(tensors)]
        return found

    monkeypatch.setattr(stored_rows, "gather", wrong)
    with pytest.raises(AssertionError):
        assert_close(stored(layer, partition, 0.4)[0], others)


def in_plain_pytorch(plan, monkeypatch):
    """The layer after attention in float64, and stand-ins of the functions that store its intermediates."""
    o, gate, up, down = (replace(one, base=replace(one.base, bias=None)) for one in plan.projections[3:])
    bases = [one.base.weight.double() for one in (o, gate, up, down)]
    scales = [one.lora.scale for one in (o, gate, up, down)]
    norm = replace(plan.mlp_norm, weight=plan.mlp_norm.weight.double())

    def project(x, number, loras):
        return x @ bases[number].t() + scales[number] * (x @ loras[2 * number].t()) @ loras[2 * number + 1].t()

    def gate_up(x, loras):
        return torch.cat((project(x, 1, loras), project(x, 2, loras)), dim=-1)

    def multiplied(stacked, loras):
        gated, other = stacked.chunk(2, dim=-1)
        return project(F.silu(gated) * other, 3, loras)

    def forward(a, stream, plan, loras):
        total = stream + project(a, 0, loras)
        normed = normalise(total, norm)
        saved = [a, a[:, :1], None, total, normed, None]
        if plan.output_unused:
            return total, loras, saved
        stacked = gate_up(normed, loras)
        return total + multiplied(stacked, loras), loras, [*saved, stacked]

    def backward(dy, plan, parts, saved):
        a, _, _, total, normed, _, stacked = saved
        loras = [one.detach().requires_grad_() for one in current]
        stacked = torch.cat((stacked, gate_up(normed[len(stacked) :], loras).detach()))

        def pull(function, x, gradient, first):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(function(x), [x, *first], gradient)

        d_stacked, *of_down = pull(lambda x: multiplied(x, loras), stacked, dy, loras[6:])
        d_normed, *of_both = pull(lambda x: gate_up(x, loras), normed, d_stacked, loras[2:6])
        (d_total,) = pull(lambda x: normalise(x, norm), total, d_normed, [])
        da, *of_o = pull(lambda x: project(x, 0, loras), a, dy + d_total, loras[:2])
        return da, dy + d_total, [*of_o, *of_both, *of_down]

    current = [one.double().detach().requires_grad_() for one in lora_tensors_of(plan.projections[3:])]
    monkeypatch.setattr(stored_rows, "after_attention", forward)
    monkeypatch.setattr(stored_rows, "after_attention_backward", backward)
    monkeypatch.setattr(stored_rows, "after_attention_loras", lambda plan: current)
    for name in ("output_projection", "fused_mlp"):
        monkeypatch.setattr(stored_rows, name, lambda *given: None)
    return current, lambda a, x: forward(a, x, plan, current)[0]


@KEPT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_three_ways_agree_in_float64(layout, keep_context, monkeypatch):
    """The gathering, joining and scattering, around stand-ins in plain PyTorch; autograd differentiates the third."""
    partition = roles(layout)
    layer = make_layer(sparse=False, partition=partition, keep_context=keep_context)
    loras, function = in_plain_pytorch(layer.plan, monkeypatch)
    generator = torch.Generator().manual_seed(3)
    leaves = [
        torch.randn(*partition.shape, width, generator=generator, dtype=torch.float64).requires_grad_()
        for width in (QUERIES, HIDDEN)
    ]
    dy, found = layer.dy.double(), []
    choice = RowChoice(partition, 0.4)
    chosen = RowOrder(choice.as_partition(), False)
    for output in (
        post_attention_of_rows(*leaves, layer.plan, choice, chosen),
        backward_rows(function, leaves, loras, BackwardRows(choice, residual_index=1)),
    ):
        found.append([output, *torch.autograd.grad(output, [*leaves, *loras], dy)])
    for ours, others in zip(*found, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-10, atol=1e-10)
