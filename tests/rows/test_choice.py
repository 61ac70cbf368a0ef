"""`RowChoice`: rows of answers stay whole, and the energy of the chosen rows is added up where it is."""

from math import ceil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.rows.energy import GradientEnergy
from sparse_unsloth.tokens.partition import TokenPartition

LABELS = torch.tensor([[-100, -100, -100, -100, 7, 8, 9, -100], [-100, -100, 5, 6, 7, 8, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
def test_rows_of_answers_are_never_left_out_by_size(size, share):
    """A quarter of all rows, the largest, makes a model unlearn chat (docs/how-it-works.md, section 3.2)."""
    partition = TokenPartition.from_labels(LABELS, MASK)
    predicting = {3, 4, 5, 9, 10, 11, 12}
    labelled = set((LABELS.flatten() != -100).nonzero().flatten().tolist())
    gradient = torch.full((16, 4), 1e3)
    gradient[sorted(predicting | labelled)] = size
    chosen = set(RowChoice(partition, share).select(gradient).tolist())
    assert predicting | labelled <= chosen
    assert len(chosen - predicting - labelled) == ceil(share * len(partition.context))


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a value of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_energy_of_chosen_rows_is_added_up_without_waiting():
    partition, energy = TokenPartition.from_labels(LABELS, MASK), GradientEnergy()
    assert energy.take() == {}
    expected = torch.zeros(2, dtype=torch.float64)
    for seed in range(2):
        gradient = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        with NoWaiting():
            rows = RowChoice(partition, 0.5, energy.of(3, CPU)).select(gradient)
        squares = gradient.double().square().sum(1)
        expected += torch.stack((squares[rows].sum(), squares.sum()))
    energy.of(1, CPU)  # no backward pass reached it
    RowChoice(partition, 0.5, energy.of(0, CPU)).select(torch.full((16, 4), torch.inf))
    address = energy.of(3, CPU).data_ptr()
    shares = energy.take()
    assert shares.keys() == {3}
    assert shares[3] == pytest.approx((expected[0] / expected[1]).item(), rel=1e-5)
    assert 0 < shares[3] < 1
    assert energy.take() == {}
    assert energy.of(3, CPU).data_ptr() == address, "graphs add to it"
    RowChoice(partition, 1.0, energy.of(3, CPU)).select(torch.zeros(16, 4).index_fill_(0, partition.context, 1.0))
    assert energy.take() == {3: 1.0}
