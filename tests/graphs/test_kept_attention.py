"""Checkpointed layers that keep attention: the same gradients, half of the kernel's calls; captured and not.

Layers are plain PyTorch in float64 (`plain_layers`); tests/gpu/test_kept_attention.py runs ours.
"""

import pytest
import torch

from sparse_unsloth import detach
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.graphs import layer as graphed_layer
from sparse_unsloth.runtime import checkpoint_planner

from family_models import make_family
from keeping_models import Kernels, attach_keeping, keep_attention_alone
from masked_models import every_step
from recorded_layers import LAYERS, RULES, other_rows
from tiny_models import always, loss_and_gradients, make_batch
from unsloth_stand_in import packed_batch
from whole_layers import SMALL, make_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it there")
SPARSITY = {"dense": always(**RULES["dense"]), "rows": every_step(), "channels": always(**RULES["both"])}
RUNS = [(name, graphs) for name in SPARSITY for graphs in (False, True) if graphs or name != "dense"]
"""Dense layers run as a whole in CUDA graphs alone."""
LENGTHS = ((12, 3), (9, 4))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    keep_attention_alone(monkeypatch)


def checkpointed(stand_in, kind):
    return make_model(stand_in, kind, num_hidden_layers=LAYERS).double()


def assert_equal(ours, expected):
    """Step by step, of what `steps_of` found."""
    for step, (((loss, gradients), _), ((plain, others), _)) in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
        assert gradients.keys() == others.keys()
        for name, gradient in others.items():
            apart = (gradients[name] - gradient).norm()
            assert apart <= 1e-10 * gradient.norm(), f"step {step}, {name}: {apart:.1e} apart"


def counted(model, batch):
    with Kernels() as kernels:
        outcome = loss_and_gradients(model, batch)
    return outcome, kernels.calls["forward"]


def steps_of(monkeypatch, model, sparsity, batches, keeps, **changes):
    """Loss and gradients of each step with how often a kernel ran, and which layers keep attention in the end."""
    monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", keeps)
    state = attach_keeping(model, sparsity, **changes)
    found = [counted(model, batch) for batch in batches]
    kept = state.planner.attention_kept
    detach(model)
    return found, kept


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize(("sparsity", "graphs"), RUNS)
def test_gradients_are_the_same(stand_in, recorder, monkeypatch, sparsity, kind, packed, graphs):
    model, make = checkpointed(stand_in, kind), packed_batch if packed else make_batch
    batch = make(lengths=LENGTHS)
    batches = [batch, other_rows(batch)] * 3 if not packed else [batch] * 6
    given = model, SPARSITY[sparsity], batches
    expected, none = steps_of(monkeypatch, *given, False, cuda_graphs=graphs)
    recorded = recorder.recorded
    ours, kept = steps_of(monkeypatch, *given, True, cuda_graphs=graphs)
    assert (none, kept) == (frozenset(), frozenset(range(LAYERS)))
    assert_equal(ours, expected)
    assert [number for _, number in expected] == [2 * LAYERS] * 6
    assert [number for _, number in ours] == [2 * LAYERS] + [LAYERS] * 5  # the first one shows which layers run whole
    assert (recorder.recorded > recorded) == (recorded > 0) == graphs


def test_what_is_kept_is_freed(stand_in, recorder, monkeypatch):
    """Until the layer's backward, and not for a forward that has none."""
    model, batch = checkpointed(stand_in, "reentrant"), make_batch(lengths=LENGTHS)
    state = attach_keeping(model, SPARSITY["rows"])
    contexts, original = [], whole_layer._keeper

    def noting(runtime, *given):
        contexts.append(runtime.context)
        return original(runtime, *given)

    monkeypatch.setattr(whole_layer, "_keeper", noting)
    for _ in range(2):
        loss = model(**batch).loss
    kept = [contexts[-1].memo(index).attention for index in range(LAYERS)]
    assert [one is not None for one in kept] == [True] * LAYERS
    rows, shape = batch["labels"].numel(), state.planner.memory.shape
    number = sum(one.numel() * one.element_size() for one in kept[0].tensors)
    assert number == rows * shape.num_heads * (shape.head_dim + 1) * 8  # logarithms are in float64 as well here
    loss.backward()
    assert [contexts[-1].memo(index).attention for index in range(LAYERS)] == [None] * LAYERS
    with torch.no_grad():
        model(**batch)
    assert all(contexts[-1].memo(index).attention is None for index in range(1, LAYERS))


@pytest.mark.parametrize("graphs", [False, True], ids=["uncaptured", "captured"])
def test_a_second_backward_computes_attention(stand_in, recorder, graphs):
    model, batch = checkpointed(stand_in, "reentrant"), make_batch(lengths=LENGTHS)
    attach_keeping(model, SPARSITY["rows"], cuda_graphs=graphs)
    expected = [loss_and_gradients(model, batch) for _ in range(3)][2]
    model.zero_grad()
    loss = model(**batch).loss
    with Kernels() as kernels:
        loss.backward(retain_graph=True)
        first = kernels.calls["forward"]
        loss.backward()
    assert (first, kernels.calls["forward"]) == (0, LAYERS)
    assert (recorder.recorded > 0) == graphs
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * expected[1][name])


@pytest.mark.parametrize("graphs", [False, True], ids=["uncaptured", "captured"])
def test_two_forwards_before_their_backwards(stand_in, recorder, graphs):
    """Each has its own, also where both replay the same graphs."""
    model, batch = checkpointed(stand_in, "reentrant"), make_batch(lengths=LENGTHS)
    batches = [batch, other_rows(batch)]
    attach_keeping(model, SPARSITY["rows"], cuda_graphs=graphs)
    for _ in range(2):
        found = [loss_and_gradients(model, one)[1] for one in batches]
    for order in (0, 1), (1, 0):
        model.zero_grad()
        losses = [model(**one).loss for one in batches]
        with Kernels() as kernels:
            for number in order:
                losses[number].backward()
        assert kernels.calls["forward"] == 0
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, found[0][name] + found[1][name])
    assert (recorder.replayed > 0) == graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["uncaptured", "captured"])
def test_a_planted_fault_is_found(stand_in, recorder, monkeypatch, graphs):
    """What the recompute gets must be what this step's first forward gave."""
    model, batch = checkpointed(stand_in, "reentrant"), make_batch(lengths=LENGTHS)
    batches = [batch, other_rows(batch)] * 2
    given = model, SPARSITY["rows"], batches
    expected, _ = steps_of(monkeypatch, *given, False, cuda_graphs=graphs)
    stale = {}
    original = whole_layer.AttentionKeeper

    def keeper(kept=None):
        if kept is not None:
            kept = stale.setdefault(kept.tensors[0].shape, kept)
        return original(kept)

    monkeypatch.setattr(whole_layer, "AttentionKeeper", keeper)
    ours, _ = steps_of(monkeypatch, *given, True, cuda_graphs=graphs)
    with pytest.raises(AssertionError, match="apart"):
        assert_equal(ours, expected)


@pytest.mark.parametrize("graphs", [False, True], ids=["uncaptured", "captured"])
@pytest.mark.parametrize(
    ("family", "attention", "keeps"), [("Llama", "sdpa", True), ("Mistral", "sdpa", True), ("Llama", "eager", False)]
)
def test_the_peft_backend(recorder, monkeypatch, family, attention, keeps, graphs):
    """Mistral's window is in transformers' mask; eager attention calls no kernel, so nothing is kept."""
    model = make_family(family, torch.float64, None, **SMALL, num_hidden_layers=LAYERS)
    model.config._attn_implementation = attention
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batches = [make_batch(lengths=LENGTHS)] * 4
    expected, _ = steps_of(monkeypatch, model.train(), every_step(), batches, False, cuda_graphs=graphs)
    ours, kept = steps_of(monkeypatch, model, every_step(), batches, True, cuda_graphs=graphs)
    assert_equal(ours, expected)
    assert bool(kept) == keeps
    assert [ours[-1][1], expected[-1][1]] == ([LAYERS, 2 * LAYERS] if keeps else [0, 0])
    assert recorder.recorded > 0 or not graphs


def test_a_capture_that_fails_runs_with_what_was_kept(stand_in, recorder, monkeypatch):
    """The first forward is captured, its recompute is not."""
    model, batch = checkpointed(stand_in, "reentrant"), make_batch(lengths=LENGTHS)
    batches = [batch, other_rows(batch)] * 2
    given = model, SPARSITY["rows"], batches
    expected, _ = steps_of(monkeypatch, *given, False, cuda_graphs=True)

    def fail(*given):
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(graphed_layer, "get_gradient_edge", fail)
    ours, kept = steps_of(monkeypatch, *given, True, cuda_graphs=True)
    assert kept
    assert_equal(ours, expected)
    assert [number for _, number in ours] == [2 * LAYERS] + [LAYERS] * 3
