"""Micro-batches of few sizes for `SparsityConfig.cuda_graphs`: tokens that nobody reads fill them up.

A recording holds for one size, and sequences of real data give hardly any size twice. So rows are lengthened behind
their last token, by an eighth at most: padding, or, where documents are packed, a document of its own. Causal attention
keeps both from all other tokens, and neither bears loss, so loss and gradients of dense layers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

LENGTHS = 8
"""How many lengths there are between a power of two and the next."""
LEAST_STEP = 16
"""Between two sizes."""
COUNTS = 16, 128
"""Counts of dense rows: a step is a 16th of all rows, at most so many, and at most half of what is counted."""
ROOM_STEP = 4
"""Between two counts of documents; a place that stays empty costs a little."""
SCALARS = ("num_items_in_batch", "n_items")


def round_up(size: int, levels: int) -> int:
    """The next of ``levels`` sizes for each power of two, at least `LEAST_STEP` apart."""
    return _next(size, max(LEAST_STEP, (1 << max(size, 1).bit_length() >> 1) // levels))


def round_count(count: int, rows: int) -> int:
    """The next of few counts of dense rows among so many ``rows``; see `COUNTS`."""
    parts, most = COUNTS
    half = (1 << max(count, 1).bit_length() >> 1) // 2
    return _next(count, max(LEAST_STEP, min(rows // parts, most, half)))


def round_room(documents: int) -> int:
    """The next of few counts of documents in a row: for how many a recording has room."""
    return _next(documents, max(ROOM_STEP, (1 << documents.bit_length() >> 1) // 4))


def _next(size: int, step: int) -> int:
    return -(-size // step) * step


def pad_length(arguments: Mapping[str, Any], limit: int | None = None) -> dict[str, Any]:
    """A forward's ``arguments`` with rows of a round length, or as they are where one is not known to allow it.

    Args:
        arguments: ``input_ids`` and ``labels`` ``[batch, length]``, as they come from a collator; packed documents are
            one row with ``packed_seq_lengths``. What is added repeats the first tokens.
        limit: the longest row that the model takes, if it is not packed.
    """
    ids, packed = arguments.get("input_ids"), arguments.get("packed_seq_lengths")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not _is_known(arguments, ids.shape):
        return dict(arguments)
    batch, length = ids.shape
    longer = round_up(length, LENGTHS)
    if packed is None and limit is not None:
        longer = max(min(longer, limit), length)
    extra = longer - length
    if not extra or extra > length or (packed is not None and batch > 1):
        return dict(arguments)
    result = {**arguments, "input_ids": torch.cat((ids, ids[:, :extra]), dim=1)}
    for name, filler in (("labels", IGNORE_INDEX), ("attention_mask", 0)):
        if (values := result.get(name)) is not None:
            result[name] = torch.cat((values, values.new_full((batch, extra), filler)), dim=1)
    if packed is not None:
        rest = longer - packed.sum(dtype=packed.dtype)  # with what a collator put behind the last document
        result["packed_seq_lengths"] = torch.cat((packed, rest[None]))
        if (positions := result.get("position_ids")) is not None:
            more = torch.arange(extra, dtype=positions.dtype, device=positions.device)
            result["position_ids"] = torch.cat((positions, more[None]), dim=1)
    return result


def pad_dense_count(partition: TokenPartition, padding_is_context: bool) -> TokenPartition:
    """``partition``, with some context rows among the dense ones so that few counts of them come; no host sync.

    Args:
        padding_is_context: for `backward_rows`: so many more rows are chosen, but none of these before others, for they
            have no gradient.
    """
    context, padding = partition.context, partition.padding
    if padding_is_context and len(padding):
        context, padding = torch.cat((context, padding)).sort().values, padding[:0]
    rows = partition.shape[0] * partition.shape[1]
    moved = min(round_count(partition.num_dense, rows) - partition.num_dense, len(context))
    context, more = context.split([len(context) - moved, moved])
    dense = torch.cat((partition.dense, more)).sort().values if moved else partition.dense
    return TokenPartition(partition.shape, dense, context, padding, partition.loss)


def _is_known(arguments: Mapping[str, Any], shape: torch.Size) -> bool:
    """Whether every tensor among ``arguments`` is one that `pad_length` lengthens, or has no length."""
    packed = arguments.get("packed_seq_lengths")
    rows = {"input_ids", "labels", "attention_mask"} | ({"position_ids"} if packed is not None else set())
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or name in SCALARS:
            continue
        if name == "packed_seq_lengths":
            known = value.dim() == 1 and not value.is_floating_point()
        else:
            known = name in rows and value.shape == shape
        if not known:
            return False
    return packed is None or isinstance(packed, Tensor)
