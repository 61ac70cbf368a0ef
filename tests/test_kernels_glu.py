"""The fused gated unit against its PyTorch reference, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from sparse_unsloth.kernels import glu

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 1, 1), (70, 130, 17, 4), (33, 64, 64, 16), (130, 200, 1, 8), (64, 300, 70, 17)]


def draw(N, I, k, r, dtype, seed=0):
    """thin, gate_base, up_base, loras, d_h, d_down_thin; the matrices that go together are slices of wider ones."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).mul_(0.5).to(DEVICE, dtype)

    stacked, gradient = tensor(N, 2 * r + 2 * k), tensor(N, k + r)
    return (
        stacked[:, : 2 * r], stacked[:, 2 * r : 2 * r + k], stacked[:, 2 * r + k :], tensor(3, I, r),
        gradient[:, :k], gradient[:, k:],
    )  # fmt: skip


def run(thin, gate_base, up_base, loras, d_h, d_down_thin, kind, rows=None, compact=False):
    """What forward and backward write: h, h down_A', d gate_base, d up_base, d thin, d loras."""
    r, k = loras.shape[2], d_h.shape[1]
    unit = thin.new_empty(len(thin), k + r)
    d_thin, blank = thin.new_empty(len(thin), 2 * r), thin.new_empty(len(thin), k + 1)
    h = torch.empty_like(gate_base) if compact else unit[:, :k]
    d_base = torch.empty_like(gate_base), torch.empty_like(gate_base)
    base = gate_base, up_base
    glu.glu_forward(thin, base, loras, h, unit[:, k:], kind, rows, compact, blank[:, :k])
    chosen = slice(None) if rows is None else rows
    assert not blank[chosen][:, :k].any()
    assert blank[:, k].isnan().all()
    assert blank.isnan().sum() == len(thin) + k * (len(thin) - len(blank[chosen]))
    gradients = (thin, base, loras, d_h, d_down_thin, d_base, d_thin, kind, rows, compact, blank[:, :0])
    d_loras = glu.glu_backward(*gradients).sum(0)
    first = [tensor.clone() for tensor in (*d_base, d_thin)]
    down_thin = thin.new_empty(len(thin), r + 2)
    again = glu.glu_backward(*gradients, down_thin[:, 1:-1]).sum(0)
    torch.testing.assert_close(again, d_loras, rtol=0, atol=0)
    for tensor, before in zip((*d_base, d_thin), first, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(down_thin[chosen][:, 1:-1], unit[chosen][:, k:], rtol=2e-3, atol=2e-3)
    assert down_thin[:, (0, -1)].isnan().all()
    places = slice(None) if compact else chosen
    return h[places], unit[chosen][:, k:], d_base[0][places], d_base[1][places], d_thin[chosen], d_loras


def expect(thin, gate_base, up_base, loras, d_h, d_down_thin, kind):
    base = gate_base, up_base
    forward = glu.reference_forward(thin, base, loras, kind)
    return *forward, *glu.reference_backward(thin, base, loras, d_h, d_down_thin, kind)


def assert_near(name, ours, reference, tolerance):
    error = ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-12)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


NAMES = ("h", "down_thin", "d gate_base", "d up_base", "d thin", "d loras")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-I{}-k{}-r{}".format(*s))
@pytest.mark.parametrize("kind", glu.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
@pytest.mark.parametrize("layout", ["all", "indexed", "compact"])
def test_glu_equals_reference(shape, kind, dtype, layout):
    thin, *base, loras, d_h, d_down_thin = draw(*shape, dtype)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    rows, chosen = None, slice(None)
    if layout != "all":
        rows = chosen = torch.randperm(len(thin), device=DEVICE)[: -(-len(thin) // 2)].sort().values
    by_place = [tensor[chosen].double() for tensor in (*base, d_h)]
    expected = expect(
        thin[chosen].double(), *by_place[:2], loras.double(), by_place[2], d_down_thin[chosen].double(), kind
    )
    if layout == "compact":
        base, d_h = [tensor[rows].clone() for tensor in base], d_h[rows].clone()
    ours = run(thin, *base, loras, d_h, d_down_thin, kind, rows, layout == "compact")
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
    h, down_thin, *_, d_loras = run(*draw(0, 50, 3, 4, torch.float32), "silu")
    assert h.shape == (0, 3)
    assert down_thin.shape == (0, 4)
    assert not d_loras.any()
