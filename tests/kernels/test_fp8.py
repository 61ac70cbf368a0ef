"""Quantisation of rows and weights to FP8, against the format's definition.

Triton's interpreter rounds to e4m3 wrongly (it loses carries and NaN), so kernels write float32 here: what they round.
The rounding itself is the GPU's, in tests/gpu/test_fp8.py.
"""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from sparse_unsloth.kernels import fp8

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
INF, NAN = float("inf"), float("nan")


def rows(n, width, dtype=torch.float32):
    """Rows of all magnitudes, at a row stride; of zeros, with inf, NaN and an outlier; the smallest subnormals."""
    x = torch.randn(n, width + 5, generator=torch.Generator().manual_seed(width))[:, 2:-3]
    x = x.mul_(torch.logspace(-40, 36, n)[:, None]).to(dtype)
    x[1], x[2, 1], x[3, 2], x[4, 3] = 0, INF, NAN, 1e4 * x[4].abs().max()
    return x


@pytest.mark.parametrize("width", [16, 48, 128, 300])
def test_rows(width, monkeypatch):
    monkeypatch.setattr(fp8, "LARGEST_ROW", 128)  # 300 columns take three blocks
    x = rows(9, width)
    found, scales = torch.full((9, width), NAN), torch.full((9, 1), NAN)
    fp8._launch_rows(x, found, scales)
    q, expected = fp8.reference_quantize_rows(x)
    assert torch.equal(scales, expected)
    exact = x * expected.reciprocal()
    assert torch.equal(found.nan_to_num(7), exact.nan_to_num(7))
    assert torch.equal(found.to(fp8.FP8).view(torch.uint8), q.view(torch.uint8))


def test_the_reference_is_the_definition():
    x = rows(9, 64)
    q, scales = fp8.quantize_rows(x)
    assert (q.dtype, scales.dtype, scales.shape) == (fp8.FP8, torch.float32, (9, 1))
    finite = torch.tensor([4, 5, 6, 7, 8])
    apart = (q.float() * scales - x)[finite].abs() / x[finite].abs().amax(1, keepdim=True)
    assert apart.max() <= 16 / 448 + 1e-6  # half of the last of three mantissa bits
    assert (q[finite].float().abs().amax(1) == 448).all()
    assert scales[1] == 1
    assert not q[1].float().any()
    for row, column in ((2, 1), (3, 2)):  # not finite: neither is the product
        assert scales[row] == INF
        assert q[row].float().isnan().nonzero().tolist() == [[column]]
    assert fp8.quantize_rows(x[:0])[0].shape == (0, 64)


def weight(shape, form):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if form is None:
        return w, None
    kind, nested, blocksize = form
    return quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=blocksize)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((48, 128), None), ((130, 640), None), ((48, 128), ("nf4", True, 64)), ((130, 640), ("nf4", True, 64)),
        ((130, 640), ("fp4", False, 64)), ((48, 128), ("nf4", True, 128)), ((18, 2048), ("nf4", True, 1024)),
        ((280, 96), ("nf4", False, 32)),
    ],
    ids=str,
)  # fmt: skip
def test_weights(shape, form, transposed):
    source, state = weight(shape, form)
    exact = fp8.exact_weight(source, state)
    reciprocals = fp8.scales_of(exact.abs().amax(0 if transposed else 1)).reciprocal()
    expected = (exact.t() if transposed else exact) * reciprocals[:, None]
    wide = torch.full((expected.shape[0], expected.shape[1] + 3), NAN)
    fp8._launch_weight(source, state, reciprocals, wide[:, 2:-1], transposed)
    assert torch.equal(wide[:, 2:-1], expected)
    assert wide[:, (0, 1, -1)].isnan().all()
    q = torch.empty(expected.shape, dtype=fp8.FP8)
    fp8.quantize_weight(source, state, reciprocals, q, transposed)
    assert torch.equal(q.view(torch.uint8), expected.to(fp8.FP8).view(torch.uint8))


def test_scales_of_nothing_and_of_what_is_not_finite():
    found = fp8.scales_of(torch.tensor([0.0, 448.0, INF, NAN, 1e-40]))
    assert found.tolist() == [1.0, 1.0, INF, INF, pytest.approx(fp8.SMALLEST_AMAX / 448)]
