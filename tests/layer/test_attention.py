"""How our attention calls PyTorch's: cuDNN's makes a plan for each length; and which attention may be kept."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from sparse_unsloth.layer import attention
from sparse_unsloth.layer.attention import OFFSETS, by_interface, causal
from sparse_unsloth.ops.kept_attention import AttentionKeeper


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


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("offsets", [None, (0, 4, 7, 12, 12)])
def test_windows_and_documents_are_kept(window, offsets):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 12, heads, 8, dtype=torch.float64).transpose(1, 2) for heads in (4, 2, 2)]
    tensors = {} if offsets is None else {OFFSETS: torch.tensor(offsets, dtype=torch.int32)}
    call = causal(0.3, tensors, window, None, True)
    leaves = [one.clone().requires_grad_() for one in inputs]
    expected = call.compute(*leaves, tensors)
    keeper = AttentionKeeper()
    with torch.no_grad():
        assert torch.equal(keeper.attend(call.compute, *inputs, tensors), expected)
    assert call.keepable
    found = AttentionKeeper(keeper.kept).attend(call.compute, *leaves, tensors)
    assert found.untyped_storage().data_ptr() == keeper.kept.tensors[0].untyped_storage().data_ptr()
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True):
        assert torch.equal(one, other)


def test_attention_that_may_not_be_kept():
    """Compiled attention and other libraries' may not run under a dispatch mode; a soft cap calls no kernel."""
    spec = SimpleNamespace(query_scaling=None, rotation="none", scaling=0.3, window=None)
    for name in ("sdpa", "eager", "flex_attention", "flash_attention_2", "kernels-community/flash-attn"):
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name))
        assert by_interface(spec, module, {}).keepable == (name in ("sdpa", "eager"))
        assert not by_interface(spec, module, {"past_key_values": object()}).keepable
    assert not causal(0.3, {}, None, 5.0, True).keepable
