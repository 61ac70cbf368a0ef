"""The contract read from sources: the installed release's, and a small tree that breaks one thing at a time."""

import pytest

from sparse_unsloth.backends.unsloth.contract import CURES, FUSED_FUNCTIONS, find_unsloth, read_contract

LORA = "\n".join(f"def {name}(self, X, inplace=True):\n    return X" for name in FUSED_FUNCTIONS)
ATTENTION = """
def {name}Attention_fast_forward(self, hidden_states, **kwargs):
    Q, K, V = getattr(self, "apply_qkv", original_apply_qkv)(self, hidden_states)
    return self.apply_o(self, run_attention(config=config, context=context, Q=Q, K=K, V=V))
"""
LAYER = """
def {name}DecoderLayer_fast_forward(self, hidden_states, *args, **kwargs):
    return self.mlp(fast_rms_layernorm(self.input_layernorm, hidden_states))
"""
LLAMA = (
    """
from ._utils import *
from ._utils import __version__

def original_apply_qkv(self, X):
    return X

def LlamaModel_fast_forward(self, input_ids=None, **kwargs):
    for layer in self.layers:
        layer(hidden_states, **kwargs)

def CausalLM_fast_forward(fast_forward_inference):
    def _CausalLM_fast_forward(self, input_ids=None, **kwargs):
        self.model(**kwargs)
        return unsloth_fused_ce_loss(trainer=None)
    return _CausalLM_fast_forward

def PeftModel_fast_forward(self, input_ids=None, **kwargs):
    return self.base_model(input_ids=input_ids, **kwargs)

class FastLlamaModel:
    @staticmethod
    def patch_peft_model(model, use_gradient_checkpointing):
        model._unsloth_gradient_checkpointing = use_gradient_checkpointing
"""
    + ATTENTION.format(name="Llama")
    + LAYER.format(name="Llama")
)
MISTRAL = """
from .llama import *
from unsloth_zoo.loss_utils import unsloth_fused_ce_loss

def MistralForCausalLM_fast_forward(self, **more):
    self.model(**more)
    return unsloth_fused_ce_loss(trainer=None)
""" + ATTENTION.format(name="Mistral")
METHODS = ("from_pretrained", "get_peft_model", "for_training", "for_inference")
LOADER = "\n".join(
    f"class {name}:\n" + "".join(f"    def {method}(model):\n        return model\n\n" for method in METHODS)
    for name in ("FastLanguageModel(FastLlamaModel)", "FastModel")
)
TREE = {
    "models/loader.py": LOADER,
    "kernels/fast_lora.py": LORA,
    "models/_utils.py": "from unsloth_zoo.loss_utils import HAS_CUT, unsloth_fused_ce_loss\n",
    "models/llama.py": LLAMA,
    "models/mistral.py": MISTRAL,
    "models/qwen3.py": ATTENTION.format(name="Qwen3"),
    "models/gemma.py": LAYER.format(name="Gemma"),
    "models/gemma2.py": ATTENTION.format(name="Gemma2") + LAYER.format(name="Gemma2"),
}


@pytest.fixture
def folder(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def missing(folder):
    return [need.what for need, found in read_contract(folder).items() if not found]


def test_the_installed_unsloth_has_every_hook():
    folder = find_unsloth()
    if folder is None:
        pytest.skip("Unsloth is not installed")
    assert missing(folder) == []


def test_a_whole_tree(folder):
    assert missing(folder) == []
    needs = read_contract(folder)
    assert len(needs) == len({(need.what, need.file) for need in needs}) == 5 + 8 + 1 + 7 + 3 + 4 + 1
    assert {need.used_for for need in needs} == set(CURES)


@pytest.mark.parametrize("name", FUSED_FUNCTIONS)
def test_renamed_function_and_changed_parameters(folder, name):
    file = folder / "kernels/fast_lora.py"
    file.write_text(LORA.replace(f"def {name}(self, X", f"def {name}(self, hidden, X"))
    assert missing(folder) == [f"{name}(self, X)"]
    file.write_text(LORA.replace(f"def {name}(", f"def {name}_new("))
    assert missing(folder) == [f"{name}(self, X)"]


BREAKS = {
    "slot not called": (
        ("models/qwen3.py", 'getattr(self, "apply_qkv", original_apply_qkv)', "self.qkv_proj"),
        ["apply_qkv called by Qwen3Attention_fast_forward"],
    ),
    "slot only mentioned": (
        ("models/gemma2.py", "self.apply_o(self, ", "other_o(self, "),
        ["apply_o called by Gemma2Attention_fast_forward"],
    ),
    "no plain function": (("models/llama.py", "def original_apply_qkv", "def plain_qkv"), ["original_apply_qkv"]),
    "keywords not taken": (
        ("models/gemma.py", ", **kwargs", ""),
        ["GemmaDecoderLayer_fast_forward takes **kwargs"],
    ),
    "keywords kept": (
        ("models/llama.py", "layer(hidden_states, **kwargs)", "layer(hidden_states)"),
        ["LlamaModel_fast_forward passes **kwargs on"],
    ),
    "keywords kept by Mistral": (
        ("models/mistral.py", "self.model(**more)", "self.model(**other)"),
        ["MistralForCausalLM_fast_forward passes **kwargs on"],
    ),
    "loss not imported": (
        ("models/_utils.py", "unsloth_fused_ce_loss", "fused_loss"),
        ["unsloth_fused_ce_loss imported"],
    ),
    "loss not called": (
        ("models/mistral.py", "return unsloth_fused_ce_loss(", "return fused_loss("),
        ["unsloth_fused_ce_loss called"],
    ),
    "no loader of its own": (
        ("models/loader.py", "class FastLanguageModel(FastLlamaModel):", "class Fast(FastLlamaModel):"),
        [f"FastLanguageModel.{method}" for method in METHODS],
    ),
    "a method of another class": (
        (
            "models/loader.py",
            "def for_training(model):\n        return model\n\n    def for_inference",
            "def for_inference",
        ),
        ["FastLanguageModel.for_training"],
    ),
    "no note of offloading": (
        ("models/llama.py", "model._unsloth_gradient_checkpointing =", "model.gradient_checkpointing ="),
        ["_unsloth_gradient_checkpointing"],
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_one_broken_thing(folder, case):
    (name, old, new), expected = BREAKS[case]
    assert old in TREE[name]
    (folder / name).write_text(TREE[name].replace(old, new, 1 if "of another" in case else -1))
    assert missing(folder) == expected


@pytest.mark.parametrize("text", [None, "def broken(:\n"], ids=["no file", "no Python"])
def test_unreadable_files_hold_no_hooks(folder, text):
    file = folder / "models/gemma2.py"
    file.unlink() if text is None else file.write_text(text)
    assert missing(folder) == [
        "apply_qkv called by Gemma2Attention_fast_forward",
        "apply_o called by Gemma2Attention_fast_forward",
        "Gemma2DecoderLayer_fast_forward takes **kwargs",
    ]
