"""Predicts the padded sizes of micro-batches whose layers are captured in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

from sparse_unsloth.forecast.tokens import PADDED, MicroBatch
from sparse_unsloth.graphs.buckets import LENGTHS, round_up


def padded_to_bucket(batch: MicroBatch, layout: str) -> MicroBatch:
    """Pads ``batch`` to a length bucket, as captured batches are (`sparse_unsloth.graphs.buckets`)."""
    if layout == PADDED:
        length, rows = max(batch.lengths), len(batch.lengths)
        longer = round_up(length, LENGTHS)
        return replace(batch, padding=batch.padding + rows * (longer - length), lengths=(longer,) * rows)
    extra = round_up(batch.rows, LENGTHS) - batch.rows
    if not extra:
        return batch
    return replace(batch, padding=batch.padding + extra, lengths=(*batch.lengths, extra))
