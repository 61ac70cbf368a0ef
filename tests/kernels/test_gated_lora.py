"""The gated unit of all channels with LoRA against its PyTorch reference, by Triton's interpreter without a GPU."""

import pytest
import torch

from sparse_unsloth.kernels import gated_lora
from sparse_unsloth.kernels.activation import KINDS

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [((N, I, r), "silu", torch.float32) for N, I, r in ((0, 50, 4), (1, 5, 1), (70, 130, 17))]
CASES += [((33, 64, 16), kind, dtype) for kind in KINDS for dtype in DTYPES]


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def test_gated_lora_equals_reference(shape, kind, dtype):
    N, I, r = shape
    generator = torch.Generator().manual_seed(0)
    stacked, gradient, loras = (
        torch.randn(*size, generator=generator).mul_(0.5).to(DEVICE, dtype)
        for size in ((N, 2 * r + 2 * I), (N, r + I), (3, I, r))
    )
    xA, base = stacked[:, : 2 * r], stacked[:, 2 * r :].split(I, dim=1)
    d_down_xA, d_h = gradient.split([r, I], dim=1)
    exact = [tensor.double() for tensor in (xA, *base, loras, d_h, d_down_xA)]
    expected = [
        gated_lora.reference_forward(exact[0], exact[1:3], exact[3], kind),
        *gated_lora.reference_backward(exact[0], exact[1:3], *exact[3:], kind),
    ]
    unit, given = xA.new_full((N, I + 2), 7.0), stacked.clone()
    gated_lora.gated_lora_forward(xA, base, loras, unit[:, 1:-1], kind)
    gated_lora.gated_lora_backward(xA, base, loras, d_h, d_down_xA, base, kind)  # in place
    for found, right in zip((unit[:, 1:-1], d_h, *base), expected, strict=True):
        assert (found.double() - right).norm() <= TOLERANCE[dtype] * right.norm()
    assert (unit[:, (0, -1)] == 7).all()
    assert torch.equal(xA, given[:, : 2 * r])
    assert torch.equal(d_down_xA, gradient[:, :r])
