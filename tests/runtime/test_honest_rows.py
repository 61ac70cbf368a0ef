"""What would give a wrong gradient, or none, is exact or refused by name: rows, repeated layers, adapters, losses."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_unsloth import attach, detach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError

from tiny_models import always, loss_and_gradients, make_base, make_batch, make_lora

ALL_ROWS = {"backward_rows": 0.999999}
CONFIGS = {"rows": ALL_ROWS, "channels": always()}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(model):
    return model.get_base_model().model


def with_adapter(config, **changes):
    return peft.get_peft_model(make_base(**changes), config).train()


def assert_exact(model, batch, config=ALL_ROWS):
    """With every row kept, loss and gradients are those of the model that is not attached."""
    loss, gradients = loss_and_gradients(model, batch)
    attach(model, config)
    for _ in range(2):  # the second forward judges the first one's backward pass
        other_loss, others = loss_and_gradients(model, batch)
    assert get_state(model).gradients_seen
    torch.testing.assert_close(other_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


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
    """From now on ``count`` rows come before the tokens, as a projector's image or sound rows do."""
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
    """``[sequence, batch]`` inside the MLP: the same number, and other rows."""
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
    """From now on the stack runs that often in one forward; `nn.ModuleList` is walked again."""
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
    """A recompute is no second call, wherever checkpointing is on."""
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


# -- Adapters ---------------------------------------------------------------------------------------------------------

TUNERS = {
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
    "SHIRA": lambda: peft.ShiraConfig(r=4, target_modules=["gate_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=TARGETS),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["down_proj"]),
    "VBLORA": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, target_modules=["v_proj"]),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=["up_proj"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_other_tuners_are_refused_by_name(tuner, kind):
    model = with_adapter(TUNERS[tuner]())
    with pytest.raises(AttachError, match=rf"is {tuner} \(\w+Config\), which has no sparse path.*LoraConfig"):
        attach(model, CONFIGS[kind])
    assert get_state(model) is None


def test_a_tuner_beside_lora_is_refused():
    model = peft.get_peft_model(make_base(), peft.LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["gate_proj"]))
    with pytest.raises(AttachError, match="'other' is LOHA"):
        attach(model, ALL_ROWS)


def test_a_layer_of_another_tuner_is_refused_without_its_configuration():
    model = peft.inject_adapter_in_model(TUNERS["OFT"](), make_base()).train()
    model.__dict__.pop("peft_config")
    with pytest.raises(AttachError, match=r"layers\.0\.self_attn\.q_proj: an adapter of the kind oft"):
        attach(model, ALL_ROWS)


def lora_config(**options):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": TARGETS} | options)


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        ({"alora_invocation_tokens": [7, 9]}, r"\(alora_invocation_tokens\)", "rows"),
        ({"alora_invocation_tokens": [7, 9]}, r"\(alora_invocation_tokens\)", "channels"),
        ({"alora_invocation_tokens": [7, 9], "target_modules": ["q_proj"]}, "alora_invocation_tokens", "rows"),
        ({"velora_config": peft.VeloraConfig()}, "VeloraLinearVariant", "rows"),
        ({"monteclora_config": peft.MontecloraConfig()}, "MontecloraLinearVariant", "rows"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters", "rows"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}, "target_param", "channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_of_lora_are_refused_by_name(options, name, kind):
    with pytest.raises(AttachError, match=name):
        attach(with_adapter(lora_config(**options)), CONFIGS[kind])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "mica"},
        {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], nblocks=2, match_strict=False)},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["input_layernorm"]},
        {"trainable_token_indices": [4, 5]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_rows_of_lora_in_its_forms_are_exact(options):
    model = with_adapter(lora_config(**options)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(4))
    assert_exact(model, make_batch())


def test_an_adapter_of_another_kind_that_takes_over_runs_dense(caplog):
    model, batch = make_lora(), make_batch()
    attach(model, ALL_ROWS)
    state = get_state(model)
    model.add_adapter("later", lora_config(alora_invocation_tokens=[7]))
    model(**batch)
    assert (state.counts.sparse_forwards, caplog.text) == (1, "")
    model.set_adapter("later")
    model(**batch)
    assert state.counts.sparse_forwards == 1
    assert "'later' uses the LoRA variant ALoraLinearVariant (alora_invocation_tokens)" in caplog.text
    assert "the model runs as it does without sparse paths" in caplog.text
    model.set_adapter("default")
    model(**batch)
    assert state.counts.sparse_forwards == 2


# -- Every trained tensor has a gradient ------------------------------------------------------------------------------


class Added(nn.Module):
    """An adapter of a user's own, added to a projection's output by a forward hook."""

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
    """Inactive adapters, a loss on the middle of the model, gradients that are returned, a forward without backward."""
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
    """MTP: attention behind the last layer sends gradients to every row."""
    model, batch = make_lora(), make_batch()
    model.mtp = nn.MultiheadAttention(64, 4, batch_first=True)
    attach(model, ALL_ROWS)
    output = model(**batch, output_hidden_states=True)
    last = output.hidden_states[-1]
    (output.loss + model.mtp(last, last, last)[0].square().mean()).backward()
    model(**batch)
    assert get_state(model).loss_rows.last is None
    assert not said(caplog)
