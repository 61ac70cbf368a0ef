"""Joining micro-batches: every layout, padding on either side, and what is refused."""

import itertools

import pytest
import torch

from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.merge import MAX_PADDING, extents, join, tokens_of
from sparse_unsloth.tokens.partition import TokenPartition

from tiny_models import make_batch


def packed(*lengths, layout="position_ids", seed=0, dtype=torch.int32):
    """A padding-free micro-batch of documents; each first token has a label, which nothing may predict."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (1, sum(lengths)), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    sizes = torch.tensor(lengths, dtype=dtype)
    if layout == "packed_seq_lengths":
        batch["packed_seq_lengths"] = sizes
    if layout == "cu_seq_lens_q":
        sums = torch.cat((sizes.new_zeros(1), sizes.cumsum(0).to(dtype)))
        batch |= {"cu_seq_lens_q": sums, "cu_seq_lens_k": sums, "max_length_q": max(lengths)}
        batch["max_length_k"] = torch.tensor(max(lengths))
    return batch


def joined(*batches):
    """The micro-batches joined, after all that allows it."""
    found, reason = extents(batches)
    assert not reason
    tokens = tokens_of(found)
    if tokens is None:
        return None
    whole = join(batches)
    assert whole["input_ids"].numel() == tokens
    return whole


def roles(batch):
    partition = TokenPartition.from_batch(read_batch(batch))
    return [batch["input_ids"].flatten()[getattr(partition, name)].tolist() for name in ("loss", "dense", "context")]


def roles_of_all(*batches):
    return [list(itertools.chain(*found)) for found in zip(*map(roles, batches), strict=True)]


def documents(batch):
    starts = read_batch(batch).sequence_starts.flatten().nonzero().flatten()
    return [part.tolist() for part in batch["input_ids"].flatten().tensor_split(starts) if len(part)]


@pytest.mark.parametrize("layout", ["position_ids", "packed_seq_lengths", "cu_seq_lens_q"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_free_micro_batches_follow_each_other(layout, dtype):
    parts = [packed(*sizes, layout=layout, seed=n, dtype=dtype) for n, sizes in enumerate([(3, 4), (5,), (2, 1, 6)])]
    whole = joined(*parts)
    assert documents(whole) == [document for part in parts for document in documents(part)]
    assert whole["position_ids"].tolist() == [[i for size in (3, 4, 5, 2, 1, 6) for i in range(size)]]
    assert whole["labels"][0, [0, 7, 12]].tolist() == [-100] * 3  # others are not changed
    assert (whole["labels"] != -100).sum() == 21 - 3
    assert parts[1]["labels"][0, 0] != -100
    assert roles(whole)[0] == [token for part in parts for token in roles(part)[0]]
    if layout == "packed_seq_lengths":
        assert whole["packed_seq_lengths"].tolist() == [3, 4, 5, 2, 1, 6]
    if layout == "cu_seq_lens_q":
        assert whole["cu_seq_lens_q"].tolist() == whole["cu_seq_lens_k"].tolist() == [0, 3, 7, 12, 14, 15, 21]
        assert (whole["max_length_q"], whole["max_length_k"].item()) == (6, 6)
        assert whole["cu_seq_lens_q"].dtype == dtype


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_micro_batches_of_one_length_are_stacked(side):
    parts = [make_batch(seed=seed, side=side) for seed in range(3)]
    whole = joined(*parts)
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts]))
    assert roles(whole) == roles_of_all(*parts)
    no_masks = [{name: value for name, value in part.items() if name != "attention_mask"} for part in parts]
    assert joined(*no_masks).keys() == no_masks[0].keys()


def test_padding_is_added_on_the_right_alone_and_only_a_little():
    a, b = make_batch(0, lengths=((30, 10), (20, 5))), make_batch(1, lengths=((30, 11), (41, 0)))
    whole = joined(a, b)
    assert whole["input_ids"].shape == (4, 41)
    assert torch.equal(
        whole["attention_mask"], torch.cat([torch.nn.functional.pad(a["attention_mask"], (0, 1)), b["attention_mask"]])
    )
    assert whole["labels"][:2, 40].tolist() == [-100, -100]
    assert roles(whole) == roles_of_all(a, b)
    del a["attention_mask"], b["attention_mask"]  # no padding before; what is added is masked
    assert joined(a, b)["attention_mask"].sum() == a["input_ids"].numel() + b["input_ids"].numel()
    long = make_batch(1, lengths=((40, 20),))
    del long["attention_mask"]
    assert joined(a, long) is None, f"more than {MAX_PADDING:.0%}"
    left = [make_batch(0, "left", lengths=((30, 10), (20, 5))), make_batch(1, "left", lengths=((30, 11), (31, 0)))]
    assert joined(*left) is None


def test_rows_of_packed_documents_are_stacked():
    """Documents of several rows are told apart by row, and their lengths count over all rows."""
    one = packed(3, 5, 2, 6, layout="packed_seq_lengths")
    rows = {name: value.view(2, 8) if value.ndim == 2 else value for name, value in one.items()}
    whole = joined(rows, rows)
    assert whole["input_ids"].shape == (4, 8)
    assert whole["packed_seq_lengths"].tolist() == [3, 5, 2, 6] * 2
    longer = packed(4, 4, 2, 8, layout="packed_seq_lengths")
    longer = {name: value.view(2, 9) if value.ndim == 2 else value for name, value in longer.items()}
    assert joined(rows, longer) is None
    assert joined(rows, packed(8, layout="packed_seq_lengths")) is None


def changed(batch, **changes):
    return {name: value for name, value in {**batch, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (changed(packed(3), labels=None), "no labels"),
        (changed(packed(3), input_ids=None), "no input_ids"),
        (changed(packed(3), pixel_values=torch.zeros(1, 3)), "not known how pixel_values of"),
        (
            changed(packed(3), token_type_ids=torch.zeros(1, 3).long(), seq_idx=torch.zeros(1, 3)),
            "seq_idx, token_type_ids",
        ),
        (changed(packed(3), shift_labels=torch.zeros(1, 3).long()), "shift_labels"),
        (packed(3, layout="packed_seq_lengths"), "some micro-batches have packed_seq_lengths, and others do not"),
        (changed(packed(3), labels=torch.zeros(1)), "labels of a micro-batch are not one integer for each"),
        (changed(packed(3), position_ids=torch.arange(3)), "position_ids of a micro-batch"),
        (
            changed(packed(3), position_ids=torch.tensor([[4, 5, 6]])),
            "do not begin each micro-batch with a new document",
        ),
        ([packed(3)], "a micro-batch is a list"),
    ],
)
def test_what_is_not_joined(second, reason):
    found, said = extents([packed(4), second])
    assert not found
    assert reason in said


@pytest.mark.parametrize("layout", ["packed_seq_lengths", "cu_seq_lens_q"])
def test_lengths_that_end_before_the_tokens(layout):
    short = packed(3, 2, layout=layout)
    short["input_ids"], short["labels"], short["position_ids"] = (torch.ones(1, 6).long() for _ in range(3))
    found, said = extents([packed(4, layout=layout), short])
    assert not found
    assert said == "the documents' lengths do not cover every token"
