"""Row sparsity of decoder layers of any kind, by the model's own code: exact forwards, and never wrong gradients."""

import copy

import pytest
import torch
from torch import nn

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends.row_parts import find_row_layers
from sparse_unsloth.errors import AttachError, SparsityError
from sparse_unsloth.rows.backward import BackwardRows, backward_rows, refuse_gradient
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.rows.routing import KeptChoices
from sparse_unsloth.tokens.partition import TokenPartition

from decoder_models import make_batch, make_model
from masked_models import assert_gradients_close, every_step, masked_gradients
from model_table import TESTED, problems_of
from tiny_models import loss_and_gradients

ALL = {"backward_rows": 1 - 1e-9}  # rounded up to every row


def parts_of(model):
    return [[part.name for part in layer.row_parts] for layer in find_row_layers(model)[0]]


def decoder_layers(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


# -- The table of docs/models.md --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TESTED)
def test_a_family_trains_as_peft_does(family):
    result = problems_of(family)
    assert not result.problems, result.problems
    assert result.rows == result.layers


# -- What backward goes through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "falcon_h1", "llama4"])
def test_a_model_trains_as_its_masks_say(family):
    """Mixtures with a shared expert, tuples, parallel mixers, and outputs ``[rows, width]``."""
    model, batch = make_model(family), make_batch(family)
    expected = masked_gradients(model, batch, layers=find_row_layers(model)[0])
    dense = loss_and_gradients(model, batch)
    attach(model, every_step())
    ours = loss_and_gradients(model, batch)
    assert ours[0] == expected[0]
    assert_gradients_close(ours[1], expected[1], rtol=1e-5, atol=1e-8)
    assert any(not torch.allclose(ours[1][name], dense[1][name]) for name in dense[1])


def test_a_copy_trains_alike_and_detaching_restores():
    model, batch = make_model("mixtral"), make_batch("mixtral")
    expected = loss_and_gradients(model, batch)
    attach(model, every_step())
    ours, copied = loss_and_gradients(model, batch), loss_and_gradients(copy.deepcopy(model), batch)
    assert_gradients_close(copied[1], ours[1])
    detach(model)
    assert not [name for module in model.modules() for name in module.__dict__ if name.startswith("_sparse_")]
    assert_gradients_close(loss_and_gradients(model, batch)[1], expected[1])


# -- Routers ----------------------------------------------------------------------------------------------------------


class Rounding(nn.Module):
    """A router whose logits are tied but for a rounding error, which depends on the number of rows."""

    def forward(self, rows):
        sign = 1 if rows.shape[0] % 2 else -1
        logits = rows.sum(-1, keepdim=True) + sign * 1e-13 * torch.arange(4, dtype=rows.dtype)
        values, indices = torch.topk(logits, 2, dim=-1)
        return torch.zeros_like(logits).scatter(1, indices, values.sigmoid()), logits


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_choice_of_the_first_pass_is_kept(use_reentrant):
    model, batch = make_model("llama4"), make_batch("llama4")
    for layer in decoder_layers(model):
        layer.feed_forward.router = Rounding()
    layers = find_row_layers(model)[0]
    assert all(layer.row_parts[-1].is_routed for layer in layers)
    expected = masked_gradients(model, batch, layers=layers)
    attach(model, every_step())
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.train()
    assert_gradients_close(loss_and_gradients(model, batch)[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("choose", "source"),
    [
        (lambda x: torch.topk(x, 2, dim=-1), (6, 5)),
        (lambda x: x.max(-1, keepdim=True), (6, 5)),
        (lambda x: torch.sort(x, dim=-1), (2, 3, 5)),
        (lambda x: (x.argmax(-1),), (6, 5)),
        (lambda x: x.view(-1, 2, 5).topk(3), (6, 10)),
    ],
    ids=["topk", "max", "sort", "argmax", "groups"],
)
def test_choices_are_repeated_for_some_rows(choose, source):
    x, kept, rows = torch.randn(source), [], torch.tensor([4, 1])
    with KeptChoices(kept, 6):
        first = choose(x)[-1].flatten(0, len(source) - 2)
    other = torch.randn(source).flatten(0, -2)[rows].requires_grad_()
    with KeptChoices(kept, 6, rows):
        again = choose(other if len(source) == 2 else other[None])
    torch.testing.assert_close(again[-1].flatten(0, len(source) - 2), first[rows])
    if len(again) == 2:
        values = again[0].flatten(0, len(source) - 2)
        torch.testing.assert_close(values, other.view(*first[rows].shape[:-1], -1).gather(-1, first[rows]))
        assert torch.autograd.grad(values.sum(), other)[0].count_nonzero() == first[rows].numel()


def test_a_choice_among_rows_is_refused():
    with pytest.raises(SparsityError, match="is not one for each of 6 rows"), KeptChoices([], 6):
        torch.topk(torch.randn(5, 6), 2, dim=-1)


def test_the_auxiliary_loss_keeps_its_gradient(caplog):
    """Routers stay out of the row parts, where a module holds the experts alone."""
    model, batch = make_model("qwen3_moe"), make_batch("qwen3_moe")
    without = loss_and_gradients(model, batch)
    expected = loss_and_gradients(model, {**batch, "output_router_logits": True})
    assert not torch.allclose(expected[0], without[0])
    assert parts_of(model) == [["self_attn.o_proj", "mlp.experts"]] * 2
    attach(model, ALL)
    ours = loss_and_gradients(model, {**batch, "output_router_logits": True})
    assert get_state(model).ran == get_state(model).expected_parts()
    assert_gradients_close(ours[1], expected[1], rtol=1e-8, atol=1e-10)


def test_the_auxiliary_loss_of_other_mixtures_is_refused(caplog):
    """Before attaching, they are no row parts; afterwards such a forward is dense."""
    model, batch = make_model("llama4"), make_batch("llama4")
    attach(model, ALL)
    ours = loss_and_gradients(model, {**batch, "output_router_logits": True})
    assert "output_router_logits was set after attaching" in caplog.text
    detach(model)
    expected = loss_and_gradients(model, {**batch, "output_router_logits": True})
    assert_gradients_close(ours[1], expected[1])
    model.config.output_router_logits = True
    report = attach(model, ALL)
    assert "feed_forward dense: the loss reads its router's logits" in str(report)
    assert_gradients_close(loss_and_gradients(model, batch)[1], expected[1], rtol=1e-8, atol=1e-10)


def test_what_a_module_returns_beside_its_output_has_no_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    rows = torch.arange(4)
    choice = RowChoice(TokenPartition((1, 4), rows, rows[:0], rows[:0], rows), 1.0)
    output = backward_rows(torch.exp, [x], [], BackwardRows(choice))
    side = refuse_gradient(torch.randn(4, 2), output, "layers.0.mlp")
    output.sum().backward(retain_graph=True)
    with pytest.raises(SparsityError, match=r"layers\.0\.mlp: the loss depends on what it returns beside"):
        (output.sum() + side.sum()).backward()


def test_noise_stays_outside():
    """Phi-MoE's router draws its experts at random in training."""
    assert parts_of(make_model("phimoe")) == [["self_attn.o_proj", "mlp.experts"]] * 2


# -- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_loop_over_layers_is_refused(use_reentrant):
    """The second call in one forward must not be taken for a recompute."""
    model, batch = make_model("mixtral"), make_batch("mixtral")
    decoder = model.get_base_model().model
    layers, looped = decoder.layers, nn.ModuleList([*decoder.layers, decoder.layers[0]])
    attach(model, ALL)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.train()
    decoder.layers, decoder.config.num_hidden_layers = looped, 3
    with pytest.raises(AttachError, match=r"layers\.0 runs more than once"):
        model(**batch)
    decoder.layers = layers
    detach(model)
    decoder.layers = looped
    expected = loss_and_gradients(model, batch)
    report = attach(model, ALL)
    assert str(report).startswith("sparse_unsloth: 1 of 3 layers sparse")
    assert "layers 0, 2: left out, dense (MixtralDecoderLayer: self_attn: it runs more than once" in str(report)
    assert_gradients_close(loss_and_gradients(model, batch)[1], expected[1], rtol=1e-8, atol=1e-10)


def test_other_rows_than_the_labels_are_refused():
    model, batch = make_model("mixtral"), make_batch("mixtral")
    attach(model, ALL)
    embed = model.get_base_model().model.embed_tokens
    plain = embed.forward
    embed.forward = lambda ids: torch.cat((plain(ids[:, :2]), plain(ids)), dim=1)
    with pytest.raises(AttachError, match=r"layers\.0\.\S* got \d+ rows"):
        model(**{name: value for name, value in batch.items() if name != "attention_mask"})


def test_dropout_is_named():
    model = make_model("phi3")
    for module in model.modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    with pytest.raises(AttachError, match=r"Phi3DecoderLayer has no part .* mlp: it draws random numbers \(dropout"):
        attach(model, ALL)
    assert get_state(model) is None


def test_a_layer_without_row_parts_is_left_out_and_named():
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x).cumsum(1)

    model, batch = make_model("phi3"), make_batch("phi3")
    layer = decoder_layers(model)[1]
    layer.mlp = Mixing(32, 32, dtype=torch.float64)
    layer.self_attn.o_proj = Mixing(32, 32, dtype=torch.float64)
    expected = loss_and_gradients(model, batch)
    report = attach(model, ALL)
    assert str(report).startswith("sparse_unsloth: 1 of 2 layers sparse")
    assert "layer 1: left out, dense (Phi3DecoderLayer: self_attn: it mixes rows" in str(report)
    assert_gradients_close(loss_and_gradients(model, batch)[1], expected[1], rtol=1e-8, atol=1e-10)


# -- Models that do not pass keyword arguments on to their layers -----------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_dense_forwards_of_a_schedule_are_checkpointed_too(reentrant):
    """Their recomputes have no context, and no layer takes them for those of another forward."""
    model, batch = make_model("falcon"), make_batch("falcon")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    attach(model, {"backward_rows": 0.25, "start_step": 1, "end_step": 3})
    state = get_state(model)
    state.begin_training("loop", max_steps=4)
    for step in range(4):
        state.set_step(step)
        model(**batch).loss.backward()
    assert state.counts.sparse_forwards == 2


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_each_recompute_gets_the_context_of_its_own_forward(use_reentrant):
    model, batch = make_model("falcon"), make_batch("falcon")
    other = {name: tensor.flip(0)[:, :12] for name, tensor in batch.items()}
    attach(model, every_step())
    expected = [loss_and_gradients(model, one)[1] for one in (batch, other)]
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.train()
    model.zero_grad()
    losses = [model(**one).loss for one in (batch, other)]
    for loss in losses:
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    both = {name: expected[0][name] + expected[1][name] for name in found}
    assert_gradients_close(found, both, rtol=1e-5, atol=1e-8)


def test_a_forward_that_failed_leaves_nothing_behind(caplog):
    model, batch = make_model("falcon"), make_batch("falcon")
    model.eval()
    expected = model(**batch).logits
    model.train()
    attach(model, every_step())
    assert "without labels" not in caplog.text
    head = model.get_base_model().lm_head
    handle = head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    model.eval()
    torch.testing.assert_close(model(**batch).logits, expected)
    assert get_state(model).handing.context is None


def test_another_checkpointing_is_refused():
    model, batch = make_model("falcon"), make_batch("falcon")
    attach(model, every_step())
    layer = decoder_layers(model)[0]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(
        lambda y: (layer if "again" in layer.__dict__ else forward)(y, **kwargs), x, use_reentrant=False
    )
    loss = model(**batch).loss
    layer.forward, layer.again = forward, True
    with pytest.raises(AttachError, match="its gradient checkpointing is not transformers' own"):
        loss.backward()
