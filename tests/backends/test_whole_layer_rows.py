"""Row sparsity in Unsloth's hooks and whole layers, on stand-ins of its layers, compared with the masked reference.

tests/gpu/test_unsloth.py does the same with Unsloth's own layers on the GPU.
"""

import pytest
import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.backends.patching import runs
from sparse_unsloth.errors import AttachError
from sparse_unsloth.tokens.partition import TokenPartition

from masked_models import every_step, masked_gradients
from tiny_models import always, loss_and_gradients, make_batch
from unsloth_stand_in import assert_same, decoder_layers, packed_batch
from whole_layers import fast_forward, make_model, small_batch


@pytest.fixture
def whole(stand_in, monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    return stand_in


def count_calls(model):
    """The numbers of rows that each layer's MLP and O projection compute, in order."""
    rows = {"mlp": [], "o": []}
    for layer in decoder_layers(model):
        down, o = layer.mlp.down_proj, layer.self_attn.o_proj
        down.register_forward_hook(
            lambda module, args, output: rows["mlp"].append(args[0].numel() // args[0].shape[-1])
        )
        o.register_forward_hook(lambda module, args, output: rows["o"].append(args[0].numel() // args[0].shape[-1]))
    return rows


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_whole_layers_train_as_masks_say(whole, checkpointing, packed):
    model = make_model(whole, checkpointing)
    # Many context tokens: some rows are chosen below a layer that drops them, and need its residual stream.
    batch = (packed_batch if packed else make_batch)(lengths=((30, 4), (25, 6), (40, 2)))
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    assert all(runs(layer, whole_layer.layer_forward) for layer in decoder_layers(model))
    ours = loss_and_gradients(model, batch)
    assert_same(ours, expected)
    assert get_state(model).ran == get_state(model).expected_parts()
    assert not any(runtime.skip_output_projection for runtime in get_state(model).runtimes.values())


def test_parts_train_as_masks_say(stand_in):
    """Without the norm function that whole layers need, each part is hooked."""
    model, batch = make_model(stand_in, "reentrant"), small_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)


def test_a_recompute_computes_nothing_behind_attention(whole):
    model, batch = make_model(whole, "reentrant"), small_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step(exact_removal=False))
    get_state(model).config = get_state(model).config.model_copy(update={"exact_removal": True})
    rows = count_calls(model)
    assert_same(loss_and_gradients(model, batch), expected)
    partition = TokenPartition.from_labels(batch["labels"], batch["attention_mask"], padding_masked=False)
    few = len(partition.dense) + -(-len(partition.context) // 4)
    assert rows["o"] == [batch["labels"].numel()] * 3 + [few] * 3
    assert rows["mlp"] in ([], rows["o"])  # the stand-in's fused MLP may not call its modules


@pytest.mark.parametrize("checkpointing", [False, "reentrant"])
def test_the_kernels_compute_the_chosen_rows(whole, monkeypatch, checkpointing):
    model, batch = make_model(whole, checkpointing), small_batch()
    expected = masked_gradients(model, batch)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    ran = []
    original = whole_layer.post_attention
    monkeypatch.setattr(whole_layer, "post_attention", lambda *given: ran.append(given) or original(*given))
    attach(model, every_step(exact_removal=False))
    ran.clear()  # of the probe
    assert_same(loss_and_gradients(model, batch), expected)
    assert len(ran) == 3
    assert all(rows.shape == stream.shape and plan.output_unused for rows, stream, plan in ran)


def put_rows_in_front(model):
    embed = model.get_base_model().model.embed_tokens
    plain = embed.forward
    embed.forward = lambda ids: torch.cat((plain(ids[:, :2]), plain(ids)), dim=1)


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        (every_step(exact_removal=False), False),
        (every_step(exact_removal=False), True),
        (always(exact_removal=False), 0),
    ],
    ids=["rows", "rows, kernels", "channels"],
)
def test_rows_are_counted_and_layers_run_once(whole, monkeypatch, config, kernels):
    """By whole layers, and by each part where whole layers do not apply."""
    if kernels:
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
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
    monkeypatch.setattr(whole_layer, "backward_rows", lambda *_: pytest.fail("a dense phase left rows out"))
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
    assert report.not_whole[0][0].startswith("the forward of FastLayer differs from our functions")
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)
