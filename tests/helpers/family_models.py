"""Tiny random models of many families whose own features are active, and the calls of their decoder layers."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from sparse_unsloth.model.decoder_layer import find_layers

from tiny_models import COMMON

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


def make_family(family, dtype=torch.float64, targets=None, **changes):
    """A model with LoRA whose layers have biases and norms that are not their neutral values."""
    torch.manual_seed(0)
    name = f"{family}Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **FAMILIES[family], **changes})
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
