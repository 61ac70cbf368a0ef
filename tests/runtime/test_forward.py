"""Forwards whose rows or layers do not match the labels: exact, or an error that names them."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_unsloth import attach, detach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError

from exact_models import ALL_ROWS, CONFIGS, assert_exact, decoder, with_adapter
from tiny_models import always, loss_and_gradients, make_batch, make_lora

# -- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_soft_prompts_are_refused_by_name(config, kind):
    changes = {"num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    with pytest.raises(AttachError, match=rf"{config.peft_type.value} \({type(config).__name__}\).*rows in front"):
        attach(with_adapter(config, **changes), CONFIGS[kind])


def put_rows_in_front(model, count):
    """Puts ``count`` rows before the tokens, like a projector of images or sound."""
    embed = decoder(model).embed_tokens
    rows = torch.zeros(1, count, embed.embedding_dim)
    embed.forward = lambda ids: torch.cat(
        (rows.expand(len(ids), -1, -1), F.embedding(ids, embed.weight)), dim=1
    )  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_put_in_front_are_counted(kind):
    model, batch = make_lora(), make_batch()
    rows = batch["input_ids"].numel()
    attach(model, CONFIGS[kind])
    put_rows_in_front(model, 2)
    given = {name: value for name, value in batch.items() if name != "attention_mask"}
    message = rf"layers\.0\.\S+ got {rows + 2 * len(batch['labels'])} rows.* count {rows}.*soft prompts"
    with pytest.raises(AttachError, match=message):
        model(**given)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_always_puts_rows_in_front_is_refused_when_attached(kind):
    model = make_lora()
    put_rows_in_front(model, 2)
    with pytest.raises(AttachError, match=r"got 6 rows.* count 4"):
        attach(model, CONFIGS[kind])
    assert get_state(model) is None


def test_as_many_rows_in_another_order_are_refused():
    """``[sequence, batch]`` inside the MLP: the same number of rows in another order."""
    model = make_lora()
    mlp = decoder(model).layers[1].mlp
    attach(model, ALL_ROWS)
    hooked = mlp.forward
    mlp.forward = lambda x: hooked(x.transpose(0, 1)).transpose(0, 1)
    with pytest.raises(AttachError, match=r"layers\.1\.mlp got .* rows, \[13, 3\]"):
        model(**make_batch())


def test_flat_rows_are_exact():
    model = make_lora(dtype=torch.float64)
    mlp = decoder(model).layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x.flatten(0, -2)).view(x.shape)
    assert_exact(model, make_batch())


# -- Layers that run more than once -----------------------------------------------------------------------------------


def loop(model, times):
    """Makes the stack run several times in one forward, by iterating over `nn.ModuleList` again."""
    stack = decoder(model).layers
    layers = list(stack)

    class Looped(nn.ModuleList):
        def __iter__(self):
            return iter(layers * times)

        def __getitem__(self, index):
            found = (layers * times)[index]
            return found

    stack.__class__ = Looped
    decoder(model).config.num_hidden_layers = len(layers) * times
    decoder(model).config.layer_types = ["full_attention"] * len(layers) * times


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_looped_decoder_is_refused(kind):
    model = make_lora()
    loop(model, 2)
    with pytest.raises(AttachError, match=r"layers\.0 runs more than once in one forward"):
        attach(model, CONFIGS[kind])
    assert get_state(model) is None


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_decoder_that_loops_later_is_refused_then(kind, checkpointing):
    model = make_lora()
    attach(model, CONFIGS[kind])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model(**make_batch()).loss.backward()
    loop(model, 2)
    with pytest.raises(AttachError, match=r"layers\.0 runs more than once in one forward"):
        model(**make_batch())


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_layer_in_two_places_is_refused(kind):
    model = make_lora()
    decoder(model).layers[2] = decoder(model).layers[0]
    with pytest.raises(AttachError, match=r"layers\.0 runs more than once"):
        attach(model, CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_mlp_that_two_layers_share_is_refused(kind):
    model = make_lora()
    layers = decoder(model).layers
    layers[2].mlp = layers[0].mlp
    with pytest.raises(AttachError, match=r"layers\.0\.mlp, which is .*layers\.2\.mlp too, runs more than once"):
        attach(model, CONFIGS[kind])
    assert "forward" not in layers[0].mlp.__dict__


def test_an_mlp_that_its_layer_calls_twice_is_refused():
    model = make_lora()
    layer = decoder(model).layers[1]
    mlp = layer.mlp
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: output + mlp(output))
    with pytest.raises(AttachError, match=r"layers\.1\.mlp runs more than once"):
        attach(model, ALL_ROWS)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_some_layers_checkpointed(kind, reentrant):
    """A recompute does not count as a second call, whichever layers are checkpointed."""
    config = {"rows": {"backward_rows": 0.4}, "channels": always()}[kind]
    model, batch = make_lora(), make_batch()
    attach(model, config)
    expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    decoder(model).layers[1].gradient_checkpointing = False
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, batch)
    assert get_state(model).gradients_seen
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6)


def checkpoint_together(model, reentrant):
    """Layers 0 and 1 are one checkpointed function."""
    first, second = decoder(model).layers[0], decoder(model).layers[1]
    call_first, call_second = type(first).__call__, type(second).__call__

    class First(type(first)):
        def __call__(self, hidden, **kwargs):
            self.waiting = kwargs
            return hidden

    class Second(type(second)):
        def __call__(self, hidden, **kwargs):
            def both(x):
                return call_second(self, call_first(first, x, **first.waiting), **kwargs)

            return checkpoint(both, hidden, use_reentrant=reentrant)

    first.__class__, second.__class__ = First, Second


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_checkpointed_is_exact(reentrant):
    model, batch = make_lora(dtype=torch.float64), make_batch()
    expected = loss_and_gradients(model, batch)
    attach(model, ALL_ROWS)
    for _ in range(2):
        model.zero_grad()
        start = torch.ones((), requires_grad=True)
        loss = checkpoint(lambda one: one * model(**batch).loss, start, use_reentrant=reentrant)
        loss.backward()
    assert get_state(model).gradients_seen
    torch.testing.assert_close(loss.detach(), expected[0])
    for name, parameter in model.named_parameters():
        if name in expected[1]:
            torch.testing.assert_close(parameter.grad, expected[1][name])
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_checkpointed_together_are_refused_or_exact(reentrant):
    model, batch = make_lora(dtype=torch.float64), make_batch()
    model.enable_input_require_grads()
    model.config.use_cache = False
    expected = loss_and_gradients(model, batch)
    checkpoint_together(model, reentrant)
    attach(model, ALL_ROWS)
    with pytest.raises(AttachError, match=r"layers\.1 and the layer before it are checkpointed together"):
        model(**batch).loss.backward()
    detach(model)
    attach(model, {**ALL_ROWS, "exact_removal": False})
    loss, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name])
