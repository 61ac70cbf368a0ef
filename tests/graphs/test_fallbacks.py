"""Where captured layers run without capture by themselves: the result is that of layers that are never captured.

`Rerun` stands for CUDA graphs and shares memory as they do; layers are plain PyTorch in float64 (`plain_layers`). Real
graphs are tested in tests/gpu/test_graphs.py.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from sparse_unsloth import detach, get_state

from plain_layers import use_plain_layers
from recorded_layers import Rerun, Unused, attach_with, other_rows
from tiny_models import loras, loss_and_gradients, make_batch
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rules", RULES)
def test_forwards_and_backwards_that_mix(stand_in, recorder, rules, way):
    calls = CALLS[way] * LAYERS
    waits = way is False or rules == "MLP alone"  # else nothing of a forward lies between it and its backward
    for (said, replayed), forwards in zip(check(make(stand_in, way), recorder, rules, MIXED), COUNTS, strict=True):
        assert ("before the backward" in said) == waits
        assert replayed == calls * (1 if waits else forwards) + LAYERS * (forwards == 1 and not waits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rules", RULES)
def test_losses_and_backwards_of_other_kinds(stand_in, recorder, rules, way):
    scenarios = OTHERS if way == "reentrant" else [*OTHERS, by_autograd_grad]  # which reentrant checkpointing refuses
    found = check(make(stand_in, way), recorder, rules, scenarios)
    assert all(replayed >= CALLS[way] * LAYERS for _, replayed in found)
