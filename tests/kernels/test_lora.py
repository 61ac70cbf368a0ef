"""Packing LoRA matrices and collecting their gradients, against plain PyTorch."""

import pytest
import torch

from sparse_unsloth.kernels import lora

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def draw(*shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape, device=DEVICE) for shape in shapes]


@pytest.mark.parametrize(("H", "I", "r"), [(130, 300, 16), (7, 5, 1), (64, 129, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selected", [False, True])
def test_pack_mlp_equals_reference(H, I, r, dtype, selected):
    loras = draw((r, H), (I, r), (r, H), (I, r), (r, I), (H, r))
    order = torch.randperm(I, device=DEVICE)[: 3 if selected else I]
    scales = (0.5, 2.0, 1.5)
    product_in = torch.full((2 * r, H), float("nan"), device=DEVICE, dtype=dtype)
    product_out = torch.full((H, r + 4), float("nan"), device=DEVICE, dtype=dtype)
    ordered = lora.pack_mlp(loras, scales, order, product_in, product_out[:, 4:])
    ours = product_in, product_out[:, 4:], ordered
    for left, right in zip(ours, lora.reference_pack_mlp(loras, scales, order, dtype), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3 if dtype != torch.float32 else 1e-6, atol=1e-3)
    assert product_out[:, :4].isnan().all()


@pytest.mark.parametrize("widths", [(300, 20, 130), (5, 129), (64,)])
@pytest.mark.parametrize("r", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_linear_equals_reference(widths, r, dtype):
    As, Bs = draw(*[(r, 140)] * len(widths)), draw(*[(width, r) for width in widths])
    arguments = As, Bs, (0.5, 2.0, 1.5)[: len(widths)], dtype
    for left, right in zip(lora.pack_linear(*arguments), lora.reference_pack_linear(*arguments), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3 if dtype != torch.float32 else 1e-6, atol=1e-3)


@pytest.mark.parametrize(("I", "r"), [(130, 16), (5, 1)])
@pytest.mark.parametrize("with_dense", [True, False])
def test_gradients_equal_reference(I, r, with_dense):
    context, dense = draw((3, 3, I, r), (2, 3, I, r))
    dense = dense if with_dense else None
    order = torch.randperm(I, device=DEVICE)
    kept = draw((I, r), (I, r), (r, I))
    ours = lora.mlp_gradients(context, dense, order, kept, 0.5)
    for left, right in zip(ours, lora.reference_mlp_gradients(context, dense, order, 0.5), strict=True):
        torch.testing.assert_close(left, right)
        assert left.is_contiguous()
