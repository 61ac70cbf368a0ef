"""Norms with residual sums, against plain PyTorch and autograd."""

from dataclasses import replace

import pytest
import torch

from sparse_unsloth.kernels import norms
from sparse_unsloth.ops.norms import Norm, normalise
from sparse_unsloth.tokens.partition import PADDING_PLACE

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ROWS = {"natural": None, "both": (5, 7, 2), "context": (0, 14, 0), "dense": (3, 0, 11)}


def sizes_of(rows):
    """``(rows, width, dtype)``: two tiles in float32 for each order of rows; the other widths and dtypes for one."""
    others = [(1, torch.float32), *((48, dtype) for dtype in DTYPES)] if rows == "both" else []
    return [(rows, H, dtype) for H, dtype in [(130, torch.float32), *others]]


def make_order(rows, seed=0):
    if rows is None:
        return norms.Order(None, 0, 14)
    num_dense, num_context, _ = rows
    generator = torch.Generator().manual_seed(seed)
    natural = torch.randperm(14, generator=generator)
    place = torch.empty(14, dtype=torch.int64)
    place[natural[:num_dense].sort().values] = torch.arange(num_dense)
    place[natural[num_dense : num_dense + num_context].sort().values] = -1 - torch.arange(num_context)
    place[natural[num_dense + num_context :]] = PADDING_PLACE
    return norms.Order(place.to(DEVICE), num_dense, num_dense + num_context)


def draw(dtype, *shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def norm_of(kind, weight, eps=1e-5):
    return {"plain": Norm(weight, eps), "offset": Norm(weight, eps, 1.0), "weightless": Norm(None, eps), "": None}[kind]


def exactly(*values):
    """Tensors and norms in float64."""
    exact = [value.double() if isinstance(value, torch.Tensor) else value for value in values]
    return [
        replace(value, weight=value.weight.double()) if isinstance(value, Norm) and value.weight is not None else value
        for value in exact
    ]


def assert_same(ours, expected, dtype):
    for left, right in zip(ours, expected, strict=True):
        if right is None:
            assert left is None
        else:
            torch.testing.assert_close(left.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("added", "H", "dtype"), [case for one in (None, *ROWS) for case in sizes_of(one)])
@pytest.mark.parametrize("normed", ROWS)
def test_add_norm_equals_reference(H, added, normed, dtype):
    order, added_order = make_order(ROWS[normed]), None if added is None else make_order(ROWS[added], seed=1)
    stream, weight, values = draw(dtype, (14, H), (H,), (14 if added is None else added_order.size, H))
    values, norm = None if added is None else values, Norm(weight, 1e-5)
    ours = norms.add_norm(stream, values, added_order, norm, order)
    exact = exactly(stream, values, added_order, norm, order)
    assert_same(ours, norms.reference_add_norm(*exact), dtype)
    if added is not None:
        torch.testing.assert_close(norms.add_rows(stream, values, added_order), ours[0], rtol=0, atol=0)


@pytest.mark.parametrize(("copied", "H", "dtype"), [case for one in (None, *ROWS) for case in sizes_of(one)])
@pytest.mark.parametrize("normed", ROWS)
def test_backward_equals_reference(H, normed, copied, dtype):
    order, added_order = make_order(ROWS[normed]), None if copied is None else make_order(ROWS[copied], seed=1)
    stream, weight, d_normed, d_stream = draw(dtype, (14, H), (H,), (order.size, H), (14, H))
    norm = Norm(weight, 1e-5)
    _, _, scale = norms.add_norm(stream, None, None, norm, order)
    before = d_stream.clone()
    arguments = d_normed, order, stream, scale, norm, d_stream, added_order
    ours = norms.norm_backward(*arguments)
    assert torch.equal(d_stream, before)
    assert_same(ours, norms.reference_norm_backward(*exactly(*arguments)), dtype)


FORMS = [
    ("offset", "", 1.0), ("weightless", "", 1.0), ("", "", 1.0), ("plain", "", 0.25), ("plain", "plain", 1.0),
    ("offset", "offset", 1.0), ("weightless", "weightless", 0.25), ("", "plain", 1.0), ("", "offset", 0.25),
]  # fmt: skip
"""The norm of the sum, the norm of what is added, the multiplier."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "added_norm", "multiplier"), FORMS)
@pytest.mark.parametrize(("normed", "added"), [("natural", "natural"), ("both", "both"), ("natural", "context")])
def test_forms_of_norms(norm, added_norm, multiplier, normed, added, dtype):
    order, added_order = make_order(ROWS[normed]), make_order(ROWS[added], seed=1)
    stream, weight, added_weight, values, d_normed, d_stream = draw(
        dtype, (14, 48), (48,), (48,), (added_order.size, 48), (order.size, 48), (14, 48)
    )
    norm, added_norm = norm_of(norm, weight), norm_of(added_norm, added_weight, 1e-3)
    arguments = stream, values, added_order, norm, order
    ours = norms.add_norm(*arguments, added_norm, multiplier)
    assert_same(ours, norms.reference_add_norm(*exactly(*arguments, added_norm), multiplier), dtype)
    total = norms.add_rows(stream, values, added_order, added_norm, multiplier)
    torch.testing.assert_close(total, ours[0], rtol=0, atol=0)
    for d_sum in (d_stream, None):
        arguments = d_normed, order, ours[0], ours[2], norm, d_sum, added_order
        d_total, d_added = norms.norm_backward(*arguments, values, added_norm, multiplier)
        expected = norms.reference_norm_backward(*exactly(*arguments, values, added_norm), multiplier)
        assert_same((d_total, d_added), expected, dtype)
        assert (d_added is d_total) == (added == "natural" and added_norm is None and multiplier == 1)
        alone = norms.added_backward(d_total, added_order, values, added_norm, multiplier)
        torch.testing.assert_close(alone, d_added, rtol=0, atol=0)


def test_rows_that_nothing_changes_are_not_copied():
    (stream,) = draw(torch.float32, (14, 48))
    total, normed, scale = norms.add_norm(stream, None, None, None, make_order(None))
    assert total is normed is stream
    assert scale is None


@pytest.mark.parametrize(("norm", "added_norm", "multiplier"), [("plain", "", 1.0), *FORMS])
@pytest.mark.parametrize("rows", ROWS)
def test_the_references_are_the_definition_and_its_gradient(rows, norm, added_norm, multiplier):
    order, added_order = make_order(ROWS[rows]), make_order(ROWS[rows], seed=1)
    stream, weight, added_weight, values, d_normed, d_stream = draw(
        torch.float64, (14, 12), (12,), (12,), (added_order.size, 12), (order.size, 12), (14, 12)
    )
    norm, added_norm = norm_of(norm, weight), norm_of(added_norm, added_weight, 1e-3)
    stream, values = stream.requires_grad_(), values.requires_grad_()
    total, output, scale = norms.reference_add_norm(stream, values, added_order, norm, order, added_norm, multiplier)
    added = norms.to_natural(normalise(values, added_norm), added_order, stream)
    torch.testing.assert_close(total, stream + multiplier * added)
    torch.testing.assert_close(
        norms.to_natural(output, order, stream)[order_rows(order)], normalise(total, norm)[order_rows(order)]
    )
    expected = torch.autograd.grad((output * d_normed).sum() + (total * d_stream).sum(), (stream, values))
    constants = total.detach(), None if scale is None else scale.detach(), norm, d_stream, added_order
    ours = norms.reference_norm_backward(d_normed, order, *constants, values.detach(), added_norm, multiplier)
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right)


def order_rows(order):
    """The rows that have a place."""
    return slice(None) if order.place is None else order.place > PADDING_PLACE
