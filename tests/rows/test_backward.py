"""`backward_rows`: an exact forward, and the gradients that masks give."""

import pytest
import torch

from sparse_unsloth.backends.row_hooks import trained
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition

from masked_models import chosen_rows


def make_partition(num_dense=3, num_context=9, num_padding=2):
    rows = torch.randperm(num_dense + num_context + num_padding, generator=torch.Generator().manual_seed(0))
    parts = (part.sort().values for part in rows.split([num_dense, num_context, num_padding]))
    dense, context, padding = parts
    return TokenPartition((1, len(rows)), dense, context, padding, dense)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_gradients_are_those_of_masks(share):
    torch.manual_seed(1)
    partition = make_partition()
    first, second = (torch.nn.Linear(5, 5).double() for _ in range(2))
    a, stream = (torch.randn(1, 14, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(1, 14, 5, dtype=torch.float64)
    weights = trained(first, second)

    def after_attention(a, stream):
        stream = stream + first(a)
        return stream + torch.tanh(second(stream))

    choice = RowChoice(partition, share)
    ours = torch.autograd.grad(
        backward_rows(after_attention, [a, stream], weights, BackwardRows(choice, residual_index=1)),
        (a, stream, *weights),
        dy,
    )
    assert set(choice.rows.tolist()) == chosen_rows(dy, partition, share)
    keep = torch.zeros(14, 1, dtype=torch.float64)
    keep[choice.rows] = 1
    added = after_attention(a, stream) - stream
    expected = torch.autograd.grad(stream + added * keep, (a, stream, *weights), dy)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_every_row_passes_gradcheck():
    torch.manual_seed(2)
    layer, choice = torch.nn.Linear(4, 4).double(), RowChoice(make_partition(2, 4, 0), 1.0)
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *weights: backward_rows(lambda rows: torch.tanh(layer(rows)), [x], weights, BackwardRows(choice)),
        (x, *trained(layer)),
    )


def test_only_what_needs_a_gradient_gets_one():
    layer = torch.nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    x = torch.randn(1, 14, 4)
    backward_rows(layer, [x], trained(layer), BackwardRows(RowChoice(make_partition(), 0.5))).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    assert layer.bias.grad is None


def test_rows_of_another_part_hold():
    choice, layer = RowChoice(make_partition(), 0.2), torch.nn.Linear(4, 4)
    choice.rows = torch.tensor([5])
    x = torch.randn(1, 14, 4, requires_grad=True)
    backward_rows(layer, [x], trained(layer), BackwardRows(choice, select_rows=False)).sum().backward()
    assert x.grad[0].any(dim=-1).nonzero().flatten().tolist() == [5]


def test_an_unused_output_is_not_computed():
    calls, layer, x = [], torch.nn.Linear(4, 4), torch.randn(1, 14, 4, requires_grad=True)

    def function(rows):
        calls.append(rows.shape[1])
        return layer(rows)

    y = backward_rows(function, [x], trained(layer), BackwardRows(RowChoice(make_partition(), 0.2), skip_output=True))
    assert not calls
    assert y.shape == x.shape
    y.backward(torch.ones_like(y))
    assert calls == [3 + 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_left_out(value):
    """It reaches the gradients, as in dense training, where trainers and scalers look for it."""
    layer, partition = torch.nn.Linear(4, 4), make_partition()
    x = torch.randn(1, 14, 4, requires_grad=True)
    dy = torch.randn(1, 14, 4)
    dy[0, partition.context[-1], 2] = value
    backward_rows(layer, [x], trained(layer), BackwardRows(RowChoice(partition, 0.01))).backward(dy)
    assert not layer.weight.grad.isfinite().all()
