"""Computes a described layer's attention, from Q, K, V to the input of O, by transformers' attention interface.

The interface is the one that the model's own attention module calls (SDPA, FlashAttention, flex, eager), with the same
mask and arguments. What depends on the batch alone is in a few tensors, so that the rest can be captured in CUDA graphs
(`fixed_tensors`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.layer.spec import LayerSpec
from sparse_unsloth.ops.head_rotary import prepare_heads

COSINES, SINES, MASK, POSITIONS = "cosines", "sines", "attention_mask", "position_ids"
"""The names of fixed tensors."""
TAKEN = ("position_embeddings", MASK, "past_key_value", "past_key_values")
"""Arguments of an attention module that its call of the interface does not pass on by name."""
READ_TOO = ("past_key_values", "is_causal", "position_bias")
"""Arguments that `attend` reads or passes on, and that no CUDA graph holds."""
UNSLOTHS_GEMMA_3 = "unsloth_zoo.temporary_patches.gemma"
"""Where Unsloth's forward of Gemma 3's attention is defined. It calls PyTorch's attention for "eager" too."""
CAPTURABLE = ("sdpa", "eager")
"""Implementations of the interface that launch the same kernels for tensors of the same shape."""


def attend(spec: LayerSpec, module: nn.Module, projected: Sequence[Tensor], arguments: Mapping[str, Any]) -> Tensor:
    """Attention's output ``[batch, sequence, num_heads * head_dim]``.

    Args:
        spec: of the layer, proved.
        module: the attention module, whose configuration names the implementation.
        projected: Q, K and V, ``[batch, sequence, heads * head_dim]``.
        arguments: the keyword arguments of the layer's forward.
    """
    query, key, value = projected
    cosines, sines = arguments.get("position_embeddings") or (None, None)
    query, key = prepare_heads(query, key, cosines, sines, spec.head_form)
    if spec.query_scaling is not None:
        beta, positions = spec.query_scaling
        factor = 1 + beta * torch.log1p(torch.floor(arguments[POSITIONS] / positions))
        query = query * factor[..., None, None].to(query.dtype)
    if torch.is_grad_enabled():  # what is saved of it would keep the memory that it shares with Q and K
        value = value.contiguous()
    value = value.unflatten(-1, (-1, spec.head_dim))
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    cache = arguments.get("past_key_values")
    if cache is not None:  # nothing reads it in training, but a model whose use_cache is on fills it
        key, value = cache.update(key, value, module.layer_idx)
    softcap = getattr(module, "attn_logit_softcapping", None)  # as the module gives it; some functions ignore it
    others = {name: argument for name, argument in arguments.items() if name not in TAKEN}
    output, *_ = _interface(module)(
        module,
        query,
        key,
        value,
        arguments.get(MASK),
        **{**others, "dropout": 0.0, "scaling": spec.scaling, "sliding_window": spec.window, "softcap": softcap},
    )
    return output.flatten(-2)


def fixed_tensors(spec: LayerSpec, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that `attend` reads besides Q, K, V, for a CUDA graph; None where it cannot be captured."""
    others = any(arguments.get(name) is not None for name in READ_TOO)
    if others or module.config._attn_implementation not in CAPTURABLE:
        return None
    found = {}
    if spec.rotation != "none":
        found[COSINES], found[SINES] = arguments["position_embeddings"]
    if spec.query_scaling is not None:
        found[POSITIONS] = arguments[POSITIONS]
    mask = arguments.get(MASK)
    if mask is not None:
        found[MASK] = mask
    return found if all(isinstance(tensor, Tensor) for tensor in found.values()) else None


def attend_with(fixed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `attend` that give these fixed tensors, and nothing else."""
    embeddings = (fixed[COSINES], fixed[SINES]) if COSINES in fixed else None
    return {"position_embeddings": embeddings, MASK: fixed.get(MASK), POSITIONS: fixed.get(POSITIONS)}


def _interface(module: nn.Module) -> Callable[..., Any]:
    """The function that the attention module calls."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, forward = module.config._attn_implementation, inspect.unwrap(type(module).forward)
    if name == "eager" and forward.__module__ == UNSLOTHS_GEMMA_3:
        name = "sdpa"  # on the mask of eager attention
    eager = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
