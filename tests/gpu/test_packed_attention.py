"""Attention within packed documents on the GPU: the kernel, and a recording of it, against the reference."""

import pytest
import torch

from sparse_unsloth.graphs import packed_attention as ours
from sparse_unsloth.graphs.capture import GraphCapture
from sparse_unsloth.tokens.batch import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
@pytest.mark.parametrize("lengths", [(300, 1, 500, 223), (1024,), (100, 0, 200), (7,) * 100])
def test_kernel(heads, lengths):
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, count, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    batch = Batch(torch.zeros(1, 1024, device="cuda"), packed_seq_lengths=torch.tensor(lengths))
    offsets = ours.packing_of(batch).offsets
    outcomes = []
    for attention, dtype in ((ours.packed_attention, torch.bfloat16), (ours._by_mask, torch.float32)):
        leaves = [values.detach().to(dtype).requires_grad_() for values in inputs]
        output = attention(*leaves, offsets)
        outcomes.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for name, found, expected in zip(("output", "q", "k", "v"), *outcomes, strict=True):
        error = ((found.float() - expected).norm() / expected.norm()).item()
        assert error < ours.TOLERANCE, f"{name}: {error:.3f}"


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
def test_recording(heads):
    assert ours.why_not_captured(*heads, 128, torch.empty(0, device="cuda", dtype=torch.bfloat16), GraphCapture()) == ""
    reason = ours.why_not_captured(*heads, 128, torch.empty(0, device="cuda"), GraphCapture())
    assert "float32" in reason
