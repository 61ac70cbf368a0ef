"""Pads micro-batches to length buckets so that CUDA graphs can be reused (docs/how-it-works.md, section 9.3).

Sequences grow by an eighth at most: by padding, or by one more document where documents are packed. Causal attention
hides the new tokens from all others, and they have no labels, so loss and gradients of dense layers stay the same.
Batches that are all as long as each other keep that length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

LENGTHS = 8
"""Length buckets between a power of two and the next."""
LEAST_STEP = 16
"""Tokens between two buckets, at least."""
COUNTS = 16, 128
"""Counts of loss tokens: a step is a 16th of all tokens, at most 128, and at most half of what is counted."""
ROOM_STEP = 4
"""Between two counts of documents; an unused place costs little."""
SCALARS = ("num_items_in_batch", "n_items")


def round_up(size: int, levels: int) -> int:
    """The next of ``levels`` sizes for each power of two, at least `LEAST_STEP` apart."""
    return _next(size, max(LEAST_STEP, (1 << max(size, 1).bit_length() >> 1) // levels))


def round_count(count: int, rows: int) -> int:
    """The next of few counts of loss tokens among ``rows`` tokens; see `COUNTS`."""
    parts, most = COUNTS
    half = (1 << max(count, 1).bit_length() >> 1) // 2
    return _next(count, max(LEAST_STEP, min(rows // parts, most, half)))


def round_room(documents: int) -> int:
    """The next of few counts of documents: for so many a captured attention has room."""
    return _next(documents, max(ROOM_STEP, (1 << documents.bit_length() >> 1) // 4))


def _next(size: int, step: int) -> int:
    return -(-size // step) * step


def bucket(length: int, repeated: bool) -> int:
    """The length that sequences are padded to; ``repeated``: as in `pad_length`."""
    return _next(length, LEAST_STEP) if repeated else round_up(length, LENGTHS)


def pad_length(batch: Batch, limit: int | None = None, repeated: bool = False) -> Batch:
    """``batch``, padded to a length bucket where every tensor of it is known to allow that; else unchanged.

    Args:
        batch: with ``input_ids`` and ``labels`` ``[batch, length]``; packed documents are one sequence with
            ``packed_seq_lengths``. The first tokens are repeated as padding.
        limit: the longest sequence that the model takes, if it is not packed.
        repeated: whether the batch before was as long, as all batches of full sequences are: padded to a multiple of
            `LEAST_STEP` alone then.
    """
    ids, packed = batch.input_ids, batch.packed_seq_lengths
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not _can_grow(batch, ids.shape):
        return batch
    rows, length = ids.shape
    longer = bucket(length, repeated)
    if packed is None and limit is not None:
        longer = max(min(longer, limit), length)
    extra = longer - length
    if not extra or extra > length or (packed is not None and rows > 1):
        return batch

    def grown(values: Tensor | None, filler: int) -> Tensor | None:
        return None if values is None else torch.cat((values, values.new_full((rows, extra), filler)), dim=1)

    changes = {"input_ids": torch.cat((ids, ids[:, :extra]), dim=1), "labels": grown(batch.labels, IGNORE_INDEX)}
    changes["attention_mask"] = grown(batch.attention_mask, 0)
    if packed is not None:
        rest = longer - packed.sum(dtype=packed.dtype)  # with a collator's padding after the last document
        changes["packed_seq_lengths"] = torch.cat((packed, rest[None]))
        if (positions := batch.position_ids) is not None:
            more = torch.arange(extra, dtype=positions.dtype, device=positions.device)
            changes["position_ids"] = torch.cat((positions, more[None]), dim=1)
    return batch.changed(**{name: values for name, values in changes.items() if values is not None})


def pad_dense_count(partition: TokenPartition, padding_is_context: bool) -> TokenPartition:
    """``partition``, with some context tokens among the loss tokens so that few counts occur; no host sync.

    Args:
        padding_is_context: for row sparsity: more rows are chosen then, but no padding before other rows, because it
            has no gradient.
    """
    context, padding = partition.context, partition.padding
    if padding_is_context and len(padding):
        context, padding = torch.cat((context, padding)).sort().values, padding[:0]
    rows = partition.shape[0] * partition.shape[1]
    moved = min(round_count(partition.num_dense, rows) - partition.num_dense, len(context))
    context, more = context.split([len(context) - moved, moved])
    dense = torch.cat((partition.dense, more)).sort().values if moved else partition.dense
    return TokenPartition(partition.shape, dense, context, padding, partition.loss)


def _can_grow(batch: Batch, shape: torch.Size) -> bool:
    """Whether every tensor of ``batch`` is one that `pad_length` pads, or has no length."""
    packed = batch.packed_seq_lengths
    per_token = [
        batch.input_ids,
        batch.labels,
        batch.attention_mask,
        batch.position_ids if packed is not None else None,
    ]
    for name, value in batch.arguments.items():
        if not isinstance(value, Tensor) or name in SCALARS:
            continue
        if value is packed:
            known = value.dim() == 1 and not value.is_floating_point()
        else:
            known = any(value is each for each in per_token) and value.shape == shape
        if not known:
            return False
    return packed is None or isinstance(packed, Tensor)
