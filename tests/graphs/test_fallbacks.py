"""Where captured layers run without capture by themselves: the result is that of layers that are never captured.

`Rerun` stands for CUDA graphs and shares memory as they do; layers are plain PyTorch in float64 (`plain_layers`). Real
graphs are tested in tests/gpu/test_graphs.py.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_unsloth import detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.graphs import recorder as graphs
from sparse_unsloth.kernels import dequantize
from sparse_unsloth.ops.projection import read_base
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT
from sparse_unsloth.runtime.metrics import metrics

from plain_layers import use_plain_layers
from recorded_layers import Rerun, Unused, attach_with, other_rows
from tiny_models import loras, loss_and_gradients, make_base, make_batch, pack_nf4
from unsloth_stand_in import decoder_layers
from whole_layers import FastLayer, make_model

LAYERS = 2
RULES = ["dense", "MLP alone", "rows"]
WAYS = ["reentrant", "non-reentrant", False]
ONE = make_batch(lengths=((5, 4), (3, 2)))
BATCHES = ONE, other_rows(ONE), make_batch(seed=3, lengths=((8, 4), (4, 3)))  # no length bucket makes them longer


@pytest.fixture
def recorder(monkeypatch):
    return use_plain_layers(monkeypatch)


def make(stand_in, way, **changes):
    return make_model(stand_in, way, num_hidden_layers=LAYERS, dtype=torch.float64, **changes)


def attach_captured(model, rules="dense", batches=BATCHES, **changes):
    """Attaches and captures every batch's signature."""
    state = attach_with(model, rules, True, **changes)
    for batch in (*batches, *batches):
        loss_and_gradients(model, batch)
    assert state.graphs.captured_keys
    return state


def uncaptured(model, rules, run, **changes):
    attach_with(model, rules, False, **changes)
    get_state(model).graphs = Unused(Rerun())
    try:
        return run(model)
    finally:
        detach(model)


def gradients_of(model):
    return [parameter.grad.clone() for parameter in loras(model).values() if parameter.grad is not None]


def assert_equal(ours, expected):
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-9  # the loss and softmax are computed in float32


def check(model, recorder, rules, scenarios, repeats=2, **changes):
    """Compares what each scenario returns of the captured model with what it returned of one that is never captured.

    Returns:
        Of each scenario what was warned of, and how often graphs were replayed in its last run.
    """
    expected = uncaptured(model, rules, lambda model: [run(model) for run in scenarios], **changes)
    state, found = attach_captured(model, rules, **changes), []
    for run, gradients in zip(scenarios, expected, strict=True):
        state.warned.clear()
        for _ in range(repeats):
            before = recorder.replayed
            assert_equal(run(model), gradients)
        found.append((" ".join(state.warned), recorder.replayed - before))
        assert not state.graphs.given_up
    return found


def counted(function):
    """A scenario that begins without gradients."""

    def run(model):
        model.zero_grad()
        found = function(model)
        return [*(() if found is None else found), *gradients_of(model)]

    return run


@counted
def compared(model):
    """As DPO does: the policy on chosen and on rejected answers, then one backward."""
    first, second = model(**BATCHES[0]).loss, model(**BATCHES[1]).loss
    F.softplus(3 * (first - second)).backward()


@counted
def of_other_shapes(model):
    losses = [model(**batch).loss for batch in (BATCHES[0], BATCHES[2], BATCHES[1])]
    (losses[0] * losses[1] + losses[2]).backward()


@counted
def first_in_first_out(model):
    first, second = model(**BATCHES[0]).loss, model(**BATCHES[1]).loss
    first.backward()
    second.backward()


@counted
def last_in_first_out(model):
    first, second = model(**BATCHES[0]).loss, model(**BATCHES[1]).loss
    second.backward()
    first.backward()


@counted
def evaluated_in_between(model):
    loss = model(**BATCHES[0]).loss
    with torch.no_grad():
        model(**BATCHES[1])
        model.eval()
        model(**BATCHES[1])
        model.train()
    loss.backward()


@counted
def never_backward(model):
    model(**BATCHES[1])
    with torch.no_grad():
        model(**BATCHES[1])
    model(**BATCHES[0]).loss.backward()


@counted
def of_logits(model):
    output = model(**BATCHES[0])
    (output.logits.log_softmax(-1).square().mean() + output.loss).backward()


@counted
def by_hand(model):
    """A loss from the logits alone, beside labels that only tell roles."""
    logits = model(**BATCHES[1]).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCHES[1]["labels"][:, 1:].flatten()).backward()


@counted
def twice(model):
    loss = model(**BATCHES[0]).loss
    loss.backward(retain_graph=True)
    loss.backward()


@counted
def twice_with_others_in_between(model):
    loss = model(**BATCHES[0]).loss
    loss.backward(retain_graph=True)
    model(**BATCHES[1]).loss.backward()
    other = model(**BATCHES[2]).loss
    loss.backward()
    other.backward()


@counted
def of_hidden_states(model):
    """Gradients of hidden states by hooks and `retain_grad`, of which two have a second consumer."""
    states, loss = hidden_states_of(model)
    seen = {}
    for number, state in enumerate(states):
        state.register_hook(partial(seen.__setitem__, number))
    states[0].retain_grad()
    (loss + states[0].square().mean() + states[1].sin().mean()).backward()
    return [seen[number] for number in range(LAYERS)] + [states[0].grad]


@counted
def by_autograd_grad(model):
    states, loss = hidden_states_of(model)
    return torch.autograd.grad(loss, [*states, *loras(model).values()])


def hidden_states_of(model):
    """Each layer's output outside its checkpoint, and the loss."""
    states = []

    def call(layer, *args, **kwargs):
        states.append(original(layer, *args, **kwargs))
        return states[-1]

    original, FastLayer.__call__ = FastLayer.__call__, call
    try:
        loss = model(**BATCHES[0]).loss
    finally:
        FastLayer.__call__ = original
    assert len(states) == LAYERS
    return states, loss


@counted
def of_norms(model):
    """Norms of gradients, by hooks on parameters, and the clipped gradients of two batches."""
    norms, handles = {}, []

    def note(name, gradient):
        norms[name] = gradient.norm()

    for name, parameter in loras(model).items():
        handles.append(parameter.register_hook(partial(note, name)))
    for batch in BATCHES[:2]:
        model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return [*(norms[name] for name in sorted(norms)), torch.nn.utils.clip_grad_norm_(loras(model).values(), 0.01)]


MIXED = [compared, of_other_shapes, first_in_first_out, last_in_first_out, evaluated_in_between]
COUNTS = [2, 3, 2, 2, 1]
"""Of the forwards that have a backward."""
CALLS = {"reentrant": 3, "non-reentrant": 3, False: 2}
OTHERS = [never_backward, of_logits, by_hand, twice, twice_with_others_in_between, of_hidden_states, of_norms]


MIXING = [*(("rows", way) for way in WAYS), ("MLP alone", "reentrant"), ("dense", "non-reentrant")]
REST = [(rules, way) for rules in RULES for way in WAYS if (rules, way) not in MIXING] + [("rows", "reentrant")]
"""All rules in all ways, divided between two tests: what they share is what captured forwards keep for a backward."""


@pytest.mark.parametrize(("rules", "way"), MIXING)
def test_forwards_and_backwards_that_mix(stand_in, recorder, rules, way):
    calls = CALLS[way] * LAYERS
    waits = way is False or rules == "MLP alone"  # else nothing of a forward lies between it and its backward
    for (said, replayed), forwards in zip(check(make(stand_in, way), recorder, rules, MIXED), COUNTS, strict=True):
        assert ("before the backward" in said) == waits
        assert replayed == calls * (1 if waits else forwards) + LAYERS * (forwards == 1 and not waits)


@pytest.mark.parametrize(("rules", "way"), REST)
def test_losses_and_backwards_of_other_kinds(stand_in, recorder, rules, way):
    scenarios = OTHERS if way == "reentrant" else [*OTHERS, by_autograd_grad]  # which reentrant checkpointing refuses
    found = check(make(stand_in, way), recorder, rules, scenarios)
    assert all(replayed >= CALLS[way] * LAYERS for _, replayed in found)


def test_a_backward_that_came_is_not_awaited(stand_in, recorder):
    """Though the loss, and with it the graph of autograd, is still there when the next forward begins."""
    model = make(stand_in, False)
    attach_captured(model, batches=BATCHES[:1])
    for _ in range(3):
        before = recorder.replayed
        loss = model(**BATCHES[0]).loss
        loss.backward()
        assert recorder.replayed == before + CALLS[False] * LAYERS


@pytest.mark.parametrize("way", ["reentrant", False])
def test_captures_that_fail(stand_in, recorder, monkeypatch, caplog, way):
    """Whichever of its captures fails, a step has the right gradients; its signature alone is given up."""
    model, capture, calls = make(stand_in, way), recorder.capture, []
    steps = [partial(first_step, number) for number in (0, 2)]
    expected = uncaptured(model, "MLP alone", lambda model: [step(model) for step in steps])
    fails = 0

    def selections():
        contexts = [runtime.context for runtime in get_state(model).whole_forwards if runtime.context is not None]
        return {key: chosen for context in contexts for key, chosen in context.selections.items()}

    def fail(function, kept):
        calls.append(function)
        if len(calls) == fails:
            before = selections()
            function()  # it fails when it has computed something, which while it is captured nothing computes
            for key, chosen in selections().items():
                if key not in before:
                    chosen.channels.zero_()
            raise torch.OutOfMemoryError("planted")
        return capture(function, kept)

    monkeypatch.setattr(recorder, "capture", fail)
    for fails in range(1, CALLS[way] * LAYERS + 1):
        state = attach_with(model, "MLP alone", True)
        for number in (0, 0, 0, 2, 2, 2, 0, 2):
            assert_equal(steps[number // 2](model), expected[number // 2])
        assert len(calls) > fails
        assert len(state.graphs.given_up) == 1
        assert {key for _, key, _ in state.graphs._captures} | set(state.graphs._kept) == {
            key for key in state.graphs.captured_keys if key not in state.graphs.given_up
        }
        assert not state.graphs.awaits_backward
        assert state.counts.captured_layers == LAYERS, "the other signature is captured"
        assert caplog.text.count("a capture failed") == 1
        caplog.clear()
        calls.clear()
        detach(model)


def first_step(number, model):
    return [loss_and_gradients(model, BATCHES[number])[0], *gradients_of(model)]


def test_captures_that_keep_failing_end(stand_in, recorder, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_GIVEN_UP", 1)
    model, tried = make(stand_in, False), []

    def fail(function, kept):
        tried.append(function)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recorder, "capture", fail)
    state = attach_captured(model)
    assert len(tried) == len(state.graphs.given_up) == 1
    assert "not permitted when stream is capturing" in caplog.text


def test_mistakes_in_captured_functions_are_raised(stand_in, recorder, monkeypatch):
    model, batch = make(stand_in, False), BATCHES[0]
    attach_with(model, "dense", True)
    loss_and_gradients(model, batch)

    def attend(*given):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(whole_layer, "attend", attend)
    with pytest.raises(RuntimeError, match="a mistake"):
        model(**batch)


@pytest.mark.parametrize("way", ["reentrant", False])
def test_adapters_that_take_turns(stand_in, recorder, way, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_RECAPTURES", 1)
    model = make(stand_in, way)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_(0, 0.05)

    def run(model, adapter):
        model.set_adapter(adapter)
        model.zero_grad()
        model(**BATCHES[0]).loss.backward()
        return [one.grad.clone() for name, one in model.named_parameters() if f".{adapter}." in name]

    adapters = ["default", "other"]
    expected = uncaptured(model, "dense", lambda model: [run(model, adapter) for adapter in adapters])
    model.set_adapter("default")
    state = attach_captured(model, batches=BATCHES[:1])
    for step in range(8):
        assert_equal(run(model, adapters[step % 2]), expected[step % 2])
        held = recorder.recorded, recorder.replayed
    assert recorder.recorded > CALLS[way] * LAYERS
    assert_equal(run(model, "default"), expected[0])
    assert held == (recorder.recorded, recorder.replayed), "captures end"
    assert "weights change their addresses" in " ".join(state.warned)


def replace_norm(layer):
    layer.input_layernorm.weight = nn.Parameter(1.5 * layer.input_layernorm.weight.detach(), requires_grad=False)


def move_norm(layer):
    layer.post_attention_layernorm.weight.data = 0.5 * layer.post_attention_layernorm.weight.data


def replace_bias(layer):
    layer.self_attn.q_proj.base_layer.bias = nn.Parameter(torch.ones(32, dtype=torch.float64), requires_grad=False)


@pytest.mark.parametrize("way", ["reentrant", False])
def test_frozen_tensors_that_are_replaced(stand_in, recorder, way):
    """Graphs would read where they were."""
    model = make(stand_in, way)
    attach_captured(model, batches=BATCHES[:1])
    for change in (replace_norm, move_norm, replace_bias):
        recorded = recorder.recorded
        change(decoder_layers(model)[0])
        steps = [first_step(0, model) for _ in range(2)]
        assert recorder.recorded == recorded + CALLS[way] * (LAYERS if way is False else 1), change
        changed = get_state(model)
        detach(model)
        plain = first_step(0, model)
        for step in steps:
            assert_equal(step, plain)
        attach_captured(model, batches=BATCHES[:1])
        assert get_state(model) is not changed


def test_all_that_kernels_read_of_a_four_bit_weight():
    """What a captured kernel is given, so that a replaced quantisation state is noticed."""
    layer = pack_nf4(make_base(num_hidden_layers=1)).model.layers[0].mlp.down_proj
    state = layer.weight.quant_state
    read = read_base(layer)
    assert {id(one) for one in dequantize._scales(state)} <= {id(one) for one in read.tensors()}
    state.nested, state.state2, state.offset = True, SimpleNamespace(absmax=torch.ones(1), code=torch.ones(2)), layer
    assert {id(one) for one in dequantize._scales(state)} <= {id(one) for one in read.tensors()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rules", RULES)
def test_layers_within_one_checkpoint(stand_in, recorder, rules, reentrant):
    """The recompute of the second one overwrites what the first one's backward reads, and reads its output."""
    model = make(stand_in, "reentrant" if reentrant else False)
    set_checkpointing(model, False)
    checkpoint_together(model, reentrant)
    expected = uncaptured(model, rules, partial(first_step, 0))
    plain = first_step(0, model)
    state = attach_captured(model, rules, batches=BATCHES[:1])
    for _ in range(3):
        assert_equal(first_step(0, model), expected)
    if rules == "dense":
        assert_equal(expected, plain)
    assert recorder.recorded == LAYERS, "first forwards alone"
    assert recorder.replayed >= 3 * LAYERS
    assert sum("checkpointed together" in message for message in state.warned) == 1


def set_checkpointing(model, flag):
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = flag


def checkpoint_together(model, reentrant):
    """Runs all decoder layers within one checkpoint."""
    layers, stack = list(decoder_layers(model)), model.get_base_model().model

    class Together(nn.Module):
        def forward(self, hidden_states, **kwargs):
            def run(hidden_states):
                for layer in layers:
                    hidden_states = layer(hidden_states, **{**kwargs, CONTEXT_ARGUMENT: context})
                return hidden_states

            context = kwargs.pop(CONTEXT_ARGUMENT, None)
            return checkpoint(run, hidden_states, use_reentrant=reentrant)

    original, together = stack.forward, Together()

    def forward(*args, **kwargs):
        stack.__dict__["layers"] = [together]
        try:
            return original(*args, **kwargs)
        finally:
            del stack.__dict__["layers"]

    stack.forward = forward


@pytest.mark.parametrize("way", ["reentrant", False])
@pytest.mark.parametrize("rules", ["MLP alone", "rows"])
def test_dense_phases_are_captured(stand_in, recorder, rules, way):
    """Before, between and after sparse steps, and of a batch without context tokens."""
    model = make(stand_in, way)
    whole = {**BATCHES[0], "labels": BATCHES[0]["input_ids"].clone()}
    dense, of_whole = first_step(0, model), [loss_and_gradients(model, whole)[0], *gradients_of(model)]
    expected = uncaptured(model, rules, partial(first_step, 0))
    assert not all(torch.allclose(*pair) for pair in zip(dense, expected, strict=True))
    state = attach_with(model, rules, True, start_step=3, end_step=6, explain_steps=0)
    state.begin_training("driver", 10)
    captured = []
    for step in range(9):
        state.set_step(step)
        assert_equal(first_step(0, model), expected if 3 <= step < 6 else dense)
        captured.append(state.counts.captured_layers)
    assert captured == [0, LAYERS, LAYERS, 0, *[LAYERS] * 5]
    recorded = recorder.recorded
    assert recorded == 2 * CALLS[way] * LAYERS
    loss, _ = loss_and_gradients(model, whole)
    assert_equal([loss, *gradients_of(model)], of_whole)
    assert recorder.recorded == recorded, "one capture serves all dense forwards of a shape"
    assert metrics(state)["sparsity/captured_layers"] == LAYERS
    state.verify_step()
