"""Attention with a soft cap of the scores, some heads at a time, against plain PyTorch."""

import pytest
import torch

from sparse_unsloth.ops import capped_attention as ours

SCALE, CAP, LENGTH = 0.7, 0.5, 5


def plain(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = CAP * torch.tanh(SCALE * query @ key.transpose(-1, -2) / CAP)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("most", [2**25, 200, 60], ids=["all at once", "some sequences", "some heads"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", ["bool", "added", "of each sequence"])
def test_outputs_and_gradients(monkeypatch, most, groups, mask):
    monkeypatch.setattr(ours, "MOST_SCORES", most)
    torch.manual_seed(0)
    shapes = [(3, LENGTH, heads, 4) for heads in (2 * groups, 2, 2)]
    leaves = [torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes]
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if mask != "bool":
        seen = torch.zeros(8, 8, dtype=torch.float64)[:LENGTH, :LENGTH].masked_fill(~seen, -1e30)
    if mask == "of each sequence":
        seen = seen + torch.randn(3, 1, LENGTH, LENGTH, dtype=torch.float64)
    found, expected = ours.capped_attention(*leaves, seen, SCALE, CAP), plain(*leaves, seen)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(y, leaves, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    found = ours.capped_attention(*(x.bfloat16() for x in inputs), seen, SCALE, CAP)
    assert found.dtype == torch.bfloat16
    assert (found - plain(*inputs, seen)).norm() < 0.01 * found.norm()
