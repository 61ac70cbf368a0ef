"""Finding decoder layers: all of a model are counted in the report, and those without a sparse path are named."""

import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sparse_unsloth import attach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
ROWS = {"backward_rows": 0.5}
MLP = {"mlp": {"all": 0.5}, "estimator": {"kind": "svd"}, "start_step": 0, "end_step": 1.0}


def qwen35():
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TEXT, **linear, num_hidden_layers=8))


def glm4_moe():
    experts = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**TEXT, **experts, num_hidden_layers=3))


def mllama():
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **{**TEXT, "hidden_size": 64}, num_hidden_layers=5, cross_attention_layers=[1, 3]
    )
    return transformers.MllamaForCausalLM(config)


def gemma4(**changes):
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(**TEXT, **PER_LAYER, num_hidden_layers=4, layer_types=kinds, **changes)
    return transformers.Gemma4ForCausalLM(config)


def gemma3_vision():
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "num_hidden_layers": 3}, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4_vision():
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16}
    text = {**TEXT, **PER_LAYER, "num_hidden_layers": 3}
    return transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=text, vision_config=vision)
    )


def lora(base, targets="all-linear"):
    base.config.use_cache = False
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets)).train()


# -- The report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "count", "left_out"),
    [
        (
            qwen35,
            "2 of 8",
            r"layers 0-2, 4-6: left out, dense \(Qwen3_5DecoderLayer: no self_attn \(it has linear_attn",
        ),
        (
            glm4_moe,
            "1 of 3",
            r"layers 1-2: left out, dense \(Glm4MoeDecoderLayer: no gate_proj, up_proj, down_proj in mlp",
        ),
        (mllama, "3 of 5", r"layers 1, 3: left out, dense \(MllamaCrossAttentionDecoderLayer: no self_attn"),
        (
            lambda: gemma4(num_kv_shared_layers=2),
            "2 of 4",
            r"layers 2-3: left out, dense .*no k_proj, v_proj in self_attn",
        ),
        (lambda: gemma4(attention_k_eq_v=True), "2 of 4", r"layers 1, 3: left out, dense .*no v_proj in self_attn"),
    ],
    ids=["qwen3.5", "glm4_moe", "mllama", "gemma4 shared", "gemma4 k is v"],
)
def test_all_decoder_layers_are_counted(make, count, left_out, caplog):
    torch.manual_seed(0)
    model = lora(make())
    report = attach(model, MLP)
    assert str(report).startswith(f"sparse_unsloth: {count} layers sparse on context tokens (peft)")
    assert report.num_layers == int(count.split()[-1])
    assert len(report.left_out) == report.num_layers - report.num_sparse
    assert re.search(left_out, str(report)), str(report)
    ids = torch.arange(5, 29)[None]
    labels = torch.where(torch.arange(24) < 16, -100, ids)
    for _ in range(2):
        model(input_ids=ids, labels=labels).loss.backward()
    assert "no label" not in caplog.text


def test_channels_name_layers_by_their_number():
    assert "  layer 3: MLP 32 of 64 channels; attention dense\n  layer 7: MLP" in str(attach(lora(qwen35()), MLP))


def test_layers_of_a_vision_tower_are_no_decoder_layers():
    for make in (gemma3_vision, gemma4_vision):
        report = attach(lora(make(), r".*language_model.*(q_proj|up_proj)"), ROWS)
        assert str(report).startswith("sparse_unsloth: 3 of 3 layers")
        assert all("language_model" in layer.name for layer in report.layers)


def test_a_projection_that_holds_more_than_queries_has_no_channels():
    model = lora(qwen35())
    with pytest.raises(AttachError, match=r"layers\.3\.self_attn\.q_proj: it gives more than the queries.*rows"):
        attach(model, {"self_attn": {"all": 0.5}, "estimator": {"kind": "svd"}, "start_step": 0, "end_step": 1.0})
    assert get_state(model) is None


def test_encoder_decoder_models_are_refused():
    part = {**TEXT, "num_hidden_layers": 2}
    model = transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(encoder=part, decoder=part))
    with pytest.raises(AttachError, match="encoder-decoder model"):
        attach(lora(model, ["q_proj"]), ROWS)


def test_auto_takes_layers_of_the_llama_kind_alone():
    with pytest.raises(AttachError, match=r"6 of 8 decoder layers are others .*sparsity='rows'"):
        attach(lora(qwen35()), "auto")
    with pytest.raises(AttachError, match=r"Row sparsity takes decoder layers of any kind: sparsity='rows'"):
        attach(lora(transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, num_hidden_layers=2))), "auto")


def test_a_model_without_such_layers_says_what_they_lack():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **experts, num_hidden_layers=2))
    with pytest.raises(
        AttachError, match=r"Qwen3MoeDecoderLayer: no gate_proj, up_proj, down_proj in mlp \(Qwen3MoeSp"
    ):
        attach(lora(model, ["q_proj"]), MLP)
