"""Checks of backward passes: they find trained tensors without a gradient and losses on unlabelled tokens only."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_unsloth import attach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError

from exact_models import ALL_ROWS, CONFIGS, assert_exact, decoder, lora_config
from tiny_models import always, make_batch, make_lora

# -- Every trained tensor has a gradient ------------------------------------------------------------------------------


class Added(nn.Module):
    """A custom adapter, added to a projection's output by a forward hook."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.full((out, width), 0.01))


def add_own_adapter(model):
    projection = decoder(model).layers[1].mlp.gate_proj
    own = Added(projection.in_features, projection.out_features)
    projection.own = own
    projection.register_forward_hook(lambda module, args, output: output + F.linear(args[0], own.weight))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"])
def test_an_adapter_that_lies_elsewhere_is_refused(part, kind):
    model = make_lora()
    projection = decoder(model).layers[1].get_submodule(part)
    model.elsewhere = Added(projection.in_features, projection.out_features)
    projection.register_forward_hook(lambda module, args, output: output + F.linear(args[0], model.elsewhere.weight))
    with pytest.raises(AttachError, match=r"layers\.1\S*: its output depends on 1 trained tensors \(of shape \["):
        attach(model, CONFIGS[kind])


def test_an_adapter_of_one_part_stays_where_another_is_sparse():
    model, batch = make_lora(), make_batch()
    projection = decoder(model).layers[1].self_attn.o_proj
    model.elsewhere = Added(projection.in_features, projection.out_features)
    projection.register_forward_hook(lambda module, args, output: output + F.linear(args[0], model.elsewhere.weight))
    attach(model, always(self_attn={}))
    for _ in range(2):
        model(**batch).loss.backward()
    assert model.elsewhere.weight.grad.any()
    assert get_state(model).gradients_seen


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_tensor_that_the_sparse_path_goes_by_is_named(checkpointing):
    model, batch = make_lora(), make_batch()
    attach(model, always())
    add_own_adapter(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with pytest.raises(
        AttachError, match=r"1 of \d+ trained tensors.* no gradient.*layers\.1\.mlp\.gate_proj\.own\.weight"
    ):
        model(**batch).loss.backward()


def test_the_same_adapter_is_exact_by_rows():
    model = make_lora(dtype=torch.float64)
    add_own_adapter(model.double())
    decoder(model).layers[1].mlp.gate_proj.own.double()
    assert_exact(model, make_batch())


def test_it_is_looked_at_once_and_leaves_nothing_behind():
    model, batch = make_lora(), make_batch()
    attach(model, always())
    for _ in range(2):
        model(**batch).loss.backward()
    assert get_state(model).gradients_seen
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    model(**batch).loss.backward()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_rightly_has_no_gradient_is_no_fault(kind):
    """Inactive adapters, a loss on a middle layer, ``torch.autograd.grad``, a forward without backward."""
    model, batch = make_lora(), make_batch()
    model.add_adapter("second", lora_config())
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.requires_grad_(True)
    attach(model, CONFIGS[kind])
    model(**batch)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    hidden[1].square().sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "second" not in n]
    torch.autograd.grad(model(**batch).loss, trained)
    for _ in range(2):
        model(**batch).loss.backward()
    get_state(model).verify_step()
    assert get_state(model).gradients_seen


def test_an_optimiser_in_the_backward_pass_is_no_fault():
    model, batch = make_lora(), make_batch()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    attach(model, always())
    for _ in range(2):
        model(**batch).loss.backward()
    assert get_state(model).gradients_seen


def test_a_plain_loop_verifies_that_parts_ran():
    model, batch = make_lora(), make_batch()
    attach(model, always())
    mlp = decoder(model).layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)
    model(**batch).loss.backward()
    with pytest.raises(AttachError, match=r"did not run sparsely.*layers\.1\.mlp"):
        model(**batch)


# -- Losses that read other rows --------------------------------------------------------------------------------------


def every_token(output, batch):
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def said(caplog):
    return sum("The loss reads tokens that have no label" in record.message for record in caplog.records)


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loss_on_other_tokens_is_noticed_once(kind, checkpointing, caplog):
    model, batch = make_lora(), make_batch()
    attach(model, CONFIGS[kind])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    for _ in range(3):
        every_token(model(**batch), batch).backward()
    assert said(caplog) == 1


def test_it_is_noticed_when_it_comes_later(caplog):
    model, batch = make_lora(num_hidden_layers=1), make_batch()
    attach(model, ALL_ROWS)
    for step in range(101):
        output = model(**batch)
        (output.loss if step < 50 else 0.01 * every_token(output, batch)).backward()
    assert said(caplog) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_on_labels_are_no_alarm(family, side, caplog):
    model, batch = make_lora(family), make_batch(side=side)
    attach(model, ALL_ROWS)
    output = model(**batch)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    weights = torch.where(shifted != -100, 3.0, 0.0)
    losses = F.cross_entropy(output.logits.flatten(0, 1), shifted.flatten(), reduction="none")
    (output.loss + (losses * weights.flatten()).mean()).backward()
    model(**batch).loss.backward()
    assert get_state(model).loss_rows.looks == 1
    assert not said(caplog)


def test_heads_that_mix_tokens_are_no_alarm(caplog):
    """MTP: attention after the last layer sends gradients to every row."""
    model, batch = make_lora(), make_batch()
    model.mtp = nn.MultiheadAttention(64, 4, batch_first=True)
    attach(model, ALL_ROWS)
    output = model(**batch, output_hidden_states=True)
    last = output.hidden_states[-1]
    (output.loss + model.mtp(last, last, last)[0].square().mean()).backward()
    model(**batch)
    assert get_state(model).loss_rows.last is None
    assert not said(caplog)
