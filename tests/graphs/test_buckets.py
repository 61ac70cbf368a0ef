"""Micro-batches in few sizes, for recordings."""

from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth.graphs.buckets import LENGTHS, pad_dense_count, pad_length, round_count, round_up
from sparse_unsloth.runtime import forward
from sparse_unsloth.tokens.batch import LAYOUTS, read_batch
from sparse_unsloth.tokens.partition import TokenPartition


@pytest.mark.parametrize(
    ("size", "levels", "expected"),
    [(1, 8, 16), (16, 8, 16), (17, 8, 32), (255, 8, 256), (257, 8, 288), (2048, 8, 2048), (2049, 8, 2304), (0, 8, 0)],
)
def test_round_up(size, levels, expected):
    assert round_up(size, levels) == expected


def test_few_sizes_and_little_more():
    assert len({round_up(size, LENGTHS) for size in range(1024, 2049)}) == LENGTHS + 1
    assert all(0 <= round_up(size, LENGTHS) - size < size / LENGTHS for size in range(LENGTHS * 16, 5000))


@pytest.mark.parametrize(
    ("count", "rows", "expected"),
    [(64, 8192, 64), (65, 8192, 96), (2052, 8192, 2176), (700, 2048, 768), (5, 2048, 16), (0, 100, 0)],
)
def test_round_count(count, rows, expected):
    assert round_count(count, rows) == expected


def padded(arguments, limit=None, repeated=False):
    """The arguments after `pad_length`; fields and arguments of the batch are the same tensors."""
    batch = pad_length(read_batch(arguments), limit, repeated)
    assert all(getattr(batch, name) is batch.arguments.get(name) for name in LAYOUTS)
    return batch.arguments


def batch_of(rows, length, **more):
    ids = torch.arange(rows * length).view(rows, length)
    return {"input_ids": ids, "labels": ids.clone(), **more}


def test_padded_rows_are_lengthened():
    mask = torch.ones(2, 41, dtype=torch.long)
    batch = batch_of(2, 41, attention_mask=mask, num_items_in_batch=torch.tensor(3), use_cache=False)
    ours = padded(batch)
    assert batch["input_ids"].shape == (2, 41)
    assert torch.equal(ours["input_ids"], torch.cat((batch["input_ids"], batch["input_ids"][:, :7]), dim=1))
    assert torch.equal(ours["labels"][:, :41], batch["labels"])
    assert (ours["labels"][:, 41:] == -100).all()
    assert ours["attention_mask"].sum() == 2 * 41
    assert padded({**batch, "attention_mask": mask.bool()})["attention_mask"].dtype == torch.bool
    assert {name: ours[name] for name in ("num_items_in_batch", "use_cache")} == {
        name: batch[name] for name in ("num_items_in_batch", "use_cache")
    }
    assert padded(batch_of(2, 41), limit=45)["labels"].shape == (2, 45)
    assert padded(batch_of(2, 1041))["labels"].shape == (2, 1152)
    assert padded(batch_of(2, 1041), repeated=True)["labels"].shape == (2, 1056)


def test_packed_rows_get_one_more_document():
    positions = torch.cat((torch.arange(20), torch.arange(19), torch.zeros(2)))[None].long()
    for dtype in (torch.int32, torch.int64):  # two tokens of a collator's padding stand behind the documents
        lengths = torch.tensor([20, 19], dtype=dtype)
        ours = padded(batch_of(1, 41, packed_seq_lengths=lengths, position_ids=positions), limit=41)
        assert ours["packed_seq_lengths"].tolist() == [20, 19, 9]
        assert ours["packed_seq_lengths"].dtype == dtype
        assert ours["position_ids"].tolist() == [[*range(20), *range(19), 0, 0, *range(7)]]
    rows = TokenPartition.from_labels(ours["labels"], packed_seq_lengths=ours["packed_seq_lengths"])
    assert rows.num_padding == 0


def test_batches_of_one_length_are_hardly_padded(monkeypatch):
    monkeypatch.setattr(forward, "loss_is_fused", lambda *given: True)
    model = torch.nn.Module()
    state = SimpleNamespace(driver=None, last_shape=None)
    lengths = [
        forward.pad_to_bucket(state, model, read_batch(batch_of(1, length))).input_ids.shape[1]
        for length in (1041, 1041, 1041, 530, 1041)
    ]
    assert lengths == [1152, 1056, 1056, 576, 1152]


@pytest.mark.parametrize(
    "batch",
    [
        batch_of(2, 48),
        batch_of(2, 41, position_ids=torch.arange(41).expand(2, -1)),
        batch_of(2, 41, packed_seq_lengths=torch.tensor([41, 41])),
        batch_of(1, 41, attention_mask=torch.ones(1, 1, 41, 41)),
        batch_of(1, 41, token_type_ids=torch.zeros(1, 41)),
        {"inputs_embeds": torch.zeros(1, 41, 4), "labels": torch.zeros(1, 41)},
        batch_of(1, 2),
    ],
    ids=["round", "position ids", "packed rows", "4-D mask", "unknown tensor", "embeddings", "hardly any token"],
)
def test_others_stay_as_they_are(batch):
    ours = padded(batch)
    assert ours.keys() == batch.keys()
    assert all(ours[name] is batch[name] for name in batch)


@pytest.mark.parametrize(("dense", "context", "expected"), [(5, 3000, 16), (32, 3000, 32), (0, 50, 0), (5, 3, 8)])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("folded", [False, True])
def test_round_counts(dense, context, expected, padding, folded):
    length = dense + context
    labels = torch.full((1, length + padding), -100)
    labels[:, length - dense + bool(dense) : length] = 1
    mask = (torch.arange(length + padding) < length)[None].long()
    rows = TokenPartition.from_labels(labels, attention_mask=mask)
    assert rows.num_dense == dense
    ours = pad_dense_count(rows, padding_is_context=folded)
    assert ours.num_dense == min(round_count(dense, length + padding), dense + context + padding * folded)
    assert folded or ours.num_dense == expected
    assert set(rows.dense.tolist()) <= set(ours.dense.tolist())
    for part in (ours.dense, ours.context, ours.padding):
        assert part.tolist() == sorted(part.tolist())
    assert sorted(ours.rows.tolist() + ours.padding.tolist()) == list(range(length + padding))
    assert ours.num_padding == (0 if folded else padding)
    assert torch.equal(ours.loss, rows.loss)
