"""Layers that are captured and replayed (`cuda_graphs`), by a stand-in for `GraphCapture` that reruns functions.

It shares memory as CUDA graphs do: the outputs of a pass are NaN once another pass begins. Real graphs are tested in
tests/gpu/test_graphs.py.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth import detach, get_state
from sparse_unsloth.backends.unsloth.attention import read_attention
from sparse_unsloth.errors import AttachError, BackendError
from sparse_unsloth.graphs import recorder as graphs
from sparse_unsloth.graphs.packed_attention import packing_of
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition

from recorded_layers import (
    CALLS,
    LAYERS,
    attach_with,
    checkpointed,
    other_rows,
    small_steps,
    step_as_recorded,
    take_sums,
)
from tiny_models import loss_and_gradients, make_batch, make_lora
from unsloth_stand_in import assert_same, packed_batch
from whole_layers import make_model, small_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


@pytest.mark.parametrize("rules", ["both", "no dense rows"])
def test_replays_give_the_same_gradients(stand_in, interpreted, rules):
    model = checkpointed(stand_in)
    batches, expected = [small_batch(), other_rows(small_batch())], small_steps(stand_in, rules)
    state = attach_with(model, rules, True)
    for step in range(3):
        assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
        assert interpreted.recorded == (LAYERS * CALLS if step else 0)
    assert interpreted.replayed == interpreted.recorded
    # Only the layer's own graphs write to its scores, which are read later.
    chosen = {
        (layer, part): one
        for (layer, *_), (*_, selections) in state.graphs._captures.items()
        for part, one in selections.items()
    }
    assert chosen.keys() == state.expected_parts()
    owned = {address for address, *_ in state.graphs._buffer_places}
    assert all(one.data_ptr() in owned for choice in chosen.values() for one in choice.scores)


def test_each_replay_selects_rows(stand_in, recorder):
    model = checkpointed(stand_in)
    batch = make_batch(lengths=((12, 3), (9, 4)))
    batches = [batch, other_rows(batch)]
    expected = [step_as_recorded(model, batch, "rows") for batch in batches]
    state, energies = attach_with(model, "rows", True), []
    for step in range(4):
        assert_same(loss_and_gradients(model, batches[step % 2]), expected[step % 2])
        energies.append(take_sums(state))
        assert recorder.recorded == (LAYERS * CALLS if step else 0)
    assert recorder.replayed == 2 * recorder.recorded
    assert state.ran == state.expected_parts()
    assert all(0 < step[0] < step[1] for step in energies), "the first layer leaves energy out"
    assert energies[2] == pytest.approx(energies[0]), "replayed, without capture"
    assert energies[3] == pytest.approx(energies[1]), "replayed, captured"


def test_dense_layers_are_captured(stand_in, recorder):
    """One capture serves all micro-batches of a shape, whichever tokens are padding or prompt, also without prompts."""
    model = checkpointed(stand_in)
    batch = small_batch()
    batches = [batch, other_rows(batch), {**batch, "labels": batch["input_ids"].clone()}]
    expected = [step_as_recorded(model, batch, "dense") for batch in batches]
    state = attach_with(model, "dense", True)
    assert not state.runtimes
    for step in range(4):
        assert_same(loss_and_gradients(model, batches[step % 3]), expected[step % 3])
        assert recorder.recorded == (LAYERS * CALLS if step else 0)
    assert recorder.replayed == 2 * recorder.recorded
    assert metrics(state)["sparsity/captured_layers"] == LAYERS
    detach(model)
    assert_same(loss_and_gradients(model, batch), expected[0])


def test_a_dense_forward_without_labels_is_not_captured(stand_in, recorder, caplog):
    model, batch = checkpointed(stand_in), small_batch()
    attach_with(model, "dense", True)
    for _ in range(3):
        model(input_ids=batch["input_ids"])
    assert not recorder.recorded
    assert caplog.text.count("nothing of it is captured") == 1


def test_trained_weights_are_read_anew(stand_in, recorder):
    model, batch = checkpointed(stand_in), small_batch()
    attach_with(model, "both", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    replayed = recorder.replayed
    ours = loss_and_gradients(model, batch)
    assert recorder.replayed > replayed
    detach(model)
    assert_same(ours, step_as_recorded(model, batch))


def test_layers_whose_weights_moved_are_captured_again(stand_in, recorder):
    model, batch = checkpointed(stand_in), small_batch()
    attach_with(model, "both", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    recorded = recorder.recorded
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * (1 + 0.1 * parameter.requires_grad)
    ours = loss_and_gradients(model, batch)
    assert recorder.recorded == 2 * recorded
    detach(model)
    assert_same(ours, step_as_recorded(model, batch))


def test_accumulated_gradients_are_not_those_of_the_last_replay(stand_in, recorder):
    model, batch = checkpointed(stand_in), small_batch()
    _, expected = small_steps(stand_in)[0]
    attach_with(model, "both", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    model.zero_grad()
    for _ in range(2):
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * expected[name])


def test_a_backward_that_comes_too_late_is_not_captured(recorder):
    """With another pass between recompute and backward, the intermediates of the recompute are gone."""

    def forward(x):
        return (x,), None

    def backward(state, x):
        return (x,), None

    ours, x = GraphCache(recorder), [torch.ones(2)]
    first = ours.open(0, "batch", "again", [], ())
    assert len(first.call("o", forward, x)) == 1
    ours.open(1, "batch", "again", [], ()).call("o", forward, x)
    assert first.call("o backward", backward, x, after="o") is None
    first.finish()
    again = ours.open(0, "batch", "again", [], ())
    assert recorder.recorded == 2
    assert len(again.call("o", forward, x)) == len(again.call("o backward", backward, x, after="o")) == 1
    assert recorder.recorded == 4, "a pass that was captured in part is captured anew"


def test_batch_signatures_that_come_once_are_not_captured(recorder):
    ours = GraphCache(recorder)
    assert not any(ours.should_replay(("once", number)) for number in range(1000))
    assert len(ours._counted) == graphs.MAX_COUNTED_KEYS
    assert [ours.should_replay("often") for _ in range(3)] == [False, True, True]
    for number in range(100):
        for _ in range(2):
            ours.should_replay(number)
    assert ours.full
    assert len(ours.captured_keys) == graphs.MAX_KEYS
    assert not ours.should_replay(99)
    assert ours.should_replay("often")


def test_prepared_batch_signatures_are_bounded(recorder):
    """Every step may have its own batch signature, and gradient accumulation repeats each one."""
    ours = GraphCache(recorder)
    assert not ours.captures_next("never came")
    for number in range(1000):
        ours.should_replay(number)
        assert ours.captures_next(number) == (number < 2 * graphs.MAX_KEYS)
    assert len(ours.prepared) == 2 * graphs.MAX_KEYS


def test_the_end_of_training_gives_memory_back(stand_in, recorder):
    model, batch = checkpointed(stand_in), small_batch()
    expected, _ = small_steps(stand_in)
    state = attach_with(model, "both", True)
    for _ in range(2):
        loss_and_gradients(model, batch)
    recorded = recorder.recorded
    state.end_training()
    assert not any((state.graphs._buffers, state.graphs._captures, state.graphs.captured_keys, recorder.places))
    for _ in range(2):
        assert_same(loss_and_gradients(model, batch), expected)
    assert recorder.recorded == 2 * recorded


def test_weights_that_keep_moving_end_captures(stand_in, recorder, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_RECAPTURES", 0)
    model, batch = checkpointed(stand_in), small_batch()
    expected, _ = small_steps(stand_in)
    attach_with(model, "both", True)
    for step in range(5):
        assert_same(loss_and_gradients(model, batch), expected)
        if step == 1:
            recorded = recorder.recorded
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert recorder.recorded == 2 * recorded
    assert caplog.text.count("weights change their addresses") == 1


def test_further_batch_signatures_are_logged_once(stand_in, recorder, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_KEYS", 0)
    model = checkpointed(stand_in)
    attach_with(model, "both", True)
    for _ in range(2):
        loss_and_gradients(model, small_batch(packed_batch))
    assert caplog.text.count("pad_to_multiple_of") == 1


def test_batches_of_many_lengths_are_captured_once(stand_in, recorder):
    """The padding of the length buckets changes nothing."""
    model = checkpointed(stand_in)
    batches = [make_batch(lengths=lengths) for lengths in (((5, 3), (5, 2)), ((4, 3), (5, 2)), ((6, 3), (2, 2)))]
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    assert len(lengths) == 3
    expected = [loss_and_gradients(model, batch) for batch in batches]
    state = attach_with(model, "dense", True)
    for step in range(4):
        assert_same(loss_and_gradients(model, batches[step % 3]), expected[step % 3])
    assert len(state.graphs.captured_keys) == 1
    assert recorder.recorded == LAYERS * CALLS
    assert recorder.replayed == 2 * recorder.recorded


def test_many_sizes_use_the_memory_of_the_largest(recorder):
    ours = GraphCache(recorder)
    places = [ours.buffer("x", (rows, 4), torch.float32, torch.device("cpu")).data_ptr() for rows in (8, 3, 8, 9, 5)]
    assert places[0] == places[1] == places[2] == places[4] != places[3]
    assert ours.buffer("y", (3, 4), torch.float32, torch.device("cpu")).data_ptr() not in places
    held = ours.buffer("x", (3, 4), torch.float32, torch.device("cpu"))
    assert ours.stage_input("x", held) is held
    columns = ours.buffer("y", (3, 4), torch.float32, torch.device("cpu")).copy_(torch.rand(3, 4))[:, :2]
    found = ours.stage_input("x", columns)  # begins where a buffer does, but is none
    assert found.is_contiguous()
    assert torch.equal(found, columns)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
@pytest.mark.installed_unsloth("graphs")
def test_unsloths_own_layers(unsloth_case):
    """Captured whole, padded, within packed documents and windows, and with a soft cap."""
    ((found,), _) = unsloth_case
    whole = ["backward", "layer", "recompute"]
    kept = ["backward", "forward"]
    assert found == {
        "llama, channels, packed": [whole, 1],
        "llama, channels, xformers": [whole, 1], "llama, rows, packed": [whole, 1],
        "llama, rows, without checkpointing": [kept, 1], "mistral, dense, packed": [whole, 1],
        "gemma2, dense, without checkpointing": [kept, 1],
    }  # fmt: skip


def xformers_mask(name, **seqinfo):
    cls = type(name, (), {"__module__": "xformers.ops.fmha.attn_bias", "q_seqinfo": SimpleNamespace(**seqinfo)})
    return cls()


def MistralAttention_fast_forward(self):
    """Under the name of Unsloth's function."""


class Attention:
    forward = MistralAttention_fast_forward
    config = SimpleNamespace(sliding_window=4)


def test_what_unsloth_hands_to_attention():
    """Tables, masks of other kernels, documents and their capture; where Unsloth's own forward must run."""
    layer = SimpleNamespace(self_attn=Attention(), head_dim=4)
    context = SparseContext(TokenPartition.from_labels(torch.ones(1, 8, dtype=torch.int64)), 1.0)
    state, fast = SimpleNamespace(graphs=SimpleNamespace(captures_documents=True)), SimpleNamespace()
    fast.spec = SimpleNamespace(scaling=1.0)
    runtime = SimpleNamespace(layer=layer, context=context, state=state, fast=fast)
    rows, tables = torch.zeros(1, 8, 4), (torch.rand(16, 4), torch.rand(16, 4))

    def found(**arguments):
        call = read_attention(runtime, rows, {"position_embeddings": tables, "use_cache": False, **arguments})
        return None if call is None else (sorted(call.tensors), call.window, call.capturable)

    plain, lengths = ["cosines", "sines"], torch.tensor([3, 5])
    assert found() == (plain, 4, True)
    for mask, taken in {
        xformers_mask("LowerTriangularMask"): True,
        xformers_mask("BlockDiagonalCausalLocalAttentionMask", min_seqlen=8): True,
        xformers_mask("BlockDiagonalCausalLocalAttentionMask", min_seqlen=3): False,  # documents of someone else
        xformers_mask("BlockDiagonalMask", min_seqlen=8): False,
        object(): False,
    }.items():
        assert (found(causal_mask=mask) is not None) == taken
    state.graphs.captures_documents = False
    assert found() == (plain, 4, False)
    layer.self_attn.config = SimpleNamespace(sliding_window=8)
    assert found() == (plain, None, True)
    assert found(packed_seq_lengths=lengths) == ([*plain[:1], "documents begin at", "sines"], None, False)
    state.graphs.captures_documents = True
    assert not found(packed_seq_lengths=lengths)[2], "the batch signature does not count them"
    context.packing = packing_of(Batch(torch.zeros(1, 8), packed_seq_lengths=lengths))
    assert found(packed_seq_lengths=lengths, causal_mask=object())[2]
    seen = torch.ones(1, 1, 8, 8)
    assert found(packed_seq_lengths=lengths, attention_mask=seen) == (["attention_mask", *plain], 8, True)
    assert found(attention_mask=torch.ones(1, 8)) is None
    for name in ("past_key_value", "past_key_values", "prefix_seg_info", "use_cache"):
        assert found(**{name: True}) is None
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], dtype=torch.int32)
    taken = read_attention(runtime, rows, {"position_embeddings": tables, "position_ids": positions}).tensors["cosines"]
    assert torch.equal(taken[0], tables[0][positions[0].long()])
    context.split = True
    assert found() is None


def test_context_parallel_forwards_are_not_captured(stand_in, recorder, caplog):
    """Under context parallelism attention communicates with other GPUs, in the order of the layers."""
    model, batch = checkpointed(stand_in), make_batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    expected = loss_and_gradients(model, batch)
    for rules in ("dense", "rows"):
        graphs_of = attach_with(model, rules, True, **({"backward_rows": 0.999} if rules == "rows" else {})).graphs
        for _ in range(4):
            assert_same(loss_and_gradients(model, {**batch, "shift_labels": shifted}), expected)
        assert recorder.recorded == 0
        assert not graphs_of.captured_keys
        assert get_state(model).counts.whole_layers == 0, "our attention communicates with nobody"
        detach(model)
    assert "cuda_graphs: sequences are split over several GPUs" in caplog.text


def test_what_cannot_be_recorded_is_refused(stand_in, monkeypatch):
    for model in (make_lora(), make_model(stand_in)):  # the PEFT backend; no kernels
        for rules in ("both", "dense"):
            with pytest.raises(AttachError, match="cuda_graphs: false"):
                attach_with(model, rules, True)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    for rules in ("both", "rows", "dense"):
        with pytest.raises(BackendError, match="cuda_graphs: false"):
            attach_with(make_model(stand_in), rules, True)
