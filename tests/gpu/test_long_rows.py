"""More elements than int32 can count: the last rows of a long micro-batch come out as they do by themselves."""

import pytest
import torch

from sparse_unsloth.ops.mlp import GatedMlp, sparse_mlp
from sparse_unsloth.ops.projection import BaseWeight, Lora, Projection
from sparse_unsloth.tokens.partition import TokenPartition

pytestmark = pytest.mark.gpu
LAST = 512


def make_mlp(hidden: int, intermediate: int, device: str) -> GatedMlp:
    generator = torch.Generator().manual_seed(0)

    def projection(out_features, in_features):
        def draw(*shape):
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device, torch.bfloat16)

        lora = Lora(draw(16, in_features).requires_grad_(), draw(out_features, 16).requires_grad_(), 1.0)
        return Projection(BaseWeight(draw(out_features, in_features)), lora)

    up = [projection(intermediate, hidden) for _ in range(2)]
    return GatedMlp(*up, projection(hidden, intermediate), "silu")


def roles(rows: int, dense: int, device: str) -> TokenPartition:
    """``dense`` rows at the end, context rows before."""
    labels = torch.full((1, rows), -100)
    labels[0, rows - dense + 1 :] = 1
    return TokenPartition.from_labels(labels.to(device))


def run(mlp: GatedMlp, x, partition: TokenPartition, channels):
    """The output and the input's gradient."""
    x = x.detach().requires_grad_()
    y = sparse_mlp(x, partition, channels, mlp)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


def compare_last_rows(rows: int, dense: int, kept: int, hidden: int, intermediate: int, device: str) -> None:
    mlp = make_mlp(hidden, intermediate, device)
    channels = torch.arange(0, intermediate, intermediate // kept, device=device)[:kept]
    generator = torch.Generator().manual_seed(1)
    tail = torch.randn(1, LAST, hidden, generator=generator).to(device, torch.bfloat16)
    x = torch.zeros(1, rows, hidden, device=device, dtype=torch.bfloat16)
    x[:, -LAST:] = tail
    long = run(mlp, x, roles(rows, dense, device), channels)
    short = run(mlp, tail, roles(LAST, min(dense, LAST), device), channels)
    for name, ours, expected in zip(("output", "input gradient"), long, short, strict=True):
        error = (ours[:, -LAST:] - expected).float().norm() / expected.float().norm()
        assert error < 0.02, f"{name}: {error:.3f}"


@pytest.mark.parametrize(("dense", "kept"), [(155_000, 143), (64, 7168)], ids=["dense rows", "context rows"])
def test_the_last_of_many_rows(dense, kept):
    """155,000 dense rows hold 2.2e9 values of gate, as many as 160,000 context rows with half of the channels twice."""
    compare_last_rows(160_000, dense, kept, hidden=512, intermediate=14336, device="cuda")
