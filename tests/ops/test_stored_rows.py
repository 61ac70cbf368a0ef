"""Row sparsity without a recompute equals row sparsity with one, in values and gradients."""

from dataclasses import replace

import pytest
import torch

from sparse_unsloth.ops import decoder_layer, stored_rows
from sparse_unsloth.ops.decoder_layer import RowOrder, lora_tensors_of, post_attention
from sparse_unsloth.ops.stored_rows import post_attention_of_rows
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice

from planned_layers import NORMS, QUERIES, RANKS, assert_close, make_layer, roles

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


def outcome(layer, function):
    """Output and gradients of ``function(attention_output, residual)``."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(*layer.x.shape[:-1], QUERIES, generator=generator).requires_grad_()
    output = function(a, layer.x)
    leaves = [a, layer.x, *lora_tensors_of(layer.plan.projections[3:])]
    return [output, *torch.autograd.grad(output, leaves, layer.dy)]


def stored(layer, partition, share):
    """The outcome of `post_attention_of_rows`, and its chosen rows."""
    choice = RowChoice(partition, share)
    chosen = RowOrder(choice.as_partition(), False)
    found = outcome(layer, lambda a, x: post_attention_of_rows(a, x, layer.plan, choice, chosen))
    return found, choice.rows


def recomputed(layer, partition, share):
    """The same with `backward_rows`, which computes the chosen rows again."""
    choice = RowChoice(partition, share)
    chosen = RowOrder(choice.as_partition(), False)
    rows_plan = replace(layer.plan, attention=chosen, mlp=chosen, output_unused=True, keep=False)

    def compute(a, x):
        def function(rows, stream):
            return post_attention(rows, stream, layer.plan if rows is a else rows_plan)

        loras = lora_tensors_of(layer.plan.projections[3:])
        return backward_rows(function, [a, x], loras, BackwardRows(choice, residual_index=1))

    return outcome(layer, compute), choice.rows


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize(
    ("form", "ranks"), [*((form, "equal") for form in NORMS), *(("output norms", one) for one in RANKS)]
)
def test_stored_rows_equal_recomputed_rows(form, ranks, keep):
    partition = roles()
    layer = make_layer(form, ranks, sparse=False, partition=partition, keep=keep)
    (ours, rows), (others, same_rows) = (one(layer, partition, 0.4) for one in (stored, recomputed))
    assert torch.equal(rows, same_rows)
    assert len(rows) == partition.num_dense + 4 < partition.shape[0] * partition.shape[1]
    assert_close(ours, others)
    elsewhere = torch.ones(ours[1].shape[:2], dtype=torch.bool).view(-1).index_fill_(0, rows, False)
    assert not ours[1].flatten(0, 1)[elsewhere].any()
    assert torch.equal(ours[2].flatten(0, 1)[elsewhere], layer.dy.flatten(0, 1)[elsewhere])


def test_every_row_is_the_dense_layer():
    partition = roles("ccdcdcd cccdccc")
    layer = make_layer("output norms", "some", sparse=False, partition=partition)
    ours, _ = stored(layer, partition, 1.0)
    assert_close(ours, outcome(layer, lambda a, x: post_attention(a, x, layer.plan)))


def test_nothing_is_multiplied_again(monkeypatch):
    """With the MLP kept, backward has the products of `post_attention`'s backward; without, the MLP's forward too."""
    partition, counts = roles(), []
    layer = make_layer("output norms", sparse=False, partition=partition)
    original = decoder_layer.after_attention_backward

    def counted(*given):
        with torch.profiler.profile() as profile:
            found = original(*given)
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::mm"))
        return found

    for module in (stored_rows, decoder_layer):
        monkeypatch.setattr(module, "after_attention_backward", counted)
    outcome(layer, lambda a, x: post_attention(a, x, layer.plan))
    for keep in (True, False):
        stored(layer.with_plan(keep=keep), partition, 0.4)
    assert 0 < counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("which", range(1, 9))
def test_a_wrong_row_of_any_stored_tensor_is_found(which, monkeypatch):
    partition = roles()
    layer = make_layer("output norms", sparse=False, partition=partition)
    others, _ = recomputed(layer, partition, 0.4)
    gather = stored_rows.gather

    def wrong(tensors, rows):
        found = gather(tensors, rows)
        found[which] = gather(tensors, rows.roll(1))[which]
        return found

    monkeypatch.setattr(stored_rows, "gather", wrong)
    with pytest.raises(AssertionError):
        assert_close(stored(layer, partition, 0.4)[0], others)
