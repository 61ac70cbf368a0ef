"""The reference of the whole layer against the own layer of each family, forward and backward, in float64."""

import dataclasses

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.probe import difference, find_spec
from sparse_unsloth.layer.reference import reference_layer
from sparse_unsloth.layer.spec import read_spec
from sparse_unsloth.model.decoder_layer import find_layers

from tiny_models import COMMON, make_base, pack_nf4

ROPE = {
    "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Ministral3": {"head_dim": 16, "rope_parameters": ROPE},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 5},
    "Gemma3": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": SLIDING,
    },
    "Granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 5},
    "Cohere": {"use_qk_norm": True},
    "Cohere2": {"sliding_window": 5, "layer_types": SLIDING},
    "Exaone4": {"sliding_window": 5, "layer_types": SLIDING},
    "Helium": {"head_dim": 16},
    "Ernie4_5": {},
    "HunYuanDenseV1": {"head_dim": 16},
    "StableLm": {"partial_rotary_factor": 0.5},
    "VaultGemma": {"head_dim": 16},
    "Cwm": {"head_dim": 16},
}


def make(family, dtype=torch.float64, targets=None):
    """A model with LoRA whose layers have biases and norms that are not their neutral values."""
    torch.manual_seed(0)
    name = f"{family}Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **FAMILIES[family]})
    config._attn_implementation = "eager" if family in ("Gemma2", "VaultGemma") else "sdpa"
    base = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    targets = targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.to(dtype)


def calls(model, length=11):
    """``(module, hidden states, other arguments)`` of each decoder layer in one training forward, with padding."""
    found, layers = [], find_layers(model)

    def note(module, args, kwargs):
        kwargs = {"hidden_states": args[0] if args else None, **kwargs}
        found.append((module, kwargs.pop("hidden_states"), kwargs))

    handles = [layer.module.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return layers, found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_and_equal(family):
    """Each layer's specification, found by the probe, gives its output and all gradients."""
    model = make(family)
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
    model = make("Qwen3", targets=targets)
    layers, found = calls(model)
    spec, _ = find_spec(read_spec(layers[1]), *found[1])
    assert sorted(name.split(".")[1] for name, one in spec.projections.items() if one.lora is not None) == sorted(
        targets
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_equal_to_rounding(dtype):
    model = make("Gemma3", dtype)
    layers, found = calls(model)
    for layer, call in zip(layers, found, strict=True):
        _, apart = find_spec(read_spec(layer), *call)
        assert apart < (1e-5 if dtype == torch.float32 else 0.02)


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
    model = make(family)
    layers, _ = calls(model)
    layers[1].module.get_submodule(where).register_forward_hook(fault)
    layers, found = calls(model)
    find_spec(read_spec(layers[0]), *found[0])
    with pytest.raises(AttachError, match=r"DecoderLayer differs from every layer that sparse_unsloth knows"):
        find_spec(read_spec(layers[1]), *found[1])


def test_parts_that_no_specification_has_are_named():
    model = make("Llama")
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
    read_spec(layer)


def test_gradients_of_the_reference():
    """gradcheck of hidden states and of one LoRA branch, through a layer with every form of norm and a window."""
    model = make("Gemma3")
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
