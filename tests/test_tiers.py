"""Tiered sparsity: output tokens on channels of their own, from the labels to the gradients."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from sparse_unsloth import SparsityConfig, attach, get_state
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.functions.linear import SelectedProjection, masked_linear, sparse_linear
from sparse_unsloth.functions.mlp import GatedMlp, masked_mlp, sparse_mlp
from sparse_unsloth.partition import TokenPartition

sys.path.insert(0, str(Path(__file__).parent))
from test_attach import assert_gradients_close, record_selections
from test_functions import (
    HIDDEN,
    INTERMEDIATE,
    assert_same,
    loras_of,
    make_projection,
    subset,
)
from tiny import FAMILIES, always, loss_and_gradients, make_batch, make_lora

ROLES = {
    "all": "ccdo odcp",
    "no-context": "dood oodp",
    "no-output": "ccdd cddp",
    "only-output": "oo",
    "output-and-context": "co",
    "one-dense": "do",
}
TIERED = {"output_sparsity": {"mlp": {"all": 0.4}, "self_attn": {"all": 0.25}}}


def partition_of(roles: str) -> TokenPartition:
    lines = roles.split()
    flat = "".join(lines)
    dense, context, padding, output = (
        torch.tensor([i for i, role in enumerate(flat) if role in these], dtype=torch.int64)
        for these in ("do", "c", "p", "o")
    )
    shape = (len(lines), len(lines[0]))
    return TokenPartition(shape, dense, context, padding, dense, output, output)


# -- Roles ------------------------------------------------------------------------------------------------------------


def test_output_tokens_are_told_from_the_last_prompt_token():
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, 7, -100]])
    partition = TokenPartition.from_labels(labels, tiers=True)
    assert partition.dense.tolist() == [1, 2, 3, 5, 6]
    assert partition.output.tolist() == [2, 3, 6]
    assert partition.output_loss.tolist() == [2]
    plain = TokenPartition.from_labels(labels)
    assert plain.output is None
    assert plain.output_loss is None
    assert torch.equal(plain.dense, partition.dense)
    with pytest.raises(ConfigError, match="no dense rows"):
        TokenPartition.from_labels(labels, dense_tokens="none", tiers=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-100, 5]), min_size=1, max_size=24), st.integers(0, 5))
def test_the_tiers_cover_every_row_once(flat, padding):
    labels = torch.tensor([flat + [-100] * padding])
    mask = torch.tensor([[1] * len(flat) + [0] * padding])
    partition = TokenPartition.from_labels(labels, mask, tiers=True)
    output = [row for row, value in enumerate(flat) if value != -100]
    assert partition.output.tolist() == output
    assert partition.output_loss.tolist() == [row for row in output if row in partition.loss.tolist()]
    whole, alone, swapped = partition.without_output, partition.output_alone, partition.output_as_context
    stay = [row for row in partition.dense.tolist() if row not in output]
    every = set(range(labels.numel()))
    for derived, dense, context in (
        (whole, stay, partition.context.tolist()),
        (alone, [], output),
        (swapped, sorted(stay + partition.context.tolist()), output),
    ):
        assert derived.dense.tolist() == dense
        assert derived.context.tolist() == context
        assert derived.padding.tolist() == sorted(every - set(dense) - set(context))
        assert derived.output is None


# -- Functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "lora", "bias"),
    [*((roles, "gud", True) for roles in ROLES.values()), ("cdo odp", "u", False)],
)
@pytest.mark.parametrize("context_dense", [False, True])
def test_mlp_gradcheck(roles, lora, bias, context_dense):
    generator = torch.Generator().manual_seed(0)
    partition = partition_of(roles)
    gate, up = (make_projection(INTERMEDIATE, HIDDEN, generator, name in lora, bias) for name in "gu")
    down = make_projection(HIDDEN, INTERMEDIATE, generator, "d" in lora, bias)
    mlp = GatedMlp(gate, up, down, "silu")
    channels, output = subset(INTERMEDIATE, 3, generator), subset(INTERMEDIATE, 6, generator)
    x = torch.randn(*partition.shape, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    arguments = (partition, None if context_dense else channels, mlp)
    inputs = [x, *loras_of(gate, up, down)]
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours = sparse_mlp(x, *arguments, output_channels=output)
    assert_same(ours, masked_mlp(x, *arguments, output_channels=output), inputs, weights)
    assert gradcheck(lambda x, *_: sparse_mlp(x, *arguments, output_channels=output), inputs)


@pytest.mark.parametrize(
    ("roles", "context_dense"),
    [*((roles, False) for roles in ROLES.values()), *((roles, True) for roles in ("cdo odp", "oo", "co"))],
)
@pytest.mark.parametrize("side", ["out", "in"])
def test_attention_gradcheck(roles, context_dense, side):
    generator = torch.Generator().manual_seed(1)
    partition = partition_of(roles)
    sizes = {"out": [(12, HIDDEN), (6, HIDDEN), (6, HIDDEN)], "in": [(HIDDEN, 8)]}[side]
    parts = []
    for number, (outputs, inputs) in enumerate(sizes):
        width = outputs if side == "out" else inputs
        own, tier = (subset(width, count, generator) for count in (width // 3, width // 2))
        index = {f"output_{side}_index": tier, **({} if context_dense else {f"{side}_index": own})}
        projection = make_projection(outputs, inputs, generator, lora=number != 1, bias=number != 2)
        parts.append(SelectedProjection(projection, **index))
    x = torch.randn(*partition.shape, sizes[0][1], dtype=torch.float64, generator=generator, requires_grad=True)
    inputs = [x, *loras_of(*(part.projection for part in parts))]
    ours, masked = (torch.cat(function(x, partition, parts), -1) for function in (sparse_linear, masked_linear))
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    assert_same(ours, masked, inputs, weights)
    assert gradcheck(lambda x, *_: sparse_linear(x, partition, parts), inputs)


def test_through_the_kernels(monkeypatch):
    """The interpreter runs them where there is no GPU; both tiers go through the fused forms."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    generator = torch.Generator().manual_seed(2)
    partition, hidden, intermediate = partition_of("ccdo odcp"), 16, 32
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    gate, up, down = (make_projection(*shape, generator, dtype=torch.float32) for shape in shapes)
    mlp = GatedMlp(gate, up, down, "silu")
    x = torch.randn(*partition.shape, hidden, generator=generator, requires_grad=True)
    channels, output = subset(intermediate, 8, generator), subset(intermediate, 20, generator)
    arguments = (partition, channels, mlp)
    inputs = [x, *loras_of(gate, up, down)]
    weights = torch.randn(x.shape, generator=generator)
    ours = sparse_mlp(x, *arguments, output_channels=output)
    assert_close(ours, masked_mlp(x, *arguments, output_channels=output), inputs, weights)
    parts = [SelectedProjection(gate, out_index=channels, output_out_index=output)]
    inputs = [x, *loras_of(gate)]
    (ours,), (masked,) = sparse_linear(x, partition, parts), masked_linear(x, partition, parts)
    assert_close(ours, masked, inputs, torch.randn(ours.shape, generator=generator))


def assert_close(ours, masked, inputs, weights):
    """In fp32, products in another order."""
    pairs = [(ours, masked)]
    pairs += zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, masked)), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


# -- Models -----------------------------------------------------------------------------------------------------------


def masked_by_hooks(model, selections, partition):
    """As `test_attach.masked_by_hooks`, with both tiers."""

    def mask(index, part, name, width):
        rows = torch.ones(partition.shape[0] * partition.shape[1], width)
        for tier, tokens in ((part, partition.context), (f"output_{part}", partition.output)):
            rows[tokens] = torch.zeros(width).index_fill_(0, getattr(selections[index, tier], name), 1.0)
        return rows.unflatten(0, partition.shape)

    def output_hook(*key):
        def hook(module, args, output):
            bias = 0 if module.bias is None else module.bias
            return (output - bias) * mask(*key, output.shape[-1]) + bias

        return hook

    def input_hook(*key):
        return lambda module, args: (args[0] * mask(*key, args[0].shape[-1]),)

    for index, layer in enumerate(model.get_base_model().model.layers):
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).base_layer.register_forward_hook(output_hook(index, "mlp", "channels"))
        layer.mlp.down_proj.base_layer.register_forward_pre_hook(input_hook(index, "mlp", "channels"))
        for name in "qkv":
            base = getattr(layer.self_attn, f"{name}_proj").base_layer
            base.register_forward_hook(output_hook(index, "self_attn", name))
        layer.self_attn.o_proj.base_layer.register_forward_pre_hook(input_hook(index, "self_attn", "o"))


@pytest.mark.parametrize(("family", "kind"), [*((family, "svd") for family in FAMILIES), ("llama", "random")])
def test_a_tiered_model_equals_the_masked_model(family, kind):
    batch = make_batch(3, "left" if family == "llama" else "right")
    sparse, masked = make_lora(family), make_lora(family)
    criterion = {"criterion": "random"} if kind == "random" else {}
    attach(sparse, always(**TIERED, **criterion))
    contexts, inputs = record_selections(sparse), []
    layer = get_state(sparse).layers[0]
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    loss, gradients = loss_and_gradients(sparse, batch)
    handle.remove()
    partition = contexts[0].partition
    if kind == "svd":
        by_loss = get_state(sparse).selector.mlp(layer, inputs[0], 0.4, partition.output_loss).channels
        assert torch.equal(contexts[0].selections[0, "output_mlp"].channels, by_loss)
    counts = {name: len(contexts[0].selections[0, name].channels) for name in ("mlp", "output_mlp")}
    assert counts == {"mlp": 51, "output_mlp": 77}
    masked_by_hooks(masked, contexts[0].selections, partition)
    masked_loss, masked_gradients = loss_and_gradients(masked, batch)
    torch.testing.assert_close(loss, masked_loss)
    assert_gradients_close(gradients, masked_gradients, rtol=1e-4, atol=1e-6)
    untiered = make_lora(family)
    attach(untiered, always(**criterion))
    assert abs(loss_and_gradients(untiered, batch)[0] - loss) > 1e-6, "output tokens left nothing out"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_finds_both_tiers_of_its_own_forward(reentrant):
    batches = [make_batch(1), make_batch(2, lengths=((4, 3), (6, 1)))]
    found = []
    for checkpointing in (False, True):
        model = make_lora()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        attach(model, always(criterion="random", **TIERED))
        losses = [model(**batch).loss for batch in batches]
        (losses[0] + 2 * losses[1]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_gradients_close(*found, rtol=1e-5, atol=1e-7)


def test_without_it_nothing_of_a_tier_is_made():
    model = make_lora()
    attach(model, always(output_sparsity=0))
    contexts = record_selections(model)
    loss_and_gradients(model, make_batch())
    assert contexts[0].partition.output is None
    assert {part for _, part in contexts[0].selections} == {"mlp", "self_attn"}
    assert not {"without_output", "output_alone"} & vars(contexts[0].partition).keys()


def test_a_batch_without_context_is_sparse_on_its_output_tokens():
    batch = make_batch()
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    model = make_lora()
    attach(model, always(**TIERED))
    contexts = record_selections(model)
    loss_and_gradients(model, batch)
    assert {part for _, part in contexts[0].selections} == {"output_mlp", "output_self_attn"}


def test_static_channels_of_both_tiers_are_chosen_once():
    model = make_lora()
    attach(model, always(estimator={"kind": "static"}, **TIERED), [make_batch(1)])
    contexts = record_selections(model)
    for seed in range(2):
        loss_and_gradients(model, make_batch(seed))
    one, other = (context.selections for context in contexts)
    assert all(one[key] is other[key] for key in one)
    kept = one[0, "mlp"].channels
    assert torch.isin(kept, one[0, "output_mlp"].channels).all(), "the same ranking, and more of it"


# -- Configuration and report -----------------------------------------------------------------------------------------


def test_one_share_or_rules_and_never_more_than_context():
    config = SparsityConfig(mlp={"1-2": 0.5, "3": 0.1}, self_attn={"2": 0.75}, output_sparsity=0.25)
    layers = config.output_layer_sparsity(4)
    assert [layer.mlp for layer in layers] == [0, 0.25, 0.25, 0.1]
    assert [layer.self_attn for layer in layers] == [0, 0, 0.25, 0]
    rules = config.model_copy(
        update={"output_sparsity": SparsityConfig(output_sparsity={"mlp": {"2": 0.3}}).output_sparsity}
    )
    assert [layer.mlp for layer in rules.output_layer_sparsity(4)] == [0, 0, 0.3, 0]
    assert not any(map(any, SparsityConfig(preset="o2").output_layer_sparsity(32)))


def test_it_survives_a_file(tmp_path):
    for share in (0.25, {"mlp": {"0-1": 0.25}}, 0):
        config = SparsityConfig(mlp={"all": 0.5}, output_sparsity=share)
        config.save(tmp_path / "sparsity.yaml")
        assert SparsityConfig.from_file(tmp_path / "sparsity.yaml") == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_sparsity": 1.0}, r"output_sparsity: must be a number in \[0, 1\)"),
        ({"output_sparsity": "half"}, "output_sparsity: must be a share such as 0.25"),
        ({"output_sparsity": {"attention": {"all": 0.5}}}, "output_sparsity.attention: unknown key"),
        ({"output_sparsity": {"mlp": {"5-3": 0.5}}}, "output_sparsity.mlp.*low to high"),
        ({"output_sparsity": 0.5, "dense_tokens": "none"}, "output_sparsity: must be 0 with dense_tokens 'none'"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ConfigError, match=message):
        SparsityConfig(**given)


def test_layers_that_the_model_does_not_have():
    with pytest.raises(ConfigError, match=r"output_sparsity\.mlp\.7: no such layer"):
        attach(make_lora(), always(output_sparsity={"mlp": {"7": 0.2}}))


def test_report_and_metrics():
    model = make_lora()
    report = attach(model, always(output_sparsity={"mlp": {"1": 0.5}}))
    assert "layer 1: MLP 51 of 128 channels (output tokens 64); attention 16 of 32 channels" in str(report)
    assert "layer 0: MLP 51 of 128 channels; attention" in str(report)
    loss_and_gradients(model, make_batch())
    state = get_state(model)
    assert "sparsity/mean_output_mlp" in state.metrics()
    attach(plain := make_lora(), always())
    assert "sparsity/mean_output_mlp" not in get_state(plain).metrics()
