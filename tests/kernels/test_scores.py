"""Scores by low-rank factors against their PyTorch references, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from sparse_unsloth.kernels import scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh tensors hold NaN, so that what a kernel leaves unwritten shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(float("nan")))


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_near(ours, reference, tolerance):
    assert ours.shape == reference.shape
    error = ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-12)).item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 3), (40, 96, 16), (70, 300, 6)], ids=lambda s: "M{}-H{}-w{}".format(*s))
def test_low_rank_activations_equal_reference(shape, dtype):
    M, hidden_size, width = shape
    hidden, down = draw(M, hidden_size, dtype=dtype), draw(width, hidden_size, dtype=dtype, seed=1)
    shuffled = torch.randperm(M, device=DEVICE)
    for rows, step in ((None, 1), (None, 3), (shuffled, 1), (shuffled[: M // 2 + 1], 2), (shuffled[::2], 3)):
        ours = scores.low_rank_activations(hidden, rows, step, down)
        assert ours.dtype == dtype
        reference = scores.reference_low_rank_activations(hidden.double(), rows, step, down.double())
        assert_near(ours, reference, TOLERANCE[dtype])


def test_low_rank_activations_of_any_leading_shape_and_strides():
    down = draw(4, 8, seed=1)
    hidden = draw(8, 3, 5).permute(2, 1, 0)
    rows = torch.tensor([14, 2, 9], device=DEVICE)
    ours = scores.low_rank_activations(hidden, rows, 1, down)
    assert_near(ours, hidden.reshape(15, 8)[rows].double() @ down.double().t(), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 5, 1), (70, 130, 8), (64, 64, 17)], ids=lambda s: "N{}-I{}-r{}".format(*s))
@pytest.mark.parametrize("extras", [False, True])
def test_mlp_scores_equal_reference(shape, kind, dtype, extras):
    N, channels, rank = shape
    low_rank, up = draw(N, 2 * rank, dtype=dtype), draw(2 * rank, channels, dtype=dtype, seed=1)
    arguments = [draw(channels, dtype=dtype, seed=2), draw(channels, dtype=dtype, seed=3)] if extras else [None, None]
    arguments.append(draw(channels, seed=4).abs() if extras else None)
    ours = scores.mlp_scores(low_rank, up, kind, *arguments)
    assert ours.dtype == torch.float32
    exact = [None if argument is None else argument.double() for argument in arguments]
    reference = scores.reference_mlp_scores(low_rank.double(), up.double(), kind, *exact)
    assert_near(ours, reference, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6, 2, 1), (70, 200, 70, 8), (33, 64, 64, 17)], ids=lambda s: str(s))
@pytest.mark.parametrize("extras", [False, True])
def test_attention_energies_equal_reference(shape, dtype, extras):
    N, queries, keys, rank = shape
    low_rank, up = draw(N, 3 * rank, dtype=dtype), draw(rank, queries + 2 * keys, dtype=dtype, seed=1)
    gain = draw(queries + 2 * keys, seed=2).abs() if extras else None
    ours = scores.attention_energies(low_rank, up, queries, keys, gain)
    exact = None if gain is None else gain.double()
    assert_near(ours, scores.reference_attention_energies(low_rank.double(), up.double(), queries, keys, exact), 2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [8, 32])
def test_real_sizes(dtype, rank):
    hidden, rows = draw(2, 2048, 4096, dtype=dtype), torch.arange(0, 4000, 2, device=DEVICE)
    down = draw(3 * rank, 4096, dtype=dtype, seed=1) / 64
    low_rank = scores.low_rank_activations(hidden, rows, 2, down)
    assert_near(
        low_rank, scores.reference_low_rank_activations(hidden.double(), rows, 2, down.double()), TOLERANCE[dtype]
    )
    up = draw(rank, 4096 + 2048, dtype=dtype, seed=2)
    energy = scores.attention_energies(low_rank, up, 4096, 1024)
    assert_near(energy, scores.reference_attention_energies(low_rank.double(), up.double(), 4096, 1024), 2e-5)
    low_rank, up = low_rank[:, : 2 * rank].contiguous(), draw(2 * rank, 14336, dtype=dtype, seed=3)
    score = scores.mlp_scores(low_rank, up, "silu")
    assert_near(score, scores.reference_mlp_scores(low_rank.double(), up.double(), "silu"), 1e-4)
