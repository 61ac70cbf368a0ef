"""Dequantisation of weights and of selected rows and columns is bitwise identical to the format's definition."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from sparse_unsloth.kernels import dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pack(shape, kind, nested, blocksize=64, seed=0):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return weight, *quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=blocksize)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (50, 192), (5, 96), (130, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
def test_kernels_equal_references(kind, nested, shape, dtype):
    weight, packed, state = pack(shape, kind, nested)
    everything = dequantize.reference_rows(packed, state, torch.arange(shape[0], device=DEVICE), dtype)
    assert (everything.float() - weight).abs().mean() < 0.2 * weight.abs().mean()
    if shape[1] % 64 == 0:  # where blocks cross rows bitsandbytes' CPU kernel is wrong
        torch.testing.assert_close(everything, dequantize_4bit(packed, state).to(dtype), rtol=2e-6, atol=0)
    exact = {"rtol": 2e-6 if DEVICE == "cuda" else 0, "atol": 0}  # a GPU fuses the nested scale's multiply and add
    whole = torch.full(tuple(state.shape), float("nan"), dtype=dtype, device=packed.device)
    dequantize._launch_whole(packed, state, whole)
    torch.testing.assert_close(whole, everything, **exact)
    if state.shape[1] % state.blocksize == 0:
        wide = torch.full((state.shape[0], state.shape[1] + 3), float("nan"), dtype=dtype, device=packed.device)
        dequantize._launch_whole(packed, state, wide[:, 2:-1])
        torch.testing.assert_close(wide[:, 2:-1], everything, **exact)
        assert wide[:, (0, 1, -1)].isnan().all()
    torch.testing.assert_close(dequantize.reference_whole(packed, state, dtype), everything, **exact)
    rows = torch.tensor([0, 2, shape[0] - 1], device=DEVICE)
    columns = torch.tensor([1, 2, 31, 33, shape[1] - 1], device=DEVICE)
    for index, axis, reference in ((rows, 0, dequantize.reference_rows), (columns, 1, dequantize.reference_columns)):
        expected = everything.index_select(axis, index)
        assert torch.equal(reference(packed, state, index, dtype), expected)
        wider = list(expected.shape)
        wider[axis] += 3
        ours = torch.full((wider[0], wider[1] + 1), float("nan"), dtype=dtype, device=DEVICE)
        dequantize._launch_select(packed, state, index, ours[:, :-1], columns=axis == 1)
        torch.testing.assert_close(ours.narrow(axis, 0, len(index))[:, : expected.shape[1]], expected, **exact)
        assert not ours[:, :-1].narrow(axis, len(index), 3).any()
        assert ours[:, -1].isnan().all()


def test_nothing_selected():
    _, packed, state = pack((8, 64), "nf4", True)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert dequantize.dequantize_rows(packed, state, none, torch.float32).shape == (0, 64)
    assert dequantize.dequantize_columns(packed, state, none, torch.float32).shape == (8, 0)
    for columns in (False, True):
        dequantize._launch_select(packed, state, none, torch.empty((0, 64) if not columns else (8, 0)), columns)


def test_whole_weight_shares_no_memory():
    """Unsloth dequantises all weights into one buffer; our result must not be overwritten by the next one."""
    _, packed, state = pack((32, 64), "nf4", True)
    first = dequantize.dequantize_whole(packed, state, torch.float32)
    kept = first.clone()
    dequantize.dequantize_whole(pack((32, 64), "nf4", True, seed=1)[1], state, torch.float32)
    assert torch.equal(first, kept)
