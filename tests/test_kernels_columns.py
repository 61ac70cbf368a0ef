"""Splitting rows by role, joining them, and adding rows, against plain PyTorch."""

import pytest
import torch

from sparse_unsloth.kernels import columns
from sparse_unsloth.partition import PADDING_PLACE, TokenPartition

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
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
    arguments = sources, partition.rows, partition.num_dense, index, counts
    for ours, reference in zip(columns.split_columns(*arguments), columns.reference_split(*arguments), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("rows", [(17, 40, 3), (0, 5, 0), (6, 1, 60), (3, 0, 0)])
@pytest.mark.parametrize(("widths", "counts"), CASES)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("r", [1, 16, 17])
def test_join_equals_reference(rows, widths, counts, dtype, transposed, r):
    partition = make_partition(*rows)
    index, tensor = draw(widths, counts, dtype)
    total = sum(widths)
    lora, bias = (tensor(r, total).t(), None) if transposed else (tensor(total, r), tensor(total))
    thin, dense = tensor(sum(rows), len(widths) * r), tensor(partition.num_dense, total)
    context = tensor(partition.num_context, sum(counts))
    arguments = (thin, lora, dense, context, partition.place, index, widths, counts, bias)
    ours = columns.join_columns(*arguments)
    exact = [argument.double() if getattr(argument, "dtype", None) == dtype else argument for argument in arguments]
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for part, reference in zip(ours, columns.reference_join(*exact), strict=True):
        torch.testing.assert_close(part.double(), reference, rtol=tolerance, atol=tolerance)
        assert part.is_contiguous()
    assert not any(part[partition.padding].any() for part in ours)


def test_places():
    partition = TokenPartition.from_labels(
        torch.tensor([[-100, -100, 5, -100]], device=DEVICE), torch.tensor([[1, 1, 1, 0]], device=DEVICE)
    )
    assert partition.place.tolist() == [-1, 0, 1, PADDING_PLACE]
    assert partition.rows.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("M", "width", "n"), [(1, 3, 1), (40, 600, 17), (33, 64, 33), (20, 50, 0)])
@pytest.mark.parametrize("dtype", PRECISION)
def test_add_rows_equals_reference(M, width, n, dtype):
    output, values = (torch.randn(size, width, device=DEVICE).to(dtype) for size in (M, n))
    rows = torch.randperm(M, device=DEVICE)[:n]
    expected = columns.reference_add_rows(output, rows, values)
    assert columns.add_rows(output, rows, values) is output
    torch.testing.assert_close(output, expected)
