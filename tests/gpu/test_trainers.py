"""Row sparsity in trainers that compute their own loss: gradients on a GPU, in bf16, LoRA in float32, by whole layers.

The CPU suite proves the same in float64 (`trainer_table`), where layers run part by part.
"""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_unsloth.backends import whole_layer

import trainer_table
from tiny_models import COMMON

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_labels": 1, "max_position_embeddings": 512,
}  # fmt: skip
BF16_ROUNDING = 0.05


def make_model(task="CAUSAL_LM", seed=0):
    """A base in bf16, with the classifier's head and LoRA in float32, as trainers have it."""
    torch.manual_seed(seed)
    kind = "CausalLM" if task == "CAUSAL_LM" else "SequenceClassification"
    base = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**{**COMMON, **SIZES})).bfloat16()
    if task != "CAUSAL_LM":
        base.score.float()
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type=task)).to(DEVICE)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.05)
    return model


def settings(folder, **changes):
    return trainer_table_settings(folder, **{"use_cpu": DEVICE == "cpu", "bf16": True, **changes})


trainer_table_settings = trainer_table.settings


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "Reward"])
def test_gradients_are_those_of_dense_training(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_table, "make_model", make_model)
    monkeypatch.setattr(trainer_table, "settings", settings)
    monkeypatch.setattr(trainer_table, "TOLERANCE", BF16_ROUNDING)
    computed, compute = [], whole_layer._uncaptured
    monkeypatch.setattr(whole_layer, "_uncaptured", lambda *rest: computed.append(1) or compute(*rest))
    result = trainer_table.problems_of(name, tmp_path)
    print(f"{name}: roles from {result.roles}, every row {result.error:.2g}, a quarter {result.cosine:.3f}")
    assert not result.problems
    assert len(computed) >= 2 * SIZES["num_hidden_layers"] or DEVICE == "cpu"
