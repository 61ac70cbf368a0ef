"""Computes a described layer's attention, from Q, K, V to the input of O.

An `AttentionCall` says what one call of a layer computes between its heads: with PEFT what the model's own attention
module would call by transformers' interface (`by_interface`: SDPA, FlashAttention, flex, eager), with the same mask and
arguments; under Unsloth's fast path causal attention (`causal`). What depends on the batch alone is in a few tensors,
so that the rest can be captured in CUDA graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from sparse_unsloth.graphs.packed_attention import DTYPES, Packing, packed_attention, visible
from sparse_unsloth.layer.spec import LayerSpec
from sparse_unsloth.ops.capped_attention import capped_attention
from sparse_unsloth.ops.head_rotary import prepare_heads
from sparse_unsloth.ops.kept_attention import AttentionKeeper

COSINES, SINES, MASK, POSITIONS, OFFSETS = "cosines", "sines", "attention_mask", "position_ids", "documents begin at"
"""The names of tensors of an `AttentionCall`."""
TAKEN = ("position_embeddings", MASK, "past_key_value", "past_key_values")
"""Arguments of an attention module that its call of the interface does not pass on by name."""
READ_TOO = ("past_key_values", "is_causal", "position_bias")
"""Arguments that `by_interface` reads or passes on, and that no CUDA graph holds."""
UNSLOTHS_GEMMA_3 = "unsloth_zoo.temporary_patches.gemma"
"""Where Unsloth's forward of Gemma 3's attention is defined. It calls PyTorch's attention for "eager" too."""
CAPTURABLE = ("sdpa", "eager")
"""Implementations of the interface that launch the same kernels for tensors of the same shape."""
CUDNN_STEP = 128
"""cuDNN's attention makes a plan for each length, in a sixth of a second; lengths are padded to multiples of this."""

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionCall:
    """What attention computes in one call of a layer.

    Attributes:
        compute: ``[batch, sequence, heads, head_dim]`` from Q, K, V ``[batch, heads, sequence, head_dim]`` and tensors.
        tensors: all that it reads besides Q, K, V, and what the heads need, by name.
        window: how many keys a query sees, its own included; None: all before it.
        capturable: whether it launches the same kernels for tensors of the same shape.
        keepable: whether it may be watched (`AttentionKeeper`): by no other library, nor compiled, nor a soft cap.
    """

    compute: Callable[[Tensor, Tensor, Tensor, Tensors], Tensor]
    tensors: Tensors
    window: int | None
    capturable: bool
    keepable: bool = False


def attend(
    spec: LayerSpec,
    projected: Sequence[Tensor],
    call: AttentionCall,
    tensors: Tensors,
    keeper: AttentionKeeper | None = None,
) -> Tensor:
    """Attention's output ``[batch, sequence, num_heads * head_dim]``.

    Args:
        spec: of the layer, proved.
        projected: Q, K and V, ``[batch, sequence, heads * head_dim]``.
        tensors: those of ``call``, or copies.
        keeper: keeps what the kernel gives, or gives what was kept.
    """
    query, key, value = projected
    query, key = prepare_heads(query, key, tensors.get(COSINES), tensors.get(SINES), spec.head_form)
    if spec.query_scaling is not None:
        beta, positions = spec.query_scaling
        factor = 1 + beta * torch.log1p(torch.floor(tensors[POSITIONS] / positions))
        query = query * factor[..., None, None].to(query.dtype)
    if torch.is_grad_enabled():  # what is saved of it would keep the memory that it shares with Q and K
        value = value.contiguous()
    value = value.unflatten(-1, (-1, spec.head_dim))
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    compute = call.compute if keeper is None else partial(keeper.attend, call.compute)
    return compute(query, key, value, tensors).flatten(-2).contiguous()


def by_interface(spec: LayerSpec, module: nn.Module, arguments: Mapping[str, Any]) -> AttentionCall:
    """What the attention ``module`` of a transformers model calls with these ``arguments`` of its layer's forward."""
    tensors = {name: arguments[name] for name in (MASK, POSITIONS) if arguments.get(name) is not None}
    if spec.query_scaling is None:
        tensors.pop(POSITIONS, None)
    if spec.rotation != "none" and arguments.get("position_embeddings"):
        tensors[COSINES], tensors[SINES] = arguments["position_embeddings"]
    known = module.config._attn_implementation in CAPTURABLE and all(arguments.get(name) is None for name in READ_TOO)
    capturable = known and all(isinstance(one, Tensor) for one in tensors.values())
    own = tensors
    cache = arguments.get("past_key_values")

    def compute(query: Tensor, key: Tensor, value: Tensor, tensors: Tensors) -> Tensor:
        if cache is not None:  # nothing reads it in training, but a model whose use_cache is on fills it
            key, value = cache.update(key, value, module.layer_idx)
        softcap = getattr(module, "attn_logit_softcapping", None)  # as the module gives it; some functions ignore it
        given = {"dropout": 0.0, "scaling": spec.scaling, "sliding_window": spec.window, "softcap": softcap}
        others = {name: value for name, value in arguments.items() if name not in (*TAKEN, *given)}
        more = others if tensors is own else {}  # a CUDA graph holds no arguments
        output, *_ = _interface(module)(module, query, key, value, tensors.get(MASK), **more, **given)
        return output

    return AttentionCall(compute, tensors, spec.window, capturable, keepable=known)


def causal(
    scale: float,
    tensors: Tensors,
    window: int | None,
    softcap: float | None,
    capturable: bool,
    packing: Packing | None = None,
) -> AttentionCall:
    """Causal attention by PyTorch's kernels; with `MASK` among the ``tensors`` as that says, without causality.

    Args:
        tensors: `MASK`, ``[sequence, sequence]`` or ``[batch, 1, sequence, sequence]``, bool or (with ``softcap``)
            added to the scores; or `OFFSETS` of documents; or none.
        window: None where it is not shorter than the sequence; with a mask it only tells kinds of layers apart.
        softcap: scores become ``softcap tanh(scores / softcap)``.
        packing: the documents. Without capture their longest one decides how much is launched.
    """

    def compute(query: Tensor, key: Tensor, value: Tensor, given: Tensors) -> Tensor:
        mask, offsets = given.get(MASK), given.get(OFFSETS)
        if softcap is not None:
            mask = visible(query.shape[2], query.device, offsets, window) if mask is None else mask
            return capped_attention(query, key, value, mask, scale, softcap)
        if mask is None and (window is not None or offsets is not None):
            longest = packing.longest if packing is not None and given is tensors else None
            return packed_attention(query, key, value, offsets, scale, window, longest)
        return _sdpa(query, key, value, mask, scale)

    return AttentionCall(compute, tensors, window, capturable, keepable=softcap is None)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention, causal without a ``mask``; ``[batch, sequence, heads, head_dim]``."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    fused = not query.is_cuda or (query.dtype in DTYPES and torch.cuda.get_device_capability(query.device) >= (8, 0))
    if groups > 1 and not (fused and mask is None):  # where keys for several heads would leave the slow kernel alone
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    options = {"attn_mask": mask, "is_causal": mask is None, "scale": scale}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    more = -length % CUDNN_STEP if query.is_cuda and mask is None else 0
    if more and torch._fused_sdp_choice(query, key, value, **options) == int(SDPBackend.CUDNN_ATTENTION):
        # By later tokens, which no other one sees; a token's heads stay beside each other.
        rows = (x.transpose(1, 2) for x in (query, key, value))
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, more)).transpose(1, 2) for x in rows)
    return F.scaled_dot_product_attention(query, key, value, **options)[:, :, :length].transpose(1, 2)


def _interface(module: nn.Module) -> Callable[..., Any]:
    """The function that the attention module calls."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, forward = module.config._attn_implementation, inspect.unwrap(type(module).forward)
    if name == "eager" and forward.__module__ == UNSLOTHS_GEMMA_3:
        name = "sdpa"  # on the mask of eager attention
    eager = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
