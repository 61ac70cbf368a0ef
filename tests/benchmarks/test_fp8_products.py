"""The benchmark of FP8 products runs without a GPU, and refuses products that are wrong."""

import pytest
import torch

from benchmarks import fp8_products
from sparse_unsloth.ops import fp8

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal without a GPU")


def test_the_rehearsal_prints_every_product(capsys, monkeypatch):
    monkeypatch.setattr(fp8_products, "milliseconds", lambda function, device: function() is None or 1.0)
    assert fp8_products.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2 * 9
    assert [line.split()[-1] for line in lines if " sum " in line] == ["1.00"] * 2


def test_a_wrong_product_is_refused(monkeypatch):
    original = fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda x: original(1.2 * x))
    with pytest.raises(SystemExit, match=r"differs by 0\.[12]"):
        fp8_products.main(["--tiny"])
