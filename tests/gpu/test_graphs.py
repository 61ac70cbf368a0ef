"""CUDA graphs of whole layers on the GPU: several steps, on changing batches and weights, against steps without.

The model is transformers' with Unsloth's hook points put in by hand, as in tests/graphs/test_layer.py; Unsloth's own
layers are checked before each timing of `sparse-o2-graphs` (`sparse_unsloth.bench.checks.check_graphs`).
"""

import pytest
import torch

from sparse_unsloth import detach, get_state
from sparse_unsloth.bench.checks import Immediate
from sparse_unsloth.graphs.capture import GraphCapture
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE

from recorded_layers import LAYERS, RULES, Unused, attach_with, checkpointed, step_as_recorded
from tiny_models import loss_and_gradients, make_batch
from unsloth_stand_in import StandIn, decoder_layers
from whole_layers import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LENGTHS = ((160, 40), (130, 25))
OTHER_LENGTHS = ((90, 30), (70, 60))
DEPTH = 4
"""Layers where nothing is checkpointed, so that several keep their intermediates at a time."""
OTHER_ROWS = 0.05
"""How far gradients may be apart where bf16 rounds otherwise, so that other rows are chosen; measured: 0.013."""


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn(monkeypatch)
    return stand_in


def batch_of(seed, lengths=LENGTHS):
    return {name: values.cuda() for name, values in make_batch(seed=seed, lengths=lengths).items()}


def error(ours, expected):
    assert ours.keys() == expected.keys()
    apart = sum((ours[name] - expected[name]).float().square().sum() for name in ours)
    return (apart / sum(values.float().square().sum() for values in expected.values())).sqrt().item()


def assert_same_step(model, batch, expected):
    loss, gradients = loss_and_gradients(model, batch)
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-3)
    found = error(gradients, expected[1])
    assert found <= 0.005 * len(decoder_layers(model))  # other functions round otherwise in each layer
    return found


def not_recorded(model, batches):
    """Steps by rows, by what is recorded, run as it is: other functions than without graphs, that round otherwise."""
    attach_with(model, "rows", True)
    get_state(model).graphs.recorder = Immediate()
    for batch in batches:  # the first of their kind
        loss_and_gradients(model, batch)
    outcome = [loss_and_gradients(model, batch) for batch in batches]
    detach(model)
    return outcome


def test_recordings_may_all_be_dropped_before_the_next():
    recorder, values = GraphCapture(), torch.ones(1000, device="cuda")
    values * 2  # compiled before it is recorded
    for factor in (2, 3):
        _, again = recorder.capture(lambda factor=factor: [values * factor])
        assert recorder.memory() > 0
        assert again()[0].eq(factor).all()
        del again


@pytest.mark.parametrize("rules", [*RULES, "rows"])
def test_replays(stand_in, rules):
    model = checkpointed(stand_in).to("cuda", torch.bfloat16)
    batches = [batch_of(seed) for seed in (1, 2)]
    held = None
    for round_number in range(2):
        expected = [step_as_recorded(model, batch, rules) for batch in batches]
        if rules == "rows":
            plain, expected = expected, not_recorded(model, batches)
            for (_, gradients), (_, ours) in zip(plain, expected, strict=True):
                assert error(ours, gradients) <= OTHER_ROWS
        attach_with(model, rules, True)
        graphs = get_state(model).graphs
        began = graphs.serial
        for step in range(8):
            if rules == "rows" and step < RUNS_BEFORE_CAPTURE:
                loss_and_gradients(model, batches[step % 2])
                continue
            found = assert_same_step(model, batches[step % 2], expected[step % 2])
            print(f"{rules}, round {round_number}, step {step}: gradients {found:.1e} apart")
            if step == 3:
                held = torch.cuda.memory_allocated()
        assert graphs.serial - began == 6 * 2 * LAYERS
        assert 0 < graphs.memory() < 2**30
        assert torch.cuda.memory_allocated() <= held + 2**20
        graphs.clear()
        assert torch.cuda.memory_allocated() < held
        if rules != "rows":
            assert_same_step(model, batches[0], expected[0])
        detach(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))


def test_trained_weights_are_read_anew(stand_in):
    model, batch = checkpointed(stand_in).to("cuda", torch.bfloat16), batch_of(3)
    attach_with(model, "both", True)
    for _ in range(4):
        before = loss_and_gradients(model, batch)
    serial = get_state(model).graphs.serial
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    after = loss_and_gradients(model, batch)
    assert get_state(model).graphs.serial == serial + 2 * LAYERS
    detach(model)
    assert error(after[1], step_as_recorded(model, batch)[1]) <= 0.01
    assert error(after[1], before[1]) > 0.05


def kept_layers(stand_in, checkpointing=False):
    return make_model(stand_in, checkpointing, num_hidden_layers=DEPTH).to("cuda", torch.bfloat16)


def set_checkpointing(model, *flags):
    for layer, flag in zip(decoder_layers(model), flags, strict=True):
        layer.gradient_checkpointing = flag


@pytest.mark.parametrize("rules", ["both", "dense", "rows"])
def test_replays_without_checkpointing(stand_in, rules):
    """Two batch signatures alternate, so that each overwrites what the other one kept."""
    model = kept_layers(stand_in)
    batches = [batch_of(seed, lengths) for seed in (1, 2) for lengths in (LENGTHS, OTHER_LENGTHS)]
    expected = [step_as_recorded(model, batch, rules) for batch in batches]
    if rules == "rows":
        plain, expected = expected, not_recorded(model, batches)
        for (_, gradients), (_, ours) in zip(plain, expected, strict=True):
            assert error(ours, gradients) <= OTHER_ROWS
    attach_with(model, rules, True)
    graphs = get_state(model).graphs
    began = graphs.serial
    for step in range(6 * len(batches)):
        number = step % len(batches)
        if step < 2 * RUNS_BEFORE_CAPTURE:
            loss_and_gradients(model, batches[number])
            continue
        found = assert_same_step(model, batches[number], expected[number])
        print(f"{rules}, step {step}: gradients {found:.1e} apart")
        if step == 4 * RUNS_BEFORE_CAPTURE:
            held, pool = torch.cuda.memory_allocated(), graphs.memory()
    assert graphs.serial - began == (6 * len(batches) - 2 * RUNS_BEFORE_CAPTURE) * DEPTH
    assert [len(kept.passes) for kept in graphs._kept.values()] == [DEPTH, DEPTH]
    assert 0 < graphs.memory() == pool
    assert torch.cuda.memory_allocated() <= held + 2**20
    graphs.clear()
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize("rules", ["both", "dense"])
def test_checkpointed_layers_beside_kept_ones(stand_in, rules):
    """Also where other layers are kept than before, and where a weight moved."""
    model = kept_layers(stand_in, "reentrant")
    batches = [batch_of(seed) for seed in (1, 2)]
    expected = [step_as_recorded(model, batch, rules) for batch in batches]
    attach_with(model, rules, True)
    every = (True,) * DEPTH, (True, False, True, False), (True, False, False, False), (True, True, False, True)
    for flags in (*every, (False,) * DEPTH):
        set_checkpointing(model, *flags)
        for step in range(6):
            found = assert_same_step(model, batches[step % 2], expected[step % 2])
            print(f"{rules}, {flags}, step {step}: gradients {found:.1e} apart")
    (kept,) = get_state(model).graphs._kept.values()
    assert len(kept.passes) == DEPTH
    module = decoder_layers(model)[2].mlp.down_proj.lora_B["default"]
    module.weight = torch.nn.Parameter(1.5 * module.weight.detach())
    ours = [loss_and_gradients(model, batches[step % 2]) for step in range(6)]
    detach(model)
    after = [step_as_recorded(model, batch, rules) for batch in batches]
    for step, (_, gradients) in enumerate(ours):
        assert error(gradients, after[step % 2][1]) <= 0.005 * DEPTH
    assert error(after[0][1], expected[0][1]) > 0.01


def counters(graphs):
    """Counts captures and replays from now on."""
    recorder, counts = graphs.recorder, {"captures": 0, "replays": 0}
    original = recorder.capture

    def capture(function, kept=False):
        first, replay = original(function, kept)
        counts["captures"] += 1

        def count():
            counts["replays"] += 1
            return replay()

        return first, count

    recorder.capture = capture
    return counts


def compared(model, first, second):
    (3 * model(**first).loss - model(**second).loss).square().backward()


def in_both_orders(model, first, second):
    for backwards in ((0, 1), (1, 0)):
        losses = model(**first).loss, model(**second).loss
        for number in backwards:
            losses[number].backward()


def evaluated_in_between(model, first, second):
    loss = model(**first).loss
    with torch.no_grad():
        model(**second)
        model.eval()
        model(**second)
        model.train()
    loss.backward()


def twice(model, first, second):
    loss = model(**first).loss
    loss.backward(retain_graph=True)
    model(**second).loss.backward()
    loss.backward()


def of_hidden_states(model, first, second):
    """The gradient of a hidden state that two consumers read, held until other layers have replayed."""
    states = []
    layer = decoder_layers(model)[-2]
    handle = layer.register_forward_hook(lambda *given: states.append(given[-1]))
    loss = model(**first).loss
    handle.remove()
    state = states[0][0] if isinstance(states[0], tuple) else states[0]
    if not state.requires_grad:  # within a reentrant checkpoint
        return loss.backward()
    held = []
    state.register_hook(lambda gradient: held.append((gradient, gradient.clone())))
    (loss + state.float().square().mean()).backward()
    assert torch.equal(*held[0])


MIXED = [compared, in_both_orders, evaluated_in_between, twice, of_hidden_states]


@pytest.mark.parametrize("checkpointing", ["reentrant", False])
@pytest.mark.parametrize("rules", ["both", "dense"])
def test_forwards_and_backwards_that_mix(stand_in, rules, checkpointing):
    model = kept_layers(stand_in, checkpointing)
    batches = batch_of(1), batch_of(2)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def gradients(run):
        model.zero_grad()
        run(model, *batches)
        return {name: one.grad.clone() for name, one in trained.items()}

    attach_with(model, rules, False)
    get_state(model).graphs = Unused(Immediate())
    expected = [gradients(run) for run in MIXED]
    detach(model)
    attach_with(model, rules, True)
    state = get_state(model)
    counts = counters(state.graphs)
    for batch in (*batches, *batches):
        loss_and_gradients(model, batch)
    captured = counts["captures"]
    assert captured == DEPTH * (3 if checkpointing else 2)
    for run, others in zip(MIXED, expected, strict=True):
        state.warned.clear()
        for _ in range(3):
            replays = counts["replays"]
            found = error(gradients(run), others)
            print(f"{rules}, {run.__name__}: gradients {found:.1e} apart")
            assert found <= 0.005 * DEPTH
            assert counts["replays"] > replays
        waits = (rules == "both" or not checkpointing) and run not in (twice, of_hidden_states)
        assert any("before the backward" in said for said in state.warned) == waits, run.__name__
    assert counts["captures"] == captured
    assert not state.graphs.given_up


def invalidate():
    """What CUDA does not allow while it captures."""
    torch.cuda.current_stream().synchronize()


def run_out():
    raise torch.OutOfMemoryError("planted")


def allocate_too_much():
    torch.empty(2**46, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("checkpointing", ["reentrant", False])
@pytest.mark.parametrize("fail", [run_out, allocate_too_much, invalidate])
def test_captures_that_fail(stand_in, checkpointing, fail):
    """In the middle of a capture: that step's gradients are right, and the GPU, its memory and others work after it."""
    model = kept_layers(stand_in, checkpointing)
    batches = batch_of(1), batch_of(2, OTHER_LENGTHS)
    expected = [step_as_recorded(model, batch, "both") for batch in batches]
    calls = DEPTH * (3 if checkpointing else 2)
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0]
    for which in (1, DEPTH + 1, DEPTH + 2):  # a first forward; a recompute or a backward; a backward
        attach_with(model, "both", True)
        graphs = get_state(model).graphs
        original, tried = graphs.recorder.capture, []

        def capture(function, kept=False, original=original, tried=tried, which=which):
            tried.append(kept)

            def failing():
                outputs = function()
                fail()
                return outputs

            return original(failing if len(tried) == which else function, kept)

        graphs.recorder.capture = capture
        for _ in range(4):
            assert_same_step(model, batches[0], expected[0])
        assert len(graphs.given_up) == 1
        assert len(tried) == which
        torch.rand(8, device="cuda")  # the generator does not count for a capture
        for share in (0.6, 0.7):  # what is cached is freed for others, as it is not within a capture
            torch.empty(int(share * room), dtype=torch.uint8, device="cuda")
        for _ in range(4):
            assert_same_step(model, batches[1], expected[1])
        assert len(tried) == which + calls, "the other signature is captured"
        assert get_state(model).counts.captured_layers == DEPTH
        assert_same_step(model, batches[0], expected[0])
        detach(model)
        torch.cuda.empty_cache()
        assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.parametrize("checkpointing", ["reentrant", False])
@pytest.mark.parametrize("rules", ["both", "rows"])
def test_dense_phases(stand_in, rules, checkpointing):
    model, batch = kept_layers(stand_in, checkpointing), batch_of(1)
    dense = loss_and_gradients(model, batch)
    sparse = step_as_recorded(model, batch, rules)
    assert error(sparse[1], dense[1]) > 0.05
    start, end, steps = 4, 8, 12
    attach_with(model, rules, True, start_step=start, end_step=end, explain_steps=0)
    state = get_state(model)
    state.begin_training("driver", steps)
    counts, captured = counters(state.graphs), []
    for step in range(steps):
        state.set_step(step)
        _, gradients = loss_and_gradients(model, batch)
        is_sparse = start <= step < end
        found = error(gradients, (sparse if is_sparse else dense)[1])
        print(f"{rules}, step {step}: gradients {found:.1e} apart")
        assert found <= (OTHER_ROWS if is_sparse and rules == "rows" else 0.005 * DEPTH)
        captured.append(state.counts.captured_layers)
    assert captured == [0, 0, DEPTH, DEPTH] * 2 + [DEPTH] * 4
    assert counts["captures"] == 2 * DEPTH * (3 if checkpointing else 2)
    assert counts["replays"] == 6 * DEPTH * (3 if checkpointing else 2)
