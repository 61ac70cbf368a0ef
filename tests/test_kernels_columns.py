"""Gathering and adding chosen rows and columns, against plain PyTorch."""

import pytest
import torch

from sparse_unsloth.kernels import columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("M", "width", "n", "k"), [(1, 3, 1, 1), (40, 300, 17, 130), (33, 64, 33, 64), (20, 50, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_equal_references(M, width, n, k, dtype):
    torch.manual_seed(0)
    source = torch.randn(M, width, device=DEVICE).to(dtype)
    rows = torch.randperm(M, device=DEVICE)[:n].sort().values
    index = torch.randperm(width, device=DEVICE)[:k].sort().values
    wide = torch.full((n, k + 3), float("nan"), device=DEVICE, dtype=dtype)
    gathered = columns.gather_columns(source, rows, index, wide[:, 1 : k + 1])
    assert torch.equal(gathered, columns.reference_gather_columns(source, rows, index))
    assert wide[:, 0].isnan().all()
    assert wide[:, k + 1 :].isnan().all()
    values = torch.randn(n, k + 2, device=DEVICE).to(dtype)[:, 2:]
    expected = columns.reference_add_columns(source, rows, index, values)
    torch.testing.assert_close(columns.add_columns(source.clone(), rows, index, values), expected)
