"""What attention's kernel gave is kept, and takes the kernel's place in a recompute."""

import pytest
import torch
from torch.nn import functional as F

from sparse_unsloth.ops.capped_attention import capped_attention
from sparse_unsloth.ops.kept_attention import AttentionKeeper

from keeping_models import Kernels

TOKENS = 10
VISIBLE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def draw(kv_heads=2, dtype=torch.float64):
    """Q, K, V and the output's gradient; as in layers a token's heads lie beside each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, TOKENS, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    drawn = [torch.randn(*shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]
    return drawn[:3], drawn[3]


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] < query.shape[1])


def by_mask(query, key, value):
    """A window of three keys."""
    seen = VISIBLE & ~VISIBLE.tril(-3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)


def gradients(attend, inputs, dy):
    leaves = [one.detach().requires_grad_() for one in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, dy)]


@pytest.mark.parametrize("attention", [causal, by_mask])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_recompute_calls_no_kernel(attention, kv_heads, dtype):
    inputs, dy = draw(kv_heads, dtype)
    expected = gradients(attention, inputs, dy)
    keeper = AttentionKeeper()
    with torch.no_grad():
        first = keeper.attend(attention, *inputs)
    assert not first.requires_grad
    assert torch.equal(first, expected[0])
    again = AttentionKeeper(keeper.kept)
    with Kernels() as kernels:
        ours = gradients(lambda *given: again.attend(attention, *given), inputs, dy)
    assert kernels.calls == {"backward": 1}
    assert ours[0].stride() == expected[0].stride()
    assert all(torch.equal(left, right) for left, right in zip(ours, expected, strict=True))


def test_copies_have_the_kernels_layout():
    """Whoever copies what is kept into a contiguous buffer gives it back as the kernel laid it out."""
    inputs, dy = draw()
    expected, keeper = gradients(causal, inputs, dy), AttentionKeeper()
    with torch.no_grad():
        keeper.attend(causal, *inputs)
    copies = [torch.empty(one.shape, dtype=one.dtype).copy_(one) for one in keeper.kept.tensors]
    assert [one.numel() for one in copies] == [2 * 4 * TOKENS * 8, 2 * 4 * TOKENS]
    again = AttentionKeeper(keeper.kept.with_tensors(()).with_tensors(copies))
    ours = gradients(lambda *given: again.attend(causal, *given), inputs, dy)
    assert ours[0].stride() == expected[0].stride()
    assert all(torch.equal(left, right) for left, right in zip(ours, expected, strict=True))


def test_what_was_kept_is_what_backward_reads():
    """A planted fault: another output, or other logarithms, give other gradients."""
    inputs, dy = draw()
    expected, keeper = gradients(causal, inputs, dy), AttentionKeeper()
    with torch.no_grad():
        keeper.attend(causal, *inputs)
    for place in range(2):
        wrong = [one + 0.1 * (number == place) for number, one in enumerate(keeper.kept.tensors)]
        again = AttentionKeeper(keeper.kept.with_tensors(wrong))
        ours = gradients(lambda *given, again=again: again.attend(causal, *given), inputs, dy)
        assert not torch.allclose(ours[1], expected[1])


def test_other_attention_is_not_kept():
    inputs, _ = draw()
    with torch.no_grad():
        for attention in (
            lambda q, k, v: capped_attention(q, k, v, VISIBLE, 0.3, 5.0),
            lambda q, k, v: (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1),
            lambda q, k, v: causal(q, k, v) + causal(q, k, v),  # of two calls it is not known which is which
        ):
            keeper = AttentionKeeper()
            assert torch.equal(keeper.attend(attention, *inputs), attention(*inputs))
            assert keeper.kept is None


def test_a_call_of_other_sizes_is_computed():
    inputs, dy = draw()
    keeper = AttentionKeeper()
    with torch.no_grad():
        keeper.attend(causal, *inputs)
    shorter, dy = [one[:, :, :6] for one in inputs], dy[:, :, :6]
    again = AttentionKeeper(keeper.kept)
    ours = gradients(lambda *given: again.attend(causal, *given), shorter, dy)
    assert all(torch.equal(left, right) for left, right in zip(ours, gradients(causal, shorter, dy), strict=True))
