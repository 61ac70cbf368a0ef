"""The fused gated unit against its PyTorch reference, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from sparse_unsloth.kernels import glu

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 1, 1), (70, 130, 17, 4), (33, 64, 64, 16), (130, 200, 1, 8), (64, 300, 70, 17)]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [(shape, "silu", torch.float32) for shape in SHAPES]
CASES += [(SHAPES[2], kind, dtype) for kind in glu.KINDS for dtype in DTYPES if (kind, dtype) != ("silu", DTYPES[0])]
"""Every shape, and every activation in every dtype."""


def draw(N, I, k, r, dtype, seed=0):
    """xA, gate_base, up_base, loras, d_h, d_down_xA; the matrices that go together are slices of wider ones."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).mul_(0.5).to(DEVICE, dtype)

    stacked, gradient = tensor(N, 2 * r + 2 * k), tensor(N, k + r)
    return (
        stacked[:, : 2 * r], stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :], tensor(3, I, r),
        gradient[:, :k], gradient[:, k:],
    )  # fmt: skip


def run(xA, gate_base, up_base, loras, d_h, d_down_xA, kind):
    """What forward and backward write: h, h down_A', d gate_base, d up_base, d xA, d loras."""
    r, k, base = loras.shape[2], d_h.shape[1], (gate_base, up_base)
    unit = xA.new_empty(len(xA), r + k)
    glu.glu_forward(xA, base, loras, unit[:, r:], unit[:, :r], kind)
    d_xA, d_base = xA.new_empty(xA.shape), (torch.empty_like(gate_base), torch.empty_like(gate_base))
    d_loras = glu.glu_backward(xA, base, loras, d_h, d_down_xA, d_base, d_xA, kind).sum(0)
    stacked, down_xA = torch.cat((xA, gate_base, up_base), 1), xA.new_empty(len(xA), r + 2)
    xA, base = stacked[:, : 2 * r], (stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :])
    again = glu.glu_backward(xA, base, loras, d_h, d_down_xA, base, xA, kind, down_xA[:, 1:-1]).sum(0)
    for left, right in zip((again, xA, *base), (d_loras, d_xA, *d_base), strict=True):  # in place: the same
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    torch.testing.assert_close(down_xA[:, 1:-1], unit[:, :r], rtol=2e-3, atol=2e-3)
    assert down_xA[:, (0, -1)].isnan().all()
    return unit[:, r:], unit[:, :r], *d_base, d_xA, d_loras


def expect(xA, gate_base, up_base, loras, d_h, d_down_xA, kind):
    base = gate_base, up_base
    forward = glu.reference_forward(xA, base, loras, kind)
    return *forward, *glu.reference_backward(xA, base, loras, d_h, d_down_xA, kind)


def assert_near(name, ours, reference, tolerance):
    error = ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-12)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


NAMES = ("h", "down_xA", "d gate_base", "d up_base", "d xA", "d loras")


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def test_glu_equals_reference(shape, kind, dtype):
    xA, *base, loras, d_h, d_down_xA = draw(*shape, dtype)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    expected = expect(*(tensor.double() for tensor in (xA, *base, loras, d_h, d_down_xA)), kind)
    ours = run(xA, *base, loras, d_h, d_down_xA, kind)
    for name, left, right in zip(NAMES, ours, expected, strict=True):
        assert_near(name, left, right, tolerance)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_change_nothing(splits, monkeypatch):
    arguments = draw(40, 200, 9, 4, torch.float32, seed=1)
    monkeypatch.setattr(glu, "TILES", dict.fromkeys(glu.TILES, (16, 32)))
    monkeypatch.setattr(glu, "_split", lambda size, tile, *a: (splits, tile * -(-size // (tile * splits))))
    for name, left, right in zip(NAMES, run(*arguments, "silu"), expect(*arguments, "silu"), strict=True):
        assert_near(name, left, right.double(), 2e-5)


def test_no_rows():
    h, down_xA, *_, d_loras = run(*draw(0, 50, 3, 4, torch.float32), "silu")
    assert h.shape == (0, 3)
    assert down_xA.shape == (0, 4)
    assert not d_loras.any()
