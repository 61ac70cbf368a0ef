"""Layers without gradient checkpointing, captured in two graphs each: forward and backward (`KeptPasses`).

`Rerun` shares memory as CUDA graphs do: what a pass keeps is NaN once something is captured or replayed that was not
captured between its forward and its backward. Real graphs are tested in tests/gpu/test_graphs.py.
"""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth import detach, get_state
from sparse_unsloth.backends.unsloth import hooks
from sparse_unsloth.backends.unsloth.attention import read_attention
from sparse_unsloth.graphs.passes import KeptCapture, KeptPasses
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.ops import stored_rows
from sparse_unsloth.runtime.metrics import metrics

from recorded_layers import LAYERS, attach_with, checkpointed, other_rows, small_steps, step_as_recorded, take_sums
from tiny_models import loss_and_gradients, make_batch
from unsloth_stand_in import assert_same, decoder_layers
from whole_layers import make_model, small_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
CALLS = 2
"""Of a kept layer: forward and backward."""


def kept_selections(state):
    """What the graphs of kept layers select, by layer and part."""
    (kept,) = state.graphs._kept.values()
    selections = {layer: found for layer, (*_, found) in kept.passes.items()}
    return {(layer, part): one for layer, found in selections.items() for part, one in found.items()}


def kept(stand_in, layers=LAYERS):
    return make_model(stand_in, num_hidden_layers=layers)


def planner(plan=lambda *given, **named: None, context_again=()):
    nothing = {"restore": lambda: None, "note_whole": lambda *given: None, "attention_kept": frozenset()}
    return SimpleNamespace(plan=plan, num_kept=LAYERS, context_again=context_again, **nothing)


def set_checkpointing(model, *flags):
    for layer, flag in zip(decoder_layers(model), flags, strict=True):
        layer.gradient_checkpointing = flag


@pytest.mark.parametrize("rules", ["both", "dense", "rows"])
def test_replays_give_the_same_gradients(stand_in, interpreted, rules, monkeypatch):
    layers = 3 if rules == "dense" else LAYERS  # of the input's gradient, that of the middle one shows
    model = kept(stand_in, layers)
    batch = make_batch(lengths=((12, 3), (9, 4))) if rules == "rows" else small_batch()
    batches = [batch, other_rows(batch)]
    expected = [step_as_recorded(model, batch, rules) for batch in batches]
    state, original, again = attach_with(model, rules, True), stored_rows._with_context, []
    energies = []
    monkeypatch.setattr(stored_rows, "_with_context", lambda *given: again.append(len(given[1])) or original(*given))
    for step in range(4 if rules == "rows" else 3):
        if rules == "rows":  # a layer is replayed as it was captured, whatever the planner says later
            state.planner = planner(context_again={1} if step < 3 else {0})
        assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
        energies.append(take_sums(state))
        assert interpreted.recorded == (layers * CALLS if step else 0)
    assert interpreted.replayed == (step - 1) * interpreted.recorded
    assert metrics(state)["sparsity/captured_layers"] == layers
    assert state.ran == state.expected_parts()
    assert len(again) == (4 if rules == "rows" else 0)  # the stand-in runs the captured function again
    if rules == "rows":
        assert energies[2:] == [pytest.approx(one) for one in energies[:2]]
        assert all(energies[0])
    else:
        assert not any(map(any, energies))
    if rules == "both":  # only the layer's own graphs write to its scores, which are read later
        chosen = kept_selections(state)
        assert chosen.keys() == state.expected_parts()
        owned = {address for address, *_ in state.graphs._buffer_places}
        assert all(one.data_ptr() in owned for choice in chosen.values() for one in choice.scores)


def test_batch_signatures_alternate(stand_in, recorder):
    model = kept(stand_in)
    batches = [small_batch(), make_batch(lengths=((3, 2), (2, 2)))]
    expected = [step_as_recorded(model, batch) for batch in batches]
    state = attach_with(model, "both", True)
    for step in range(7):
        assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
    assert len(state.graphs.captured_keys) == 2
    assert (recorder.recorded, recorder.replayed) == (2 * LAYERS * CALLS, 3 * LAYERS * CALLS)


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_checkpointed_layers_beside_kept_ones(stand_in, recorder, flags):
    model = checkpointed(stand_in)
    batches, expected = [small_batch(), other_rows(small_batch())], small_steps(stand_in)
    attach_with(model, "both", True)
    set_checkpointing(model, *flags)
    for step in range(4):
        assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
        assert recorder.recorded == (CALLS + 3 if step else 0)
    assert recorder.replayed == 2 * recorder.recorded


def test_other_layers_are_kept(stand_in, recorder):
    """As `memory_budget` changes its mind: fewer layers replay what they have, and one more lets all be captured."""
    model, batch = checkpointed(stand_in), small_batch()
    expected, _ = small_steps(stand_in)
    attach_with(model, "both", True)
    recorded = []
    for flags in ((True, False), (True, False), (False, False), (False, True), (True, False), (False, False)):
        set_checkpointing(model, *flags)
        assert_same(loss_and_gradients(model, batch), expected)
        recorded.append(recorder.recorded)
    assert recorded == [0, 5, 5 + 4, 9 + 3, 12, 12]


def test_memory_that_is_held_is_planned_for(stand_in, recorder):
    """`memory_budget` must not count on what the pool holds, except in a forward that uses it."""
    model, batch = kept(stand_in), small_batch()
    state, planned = attach_with(model, "dense", True), []
    state.planner = planner(lambda rows, scale, held=0, document=0: planned.append(held))
    for _ in range(3):
        loss_and_gradients(model, batch)
    assert planned == [0, 0, recorder.memory(), 0]
    state.graphs.clear()
    assert not state.graphs.kept_memory


@pytest.mark.parametrize("which", range(LAYERS))
def test_a_moved_weight_lets_all_be_captured_anew(stand_in, recorder, which):
    """At once if it is the first kept layer's, whose memory nothing uses yet; else in the next forward."""
    model, batch = kept(stand_in), small_batch()
    state = attach_with(model, "dense", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    assert recorder.recorded == LAYERS * CALLS
    module = decoder_layers(model)[which].mlp.down_proj.lora_B["default"]
    module.weight = torch.nn.Parameter(1.5 * module.weight.detach())
    held, outcomes, captured = [], [], []
    for _ in range(3):
        held.append(recorder.recorded)
        outcomes.append(loss_and_gradients(model, batch))
        captured.append(metrics(state)["sparsity/captured_layers"])
    twice = 2 * LAYERS * CALLS
    assert [*held, recorder.recorded] == [LAYERS * CALLS] * (1 + which) + [twice] * (3 - which)
    assert captured == [LAYERS - which, LAYERS, LAYERS]
    detach(model)
    plain = step_as_recorded(model, batch, "dense")
    for outcome in outcomes:
        assert_same(outcome, plain)


def test_a_forward_without_backward(stand_in, recorder):
    """It is captured in vain, or replays in vain; both do not break the next one."""
    model, batch = kept(stand_in), small_batch()
    expected, _ = small_steps(stand_in, "dense")
    attach_with(model, "dense", True)
    loss_and_gradients(model, batch)
    model(**batch)
    for _ in range(2):
        assert_same(loss_and_gradients(model, batch), expected)
        assert recorder.recorded == LAYERS + LAYERS * CALLS
        model(**batch)
        with torch.no_grad():
            model(**batch)
        recorder.recorded = LAYERS + LAYERS * CALLS  # not those of the forward without gradients


def test_saved_tensors_that_are_offloaded_are_not_captured(stand_in, recorder, caplog):
    model, batch = make_model(stand_in, num_hidden_layers=LAYERS), small_batch()
    expected, _ = small_steps(stand_in)
    attach_with(model, "both", True)
    loss_and_gradients(model, batch)
    with torch.autograd.graph.save_on_cpu():
        assert_same(loss_and_gradients(model, batch), expected)
    assert not recorder.recorded
    assert caplog.text.count("no layer was captured") == 1
    assert_same(loss_and_gradients(model, batch), expected)
    assert recorder.recorded == LAYERS * CALLS


@pytest.mark.parametrize("rules", ["dense", "rows"])
def test_layers_whose_attention_cannot_be_captured(stand_in, recorder, monkeypatch, rules):

    def read(*given):
        return dataclasses.replace(read_attention(*given), capturable=False)

    monkeypatch.setattr(hooks, "BACKEND", dataclasses.replace(hooks.BACKEND, read_attention=read))
    model, batch = kept(stand_in), small_batch()
    expected = step_as_recorded(model, batch, rules)
    state = attach_with(model, rules, True)
    for _ in range(2):
        assert_same(loss_and_gradients(model, batch), expected)
    assert not recorder.recorded
    assert state.graphs.unused


def test_captures_that_are_never_replayed_end(stand_in, recorder, monkeypatch, caplog):
    model, batch = kept(stand_in), small_batch()
    attach_with(model, "dense", True)
    for _ in range(8):
        model(**batch)
    assert recorder.recorded == 6 * LAYERS  # the first forward runs without capture, the last one again
    assert caplog.text.count("forwards come without a backward") == 1


def test_copies_capture_anew(stand_in, recorder):
    model, batch = kept(stand_in), small_batch()
    expected, _ = small_steps(stand_in, "dense")
    attach_with(model, "dense", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    copied = copy.deepcopy(model)
    assert not get_state(copied).graphs._kept
    for ours in (copied, copied, model):
        assert_same(loss_and_gradients(ours, batch), expected)
    assert not pickle.loads(pickle.dumps(get_state(model).graphs))._kept


def test_the_stand_in_notices_a_layer_that_is_captured_alone(stand_in, recorder, monkeypatch):
    """Without the rule of `KeptPasses` the gradients of other layers are overwritten."""
    model, batch = kept(stand_in), small_batch()
    state = attach_with(model, "dense", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    (passes,) = state.graphs._kept.values()
    monkeypatch.setattr(recorder, "note", lambda *given: None)

    def open_alone(self, layer, *given):
        if layer == 1:
            passes.passes[layer] = (), {}, {}
            passes.unfinished += 1
        self.serial += 1
        return KeptCapture(self, layer, "batch", passes)

    monkeypatch.setattr(GraphCache, "open_kept", open_alone)
    _, gradients = loss_and_gradients(model, batch)
    assert any(values.isnan().any() for name, values in gradients.items() if "layers.0" in name)
    assert isinstance(passes, KeptPasses)
