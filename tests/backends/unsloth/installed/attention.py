"""Our attention against that of the installed Unsloth's modules.

Unsloth's attention modules get the same Q, K, V and arguments by their slots, and leave O out. A function takes
FlashAttention's place.
"""

import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth.backends.patching import plain_forward
from sparse_unsloth.backends.unsloth.attention import read_attention
from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.attention import MASK, OFFSETS, attend
from sparse_unsloth.layer.fast import FastLayer
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.tokens.partition import TokenPartition

from tiny_models import make_base, make_batch, make_lora

WINDOW = 5
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},  # Unsloth has no window here
    "qwen3": {},
    "gemma": {"query_pre_attn_scalar": 8},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
}
KERNELS = {"PyTorch": torch.float32, "FlashAttention": torch.float64}
"""By what Unsloth's attention is computed, and in which dtype: Unsloth rounds float32 for FlashAttention."""


def weighted(q, k, v, seen, scale, softcap):
    """Attention of ``[batch, sequence, heads, head_dim]``."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def flash_attn_func(q, k, v, causal, window_size=(-1, -1), softmax_scale=None, softcap=None):
    """FlashAttention 2, by its documentation: a query sees ``window_size[0]`` keys before its own."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return weighted(q, k, v, seen.triu(-window_size[0]) if window_size[0] >= 0 else seen, softmax_scale, softcap)


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, **options):
    parts = [slice(begin, end) for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)]
    return torch.cat([flash_attn_func(*(x[None, part] for x in (q, k, v)), **options)[0] for part in parts])


@contextmanager
def flash_attention():
    from unsloth.models import gemma2, llama
    from unsloth.utils import attention_dispatch

    with pytest.MonkeyPatch.context() as patch:
        for module in (gemma2, llama):
            patch.setattr(module, "HAS_FLASH_ATTENTION_SOFTCAPPING", True)
        patch.setattr(attention_dispatch, "HAS_FLASH_ATTENTION", True)
        patch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
        patch.setattr(attention_dispatch, "flash_attn_varlen_func", flash_attn_varlen_func)
        yield


def layouts():
    from unsloth_stand_in import packed_batch

    packed = packed_batch()
    return {
        "padded": make_batch(),
        "left padded": make_batch(side="left"),
        "packed": packed,
        "padding after the documents": {**packed, "packed_seq_lengths": packed["packed_seq_lengths"][:-1]},
        "positions alone": {name: packed[name] for name in ("input_ids", "labels", "position_ids")},
        "kept mask": make_batch(side="left"),
    }


def calls_of(model, batch, keeps_mask):
    """``(layer, hidden states, arguments)`` of the first two layers in a training forward."""
    found, decoder = [], model.get_base_model().model
    decoder._unsloth_keep_padding_mask = keeps_mask
    for name in ("SWA_mask", "GA_mask"):
        decoder.__dict__.pop(name, None)

    def note(module, args, kwargs):
        kwargs = {"hidden_states": args[0] if args else None, **kwargs}
        found.append((kwargs.pop("hidden_states").detach(), kwargs))

    layers = find_layers(model)[:2]
    handles = [layer.module.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model.train()(**batch)
    for handle in handles:
        handle.remove()
    return [(layer, *call) for layer, call in zip(layers, found, strict=True)]


def outcome(function, projected, gradient):
    leaves = [one.detach().clone().requires_grad_() for one in projected]
    output = function(leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def compare(layer, hidden, arguments, batch) -> dict:
    """Compares attention of random Q, K, V, forward and backward, and proves the whole layer; what our call was."""
    attention = layer.self_attn
    partition = TokenPartition.from_labels(batch["labels"])
    state = SimpleNamespace(graphs=SimpleNamespace(captures_documents=True))
    runtime = SimpleNamespace(layer=layer, context=SparseContext(partition, 1.0), state=state, fast=FastLayer(layer))
    call = read_attention(runtime, hidden, arguments)
    generator = torch.Generator().manual_seed(0)
    heads = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
    draw = {"generator": generator, "dtype": hidden.dtype}
    projected = [torch.randn(*hidden.shape[:2], n * layer.head_dim, **draw) * 2 for n in heads]
    gradient = torch.randn(projected[0].shape, **draw)

    def theirs(leaves):
        before = attention.apply_qkv, attention.apply_o
        attention.apply_qkv, attention.apply_o = lambda self, x: leaves, lambda self, x: x
        try:
            return attention(hidden_states=hidden.clone().requires_grad_(), **arguments)[0]
        finally:
            attention.apply_qkv, attention.apply_o = before

    def ours(leaves):
        return attend(runtime.fast.present_spec(), leaves, call, call.tensors)

    for found, expected in zip(outcome(ours, projected, gradient), outcome(theirs, projected, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if OFFSETS not in call.tensors:  # the probe of attaching has none
        runtime.fast.prove(lambda x: plain_forward(layer.module, x, **arguments), hidden, call)
    again = read_attention(runtime, hidden, arguments)
    assert all(again.tensors[name] is tensor for name, tensor in call.tensors.items()), "made once a forward"
    own = {"use_cache": True}, {"prefix_seg_info": object()}, {"past_key_value": (hidden, hidden)}
    assert all(read_attention(runtime, hidden, {**arguments, **more}) is None for more in own)
    return {
        "window": call.window, "capturable": call.capturable,
        "by": [name for name in (MASK, OFFSETS) if name in call.tensors],
    }  # fmt: skip


def prepare() -> dict[str, torch.nn.Module]:
    return {family: make_base(family, **changes) for family, changes in FAMILIES.items()}


def examine(bases: dict[str, torch.nn.Module]) -> dict[str, list]:
    """By family, kernels and layout: what our attention read of the calls of two layers."""
    from unsloth.models import llama

    from unsloth_on_cpu import Rotary, replace_gpu_kernels

    replace_gpu_kernels()
    modules = {family: importlib.import_module(f"unsloth.models.{family}") for family in FAMILIES}
    found = {}
    for family, base in bases.items():
        getattr(modules[family], f"Fast{family.capitalize()}Model").pre_patch()
        base.model.rotary_emb = rotary = Rotary(base.model.rotary_emb, base.config.max_position_embeddings)
        for layer in base.model.layers:
            layer.self_attn.rotary_emb = rotary
            layer.self_attn.apply_qkv, layer.self_attn.apply_o = llama.original_apply_qkv, llama.original_apply_o
        model = make_lora(base=base)
        model.get_base_model().model.max_seq_length = 64
        for kernels, dtype in KERNELS.items():
            model.to(dtype).get_base_model().config.dtype = dtype
            for name, batch in layouts().items():
                if name == "kept mask" and kernels == "FlashAttention":
                    continue  # Unsloth takes PyTorch's attention there
                with flash_attention() if kernels == "FlashAttention" else pytest.MonkeyPatch.context():
                    calls = calls_of(model, dict(batch), name == "kept mask")
                    found[f"{family}, {kernels}, {name}"] = [compare(*call, batch) for call in calls]
                    layer, hidden, arguments = calls[0]
                    without = compare(layer, hidden, {**arguments, "position_embeddings": None}, batch)
                    assert without == found[f"{family}, {kernels}, {name}"][0]
    type(layer.self_attn).forward = lambda self, hidden_states: hidden_states
    with pytest.raises(AttachError, match="which is none of LlamaAttention_fast_forward"):
        compare(layer, hidden, arguments, batch)
    return found
