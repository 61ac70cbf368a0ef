"""Channel selection from scores: counts, grouped-query pairing, RoPE pairs, and the definition of each criterion."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_unsloth.channels.energy import column_energy
from sparse_unsloth.channels.factors import build_estimator, obtain_estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.kernels.select import (
    key_channel_scores,
    query_channels,
    reference_attention_channels,
    top_channels,
)
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.ops.fused_mlp import channel_order

from tiny_models import make_base, make_batch, make_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["llama", "qwen2", "qwen3", "gemma"]
GROUPS = {
    1: {"num_key_value_heads": 4},
    3: {"hidden_size": 96, "num_attention_heads": 6},
    4: {"num_key_value_heads": 1},
}


def selector(layers, criterion="oracle", estimator=None, **changes):
    config = SparsityConfig(mlp={"all": 0.5}, self_attn={"all": 0.5}, criterion=criterion, **changes)
    return ChannelSelector(config, layers, estimator)


def spread_rows(width, n=64, seed=0, rank=6):
    """Rows with a much larger variance in a few directions than in others, like hidden states."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(n, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return strong + 0.1 * torch.randn(n, width, generator=generator)


def uneven_(layer, seed=0):
    """Scales weights so that channel energies differ as in trained models; random weights give similar energies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in layer.projections().values():
            scale = torch.rand(module.out_features, 1, generator=generator).mul(3).exp() / 5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale / 8)
    return layer


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [(14336, 0.99, 143), (1536, 0.9, 154), (1536, 0.75, 384), (100, 0.999, 1), (8, 0.99, 1), (7, 0.0, 7)],
)
def test_keep_count(size, sparsity, count):
    assert keep_count(size, sparsity) == count


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 8]), st.data())
def test_query_channels_are_those_of_the_key_channels_group(heads, groups, head_dim, data):
    keys = sorted(data.draw(st.sets(st.integers(0, heads * head_dim - 1), min_size=1)))
    chosen = query_channels(torch.tensor(keys), groups, head_dim)
    assert chosen.tolist() == sorted(
        query * head_dim + dim
        for query in range(heads * groups)
        for dim in range(head_dim)
        if (query // groups) * head_dim + dim in keys
    )


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 100))
def test_key_channel_scores_pair_each_query_head_with_its_own_key_head(heads, groups, seed):
    head_dim = 4
    generator = torch.Generator().manual_seed(seed)
    queries = torch.rand(heads * groups * head_dim, generator=generator)
    keys = torch.rand(heads * head_dim, generator=generator)
    scores = key_channel_scores(queries.square(), keys.square(), groups, head_dim)
    for channel in range(heads * head_dim):
        head, dim = divmod(channel, head_dim)
        own = [queries[(head * groups + member) * head_dim + dim] for member in range(groups)]
        assert scores[channel].sqrt().item() == pytest.approx(
            (torch.stack(own).norm() * keys[channel]).item(), rel=1e-5
        )


@given(st.integers(1, 3), st.floats(0, 0.99), st.integers(0, 100))
def test_rope_pairs_come_together_and_the_best_first(heads, sparsity, seed):
    head_dim, half = 8, 4
    scores = torch.rand(heads * head_dim, generator=torch.Generator().manual_seed(seed))
    energies = (torch.ones_like(scores), scores, scores)
    count = keep_count(heads * half, sparsity)
    _, channels, _, _ = reference_attention_channels(*energies, count, 1, 1, head_dim)
    channels = channels.tolist()
    assert channels == sorted(set(channels))
    assert len(channels) == 2 * keep_count(heads * half, sparsity)
    kept = {(channel // head_dim, channel % half) for channel in channels}
    assert len(kept) == len(channels) // 2
    pair = lambda head, dim: (scores[head * head_dim + dim] + scores[head * head_dim + dim + half]).item()  # noqa: E731
    every = {(head, dim) for head in range(heads) for dim in range(half)}
    if every - kept:
        assert min(pair(*p) for p in kept) >= max(pair(*p) for p in every - kept)


def test_column_energy_in_pieces_is_the_same(monkeypatch):
    rows = torch.randn(37, 5, dtype=torch.float64)
    whole = column_energy(rows, 5, torch.sin)
    monkeypatch.setattr("sparse_unsloth.channels.energy.CHUNK_ELEMENTS", 20)
    torch.testing.assert_close(column_energy(rows, 5, torch.sin), whole)
    torch.testing.assert_close(whole, rows.sin().square().sum(0))


def test_column_energy_of_low_precision_rows_is_accumulated_in_fp32():
    rows = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    energy = column_energy(rows, 1, lambda piece: piece)
    assert energy.dtype == torch.float32
    assert energy.item() == pytest.approx(4096, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_chooses_by_the_true_activations(family):
    layers = find_layers(make_base(family))
    layer = layers[1]
    rows = spread_rows(64)
    mlp, attention = layer.module.mlp, layer.module.self_attn
    hidden = ACTIVATIONS[layer.activation](mlp.gate_proj(rows)) * mlp.up_proj(rows)
    chosen = selector(layers).mlp(layer, rows, 0.75).channels
    assert chosen.tolist() == sorted(hidden.square().sum(0).topk(32).indices.tolist())

    energies = {name: F.linear(rows, getattr(attention, f"{name}_proj").weight).square().sum(0) for name in "qkv"}
    selection = selector(layers).attention(layer, rows, 0.5)
    keys = layer.num_kv_heads * layer.head_dim
    assert selection.v.tolist() == sorted(energies["v"].topk(keys // 2).indices.tolist())
    scores = key_channel_scores(energies["q"], energies["k"], layer.groups, layer.head_dim)
    half = layer.head_dim // 2
    pairs = scores.view(-1, 2, half).sum(1).flatten().topk(keys // 4).indices
    first = pairs // half * layer.head_dim + pairs % half
    assert selection.k.tolist() == sorted([*first.tolist(), *(first + half).tolist()])
    for index, size in ((selection.q, layer.num_heads), (selection.o, layer.num_heads)):
        assert index.dtype == torch.int64
        assert len(index) == size * layer.head_dim // 2
        assert (index.diff() > 0).all()


def logits(layer, rows, queries=None, keys=None):
    """Attention logits before rotation, ``[heads, N, N]``, of the chosen channels."""
    attention = layer.module.self_attn
    q, k = F.linear(rows, attention.q_proj.weight), F.linear(rows, attention.k_proj.weight)
    if queries is not None:
        q = torch.zeros_like(q).index_copy_(1, queries, q[:, queries])
        k = torch.zeros_like(k).index_copy_(1, keys, k[:, keys])
    q = q.view(len(rows), layer.num_heads, layer.head_dim).transpose(0, 1)
    k = k.view(len(rows), layer.num_kv_heads, layer.head_dim).transpose(0, 1).repeat_interleave(layer.groups, 0)
    return q @ k.transpose(1, 2)


@pytest.mark.parametrize("groups", GROUPS)
def test_grouped_query_pairing_keeps_the_logits(groups):
    """Regression: query norms were averaged and indexed with wrong pairings, which the logits show."""
    model = make_base("llama", **GROUPS[groups])
    layers = find_layers(model)
    layer = uneven_(layers[0])
    assert layer.groups == groups
    rows = spread_rows(layer.hidden_size)
    truth = logits(layer, rows)

    def error(selection):
        return ((logits(layer, rows, selection.q, selection.k) - truth).norm() / truth.norm()).item()

    ours = error(selector(layers).attention(layer, rows, 0.25))
    chance = selector(layers, "random")
    random = sum(error(chance.attention(layer, rows, 0.25)) for _ in range(8)) / 8
    assert ours < 0.5 * random


@pytest.mark.parametrize("groups", GROUPS)
def test_o_takes_the_value_channels_of_every_query_head(groups):
    """Regression: o_proj used value channel numbers as its own, so only the first heads were ever kept."""
    layers = find_layers(make_base("llama", **GROUPS[groups]))
    layer = layers[0]
    selection = selector(layers).attention(layer, spread_rows(layer.hidden_size), 0.5)
    heads = selection.o // layer.head_dim
    for head in range(layer.num_heads):
        mine = (selection.o[heads == head] % layer.head_dim).tolist()
        own_values = selection.v[selection.v // layer.head_dim == head // layer.groups] % layer.head_dim
        assert mine == own_values.tolist()


def test_wanda_by_its_definition():
    layers = find_layers(make_base("llama"))
    layer, rows = uneven_(layers[0]), spread_rows(64)
    mlp, norms = layer.module.mlp, rows.norm(dim=0)
    hidden = F.silu(mlp.gate_proj(rows)) * mlp.up_proj(rows)
    parts = [mlp.gate_proj.weight.abs() @ norms, mlp.up_proj.weight.abs() @ norms]
    parts.append(mlp.down_proj.weight.abs().sum(0) * hidden.norm(dim=0))
    scores = sum(part / part.mean() for part in parts)
    chosen = selector(layers, "wanda").mlp(layer, rows, 0.9).channels
    assert chosen.tolist() == sorted(scores.topk(13).indices.tolist())
    before = mlp.gate_proj.weight.clone()
    selector(layers, "wanda").attention(layer, rows, 0.5)
    assert torch.equal(mlp.gate_proj.weight, before)


def test_magnitude_looks_at_weights_alone_and_is_worked_out_once(monkeypatch):
    layers = find_layers(make_base("llama"))
    layer = uneven_(layers[0])
    mlp = layer.module.mlp
    scores = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    chosen = selector(layers, "magnitude")
    first = chosen.mlp(layer, spread_rows(64), 0.5)
    assert first.channels.tolist() == sorted(scores.topk(64).indices.tolist())
    assert chosen.mlp(layer, spread_rows(64, seed=9), 0.5) is first
    assert len(chosen.mlp(layer, spread_rows(64), 0.75).channels) == 32
    assert chosen.attention(layer, spread_rows(64), 0.5) is chosen.attention(layer, spread_rows(64, seed=1), 0.5)


def test_random_is_new_at_each_call_and_the_same_sequence_for_a_seed():
    layers = find_layers(make_base("llama"))
    rows = spread_rows(64)

    def draw(seed):
        chosen = selector(layers, "random", seed=seed)
        return [chosen.mlp(layer, rows, 0.5).channels.tolist() for layer in layers for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == draw(5)
    assert first != draw(6)
    assert len({tuple(channels) for channels in first}) == len(first)


@pytest.mark.parametrize("criterion", ["oracle", "wanda", "magnitude"])
def test_lora_branches_play_no_part(criterion):
    plain = make_base("llama", seed=3)
    layers = find_layers(plain)
    rows = spread_rows(64)
    before = selector(layers, criterion).mlp(layers[0], rows, 0.7).channels
    adapted = find_layers(make_lora("llama", base=plain, lora_b=5.0))
    assert torch.equal(selector(adapted, criterion).mlp(adapted[0], rows, 0.7).channels, before)


def test_selection_has_no_gradient_and_takes_any_dtype():
    layers = find_layers(make_base("llama", dtype=torch.bfloat16))
    rows = spread_rows(64).to(torch.bfloat16).requires_grad_()
    config = SparsityConfig(mlp={"all": 0.5}, self_attn={"all": 0.5})
    estimator = build_estimator(layers, config.layer_sparsity(3), SparsityConfig(estimator={"kind": "svd"}).estimator)
    for criterion in ("estimator", "oracle", "wanda", "magnitude", "random"):
        chosen = selector(layers, criterion, estimator)
        assert len(chosen.mlp(layers[0], rows, 0.5).channels) == 64
        assert len(chosen.mlp(layers[0], rows[:1], 0.5).channels) == 64
        assert len(chosen.attention(layers[0], rows, 0.5).o) == 32
    assert rows.grad is None


def test_rows_beyond_the_scored_ones_are_thinned_evenly(monkeypatch):
    layers = find_layers(make_base("llama"))
    sparsity = SparsityConfig(mlp={"all": 0.5}).layer_sparsity(3)
    estimator = build_estimator(layers, sparsity, SparsityConfig(estimator={"kind": "svd"}).estimator)
    rows = spread_rows(64, n=100)
    monkeypatch.setattr("sparse_unsloth.channels.estimator.SCORED_ROWS", 25)
    torch.testing.assert_close(estimator.mlp(layers[0], rows), estimator.mlp(layers[0], rows[::4]))


def test_criterion_estimator_needs_one():
    layers = find_layers(make_base("llama"))
    with pytest.raises(EstimatorError, match=r"needs an Estimator.*another criterion: oracle, wanda"):
        selector(layers, "estimator")


def test_estimator_must_cover_the_sparse_layers():
    layers = find_layers(make_base("llama"))
    config = SparsityConfig(mlp={"1": 0.5}, estimator={"kind": "svd"})
    estimator = build_estimator(layers, config.layer_sparsity(3), config.estimator)
    with pytest.raises(EstimatorError, match=r"nothing for 0\.mlp, 0\.self_attn, 1\.self_attn, 2\.mlp and 1 more"):
        selector(layers, "estimator", estimator)


def test_top_channels_are_ascending():
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
    assert top_channels(scores, 3).tolist() == [1, 3, 4]
    assert math.isclose(scores[top_channels(scores, 1)].item(), 9)


@pytest.mark.parametrize("criterion", ["oracle", "wanda", "magnitude", "random", "svd", "prior"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_kernels_choose_the_same_channels(family, criterion, monkeypatch):
    model = make_base(family, mlp_bias=True)
    layers = find_layers(model)
    layer = uneven_(layers[0])
    changes = {"estimator": {"kind": criterion}} if criterion in ("svd", "prior") else {}
    config = SparsityConfig(mlp={"all": 0.5}, self_attn={"all": 0.5}, **changes)
    estimator = None
    if changes:
        estimator = obtain_estimator(model, layers, config.layer_sparsity(3), config.estimator, samples=[make_batch(0)])
    model.to(DEVICE)
    hidden_states = spread_rows(64, n=90).view(3, 30, 64).to(DEVICE)
    rows = torch.arange(4, 84, device=DEVICE)
    monkeypatch.setattr("sparse_unsloth.channels.estimator.SCORED_ROWS", 30)

    def choose(kernels, *arguments):
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", kernels)
        chosen = selector(layers, "estimator" if changes else criterion, estimator)
        return chosen.mlp(layer, *arguments), chosen.attention(layer, *arguments)

    mlp, attention = choose("torch", hidden_states, 0.7, rows)
    ours, ours_attention = choose("triton", hidden_states, 0.7, rows)
    assert mlp.order is None
    assert torch.equal(ours.channels, mlp.channels)
    assert torch.equal(ours.order, channel_order(mlp.channels, layer.intermediate_size))
    for name in "qkvo":
        assert torch.equal(getattr(ours_attention, name), getattr(attention, name)), name

    gathered, gathered_attention = choose("torch", hidden_states.flatten(0, 1)[rows], 0.7)
    assert torch.equal(gathered.channels, mlp.channels)
    assert torch.equal(gathered_attention.q, attention.q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", ["svd", "prior"])
def test_selection_never_waits_for_the_gpu(kind):
    model = make_base("llama", dtype=torch.bfloat16).cuda()
    layers = find_layers(model)
    config = SparsityConfig(mlp={"all": 0.5}, self_attn={"all": 0.5}, estimator={"kind": kind})
    estimator = obtain_estimator(model, layers, config.layer_sparsity(3), config.estimator, samples=[make_batch(0)])
    chosen = ChannelSelector(config, layers, estimator)
    rows = spread_rows(64, n=3000).to("cuda", torch.bfloat16)
    chosen.mlp(layers[0], rows, 0.5), chosen.attention(layers[0], rows, 0.5)  # moves the factors there, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp, attention = chosen.mlp(layers[0], rows, 0.75), chosen.attention(layers[0], rows, 0.75)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mlp.channels.is_cuda
    assert len(mlp.channels) == 32
    assert len(attention.o) == 16
