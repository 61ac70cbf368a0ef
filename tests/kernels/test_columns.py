"""Splitting rows by role and joining them, against plain PyTorch."""

import pytest
import torch

from sparse_unsloth.kernels import columns
from sparse_unsloth.tokens.partition import PADDING_PLACE, TokenPartition

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
JOINED = [(torch.float32, False, 17), (torch.float32, True, 16), (torch.float16, False, 1)]
JOINED += [(torch.bfloat16, transposed, 16) for transposed in (False, True) if DEVICE == "cuda"]
"""dtype, whether B is transposed (then without a bias), and the rank: one, a whole tile, and one more."""
CASES = [((70, 20, 20), (9, 1, 20)), ((130,), (33,)), ((5, 129), (5, 1))]


def make_partition(num_dense, num_context, num_padding):
    torch.manual_seed(0)
    order = torch.randperm(num_dense + num_context + num_padding, device=DEVICE)
    parts = [part.sort().values for part in order.split([num_dense, num_context, num_padding])]
    return TokenPartition((1, len(order)), *parts, parts[0])


def draw(widths, counts, dtype):
    index = torch.cat([
        torch.randperm(width, device=DEVICE)[:count].sort().values
        for width, count in zip(widths, counts, strict=True)
    ])  # fmt: skip
    return index, lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("rows", [(17, 40, 3), (0, 5, 0), (6, 1, 60), (3, 0, 0)])
@pytest.mark.parametrize(("widths", "counts"), CASES)
@pytest.mark.parametrize("dtype", PRECISION)
def test_split_equals_reference(rows, widths, counts, dtype):
    partition = make_partition(*rows)
    index, tensor = draw(widths, counts, dtype)
    sources = [tensor(sum(rows), width + 3)[:, 2 : width + 2] for width in widths]
    arguments = tensor(sum(rows), 5), sources, partition.rows, partition.num_dense, index, counts
    for ours, reference in zip(columns.split_columns(*arguments), columns.reference_split(*arguments), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("rows", [(17, 40, 3), (0, 5, 0), (6, 1, 60), (3, 0, 0)])
@pytest.mark.parametrize(("widths", "counts"), CASES)
@pytest.mark.parametrize(("dtype", "transposed", "r"), JOINED)
def test_join_equals_reference(rows, widths, counts, dtype, transposed, r):
    partition = make_partition(*rows)
    index, tensor = draw(widths, counts, dtype)
    total = sum(widths)
    lora, bias = (tensor(r, total).t(), None) if transposed else (tensor(total, r), tensor(total))
    dense = tensor(partition.num_dense, len(widths) * r + total)
    context = tensor(partition.num_context, len(widths) * r + sum(counts))
    arguments = (lora, dense, context, partition.place, index, widths, counts, bias)
    ours, xA = columns.join_columns(*arguments)
    exact = [argument.double() if getattr(argument, "dtype", None) == dtype else argument for argument in arguments]
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    expected, expected_xA = columns.reference_join(*exact)
    assert torch.equal(xA.double(), expected_xA)
    for part, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(part.double(), reference, rtol=tolerance, atol=tolerance)
        assert part.is_contiguous()
    assert not any(part[partition.padding].any() for part in ours)


def test_places():
    partition = TokenPartition.from_labels(
        torch.tensor([[-100, -100, 5, -100]], device=DEVICE), torch.tensor([[1, 1, 1, 0]], device=DEVICE)
    )
    assert partition.place.tolist() == [-1, 0, 1, PADDING_PLACE]
    assert partition.rows.tolist() == [1, 2, 0]
