"""Norms with residual sums, against plain PyTorch and autograd."""

import pytest
import torch

from sparse_unsloth.kernels import norms
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


@pytest.mark.parametrize(("added", "H", "dtype"), [case for one in (None, *ROWS) for case in sizes_of(one)])
@pytest.mark.parametrize("normed", ROWS)
def test_add_norm_equals_reference(H, added, normed, dtype):
    order, added_order = make_order(ROWS[normed]), None if added is None else make_order(ROWS[added], seed=1)
    stream, weight, values = draw(dtype, (14, H), (H,), (14 if added is None else added_order.size, H))
    values = None if added is None else values
    ours = norms.add_norm(stream, values, added_order, weight, 1e-5, order)
    exact = [None if tensor is None else tensor.double() for tensor in (stream, values, weight)]
    expected = norms.reference_add_norm(exact[0], exact[1], added_order, exact[2], 1e-5, order)
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if added is not None:
        torch.testing.assert_close(norms.add_rows(stream, values, added_order), ours[0], rtol=0, atol=0)


@pytest.mark.parametrize(("copied", "H", "dtype"), [case for one in (None, *ROWS) for case in sizes_of(one)])
@pytest.mark.parametrize("normed", ROWS)
def test_backward_equals_reference(H, normed, copied, dtype):
    order, copy_order = make_order(ROWS[normed]), None if copied is None else make_order(ROWS[copied], seed=1)
    stream, weight, d_normed, d_stream = draw(dtype, (14, H), (H,), (order.size, H), (14, H))
    _, _, scale = norms.add_norm(stream, None, None, weight, 1e-5, order)
    before = d_stream.clone()
    ours = norms.norm_backward(d_normed, order, stream, scale, weight, d_stream, copy_order)
    assert torch.equal(d_stream, before)
    exact = [tensor.double() for tensor in (d_normed, stream, weight, d_stream)]
    expected = norms.reference_norm_backward(exact[0], order, exact[1], scale.double(), *exact[2:], copy_order)
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("normed", ROWS)
def test_the_reference_is_the_gradient(normed):
    order = make_order(ROWS[normed])
    stream, weight, d_normed, d_stream = draw(torch.float64, (14, 12), (12,), (order.size, 12), (14, 12))
    stream = stream.requires_grad_()
    _, output, scale = norms.reference_add_norm(stream, None, None, weight, 1e-5, order)
    (expected,) = torch.autograd.grad((output * d_normed).sum() + (stream * d_stream).sum(), stream)
    ours, _ = norms.reference_norm_backward(d_normed, order, stream.detach(), scale.detach(), weight, d_stream)
    torch.testing.assert_close(ours, expected)
