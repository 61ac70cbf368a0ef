"""Attention within packed documents, whose starts are a tensor, against one document at a time."""

import pytest
import torch
from torch.nn import functional as F

from sparse_unsloth.bench.checks import Immediate
from sparse_unsloth.graphs import packed_attention as ours
from sparse_unsloth.graphs.packed_attention import packed_attention, packing_of, why_not_captured
from sparse_unsloth.tokens.batch import Batch

TOKENS = 12


def packing(*lengths, rows=1, tokens=TOKENS):
    return packing_of(Batch(torch.zeros(rows, tokens), packed_seq_lengths=torch.tensor(lengths)))


def draw(heads=(4, 2, 2), tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in heads
    ]


@pytest.mark.parametrize(
    ("lengths", "offsets"),
    [
        ((3, 5, 4), [0, 3, 8, 12, 12]),
        ((3, 5), [0, 3, 8, 12, 12]),  # what is left is a document of its own
        ((12,), [0, 12, 12, 12, 12]),
        ((3, 0, 9), [0, 3, 3, 12, 12]),
        ((1,) * 4, [0, 1, 2, 3, 4, 12, 12, 12, 12]),
    ],
)
def test_offsets(lengths, offsets):
    found = packing(*lengths)
    assert found.offsets.tolist() == offsets
    assert found.offsets.dtype == torch.int32
    assert found.room == len(offsets) - 1
    assert found.longest == torch.tensor(offsets).diff().max()


def test_few_kinds_of_room():
    rooms = [packing(*[1] * count).room for count in range(1, 200)]
    assert all(room > count for count, room in enumerate(rooms, start=1))
    assert rooms == sorted(rooms)
    assert len(set(rooms)) < 20


def test_where_recordings_do_not_attend_within_documents(monkeypatch):
    assert packing(6, 6, rows=2) is None
    assert packing_of(Batch(torch.zeros(1, TOKENS))) is None
    assert packing(2048, 2048, tokens=4096) is not None
    monkeypatch.setattr(ours, "MOST_ROWS", 500)
    assert packing(6, 6) is None


@pytest.mark.parametrize("lengths", [(3, 5, 4), (3, 5), (12,), (3, 0, 9), (1,) * 12])
@pytest.mark.parametrize(("heads", "window"), [((4, 2, 2), None), ((2, 2, 2), None), ((4, 2, 2), 4)])
def test_every_document_attends_to_itself(lengths, heads, window):
    inputs = draw(heads)
    expected, begin = [], 0
    for length in (*lengths, TOKENS - sum(lengths)):
        part = [values[:, :, begin : begin + length] for values in inputs]
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
        if length:
            expected.append(F.scaled_dot_product_attention(*part, attn_mask=seen, enable_gqa=True))
        begin += length
    found = packed_attention(*inputs, packing(*lengths).offsets, window=window)
    torch.testing.assert_close(found, torch.cat(expected, dim=2).transpose(1, 2))


def test_a_window_of_every_sequence():
    inputs = [values.reshape(2, values.shape[1], 6, 4) for values in draw()]
    alone = [packed_attention(*(one[row : row + 1] for one in inputs), None, window=2) for row in range(2)]
    torch.testing.assert_close(packed_attention(*inputs, None, window=2), torch.cat(alone))
    assert not torch.allclose(torch.cat(alone), packed_attention(*inputs, None, window=3))


def test_gradients_and_scale():
    offsets = packing(3, 5).offsets
    assert torch.autograd.gradcheck(lambda *inputs: packed_attention(*inputs, offsets), draw())
    inputs = draw()
    doubled = packed_attention(2 * inputs[0], *inputs[1:], offsets)
    torch.testing.assert_close(packed_attention(*inputs, offsets, scale=1.0), doubled)  # head_dim is 4


def test_what_is_tried_before_it_is_recorded(monkeypatch):
    given = 4, 2, 8, torch.empty(0), Immediate()
    assert why_not_captured(*given) == ""
    right = ours._by_mask
    first = torch.tensor(ours.TRIED[0])
    for wrong in (
        lambda q, k, v, _, window: right(q, k, v, first, window=window),
        lambda q, k, v, offsets, window: right(q, k, v, offsets),
    ):
        monkeypatch.setattr(ours, "packed_attention", wrong)
        assert "differs from the reference" in why_not_captured(*given)

    def fail(*inputs, **more):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    monkeypatch.setattr(ours, "packed_attention", fail)
    assert why_not_captured(*given) == "operation not permitted when stream is capturing"
