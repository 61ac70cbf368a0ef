"""How our attention calls PyTorch's where that is cuDNN's, which makes a plan for each length."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from sparse_unsloth.layer import attention
from sparse_unsloth.layer.attention import causal


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("backend", "length", "called_with"),
    [(SDPBackend.CUDNN_ATTENTION, 130, 256), (SDPBackend.CUDNN_ATTENTION, 128, 128), (SDPBackend.MATH, 130, 130)],
)
def test_lengths_are_padded_for_cudnn(monkeypatch, backend, length, called_with):
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    call, lengths = causal(0.3, {}, None, None, True), []
    expected = call.compute(*inputs, {})
    gradients = torch.autograd.grad(expected.sum(), inputs)
    original = F.scaled_dot_product_attention

    def note(query, *given, **options):
        lengths.append(query.shape[2])
        return original(query, *given, **options)

    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **options: int(backend))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    found = call.compute(inputs[0].as_subclass(OnGpu), *inputs[1:], {}).as_subclass(torch.Tensor)
    assert lengths == [called_with]
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(one, other)
