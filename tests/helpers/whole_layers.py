"""Transformers' layers with a class forward like Unsloth's, on stand-ins of Unsloth's modules."""

from types import MethodType

from transformers.models.llama import modeling_llama

from tiny_models import make_base, make_batch, make_lora
from unsloth_stand_in import SlotAttention, decoder_layers


def fast_forward(self, hidden_states, **kwargs):
    """Llama's layer as Unsloth's class forward returns it."""
    return (modeling_llama.LlamaDecoderLayer.forward(self, hidden_states, **kwargs),)


class FastLayer(modeling_llama.LlamaDecoderLayer):
    """A call returns a tensor, as transformers' model expects; the forward returns a tuple, like Unsloth's.

    It hands the forward tables of the batch's positions, as Unsloth's model does, in place of the positions.
    """

    forward = fast_forward

    def __call__(self, *args, **kwargs):
        tables = [table[0] for table in kwargs.pop("position_embeddings")]
        return super().__call__(*args, **{**kwargs, "position_ids": None, "position_embeddings": tables})[0]


SMALL = {"hidden_size": 32, "intermediate_size": 64}
"""The interpreter runs a program for each row of a norm, so rows are few as well."""


def small_batch(make=make_batch):
    return make(lengths=((5, 3), (3, 2)))


def make_model(stand_in, checkpointing=False, lora=make_lora, **changes):
    model = lora(base=make_base("llama", use_cache=False, **SMALL, **changes))
    fast_lora = stand_in.fast_lora
    for layer in decoder_layers(model):
        layer.__class__, layer.self_attn.__class__ = FastLayer, SlotAttention
        layer.mlp.forward = MethodType(fast_lora.apply_lora_mlp_swiglu, layer.mlp)
        layer.self_attn.apply_qkv, layer.self_attn.apply_o = fast_lora.apply_lora_qkv, fast_lora.apply_lora_o
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train()


RULES = {
    "both": {"mlp": {"1-2": 0.6}, "self_attn": {"2": 0.5}},
    "attention alone": {"mlp": {}, "self_attn": {"0-1": 0.5}},
    "no dense rows": {"mlp": {"0-1": 0.6}, "self_attn": {"1": 0.5}, "dense_tokens": "none"},
    "nothing dropped": {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}},
}
