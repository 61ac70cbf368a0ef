"""Stand-ins of Unsloth's modules that compute what PEFT computes, and a model that uses their functions."""

import sys
from types import MethodType, ModuleType

import torch
from transformers.models.llama import modeling_llama

from sparse_unsloth.backends.unsloth.contract import FUSED_FUNCTIONS

from tiny_models import make_batch, make_lora

SLOTS = ("apply_qkv", "apply_o")


def assert_same(ours, expected, what=""):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, f"{what} {name}"


def decoder_layers(model):
    return model.get_base_model().model.layers


def packed_batch(**changes):
    """`make_batch` without padding, as TRL under Unsloth sends it: one sequence, and the documents' lengths."""
    padded = make_batch(**changes)
    keep = padded["attention_mask"].bool()
    lengths = keep.sum(1)
    return {
        "input_ids": padded["input_ids"][keep][None],
        "labels": padded["labels"][keep][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "packed_seq_lengths": lengths.int(),
    }


def original_apply_qkv(self, X):
    return self.q_proj(X), self.k_proj(X), self.v_proj(X)


def original_apply_o(self, X):
    return self.o_proj(X)


def fused_loss(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, mask=None, shift_labels=True):
    raise NotImplementedError


def LlamaAttention_fast_forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    projected = getattr(self, "apply_qkv", original_apply_qkv)(self, hidden_states)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
    tables = (table[None] if table.dim() == 2 else table for table in position_embeddings)
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *tables)
    mixed, _ = modeling_llama.eager_attention_forward(self, q, k, v, attention_mask, self.scaling)
    return getattr(self, "apply_o", original_apply_o)(self, mixed.flatten(2)), None


class SlotAttention(modeling_llama.LlamaAttention):
    """Llama's attention, which calls its projections through Unsloth's two slots."""

    forward = LlamaAttention_fast_forward


class DeafAttention(SlotAttention):
    """An attention that no longer calls the slots."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


class StandIn:
    """Modules under Unsloth's names whose fused functions compute what PEFT does and note their calls."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.fast_lora, self.llama = ModuleType("fast_lora"), ModuleType("unsloth.models.llama")
        for name in FUSED_FUNCTIONS:
            setattr(self.fast_lora, name, self._function(name))
        self.llama.original_apply_qkv, self.llama.original_apply_o = original_apply_qkv, original_apply_o
        self.mistral = ModuleType("unsloth.models.mistral")
        self.llama.unsloth_fused_ce_loss = self.mistral.unsloth_fused_ce_loss = fused_loss
        packages = {name: ModuleType(name) for name in ("unsloth", "unsloth.kernels", "unsloth.models")}
        packages["unsloth.kernels"].fast_lora = self.fast_lora
        packages["unsloth.models"].llama = self.llama
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", self.fast_lora)
        monkeypatch.setitem(sys.modules, "unsloth.models.llama", self.llama)
        monkeypatch.setitem(sys.modules, "unsloth.models.mistral", self.mistral)

    def _function(self, name):
        def fused(module, X):
            self.calls.append(name)
            if name == "apply_lora_qkv":
                return original_apply_qkv(module, X)
            if name == "apply_lora_o":
                return original_apply_o(module, X)
            return module.down_proj(module.act_fn(module.gate_proj(X)) * module.up_proj(X))

        return fused

    def model(self, fused=(0, 1, 2)):
        """A tiny Llama in which some layers use the fused functions, as under Unsloth."""
        model = make_lora("llama")
        for index, layer in enumerate(decoder_layers(model)):
            attention = layer.self_attn
            attention.__class__ = SlotAttention
            attention.apply_qkv, attention.apply_o = original_apply_qkv, original_apply_o
            if index in fused:
                layer.mlp.forward = MethodType(self.fast_lora.apply_lora_mlp_swiglu, layer.mlp)
                attention.apply_qkv, attention.apply_o = self.fast_lora.apply_lora_qkv, self.fast_lora.apply_lora_o
        return model

    def called(self):
        """The calls since the last query, sorted."""
        calls, self.calls = sorted(self.calls), []
        return calls


def slots(model):
    """The functions in the slots of each layer."""
    return [
        {
            "mlp": layer.mlp.__dict__.get("forward"),
            "tiled": layer.mlp.__dict__.get("_unsloth_forward"),
            **{name: layer.self_attn.__dict__.get(name) for name in SLOTS},
        }
        for layer in decoder_layers(model)
    ]
