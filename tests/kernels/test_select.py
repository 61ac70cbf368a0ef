"""Selecting channels in one launch, against PyTorch, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from sparse_unsloth.kernels import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["random", "ties", "zeros", "special", "negative"]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New tensors hold no valid index, so that elements that a kernel does not write are found."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(-7))


def draw(size, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(size, generator=generator)
    if kind == "ties":
        scores = torch.randint(0, 4, (size,), generator=generator).float()
    elif kind == "zeros":
        scores.mul_(torch.rand(size, generator=generator) < 0.3)
    elif kind == "special":
        values = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-42, 3e38])
        scores = values[torch.randint(0, len(values), (size,), generator=generator)]
    elif kind == "negative":
        scores -= 0.5
    return scores.to(DEVICE)


def assert_order(order, scores, count):
    assert order.dtype == torch.int64
    assert order.tolist() == select.reference_top_order(scores, count).tolist()


@pytest.mark.parametrize(
    ("size", "kind"), [*((257, kind) for kind in KINDS), *((size, "ties") for size in (1, 2, 7, 128, 1000))]
)
def test_top_order_equals_reference(size, kind):
    scores = draw(size, kind, seed=size)
    for count in {1, max(1, size // 4), max(1, 2 * size // 3), size - 1 or 1, size}:
        assert_order(select.top_order(scores, count), scores, count)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_beyond_the_registers_are_read_in_chunks(kind, monkeypatch):
    monkeypatch.setattr(select, "CHUNK", 256)
    for size, counts in ((256, (77,)), (512, (1, 512)), (700, (210,))):
        scores = draw(size, kind, seed=size)
        for count in counts:
            assert_order(select.top_order(scores, count), scores, count)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize("size", [8192, 14336, 16384, 28672, 65536, 70001])
@pytest.mark.parametrize("kind", KINDS)
def test_top_order_of_real_sizes(size, kind):
    scores = draw(size, kind)
    for count in (1, 143, size // 10, size):
        assert_order(select.top_order(scores, count), scores, count)


def test_a_channel_of_unknown_score_is_taken_last():
    scores = torch.tensor([float("nan"), 0.0, float("inf"), float("nan"), 2.0], device=DEVICE)
    for choose in (select.top_channels, lambda *a: select.top_order(*a)[: a[1]]):
        assert choose(scores, 2).tolist() == [2, 4]
        assert choose(scores, 3).tolist() == [1, 2, 4]
        assert choose(scores, 4).tolist() == [0, 1, 2, 4]


def test_of_equal_scores_the_lowest_channels_are_taken():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0], device=DEVICE)
    assert select.top_channels(scores, 3).tolist() == [0, 1, 2]
    assert select.top_order(scores, 3).tolist() == [0, 1, 2, 3, 4]


HEADS = [
    ((1, 1, 8), ["whole", "special"]),
    ((2, 3, 8), ["whole", "ties"]),
    ((1, 4, 16), ["whole"]),
    ((3, 2, 10), ["whole", "ties", "zeros", "special"]),
    ((5, 1, 24), ["whole"]),
]


@pytest.mark.parametrize(
    ("heads", "kind"),
    [(heads, kind) for heads, kinds in HEADS for kind in kinds],
    ids=lambda value: "kv{}-groups{}-dim{}".format(*value) if isinstance(value, tuple) else value,
)
def test_attention_channels_equal_reference(heads, kind):
    kv_heads, groups, head_dim = heads
    size = kv_heads * head_dim
    energies = [draw(width, kind, seed) for seed, width in enumerate((groups * size, size, size))]
    if kind == "whole":  # exact in any order of summation
        energies = [torch.randperm(len(energy), device=DEVICE).float() for energy in energies]
    pairs = size // 2
    for keys, values in ((1, size), (pairs // 3 or 1, size // 4), (pairs, 1)):
        arguments = (*energies, keys, values, groups, head_dim)
        ours = select.attention_channels(*arguments)
        reference = select.reference_attention_channels(*arguments)
        for name, left, right in zip("qkvo", ours, reference, strict=True):
            assert left.dtype == torch.int64
            assert left.tolist() == right.tolist(), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize("heads", [(8, 4, 128), (32, 1, 128), (64, 1, 128), (4, 7, 128), (1, 8, 256), (32, 1, 80)])
def test_attention_channels_of_real_sizes(heads):
    kv_heads, groups, head_dim = heads
    size = kv_heads * head_dim
    assert select.fits_attention(kv_heads, head_dim)
    energies = [torch.randint(0, 500, (width,), device=DEVICE).float() for width in (groups * size, size, size)]
    arguments = (*energies, size // 5, size // 3, groups, head_dim)
    for left, right in zip(
        select.attention_channels(*arguments), select.reference_attention_channels(*arguments), strict=True
    ):
        assert torch.equal(left, right)
