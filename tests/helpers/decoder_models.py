"""Tiny random models of families that row sparsity trains by the model's own code, and how each is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from family_models import FAMILIES as LIKE_LLAMA

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
DELTA_NET = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SLIDING = ["sliding_attention", "full_attention"]
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = 7
"""The token that stands for a part of an image."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of transformers' classes.
        config: of the text decoder, besides `TEXT`.
        config_class: where its name is not ``name`` and "Config".
        dense: linear modules that LoRA does not take, by name or as a pattern: PEFT refuses those of Mamba,
            and routers return tuples.
        lacks: the settings of `TEXT` that its configuration does not have.
        build: makes the model where a configuration alone does not.
        inputs: of the batch, besides tokens, mask and labels.
        tolerance: of "every row kept equals PEFT", relative, in float64.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""
    dense: tuple[str, ...] | str = ()
    lacks: tuple[str, ...] = ()
    build: Callable[[Family], nn.Module] | None = None
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    tolerance: float = 1e-10


def text_config(family: Family) -> dict[str, Any]:
    """The settings of the family's text decoder."""
    return {name: value for name, value in {**TEXT, **family.config}.items() if name not in family.lacks}


def causal(family: Family) -> nn.Module:
    """The family's ``ForCausalLM``."""
    config = getattr(transformers, family.config_class or f"{family.name}Config")(**text_config(family))
    return getattr(transformers, f"{family.name}ForCausalLM")(config)


def with_images(vision: Mapping[str, Any], **changes: Any) -> Callable[[Family], nn.Module]:
    """Builds the family's ``ForConditionalGeneration``, with a vision tower."""

    def build(family: Family) -> nn.Module:
        kind = getattr(transformers, f"{family.name}ForConditionalGeneration")
        config_class = kind.config_class
        config = config_class(text_config=text_config(family), vision_config=dict(vision), **changes)
        return kind(config)

    return build


def _mllama(family: Family) -> nn.Module:
    config = transformers.models.mllama.configuration_mllama
    return transformers.MllamaForCausalLM(config.MllamaTextConfig(**text_config(family)))


def _image_states(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Llama 3.2's cross-attention reads of images."""
    return {"cross_attention_states": torch.randn(len(ids), 6, 32, generator=torch.Generator().manual_seed(3))}


def _patches(size: int, count: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Images of Qwen's kind: ``count`` tokens each, a row of ``size`` values for each patch."""

    def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        ids[:, 1 : 1 + count] = IMAGE
        grid = torch.tensor([[1, 4, 4]] * len(ids))
        pixels = torch.randn(16 * len(ids), size, generator=generator)
        types = (ids == IMAGE).long()
        return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}

    return inputs


def _pictures(
    size: int, count: int, types: str = "", sizes: bool = False, frames: bool = False
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """One image of ``size`` squared in each document, of ``count`` tokens.

    Args:
        types: the argument that marks its tokens.
        sizes: the model takes each image's size; ``frames``: a dimension of several images a document.
    """

    def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        ids[:, 1 : 1 + count] = IMAGE
        pixels = torch.randn(len(ids), 3, size, size, generator=torch.Generator().manual_seed(3))
        found = {"pixel_values": pixels[:, None] if frames else pixels}
        if types:
            found[types] = (ids == IMAGE).long()
        if sizes:
            found["image_sizes"] = torch.tensor([[size, size]] * len(ids))
        return found

    return inputs


QWEN_IMAGES = {
    "image_token_id": IMAGE, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN3_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip

WIDER = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16}
FAMILIES = {
    **{
        name.lower(): Family(name, {**WIDER, **config}, "Gemma3TextConfig" if name == "Gemma3" else "")
        for name, config in LIKE_LLAMA.items()
    },
    "qwen3_moe": Family("Qwen3Moe", EXPERTS),
    "mixtral": Family("Mixtral", {"num_local_experts": 4}),
    "gpt_oss": Family("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": SLIDING}),
    "qwen3_5": Family("Qwen3_5", DELTA_NET, "Qwen3_5TextConfig"),
    "qwen3_5_moe": Family(
        "Qwen3_5Moe", {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16}, "Qwen3_5MoeTextConfig"
    ),
    "qwen3_next": Family(
        "Qwen3Next", {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    ),
    "phi3": Family("Phi3"),
    "glm": Family("Glm"),
    "glm4": Family("Glm4"),
    "glm4_moe": Family("Glm4Moe", {**ROUTED, "first_k_dense_replace": 1}),
    "gemma3n": Family(
        "Gemma3n",
        {
            **PER_LAYER, "num_hidden_layers": 4, "layer_types": SLIDING * 2, "num_kv_shared_layers": 2,
            "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        "Gemma3nTextConfig",
    ),
    "gemma4": Family(
        "Gemma4",
        {**PER_LAYER, "num_hidden_layers": 4, "layer_types": SLIDING * 2, "num_kv_shared_layers": 2},
        "Gemma4TextConfig",
    ),
    "gemma4_k_eq_v": Family(
        "Gemma4",
        {
            "layer_types": SLIDING, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 1, "global_head_dim": 16,
        },
        "Gemma4TextConfig",
    ),
    "gemma4_moe": Family(
        "Gemma4",
        {
            "layer_types": SLIDING, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 16,
        },
        "Gemma4TextConfig",
    ),
    "deepseek_v3": Family("DeepseekV3", {**LATENT, **ROUTED, "first_k_dense_replace": 1}, lacks=("head_dim",)),
    "falcon": Family("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, lacks=("head_dim",)),
    "falcon-7b": Family("Falcon", {"multi_query": True, "parallel_attn": True}, lacks=("head_dim",)),
    "lfm2": Family("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {
            **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 16, "mamba_expand": 2,
        },
    ),
    "falcon_h1": Family("FalconH1", {**MAMBA, "mamba_d_ssm": 64}, dense=("out_proj", "conv1d")),
    "nemotron": Family("Nemotron"),
    "mllama": Family(
        "Mllama",
        {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "MllamaTextConfig",
        build=_mllama,
        inputs=_image_states,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        {"rope_parameters": ROPE, **QWEN_IMAGES},
        build=with_images(
            {
                "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4,
                "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
            },
            **QWEN_IMAGES,
        ),
        inputs=_patches(3 * 2 * 4 * 4, 4),
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        {"rope_parameters": {**ROPE, "mrope_interleaved": True}},
        build=with_images(QWEN3_VISION, **QWEN_IMAGES),
        inputs=_patches(3 * 2 * 4 * 4, 4),
    ),
    "qwen3_5_vl": Family(
        "Qwen3_5",
        {**DELTA_NET, "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}},
        build=with_images(QWEN3_VISION, **QWEN_IMAGES),
        inputs=_patches(3 * 2 * 4 * 4, 4),
    ),
    "gemma3_vision": Family(
        "Gemma3",
        {"layer_types": SLIDING, "sliding_window": 8},
        build=with_images(
            {**VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=9, eoi_token_index=10,
        ),
        inputs=_pictures(28, 4, "token_type_ids"),
    ),
    "gemma4_vision": Family(
        "Gemma4",
        {**PER_LAYER, "layer_types": SLIDING},
        dense=r".*(vision_tower|embed_vision).*",
        build=with_images({**VISION, "num_key_value_heads": 2, "head_dim": 16}, image_token_id=95),
    ),
    "llava": Family(
        "Llava",
        {"model_type": "llama"},
        build=with_images(
            {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            image_token_index=IMAGE, vision_feature_layer=-1,
        ),
        inputs=_pictures(28, 4),
    ),
    "mistral3": Family(
        "Mistral3",
        {"model_type": "mistral"},
        build=with_images(
            {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 7, "head_dim": 16},
            image_token_index=IMAGE, vision_feature_layer=-1, spatial_merge_size=2,
        ),
        inputs=_pictures(28, 4, sizes=True),
    ),
    "idefics3": Family(
        "Idefics3",
        {"model_type": "llama"},
        build=with_images(
            {**VISION, "image_size": 28, "patch_size": 7}, image_token_id=IMAGE, scale_factor=2
        ),
        inputs=_pictures(28, 4, frames=True),
    ),
    "smolvlm": Family(
        "SmolVLM",
        {"model_type": "llama"},
        build=with_images(
            {**VISION, "image_size": 28, "patch_size": 7}, image_token_id=IMAGE, scale_factor=2
        ),
        inputs=_pictures(28, 4, frames=True),
    ),
    "internvl": Family(
        "InternVL",
        {"model_type": "qwen2"},
        build=with_images(
            {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}, image_token_id=IMAGE, downsample_ratio=0.5
        ),
        inputs=_pictures(28, 4),
    ),
    "paligemma": Family(
        "PaliGemma",
        {"model_type": "gemma"},
        build=with_images(
            {**VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32},
            image_token_index=IMAGE, projection_dim=32,
        ),
        inputs=_pictures(28, 4, "token_type_ids"),
    ),
    "starcoder2": Family("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "gpt_neox": Family("GPTNeoX", lacks=("num_key_value_heads", "head_dim")),
    "cohere": Family("Cohere", {"use_qk_norm": True}, lacks=("head_dim",)),
    "minicpm3": Family("MiniCPM3", LATENT, lacks=("head_dim",)),
    "bitnet": Family("BitNet"),
    "llama4": Family(
        "Llama4",
        {
            "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "Llama4TextConfig",
        dense=("router",),
        tolerance=1e-8,  # its router's scores are float32
    ),
    "nemotron_h": Family(
        "NemotronH",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
            "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, **ROUTED, "num_hidden_layers": 4,
            "moe_shared_expert_intermediate_size": 16, "moe_latent_size": None,
        },
        dense=("out_proj", "conv1d"),
    ),
    "phimoe": Family(
        "Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, dense=("router",), lacks=("head_dim",)
    ),
}  # fmt: skip
"""The families of docs/models.md, by transformers' name of the model's type."""


def make_model(key: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The family's model with LoRA on every linear layer, whose branches are not zero, in training mode."""
    from peft import LoraConfig, get_peft_model

    family = FAMILIES[key]
    torch.manual_seed(seed)
    base = (family.build or causal)(family).to(dtype)
    base.config.use_cache = False
    base.config.get_text_config()._experts_implementation = "eager"  # the others know no float64
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3)
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            exclude_modules=family.dense if isinstance(family.dense, str) else list(family.dense),
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.train()


def make_batch(key: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Two documents of a prompt (with an image, where the family has them) and an answer, padded on the right."""
    family = FAMILIES[key]
    ids = torch.randint(11, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    extra = family.inputs(ids) if family.inputs else {}
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :11] = -100
    mask[1, -2:], labels[1, -2:] = 0, -100
    extra = {name: value.to(dtype) if value.is_floating_point() else value for name, value in extra.items()}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}
