"""Row sparsity in Unsloth's hooks and whole layers, on stand-ins of its layers, compared with the masked reference.

tests/gpu/test_unsloth.py does the same with Unsloth's own layers on the GPU.
"""

import pytest
import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.backends.patching import runs
from sparse_unsloth.errors import AttachError
from sparse_unsloth.ops import stored_rows

from masked_models import every_step, masked_gradients
from tiny_models import always, loss_and_gradients, make_batch
from unsloth_stand_in import assert_same, decoder_layers, packed_batch
from whole_layers import fast_forward, make_model, small_batch


@pytest.fixture
def whole(stand_in, monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    return stand_in


@pytest.mark.parametrize(("checkpointing", "packed"), [(False, True), (True, False), ("reentrant", False)])
def test_whole_layers_train_as_masks_say(whole, checkpointing, packed):
    model = make_model(whole, checkpointing)
    # Many context tokens: some rows are chosen below a layer that drops them, and need its residual stream.
    batch = (packed_batch if packed else make_batch)(lengths=((12, 2), (9, 3)))
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    assert all(runs(layer, whole_layer.layer_forward) for layer in decoder_layers(model))
    ours = loss_and_gradients(model, batch)
    assert_same(ours, expected)
    assert get_state(model).ran == get_state(model).expected_parts()


def test_parts_train_as_masks_say(stand_in):
    """Without the norm function that whole layers need, each part is hooked."""
    model, batch = make_model(stand_in, "reentrant"), small_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize("checkpointing", [False, "reentrant"])
def test_rows_are_stored_or_computed_again(whole, monkeypatch, checkpointing):
    """Without a recompute every intermediate is stored; in a recompute backward computes the chosen rows alone."""
    model, batch = make_model(whole, checkpointing), small_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    get_state(model).config = get_state(model).config.model_copy(update={"exact_removal": True})
    ran = []
    for name in ("post_attention", "post_attention_of_rows"):
        original = getattr(stored_rows, name)
        monkeypatch.setattr(
            stored_rows,
            name,
            lambda *given, name=name, original=original: ran.append((name, given)) or original(*given),
        )
    assert_same(loss_and_gradients(model, batch), expected)
    count = batch["labels"].numel()
    calls = [(name, given[0].flatten(0, -2).shape[0] == count, given[2].output_unused) for name, given in ran]
    if checkpointing:
        assert calls == [("post_attention", True, False)] * 3 + [("post_attention", False, True)] * 3
    else:
        assert calls == [("post_attention_of_rows", True, False)] * 3


def put_rows_in_front(model):
    embed = model.get_base_model().model.embed_tokens
    plain = embed.forward
    embed.forward = lambda ids: torch.cat((plain(ids[:, :2]), plain(ids)), dim=1)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize(
    "config", [every_step(exact_removal=False), always(exact_removal=False)], ids=["rows", "channels"]
)
def test_rows_are_counted_and_layers_run_once(whole, monkeypatch, config, kernels):
    """By whole layers, and by each part where whole layers do not apply."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", kernels)
    model, batch = make_model(whole, "reentrant"), small_batch()
    attach(model, config)
    model(**batch).loss.backward()
    decoder = model.get_base_model().model
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([*layers[:2], *layers[:1]])
    with pytest.raises(AttachError, match=r"layers\.0 runs more than once"):
        model(**batch)
    decoder.layers = layers
    put_rows_in_front(model)
    with pytest.raises(AttachError, match=r"layers\.0\S* got \d+ rows"):
        model(**{name: value for name, value in batch.items() if name != "attention_mask"})


def test_evaluation_and_dense_phases_run_the_layer_itself(whole, monkeypatch):
    model, batch = make_model(whole), small_batch()
    expected = loss_and_gradients(model, batch)
    attach(model, every_step(exact_removal=False, start_step=5))
    state = get_state(model)
    state.begin_training(object(), 10)
    monkeypatch.setattr(whole_layer, "post_attention_by_rows", lambda *_: pytest.fail("a dense phase left rows out"))
    state.set_step(0)
    assert_same(loss_and_gradients(model, batch), expected)
    detach(model)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_a_layer_that_computes_something_else_runs_part_by_part(whole, monkeypatch):
    def other(self, hidden_states, **kwargs):
        return (2 * fast_forward(self, hidden_states, **kwargs)[0],)

    model, batch = make_model(whole), small_batch()
    monkeypatch.setattr(type(decoder_layers(model)[0]), "forward", other)
    expected = loss_and_gradients(model, batch)
    report = attach(model, every_step(exact_removal=False, backward_rows=1 - 1e-9))
    assert (report.row_layers, report.whole_layers) == (3, 0)
    assert report.not_whole[0][0].startswith("its forward differs from every layer")
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)
