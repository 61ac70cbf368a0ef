"""Roles of tokens: the same for every layout of the same samples, and equal to a plain loop over tokens."""

import warnings
from itertools import accumulate, chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unsloth.errors import ConfigError
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

repeatable = settings(deadline=None, max_examples=80, derandomize=True)

label = st.sampled_from([IGNORE_INDEX, IGNORE_INDEX, 7])
sample = st.lists(label, min_size=1, max_size=9)
samples = st.lists(sample, min_size=1, max_size=6)


def roles(partition: TokenPartition) -> list[str]:
    """One role a row; also checks that the index tensors are what they promise to be."""
    rows = partition.shape[0] * partition.shape[1]
    names = [""] * rows
    for name in ("dense", "context", "padding"):
        index = getattr(partition, name)
        assert index.dtype == torch.int64
        assert torch.equal(index, index.sort().values)
        for row in index.tolist():
            assert names[row] == ""
            names[row] = name
    assert "" not in names
    return names


def naive_roles(labels: list[int]) -> tuple[list[str], list[bool]]:
    """Role and loss of each token of one document, by the definition."""
    loss = [t + 1 < len(labels) and labels[t + 1] != IGNORE_INDEX for t in range(len(labels))]
    return ["dense" if labels[t] != IGNORE_INDEX or loss[t] else "context" for t in range(len(labels))], loss


def assert_roles(partition: TokenPartition, documents: list[list[int]], rows: list[list[int]], inert: int = 0) -> None:
    """`rows[i][t]` is where token t of document i lies; the last `inert` documents and all other rows are padding."""
    names, loss = roles(partition), set(partition.loss.tolist())
    expected, expected_loss = ["padding"] * len(names), set()
    for document, places in zip(documents[: len(documents) - inert], rows, strict=False):
        for place, role, bears in zip(places, *naive_roles(document), strict=True):
            expected[place] = role
            if bears:
                expected_loss.add(place)
    assert names == expected
    assert loss == expected_loss
    dense, context = expected.count("dense"), expected.count("context")
    assert partition.context_share == pytest.approx(context / max(dense + context, 1))


def inert_tail(documents: list[list[int]]) -> int:
    """Documents of one unlabelled token at the end: position ids cannot tell them from padding."""
    count = 0
    while count < len(documents) and documents[-1 - count] == [IGNORE_INDEX]:
        count += 1
    return count


def padded(documents: list[list[int]], side: str, extra: int):
    width = max(map(len, documents)) + extra
    labels, mask, positions, rows = [], [], [], []
    for i, document in enumerate(documents):
        gap = width - len(document)
        before, after = (gap, 0) if side == "left" else (0, gap)
        labels.append([IGNORE_INDEX] * before + document + [IGNORE_INDEX] * after)
        mask.append([0] * before + [1] * len(document) + [0] * after)
        positions.append([1] * before + list(range(len(document))) + [1] * after)
        rows.append([i * width + before + t for t in range(len(document))])
    return torch.tensor(labels), torch.tensor(mask), torch.tensor(positions), rows


def flattened(documents: list[list[int]], tail: int):
    starts = list(accumulate(map(len, documents), initial=0))
    labels = torch.tensor([[*chain.from_iterable(documents)] + [IGNORE_INDEX] * tail])
    positions = torch.tensor([[t for document in documents for t in range(len(document))] + [0] * tail])
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int32)
    return labels, positions, lengths, [list(range(a, b)) for a, b in pairwise(starts)]


@repeatable
@given(samples, st.integers(0, 5))
def test_right_padded(documents, extra):
    labels, mask, positions, rows = padded(documents, "right", extra)
    for given_mask in (mask, mask.bool(), mask.float()):
        assert_roles(TokenPartition.from_labels(labels, given_mask), documents, rows)
    assert_roles(TokenPartition.from_labels(labels, mask, positions), documents, rows)


@repeatable
@given(samples, st.integers(0, 5))
def test_left_padded(documents, extra):
    labels, mask, positions, rows = padded(documents, "left", extra)
    assert_roles(TokenPartition.from_labels(labels, mask, positions), documents, rows)
    collated = [[IGNORE_INDEX, *document[1:]] for document in documents]
    labels, mask, _, rows = padded(collated, "left", extra)
    assert_roles(TokenPartition.from_labels(labels, mask), collated, rows)


@repeatable
@given(samples, st.integers(0, 9))
def test_padding_free(documents, tail):
    labels, positions, lengths, rows = flattened(documents, tail)
    assert_roles(TokenPartition.from_labels(labels, packed_seq_lengths=lengths), documents, rows)
    both = TokenPartition.from_labels(labels, position_ids=positions, packed_seq_lengths=lengths)
    assert_roles(both, documents, rows)
    for given_positions in (positions, positions[0], positions.int()):
        partition = TokenPartition.from_labels(labels, position_ids=given_positions)
        assert_roles(partition, documents, rows, inert=inert_tail(documents))


@repeatable
@given(samples, st.integers(1, 3), st.booleans())
def test_parts_of_sequences(documents, ranks, ring):
    """Context parallelism: every rank's part has the roles that its tokens have in the whole, whatever lies beside it.

    Parts as Ulysses makes them (one piece a rank) and as ring attention does (one from the front, one from the back).
    """
    width = max(map(len, documents))
    labels, mask, positions, _ = padded(documents, "right", -width % (2 * ranks))
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    whole = TokenPartition.from_labels(labels, mask)
    place = torch.arange(labels.numel()).view(labels.shape)
    pieces = place.chunk(2 * ranks, dim=1)
    for rank in range(ranks):
        two = (pieces[rank], pieces[-1 - rank]) if ring else pieces[2 * rank : 2 * rank + 2]
        rows = torch.cat(two, dim=1)
        part = TokenPartition.from_labels(
            labels.flatten()[rows],
            mask.flatten()[rows],
            positions.flatten()[rows],
            packed_seq_lengths=torch.tensor([labels.shape[1]] * len(labels)),  # as Unsloth leaves them, of the whole
            shift_labels=shifted.flatten()[rows],
        )
        for role in ("dense", "context", "padding", "loss"):
            mine = rows.flatten()[getattr(part, role)].tolist()
            assert set(mine) == set(getattr(whole, role).tolist()) & set(rows.flatten().tolist())
            assert len(mine) == len(set(mine))


def test_shifted_labels_must_fit():
    labels = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shift_labels"):
        TokenPartition.from_labels(labels, shift_labels=labels[:, 1:])


@repeatable
@given(st.lists(samples, min_size=1, max_size=4), st.integers(0, 4))
def test_packed_rows(packs, extra):
    """Several documents a row, several rows, each filled up to the longest with masked padding."""
    width = max(sum(map(len, pack)) for pack in packs) + extra
    labels, positions, mask, rows = [], [], [], []
    for i, pack in enumerate(packs):
        row, position, _, places = flattened(pack, width - sum(map(len, pack)))
        labels.append(row)
        positions.append(position)
        mask.append([1] * sum(map(len, pack)) + [0] * (width - sum(map(len, pack))))
        rows += [[i * width + place for place in document] for document in places]
    documents = [document for pack in packs for document in pack]
    partition = TokenPartition.from_labels(torch.cat(labels), torch.tensor(mask), torch.cat(positions))
    assert_roles(partition, documents, rows)


@repeatable
@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_against_a_loop_over_any_labels_mask_and_lengths(data, batch, sequence):
    rows = batch * sequence
    flat = data.draw(st.lists(label, min_size=rows, max_size=rows))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=5)))
    lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    document = [sum(cut <= row for cut in cuts) for row in range(rows)]
    loss = [
        (row + 1) % sequence != 0 and flat[row + 1] != IGNORE_INDEX and document[row] == document[row + 1]
        for row in range(rows)
    ]
    dense = [flat[row] != IGNORE_INDEX or loss[row] for row in range(rows)]
    absent = [not mask[row] or row >= cuts[-1] for row in range(rows)]
    expected = ["dense" if d else "padding" if a else "context" for d, a in zip(dense, absent, strict=True)]

    def split(dense_tokens):
        shape = (batch, sequence)
        return TokenPartition.from_labels(
            torch.tensor(flat).view(shape),
            torch.tensor(mask).view(shape),
            packed_seq_lengths=torch.tensor(lengths),
            dense_tokens=dense_tokens,
        )

    partition, none = split("output"), split("none")
    assert roles(partition) == expected
    assert partition.loss.tolist() == [row for row in range(rows) if loss[row]]
    assert set(partition.loss.tolist()) <= set(partition.dense.tolist())
    assert roles(none) == ["context" if name == "dense" else name for name in expected]
    assert torch.equal(none.loss, partition.loss)


def test_last_prompt_token_is_dense():
    """The older implementation left it sparse, although it predicts the first answer token."""
    partition = TokenPartition.from_labels(torch.tensor([[-100, -100, -100, 5, 6]]))
    assert partition.dense.tolist() == [2, 3, 4]
    assert partition.loss.tolist() == [2, 3]
    assert partition.context.tolist() == [0, 1]


def test_a_long_prompt_leaves_the_other_rows_dense():
    """The older implementation split all rows at the batch's common prefix."""
    labels = torch.tensor([[-100, 5, 6, 7, 8, 9], [-100, -100, -100, -100, -100, 9]])
    alone = [TokenPartition.from_labels(row[None]).dense for row in labels]
    assert TokenPartition.from_labels(labels).dense.tolist() == [*alone[0].tolist(), *(alone[1] + 6).tolist()]
    flat = TokenPartition.from_labels(labels.view(1, -1), packed_seq_lengths=torch.tensor([6, 6]))
    assert torch.equal(flat.dense, TokenPartition.from_labels(labels).dense)


def test_padding_is_not_context():
    """The older implementation padded to the maximum length and reported the padding as sparse tokens."""
    labels, mask = torch.full((2, 512), -100), torch.zeros(2, 512, dtype=torch.long)
    labels[:, 8:10], mask[:, :10] = 5, 1
    partition = TokenPartition.from_labels(labels, mask)
    assert (len(partition.context), len(partition.dense), len(partition.padding)) == (14, 6, 1004)
    assert partition.context_share == 0.7


def test_several_turns():
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, 7, -100]])
    partition = TokenPartition.from_labels(labels)
    assert partition.dense.tolist() == [1, 2, 3, 5, 6]
    assert partition.context.tolist() == [0, 4, 7]


def test_padding_that_tokens_attend_to_counts_as_tokens():
    """Unsloth drops the mask in training: only padding behind the last token of its row has no reader."""
    labels, mask = torch.full((3, 5), -100), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0]])
    labels[:, 3] = 5
    labels[1] = torch.tensor([-100, -100, 5, -100, -100])
    partition = TokenPartition.from_labels(labels, mask, padding_masked=False)
    assert roles(partition) == [
        *("context", "context", "dense", "dense", "context"),
        *("context", "dense", "dense", "padding", "padding"),
        *("context", "context", "dense", "dense", "padding"),
    ]
    assert roles(TokenPartition.from_labels(labels, mask))[:2] == ["padding", "padding"]


def test_no_loss_and_all_loss():
    none = TokenPartition.from_labels(torch.full((2, 3), -100))
    assert roles(none) == ["context"] * 6
    assert none.loss.numel() == 0
    assert none.context_share == 1.0
    every = TokenPartition.from_labels(torch.ones(2, 3, dtype=torch.long))
    assert roles(every) == ["dense"] * 6
    assert every.loss.tolist() == [0, 1, 3, 4]
    assert every.context_share == 0.0


def test_only_padding_and_no_tokens():
    padding = TokenPartition.from_labels(torch.full((1, 4), -100), torch.zeros(1, 4))
    assert roles(padding) == ["padding"] * 4
    assert padding.context_share == 0.0
    assert roles(TokenPartition.from_labels(torch.zeros(0, 4, dtype=torch.long))) == []
    assert roles(TokenPartition.from_labels(torch.zeros(2, 0, dtype=torch.long))) == []


def test_first_label_of_a_document_is_not_predicted_by_the_one_before():
    labels = torch.tensor([[-100, 5, -100, 9, -100, -100]])
    partition = TokenPartition.from_labels(labels, packed_seq_lengths=torch.tensor([3, 3]))
    assert partition.loss.tolist() == [0]
    assert roles(partition) == ["dense", "dense", "context", "dense", "context", "context"]


def test_lengths_cover_several_rows_in_order():
    labels = torch.tensor([[-100, 5, -100, 6], [-100, -100, 7, -100]])
    partition = TokenPartition.from_labels(labels, packed_seq_lengths=torch.tensor([2, 2, 3]))
    assert partition.loss.tolist() == [0, 2, 5]
    assert roles(partition) == ["dense"] * 4 + ["context", "dense", "dense", "padding"]


def test_masked_rows_that_bear_loss_are_dense():
    """transformers' loss looks at labels alone: it counts labels on padding, and padding that predicts a label."""
    labelled = TokenPartition.from_labels(torch.tensor([[-100, 5, 5]]), torch.tensor([[1, 1, 0]]))
    assert roles(labelled) == ["dense"] * 3
    before = TokenPartition.from_labels(torch.tensor([[-100, -100, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    assert roles(before) == ["padding", "dense", "dense", "dense"]
    assert before.loss.tolist() == [1, 2]


def test_repeated_position_ids_with_labels_are_not_padding():
    labels = torch.tensor([[-100, -100, 5, 6]])
    partition = TokenPartition.from_labels(labels, position_ids=torch.zeros(4, dtype=torch.long))
    assert roles(partition) == ["context", "context", "dense", "dense"]
    assert partition.loss.numel() == 0


class SyncCounter(TorchDispatchMode):
    """Counts operators whose result, or whose result's shape, makes the host wait for the device."""

    WAITING = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.masked_select",
        "aten.is_nonzero",
        "aten.equal",
        "aten._unique2",
        "aten.unique_consecutive",
        "aten.repeat_interleave",
        "aten.bincount",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        boolean_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += boolean_index or str(func).startswith(self.WAITING)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["plain", "masked", "positions", "lengths"])
def test_one_host_sync(form, monkeypatch):
    documents = [[-100, -100, 5], [-100, 6, 6, -100]]
    if form in ("plain", "masked"):
        labels, mask, _, _ = padded(documents, "right", 2)
        kwargs = {"attention_mask": mask} if form == "masked" else {}
    else:
        labels, positions, lengths, _ = flattened(documents, 3)
        kwargs = {"position_ids": positions} if form == "positions" else {"packed_seq_lengths": lengths}
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    with SyncCounter() as counter:
        partition = TokenPartition.from_labels(labels, **kwargs)
        assert partition.context_share > 0
    assert len(lists) == 1
    assert counter.count == 0
    with SyncCounter() as control:
        (labels != -100).nonzero()
        labels[labels != -100]
        labels[0, 0].item()
    assert control.count >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", ["masked", "positions", "lengths"])
def test_one_host_sync_on_the_gpu(form):
    documents = [[-100, -100, 5], [-100, 6, 6, -100]] * 1000
    if form == "masked":
        labels, mask, _, rows = padded(documents, "right", 2)
        kwargs = {"attention_mask": mask.cuda()}
    else:
        labels, positions, lengths, rows = flattened(documents, 3)
        kwargs = {"position_ids": positions.cuda()} if form == "positions" else {"packed_seq_lengths": lengths.cuda()}
    labels = labels.cuda()
    TokenPartition.from_labels(labels, **kwargs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            partition = TokenPartition.from_labels(labels, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1
    assert partition.dense.is_cuda
    assert_roles(partition, documents, rows)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode):
    with mode():
        partition = TokenPartition.from_labels(torch.tensor([[-100, -100, 5]]), position_ids=torch.arange(3))
    assert roles(partition) == ["context", "dense", "dense"]


labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 5, 6]])
BAD = {
    "classification": ({"labels": torch.tensor([0, 1])}, r"int64 of shape \[2\].*one integer label per token"),
    "float labels": ({"labels": torch.zeros(2, 4)}, r"float32 of shape \[2, 4\]"),
    "3-D labels": ({"labels": labels[None]}, r"shape \[1, 2, 4\]"),
    "4-D mask": ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask is of shape \[2, 1, 4, 4\].*4-D mask"),
    "mask by kind": ({"attention_mask": {"full_attention": None}}, r"attention_mask is a dict"),
    "long mask": ({"attention_mask": torch.ones(2, 5)}, r"\[2, 5\], but the labels are \[2, 4\]"),
    "3-D positions": ({"position_ids": torch.zeros(3, 2, 4)}, r"position_ids are of shape \[3, 2, 4\]"),
    "short positions": ({"position_ids": torch.arange(3)}, r"position_ids are of shape \[3\]"),
    "empty lengths": ({"packed_seq_lengths": torch.tensor([], dtype=torch.int32)}, r"at least one"),
    "2-D lengths": ({"packed_seq_lengths": torch.ones(2, 2)}, r"shape \[2, 2\].*1-D"),
    "too many": ({"packed_seq_lengths": torch.tensor([5, 4])}, r"sum to 9 tokens.*hold only 8"),
    "unknown": ({"dense_tokens": "all"}, r"'all'; it must be 'output' or 'none'"),
}


@pytest.mark.parametrize(("kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_inputs(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        TokenPartition.from_labels(**{"labels": labels, **kwargs})
