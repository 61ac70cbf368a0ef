"""The reference of the whole layer against the own layer of each family, forward and backward, in float64."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer import probe
from sparse_unsloth.layer.probe import difference, find_spec
from sparse_unsloth.layer.reference import reference_layer
from sparse_unsloth.layer.spec import read_norm, read_spec
from sparse_unsloth.model.decoder_layer import find_layers

from family_models import FAMILIES, calls, make_family
from tiny_models import make_base, pack_nf4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_and_equal(family):
    """Each layer's specification, found by the probe, gives its output and all gradients."""
    model = make_family(family)
    layers, found = calls(model)
    assert len(layers) == len(found) == 3
    for layer, (module, hidden_states, arguments) in zip(layers, found, strict=True):
        spec, apart = find_spec(read_spec(layer), module, hidden_states, arguments)
        assert apart < 1e-6
        named = {name: arguments.get(name) for name in ("position_embeddings", "attention_mask", "position_ids")}
        loras = {name: one for name, one in module.named_parameters() if "lora_" in name}
        dy = torch.randn(hidden_states.shape, dtype=hidden_states.dtype, generator=torch.Generator().manual_seed(2))
        outputs = (module(hidden_states, **arguments), reference_layer(spec, hidden_states, **named))
        expected, ours = (
            torch.autograd.grad(output if isinstance(output, torch.Tensor) else output[0], loras.values(), dy)
            for output in outputs
        )
        for name, left, right in zip(loras, ours, expected, strict=True):
            assert difference(left, right) < 1e-6, name


@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj", "gate_proj"], ["k_proj", "v_proj", "down_proj"]])
def test_lora_on_any_projections(targets):
    model = make_family("Qwen3", targets=targets)
    layers, found = calls(model)
    spec, _ = find_spec(read_spec(layers[1]), *found[1])
    assert sorted(name.split(".")[1] for name, one in spec.projections.items() if one.lora is not None) == sorted(
        targets
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_equal_to_rounding(dtype):
    model = make_family("Gemma3", dtype)
    layers, found = calls(model)
    for layer, call in zip(layers, found, strict=True):
        _, apart = find_spec(read_spec(layer), *call)
        assert apart < (1e-5 if dtype == torch.float32 else 0.02)


def test_the_nearest_form_counts_in_half_precision(monkeypatch):
    """Few positions turn queries by little more than bf16 rounds; attaching probes with four tokens."""
    monkeypatch.setattr(probe, "HALF_TOLERANCE", 0.05)  # "halves" is 0.03 from the layer without rotation
    model = make_family("SmolLM3", torch.bfloat16)
    layers, found = calls(model, length=4)
    specs = [find_spec(read_spec(layer), *call)[0] for layer, call in zip(layers, found, strict=True)]
    assert [spec.rotation for spec in specs] == ["halves", "none", "halves"]


def test_nf4_bases_are_dequantised():
    model = get_peft_model(
        pack_nf4(make_base("llama")), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    layers, found = calls(model)
    spec, apart = find_spec(read_spec(layers[0]), *found[0])
    assert spec.projections["mlp.gate_proj"].base.quant_state is not None
    assert apart < 1e-4


def change_output(module, args, output):
    return output + 0.01 * args[0] if isinstance(output, torch.Tensor) else output


def clip_queries(module, args, output):
    return output.clamp(-0.5, 0.5)


@pytest.mark.parametrize(
    ("family", "where", "fault"),
    [("Llama", "mlp", change_output), ("Qwen3", "self_attn.q_proj", clip_queries), ("Olmo2", "", change_output)],
)
def test_a_layer_that_computes_something_else_is_refused(family, where, fault):
    """What a class does beside its parts (an extra residual, clipped queries) no candidate has."""
    model = make_family(family)
    layers, _ = calls(model)
    layers[1].module.get_submodule(where).register_forward_hook(fault)
    layers, found = calls(model)
    find_spec(read_spec(layers[0]), *found[0])
    with pytest.raises(AttachError, match=r"its forward differs from every layer that sparse_unsloth knows"):
        find_spec(read_spec(layers[1]), *found[1])


def test_parts_that_no_specification_has_are_named():
    model = make_family("Llama")
    layer = find_layers(model)[0]
    layer.self_attn.sinks = torch.nn.Linear(1, 1)
    with pytest.raises(AttachError, match=r"self_attn has parts that are not of a Llama layer: sinks"):
        read_spec(layer)
    del layer.self_attn.sinks
    layer.mlp.dropout = torch.nn.Dropout(0.1)
    with pytest.raises(AttachError, match=r"mlp.dropout: dropout of 0.1"):
        read_spec(layer)
    layer.mlp.dropout.p = 0.0
    layer.module.input_layernorm.weight.requires_grad_()
    with pytest.raises(AttachError, match=r"input_layernorm is trained; freeze it"):
        read_spec(layer)
    layer.module.input_layernorm.weight.requires_grad_(False)
    layer.self_attn.attention_dropout = 0.1
    model.eval()
    with pytest.raises(AttachError, match=r"attention_dropout is not zero"):
        read_spec(layer)
    layer.self_attn.attention_dropout = 0.0
    read_spec(layer)


@pytest.mark.parametrize(("family", "kept"), [("Llama", False), ("Gemma3", True), ("Olmo2", True)])
def test_what_a_float32_norm_does_to_a_narrower_stream(family, kept):
    """Unsloth leaves norms in float32 where they keep the stream's dtype; others would widen the stream."""
    norm = find_layers(make_family(family, torch.float32))[0].module.post_attention_layernorm
    assert read_norm(norm, "norm").keeps_dtype is kept
    norm.forward = lambda x, own=norm.forward: own(x).half()
    with pytest.raises(AttachError, match=r"norm \(.*RMSNorm\) gives torch.float16 for torch.float32"):
        read_norm(norm, "norm")


def test_gradients_of_the_reference():
    """gradcheck of hidden states and of one LoRA branch, through a layer with every form of norm and a window."""
    model = make_family("Gemma3")
    layers, found = calls(model)
    module, hidden_states, arguments = found[0]
    spec, _ = find_spec(read_spec(layers[0]), module, hidden_states, arguments)
    cosines, sines = (angles[:1, :4] for angles in arguments["position_embeddings"])
    projection = spec.projections["self_attn.k_proj"]

    def function(x, A, B):
        changed = dataclasses.replace(projection, lora=dataclasses.replace(projection.lora, A=A, B=B))
        mixed = dataclasses.replace(spec, projections={**spec.projections, "self_attn.k_proj": changed}, window=3)
        return reference_layer(mixed, x, (cosines, sines))[..., :5]

    inputs = hidden_states[:1, :4], projection.lora.A[:1], projection.lora.B[:, :1]
    assert torch.autograd.gradcheck(function, [one.detach().clone().requires_grad_() for one in inputs])
