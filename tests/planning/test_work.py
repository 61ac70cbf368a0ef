"""What a micro-batch counts."""

from dataclasses import replace

import pytest

from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.planning.work import MicroBatch, Plan, batch_flops, batch_work, fp8_time, mark_repeated


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


@pytest.mark.parametrize(("in_4bit", "checkpointing", "passes"), [(True, True, 3), (True, False, 2), (False, True, 0)])
def test_weights_are_dequantised_in_each_pass_whatever_the_rows(in_4bit, checkpointing, passes):
    plan = Plan(LLAMA_3_8B, ((0.0, 0.0),) * 32, checkpointing=checkpointing, in_4bit=in_4bit)
    for rows in (10, 1000):
        work = batch_work(plan, MicroBatch(rows, 0, 0, rows, (rows,)), True)
        assert work.dequantised == passes * 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)


# -- FP8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "in_4bit", "speed"), [(8192, True, 1.59), (8192, False, 1.62), (1664, True, 1.28), (1664, False, 1.28)]
)
def test_products_in_fp8_are_as_fast_as_measured(rows, in_4bit, speed):
    assert 1 / fp8_time(rows, in_4bit) == pytest.approx(speed, abs=0.01)
    assert fp8_time(16, in_4bit) > 1, "converting the weights takes longer than such products"
    assert fp8_time(10**6, in_4bit) > 1 / 1.8


def test_only_products_with_frozen_weights_are_in_fp8():
    plan = Plan(LLAMA_3_8B, ((0.0, 0.0),) * 32, estimator_rank=0, precision="fp8")
    batch = MicroBatch(2048, 6144, 0, 2048, (2048,) * 4)
    parts = batch_flops(plan, batch, True).parts
    frozen = parts.mlp_base + parts.attention_projections
    work, plain = (batch_work(one, batch, True) for one in (plan, replace(plan, precision="bf16")))
    assert work.spared == pytest.approx(frozen * (1 - fp8_time(8192, True)), rel=1e-6)
    assert 0.85 < frozen / work.products < 0.99
    assert plain.spared == batch_work(replace(plan, whole_layers=False), batch, True).spared == 0
    context = batch_work(replace(plan, precision="fp8-context"), batch, True)
    assert context.spared == pytest.approx(0.75 * frozen * (1 - fp8_time(6144, True)), rel=1e-6)
    rows = batch_work(replace(plan, backward_rows=0.25), batch, True)
    assert 0 < rows.spared < work.spared
    assert plan.dense().precision == "bf16"
    captured = batch_work(replace(plan, precision="bf16", captured=True), batch, True)
    assert work.products == captured.products < plain.products, "layers run as a whole, and leave out a down projection"
