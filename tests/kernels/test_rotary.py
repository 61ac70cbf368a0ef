"""Head norms and rotary embedding against plain PyTorch and its gradients, through Triton's interpreter on a CPU."""

import itertools

import pytest
import torch

from sparse_unsloth.kernels import rotary
from sparse_unsloth.ops.head_rotary import HeadForm, reference_heads
from sparse_unsloth.ops.norms import Norm

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
HEADS, KV_HEADS, HEAD_DIM, BATCH, SEQUENCE = 5, 3, 24, 2, 3
NORMS = {"none": (None, None), "both": (0.0, 0.0), "offset": (1.0, 1.0), "bare": ("bare", 0.0), "key": (None, 1.0)}
ROTATIONS = [("halves", 24), ("halves", 12), ("pairs", 24), ("interleaved", 24), ("interleaved", 16), ("none", 0)]
CASES = [
    *((*rotation, norm, torch.float32) for rotation, norm in itertools.product(ROTATIONS, NORMS)),
    *(("halves", 24, norm, dtype) for norm in ("both", "offset") for dtype in (torch.float16, torch.bfloat16)),
    ("interleaved", 16, "both", torch.bfloat16),
]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_norm(offset, seed, dtype):
    if offset is None:
        return None
    if offset == "bare":
        return Norm(None, 1e-2)
    return Norm(draw(HEAD_DIM, dtype=dtype, seed=seed), 1e-2, offset)


def widen(norm):
    return norm and Norm(None if norm.weight is None else norm.weight.double(), norm.eps, norm.offset)


@pytest.mark.parametrize(
    ("each", "tile"),
    [(True, (64, 64)), (False, rotary.TILE)],
    ids=["position-per-token-two-heads", "position-per-sequence-all-heads"],
)
@pytest.mark.parametrize(("rotation", "width", "norms", "dtype"), CASES)
def test_kernels_equal_reference(rotation, width, norms, dtype, each, tile, monkeypatch):
    """Queries and keys lie side by side in a wider tensor; angles of a pair's channels differ, as no model's do."""
    monkeypatch.setattr(rotary, "TILE", tile)
    wide = draw(BATCH * SEQUENCE, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype).mul_(3)
    query, key, _ = wide.split([size * HEAD_DIM for size in (HEADS, KV_HEADS, KV_HEADS)], dim=1)
    shape = BATCH if each else 1, SEQUENCE, width
    angles = (None, None) if rotation == "none" else (draw(*shape, seed=1), draw(*shape, seed=2))
    pair = [make_norm(offset, seed, dtype) for seed, offset in enumerate(NORMS[norms], 3)]
    form = HeadForm(HEAD_DIM, rotation, *map(widen, pair))

    exact = [x.double().unflatten(0, (BATCH, SEQUENCE)).requires_grad_() for x in (query, key)]
    expected = reference_heads(*exact, *(a if a is None else a.double() for a in angles), form)
    d_query, d_key = (draw(x.shape[0], x.shape[1], dtype=dtype, seed=5) for x in (query, key))
    gradients = torch.autograd.grad(
        expected, exact, [dy.double().view_as(y) for dy, y in zip((d_query, d_key), expected, strict=True)]
    )

    angles = [angle if angle is None else angle.flatten(0, 1) for angle in angles]
    options = rotation, HEAD_DIM, *(norm and (norm.weight, norm.eps, norm.offset) for norm in pair)
    before = wide.clone()
    kept = (None, None) if norms == "none" else (query, key)
    ours = *rotary.rotary_forward(query, key, *angles, *options), *rotary.rotary_backward(
        d_query, d_key, *kept, *angles, *options
    )  # fmt: skip
    assert torch.equal(wide, before)
    for found, right in zip(ours, (*expected, *gradients), strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous()
        right = right.view_as(found)
        assert (found.double() - right).norm() <= TOLERANCE[dtype] * right.norm()


def test_norms_round_as_transformers_does():
    """Nearly bitwise: an offset of 0 (Llama, Qwen) rounds before the weight, an offset of 1 (Gemma) after it."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter truncates to bf16
    x = draw(64, 8 * HEAD_DIM, dtype=dtype)
    for number, module in enumerate((Qwen3RMSNorm(HEAD_DIM, eps=1e-6), Gemma3RMSNorm(HEAD_DIM, eps=1e-6))):
        module = module.to(DEVICE, dtype)
        module.weight.data.copy_(draw(HEAD_DIM, seed=1))
        norm = module.weight.detach(), 1e-6, float(number)
        ours, _ = rotary.rotary_forward(x, x, None, None, "none", HEAD_DIM, norm, None)
        expected = module(x.view(64, 8, HEAD_DIM)).flatten(1)
        assert (ours == expected).float().mean() > 0.999  # the sum of squares in another order
        assert (ours.double() - expected.double()).norm() < 1e-3 * expected.double().norm()


def test_no_rows():
    empty = draw(0, 2 * HEAD_DIM), draw(0, HEAD_DIM)
    assert [len(y) for y in rotary.rotary_forward(*empty, None, None, "none", HEAD_DIM)] == [0, 0]
    assert [len(y) for y in rotary.rotary_backward(*empty, None, None, None, None, "none", HEAD_DIM)] == [0, 0]
