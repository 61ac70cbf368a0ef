"""A fast layer keeps what it read of its projections until something of it changes."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from sparse_unsloth.layer.fast import FastLayer
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.ops import projection
from sparse_unsloth.ops.projection import Lora, Projection, read_projection

from tiny_models import make_base, make_lora


def make():
    model = make_lora(base=make_base("llama", num_hidden_layers=1))
    (layer,) = find_layers(model)
    return model, layer, FastLayer(layer)


def parameter_of(module):
    return nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)


class FakeQuantizedLinear(nn.Linear):
    pass


def quantise(module):
    module.__class__ = FakeQuantizedLinear


CHANGES = {
    "merged": lambda model, up: model.merge_adapter(),
    "disabled": lambda model, up: model.base_model.disable_adapter_layers(),
    "another adapter": lambda model, up: model.set_adapter("other"),
    "two adapters": lambda model, up: model.base_model.set_adapter(["default", "other"]),
    "scale": lambda model, up: up.set_scale("default", 3.0),
    "A": lambda model, up: setattr(up.lora_A["default"], "weight", parameter_of(up.lora_A["default"])),
    "B": lambda model, up: up.lora_B.update({"default": copy.deepcopy(up.lora_B["default"])}),
    "weight": lambda model, up: setattr(up.base_layer, "weight", parameter_of(up.base_layer)),
    "bias": lambda model, up: setattr(up.base_layer, "bias", nn.Parameter(torch.zeros(up.out_features), False)),
    "base": lambda model, up: setattr(up, "base_layer", copy.deepcopy(up.base_layer)),
    "quantised base": lambda model, up: quantise(up.base_layer),
    "quantised A": lambda model, up: quantise(up.lora_A["default"]),
    "quantiser of the base": lambda model, up: up.base_layer.add_module("weight_fake_quantizer", nn.Identity()),
    "quantiser of B": lambda model, up: up.lora_B["default"].add_module("activation_fake_quantizer", nn.Identity()),
}


def outcome(read):
    try:
        return read()
    except Exception as error:
        return type(error)


def is_same(one, other):
    if not isinstance(one, Projection) or not isinstance(other, Projection):
        return one is other
    parts = [(one.base.weight, other.base.weight), (one.base.bias, other.base.bias)]
    if not isinstance(one.lora, Lora) or not isinstance(other.lora, Lora):
        return one.lora is other.lora and all(a is b for a, b in parts)
    parts += [(one.lora.A, other.lora.A), (one.lora.B, other.lora.B)]
    return one.lora.scale == other.lora.scale and all(a is b for a, b in parts)


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_are_seen(change):
    model, layer, fast = make()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM"))
    before = fast.projections()
    assert fast.projections() is before
    CHANGES[change](model, layer.mlp.up_proj)
    ours = outcome(fast.projections)
    fresh = [outcome(lambda module=module: read_projection(module)) for module in fast._projections]
    if isinstance(ours, list):
        assert all(map(is_same, ours, fresh))
        assert not all(map(is_same, ours, before))
    else:
        assert ours in fresh


def test_a_known_version_of_the_adapters_spares_all_but_tensors_and_scales():
    model, layer, fast = make()
    known, up = fast.projections(7), layer.mlp.up_proj
    quantise(up.base_layer)
    assert fast.projections(7) is known  # who changes this must count a version on
    assert outcome(lambda: fast.projections(8)) is not known
    _, layer, fast = make()
    known, up = fast.projections(7), layer.mlp.up_proj
    for name in ("A", "B", "weight", "scale"):
        CHANGES[name](model, up)
        now = fast.projections(7)
        assert now is not known
        assert not all(map(is_same, now, known))
        known = now


def test_norms_are_read_again_when_they_changed():
    _, layer, fast = make()
    norms = fast.norms()
    assert fast.norms() is norms
    weight = layer.module.input_layernorm.weight
    weight.data = weight.data.clone()
    assert fast.norms()[0].weight.data_ptr() == weight.data_ptr() != norms[0].weight.data_ptr()
    layer.module.input_layernorm.weight = parameter_of(layer.module.input_layernorm)
    assert fast.norms()[0].weight.data_ptr() == layer.module.input_layernorm.weight.data_ptr()
    layer.module.input_layernorm.weight.requires_grad_(True)
    assert fast.norms() is None
    assert fast.norms() is None
    layer.module.input_layernorm.weight.requires_grad_(False)
    assert fast.norms()[2] is not None


def test_nothing_is_read_again(monkeypatch):
    _, _, fast = make()
    known = fast.projections()
    monkeypatch.setattr("sparse_unsloth.layer.fast.read_projection", None)
    assert fast.projections() is known
    monkeypatch.setattr(projection, "read_base", None)
    with torch.no_grad():
        known[0].lora.A.mul_(2)
    assert fast.projections()[0].lora.A is known[0].lora.A


def test_copies_read_their_own_modules():
    _, layer, fast = make()
    fast.projections()
    layer.module.__dict__["kept"] = fast
    other = copy.deepcopy(layer.module)
    theirs = other.__dict__["kept"].projections()
    assert theirs[5].lora.A is other.mlp.up_proj.lora_A["default"].weight
