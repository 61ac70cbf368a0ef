"""The fused gated unit against its PyTorch reference, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from sparse_unsloth.kernels import glu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 1, 1), (70, 130, 17, 4), (33, 64, 64, 16), (130, 200, 1, 8), (64, 300, 70, 17)]


def draw(N, I, k, r, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, 2 * r + 2 * k), (N, k + r), (I, r), (I, r), (I, r))
    return [torch.randn(*shape, generator=generator).mul_(0.5).to(DEVICE, dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh tensors hold NaN, so that what a kernel leaves unwritten shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: poisoned(new_empty(*a, **o)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: poisoned(empty_like(*a, **o)))


def assert_near(name, ours, reference, tolerance):
    error = ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-12)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-I{}-k{}-r{}".format(*s))
@pytest.mark.parametrize("kind", glu.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
@pytest.mark.parametrize("indexed", [False, True])
def test_glu_equals_reference(shape, kind, dtype, indexed):
    k = shape[2]
    stacked, gradient, gate_B, up_B, down_A = draw(*shape, dtype)
    scales = (0.5, 2.0, 1.5)
    exact = [tensor.double() for tensor in (stacked, gradient, gate_B, up_B, down_A)]
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    rows = None
    if indexed:
        rows = torch.randperm(len(stacked), device=DEVICE)[: -(-len(stacked) // 2)].sort().values
        exact[:2] = (tensor[rows] for tensor in exact[:2])
    chosen = slice(None) if rows is None else rows
    output = glu.glu_forward(stacked, gate_B, up_B, down_A, k, scales, kind, rows)
    assert_near("forward", output[chosen], glu.reference_forward(exact[0], *exact[2:], k, scales, kind), tolerance)
    ours = glu.glu_backward(stacked, gradient, gate_B, up_B, down_A, k, scales, kind, rows)
    reference = glu.reference_backward(*exact, k, scales, kind)
    assert_near("d stacked", ours[0][chosen], reference[0], tolerance)
    assert_near("d loras", ours[1].sum(0), reference[1].sum(0).double(), tolerance)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_change_nothing(splits, monkeypatch):
    N, I, k, r = 40, 200, 9, 4
    stacked, gradient, gate_B, up_B, down_A = draw(N, I, k, r, torch.float32, seed=1)
    monkeypatch.setattr(glu, "TILES", dict.fromkeys(glu.TILES, (16, 32, 4, 1)))
    monkeypatch.setattr(glu, "_split", lambda size, tile, *a: (splits, tile * -(-size // (tile * splits))))
    arguments = (k, (1.0, 0.5, 0.25), "silu")
    output = glu.glu_forward(stacked, gate_B, up_B, down_A, *arguments)
    assert_near("forward", output, glu.reference_forward(stacked, gate_B, up_B, down_A, *arguments).double(), 2e-5)
    ours = glu.glu_backward(stacked, gradient, gate_B, up_B, down_A, *arguments)
    reference = glu.reference_backward(stacked, gradient, gate_B, up_B, down_A, *arguments)
    for name, left, right in zip(("d stacked", "d loras"), ours, reference, strict=True):
        if name == "d loras":
            left, right = left.sum(0), right.sum(0)
        assert_near(name, left, right.double(), 2e-5)


def test_no_rows():
    stacked, gradient, gate_B, up_B, down_A = draw(0, 50, 3, 4, torch.float32)
    assert glu.glu_forward(stacked, gate_B, up_B, down_A, 3, (1.0, 1.0, 1.0), "silu").shape == (0, 7)
    d_stacked, d_loras = glu.glu_backward(stacked, gradient, gate_B, up_B, down_A, 3, (1.0, 1.0, 1.0), "silu")
    assert d_stacked.shape == (0, 14)
    assert not d_loras.any()
