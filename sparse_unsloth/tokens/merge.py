"""Joins micro-batches into one of the same samples: padding-free ones along the sequence, padded ones along the batch.

A trainer's loss that is a sum over a given divisor (``num_items_in_batch``) is then the sum of theirs, and so is its
gradient (docs/how-it-works.md, section 5.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.partition import IGNORE_INDEX

MAX_PADDING = 0.05
"""Padding that joining may add, as a share of the rows: a row of padding costs what every row costs."""
PER_TOKEN = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "position_ids": 0}
"""Tensors ``[batch, sequence]``, and what pads them."""
LENGTHS, RUNNING_SUMS = ("packed_seq_lengths",), ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
KNOWN = {*PER_TOKEN, *LENGTHS, *RUNNING_SUMS, *LONGEST}


class Extent(NamedTuple):
    """The size of a micro-batch.

    Attributes:
        rows, length: of ``input_ids``.
        along_sequence: documents are told apart by lengths or position ids, so that others may follow them in the row.
        stretches: padding may be added on the right: there is none on the left.
    """

    rows: int
    length: int
    along_sequence: bool
    stretches: bool


def extents(batches: Sequence[Any]) -> tuple[list[Extent], str]:
    """The extent of each micro-batch of an optimiser step, or why they cannot be joined; the host waits once at most.

    Args:
        batches: as a trainer's collator makes them.
    """
    reason = next((why for batch in batches if (why := _why_not_joined(batch, batches[0]))), "")
    if reason:
        return [], reason
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    uncovered = [_uncovered(batch, name) for batch in batches for name in (*LENGTHS, *RUNNING_SUMS) if name in batch]
    padded = [batch["attention_mask"][:, 0].eq(0).sum() for batch in batches if "attention_mask" in batch]
    padded = padded if len(lengths) > 1 else []
    by_position = [batch["position_ids"] for batch in batches if read_batch(batch).layout == "position_ids"]
    first = [ends for ids in by_position for ends in (ids[0, 0], ids.min())]
    facts = torch.stack([*uncovered, *first, *padded]).tolist() if uncovered or first or padded else []
    if any(facts[: len(uncovered)]):
        return [], "the documents' lengths do not cover every token"
    if len(set(facts[len(uncovered) : len(uncovered) + len(first)])) > 1:
        return [], "position_ids do not begin each micro-batch with a new document"
    left_padded = facts[len(uncovered) + len(first) :] or [0] * len(batches)
    found = []
    for batch, on_the_left in zip(batches, left_padded, strict=True):
        rows, length = batch["input_ids"].shape
        told_apart = _told_apart(batch)
        found.append(Extent(rows, length, told_apart and rows == 1, not (told_apart or on_the_left)))
    return found, ""


def tokens_of(group: Sequence[Extent]) -> int | None:
    """The tokens of ``group`` joined, padding included; None where they cannot be joined, or padding would grow."""
    real = sum(one.rows * one.length for one in group)
    if all(one.along_sequence for one in group):
        return real
    if any(one.along_sequence for one in group):
        return None
    longest = max(one.length for one in group)
    tokens = sum(one.rows for one in group) * longest
    grows = all(one.stretches for one in group) and tokens <= (1 + MAX_PADDING) * real
    return tokens if tokens == real or grows else None


def grouped(
    found: Sequence[Extent], most: float, fits: Callable[[Sequence[Extent]], bool], reorder: bool
) -> list[list[int]]:
    """Numbers of the micro-batches that run as one; each group as large as it may be.

    Args:
        found: of the micro-batches of an optimiser step.
        most: micro-batches in a group, at most.
        fits: whether a group of them may run as one.
        reorder: whether padded ones of similar lengths come together; else groups are of neighbours.
    """
    order = list(range(len(found)))
    if reorder:
        order.sort(key=lambda number: not found[number].along_sequence and found[number].length)
    groups = [order[:1]] if order else []
    for number in order[1:]:
        more = [*groups[-1], number]
        if len(more) <= most and fits([found[one] for one in more]):
            groups[-1] = more
        else:
            groups.append([number])
    return groups


def starts(groups: Sequence[Sequence[int]]) -> list[int]:
    """For each micro-batch, 1 where one of ``groups`` (of neighbours) begins, and 0 elsewhere."""
    begin = {min(group) for group in groups}
    return [int(number in begin) for number in range(sum(map(len, groups)))]


def agreed(every: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups that each of several processes can run: one begins wherever one begins on any of them.

    Args:
        every: for each micro-batch, its `starts` on all processes.
    """
    found: list[list[int]] = []
    for number, begin in enumerate(map(max, every)):
        found.append([number]) if begin else found[-1].append(number)
    return found


def why_alone(found: Sequence[Extent], keeps: bool) -> str:
    """Why no two of these micro-batches run as one; ``keeps``: layers that keep activations must not become fewer."""
    if any(tokens_of(pair) is not None for pair in combinations(found, 2)):
        return "two of them do not fit into the memory" + " and keep as many layers" * keeps
    return (
        "they are padded to different lengths, and padding would grow. padding_free=True (TRL, Unsloth), or "
        "packing, lets them be merged"
    )


def join(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One micro-batch of the samples of ``batches``, in their order; `extents` and `tokens_of` allow it.

    The first label of each padding-free micro-batch becomes -100. It predicts nothing there, as no token comes before
    it, and would be predicted by the last token of the micro-batch before.
    """
    along_sequence = all(_told_apart(batch) and len(batch["input_ids"]) == 1 for batch in batches)
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    if not along_sequence and any(batch["input_ids"].shape[1] < longest for batch in batches):
        batches = [{"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in batches]
    joined = {}
    for name, first in batches[0].items():
        values = [batch[name] for batch in batches]
        if name in RUNNING_SUMS:
            joined[name] = _running_sums(values)
        elif name in LONGEST:
            joined[name] = torch.stack(values).amax(0) if isinstance(first, Tensor) else max(values)
        elif name in LENGTHS:
            joined[name] = torch.cat(values)
        elif along_sequence:
            if name == "labels":
                values = [F.pad(value[:, 1:], (1, 0), value=IGNORE_INDEX) for value in values]
            joined[name] = torch.cat(values, dim=1)
        else:
            padding = PER_TOKEN[name]
            joined[name] = torch.cat([F.pad(value, (0, longest - value.shape[1]), value=padding) for value in values])
    return joined


def _why_not_joined(batch: Any, first: Any) -> str:
    """Why ``batch`` cannot be joined to ``first``, the first one; "" where it can."""
    if not isinstance(batch, Mapping):
        return f"a micro-batch is a {type(batch).__name__}, not a mapping of tensors"
    if missing := {"input_ids", "labels"} - batch.keys():
        return f"a micro-batch has no {' and no '.join(sorted(missing))}"
    if unknown := sorted(batch.keys() - KNOWN):
        return f"it is not known how {', '.join(unknown)} of two micro-batches are joined"
    if batch.keys() != first.keys():
        return f"some micro-batches have {', '.join(sorted(batch.keys() ^ first.keys()))}, and others do not"
    shape = batch["input_ids"].shape
    for name in PER_TOKEN.keys() & batch.keys():
        value = batch[name]
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape != shape or value.is_floating_point():
            return f"{name} of a micro-batch are not one integer for each of its tokens"
    return ""


def _told_apart(batch: Mapping[str, Any]) -> bool:
    """Whether lengths or position ids tell the documents of a row apart; with a mask, position ids only count."""
    return "attention_mask" not in batch and read_batch(batch).layout != "padded"


def _uncovered(batch: Mapping[str, Any], name: str) -> Tensor:
    """How many tokens of ``batch`` come after the documents that ``name`` tells: an integer scalar."""
    ends = batch[name].sum() if name in LENGTHS else batch[name][-1]
    return (batch["input_ids"].numel() - ends).to(batch["input_ids"].device)


def _running_sums(values: Sequence[Tensor]) -> Tensor:
    """The running sums ``[documents + 1]`` of all documents from those of each micro-batch."""
    lengths = torch.cat([value.diff() for value in values])
    return F.pad(lengths.cumsum(0), (1, 0)).to(values[0].dtype)
