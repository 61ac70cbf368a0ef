"""What a micro-batch counts."""

from dataclasses import replace

from sparse_unsloth.planning.work import MicroBatch, mark_repeated


def test_captured_rows_are_padded_to_buckets():
    batch = MicroBatch(40, 200, 10, 40, (125, 125))
    padded = batch.padded_to_bucket("padded")
    assert (padded.lengths, padded.rows, padded.dense, padded.context) == ((128, 128), 256, 40, 200)
    assert padded.padded_to_bucket("padded") == padded
    flat = replace(batch, context=210, padding=0, lengths=(200, 50)).padded_to_bucket("padding-free")
    assert (flat.lengths, flat.padding, flat.rows) == ((200, 50, 6), 6, 256)
    assert flat.padded_to_bucket("packed") == flat


def test_micro_batches_of_one_length_are_hardly_padded():
    """As `sparse_unsloth.graphs.buckets.pad_length` does: a multiple of 16 in place of a bucket."""
    lengths = (8200, 8200, 8200, 5000, 8200)
    flat = [MicroBatch(length, 0, 0, length, (length,)) for length in lengths]
    marked = mark_repeated(flat, "padding-free")
    assert [one.repeated for one in marked] == [True, True, True, False, False]
    assert [one.padded_to_bucket("packed").rows for one in marked] == [8208, 8208, 8208, 5120, 9216]
    assert mark_repeated(flat[:1], "packed") == (flat[0],), "nothing is known of the one before it"
    padded = [MicroBatch(2 * length, 0, 0, 9, (length, length)) for length in (130, 130, 129)]
    assert [one.padded_to_bucket("padded").lengths for one in mark_repeated(padded, "padded")] == [
        (144, 144), (144, 144), (144, 144)
    ]  # fmt: skip
    other = [padded[0], MicroBatch(130, 0, 0, 9, (130,))]
    assert not any(one.repeated for one in mark_repeated(other, "padded")), "more sequences of one length"
