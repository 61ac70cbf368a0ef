"""The checkpoint planner: same gradients, fewer forwards, and the predicted layers without checkpointing."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sparse_unsloth import SparsityConfig, attach, detach, get_state
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import (
    GIB,
    layer_activations,
    loss_row_activations,
    peak_memory,
    plain_logits,
    row_layer_activations,
)
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.runtime import checkpoint_planner
from sparse_unsloth.runtime.forward import roles_of
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.tokens.batch import read_batch

from tiny_models import always, loss_and_gradients, make_base, make_batch, make_lora

BUDGET = 2.0
SPARSE = always(mlp={"1-2": 0.9}, self_attn={})


def attached(**changes):
    """A checkpointed model at the beginning of training, and the counts of each layer's calls."""
    model = make_lora()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    attach(model, {**SPARSE, "memory_budget": BUDGET, **changes})
    get_state(model).begin_training("test", max_steps=100)
    get_state(model).set_step(0)
    calls = Counter()
    for index, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    return model, calls


def layers_of(model):
    return model.get_base_model().model.layers


def flags(model):
    return [layer.gradient_checkpointing for layer in layers_of(model)]


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes of the budget are left."""

    def leave(count):
        monkeypatch.setattr(checkpoint_planner, "allocated", lambda device: int(BUDGET * GIB - count))

    return leave


def needs(model, index, batch, scale=1.0):
    planner, partition = get_state(model).planner, roles_of(get_state(model), read_batch(batch))
    rows = batch["labels"].numel()
    others = planner._future_bytes + planner._other_bytes(partition, rows, len(layers_of(model)), scale)
    return planner._needs(index, partition, rows, scale)[-1], others


def test_layers_keep_their_activations_as_far_as_the_memory_goes(room):
    expected = None
    model, calls = attached()
    batch = make_batch()
    room(0)
    expected = loss_and_gradients(model, batch)
    assert dict(calls) == {0: 2, 1: 2, 2: 2}
    dense, rest = needs(model, 0, batch)
    sparse, _ = needs(model, 2, batch)
    assert 0 < sparse < dense
    for count, kept in ((sparse, {2}), (2 * sparse, {1, 2}), (2 * sparse + dense, {0, 1, 2})):
        for enough in (False, True):
            room(rest + count + (1 if enough else -100))
            calls.clear()
            loss, gradients = loss_and_gradients(model, batch)
            assert torch.equal(loss, expected[0])
            assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)
            if enough:
                assert {index for index, number in calls.items() if number == 1} == kept
                assert metrics(get_state(model))["sparsity/kept_layers"] == len(kept)
            else:
                assert get_state(model).planner.num_kept == len(kept) - 1
    detach(model)
    assert flags(model) == [True] * 3


def test_a_dense_phase_keeps_fewer(room):
    model, _ = attached(start_step=0, end_step=5)
    batch = make_batch()
    sparse, rest = needs(model, 2, batch)
    room(rest + 2 * sparse + 1)
    loss_and_gradients(model, batch)
    assert flags(model) == [True, False, False]
    get_state(model).set_step(5)
    loss_and_gradients(model, batch)
    assert sum(flags(model)) > 1


def test_longer_micro_batches_keep_fewer(room):
    model, _ = attached()
    short, long = make_batch(), make_batch(lengths=((90, 4), (80, 6), (70, 2)))
    sparse, rest = needs(model, 2, short)
    room(rest + 2 * sparse + 1)
    loss_and_gradients(model, short)
    assert flags(model) == [True, False, False]
    loss_and_gradients(model, long)
    assert flags(model) == [True] * 3


def test_memory_that_is_held_is_left_alone(room):
    model, _ = attached()
    batch = make_batch()
    sparse, rest = needs(model, 2, batch)
    room(rest + 2 * sparse + 1)
    loss_and_gradients(model, batch)
    planner, partition = get_state(model).planner, roles_of(get_state(model), read_batch(batch))
    for held, kept in ((0, 2), (int(sparse), 1), (int(3 * sparse), 0)):
        planner.plan(partition, 1.0, held)
        assert planner.num_kept == kept


def test_forwards_without_labels_or_gradients_keep_nothing_more(room):
    model, _ = attached()
    room(GIB)
    batch = make_batch()
    loss_and_gradients(model, batch)
    assert flags(model) == [False] * 3
    model(input_ids=batch["input_ids"])
    assert flags(model) == [True] * 3
    with torch.no_grad():
        model(**batch)
    assert flags(model) == [True] * 3


def test_checkpointing_that_is_off_stays_off(room):
    model, calls = attached()
    room(0)
    loss_and_gradients(model, make_batch())
    model.gradient_checkpointing_disable()
    calls.clear()
    loss_and_gradients(model, make_batch())
    assert set(calls.values()) == {1}
    get_state(model).end_training()
    assert flags(model) == [False] * 3


def test_a_trainer_switches_it_on_again(room):
    """Transformers does so when training begins, and Unsloth after each evaluation."""
    model, _ = attached()
    room(GIB)
    loss_and_gradients(model, make_batch())
    assert flags(model) == [False] * 3
    model.gradient_checkpointing_enable({"use_reentrant": False})
    room(0)
    loss_and_gradients(model, make_batch())
    assert flags(model) == [True] * 3


def test_the_prediction_is_near_what_a_sparse_mlp_really_keeps():
    """Compares the part that sparsity changes: the stored tensors of gate and up."""
    model = make_lora()
    batch = make_batch(lengths=((90, 10), (90, 10)))
    attach(model, SPARSE)
    shape = ModelShape.from_config(model.config)
    kept = {}
    for name in ("dense", "sparse"):
        if name == "dense":
            detach(model)
            attach(model, {**SPARSE, "mlp": {"1-2": 1e-9}})
        else:
            detach(model)
            attach(model, SPARSE)
        sizes = {}
        bases = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor, sizes=sizes, bases=bases):
            if tensor.untyped_storage().data_ptr() not in bases:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**batch)
        kept[name] = sum(sizes.values())
        del output
    rows, dense_rows = 200, 2 * 11
    predicted = {
        "dense": layer_activations(shape, rows, rows, activation_bytes=4),
        "sparse": layer_activations(shape, rows, dense_rows, kept_channels=13, lora_rank=4, activation_bytes=4),
    }
    saved, expected = kept["dense"] - kept["sparse"], 2 * (predicted["dense"] - predicted["sparse"])
    assert 0.6 * expected < saved < 1.7 * expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_backward_pass_through_few_rows_keeps(family):
    """A hooked MLP and O store their inputs alone; the inputs of the layer and of attention are stored as usual."""
    model, batch, sizes = make_lora(family), make_batch(lengths=((90, 10), (90, 10))), {}
    attach(model, "rows")
    bases = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in bases and tensor.numel() >= 200 * 16:
            sizes[pointer] = tensor.numel() * tensor.element_size()
        return tensor

    layer, counted = layers_of(model)[1], {}
    layer.mlp.register_forward_pre_hook(lambda *_: counted.update(before=sum(sizes.values())))
    layer.mlp.register_forward_hook(lambda *_: counted.update(after=sum(sizes.values())))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
    assert counted["after"] - counted["before"] == 200 * 64 * 4, "the MLP's input"
    shape = ModelShape.from_config(model.config)
    every = row_layer_activations(shape, 200, activation_bytes=4)
    assert every == 200 * 4 * (4 * 64 + 2 * 64 + 2 * 32)
    assert every < 0.75 * layer_activations(shape, 200, 200, activation_bytes=4)
    del output


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_whole_layers_whose_backward_goes_through_few_rows(room, monkeypatch):
    """They keep all as dense layers do, or of context tokens the inputs of what follows attention, as memory allows.

    Besides what is predicted V is a view of Q, K, V (64 + 32 columns) and the MLP keeps ``xA`` (2 x 4).
    """
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    base = make_base(use_cache=False, num_hidden_layers=2)
    base.config._attn_implementation = "sdpa"
    model, batch, sizes = make_lora(base=base), make_batch(lengths=((12, 4), (12, 4))), {}
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert attach(model, {"backward_rows": 0.25, "memory_budget": BUDGET}).whole_layers == 2
    state = get_state(model)
    state.begin_training("test", max_steps=1)
    state.set_step(0)
    planner, partition = state.planner, roles_of(state, read_batch(batch))
    room(0)
    _, expected = loss_and_gradients(model, batch)
    assert (planner.num_kept, planner.context_again) == (0, frozenset())
    rows, loss_rows, shape = 32, 10, ModelShape.from_config(model.config)
    few = loss_row_activations(shape, rows, loss_rows, 4)
    every = layer_activations(shape, rows, rows, activation_bytes=4)
    assert (few, every) == (4 * (5 * 64 * rows + loss_rows * 2 * (128 + 64)), 4 * rows * (2 * 128 + 7 * 64))
    least, most = (checkpoint_planner.MARGIN * kept - 4 * rows * 64 for kept in (few, every))
    needed, rest = needs(model, 1, batch)
    assert needed == pytest.approx(most)
    for count, kept, again in ((least, 1, {1}), (2 * least, 2, {0, 1}), (2 * most, 2, set()), (least + most, 2, {0})):
        for enough in (False, True):
            room(rest + count + (1 if enough else -100))
            planner.plan(partition, 1.0)
            assert enough == ((planner.num_kept, planner.context_again) == (kept, again))
    bases = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in bases and tensor.numel() >= loss_rows * 64:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    counted = [0]
    for layer in layers_of(model):
        layer.register_forward_hook(lambda *_: counted.append(sum(sizes.values())))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for predicted, before, after in zip((few, every), counted, counted[1:], strict=False):
        assert predicted <= after - before <= predicted + 4 * rows * (64 + 32 + 2 * 4)
    model.zero_grad()
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=lambda m, n=name: f"{n}: {m}")
    planner.restore()
    assert not planner.context_again


def test_context_rows_are_computed_again_only_where_it_pays():
    """Where most of them are in backward, a checkpointed layer costs hardly more time and needs less memory."""
    for share, *counts in ((0.1, 2, 2), (0.25, 2, 2), (0.95, 1, 2)):
        model, _ = attached(mlp={}, backward_rows=share)
        planner = get_state(model).planner
        planner._row_layers = dict.fromkeys(range(3), True)
        for lengths, ways in zip((((90, 3), (80, 5)), ((5, 90), (9, 90))), counts, strict=True):
            batch = make_batch(lengths=lengths)
            found = planner._needs(1, roles_of(get_state(model), read_batch(batch)), batch["labels"].numel(), 1.0)
            assert (len(found), found) == (ways, sorted(found))


def test_hooked_layers_whose_backward_goes_through_few_rows_need_less(room):
    model, _ = attached(mlp={}, backward_rows=0.25)
    batch = make_batch()
    few, rest = needs(model, 1, batch)
    dense, _ = needs(model, 1, batch, scale=0.0)
    assert few < 0.75 * dense
    room(rest + 2 * few + 1)
    expected = loss_and_gradients(model, batch)
    assert flags(model) == [True, False, False]
    room(0)
    loss, gradients = loss_and_gradients(model, batch)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


def test_a_share_needs_a_gpu():
    model = make_lora()
    attach(model, always(memory_budget=0.5))
    with pytest.raises(ConfigError, match=r"memory_budget: 0\.5 is a share of a GPU's memory, and the model is on cpu"):
        get_state(model).begin_training("test", max_steps=3)


@pytest.mark.parametrize("value", [0, -1.0, True, "0.9"])
def test_budgets_are_numbers_above_zero(value):
    with pytest.raises(ConfigError, match="memory_budget: must be a number above 0"):
        SparsityConfig(memory_budget=value)


def test_whether_a_forward_of_more_tokens_fits(room):
    """With all layers checkpointed that can be; where as many as before must be kept, with room for those."""
    model, _ = attached()
    planner, tokens = get_state(model).planner, 40
    roles = checkpoint_planner._every_token_bears_loss(tokens)
    rest = planner._future_bytes + planner._other_bytes(roles, tokens, 3)
    (layer,) = planner._needs(0, roles, tokens, 0.0)
    room(rest - 100)
    assert not planner.fits(tokens)
    room(rest + 1)
    assert planner.fits(tokens)
    assert not planner.fits(tokens, held=200)
    assert not planner.fits(tokens, of=tokens // 4)
    room(rest + 3 * layer + 1)
    assert planner.fits(tokens, of=tokens // 4)
    model, _ = attached()
    layers_of(model)[0].gradient_checkpointing = False  # by somebody else: it keeps its activations in any case
    planner = get_state(model).planner
    room(rest + 1)
    assert not planner.fits(tokens)
    room(rest + layer + 1)
    assert planner.fits(tokens)


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_forecast_is_that_of_estimate(mode, share, room):
    """Of forwards with all layers checkpointed, or none: without a margin, what `peak_memory` says."""
    model, _ = attached(mlp={}, backward_rows=0.25)
    planner, batch = get_state(model).planner, make_batch()
    roles, scale = roles_of(get_state(model), read_batch(batch)), float(share < 1)
    room(0 if mode == "on" else GIB)
    kept, forward = planner.forecast(roles, scale)
    assert kept == (0 if mode == "on" else 3)
    rows, through = batch["labels"].numel(), roles.num_dense + -(-roles.num_context // 4)
    shape = ModelShape.from_config(model.config)
    logits = plain_logits(shape, rows, 4)
    common = {"linear": 0, "other": 0, "adapter": 0, "in_4bit": False, "activation_bytes": 4, "whole_layers": False}
    expected = peak_memory(
        shape, rows=rows, checkpointing=mode, logits=logits, **common, backward_rows=through if share < 1 else None
    )
    assert planner.memory.alone(forward) == pytest.approx(expected.peak)
    captured = peak_memory(
        shape,
        rows=rows,
        checkpointing=mode,
        logits=logits,
        **common,
        backward_rows=through if share < 1 else None,
        captured=[(rows, logits)],
    )
    assert planner.memory.peak([forward], [forward]) == pytest.approx(captured.peak)
