"""What a micro-batch counts."""

from dataclasses import replace

from sparse_unsloth.planning.work import MicroBatch


def test_captured_rows_are_padded_to_buckets():
    batch = MicroBatch(40, 200, 10, 40, (125, 125))
    padded = batch.padded_to_bucket("padded")
    assert (padded.lengths, padded.rows, padded.dense, padded.context) == ((128, 128), 256, 40, 200)
    assert padded.padded_to_bucket("padded") == padded
    flat = replace(batch, context=210, padding=0, lengths=(200, 50)).padded_to_bucket("padding-free")
    assert (flat.lengths, flat.padding, flat.rows) == ((200, 50, 6), 6, 256)
    assert flat.padded_to_bucket("packed") == flat
