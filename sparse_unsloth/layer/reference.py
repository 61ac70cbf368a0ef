"""Defines the layer in plain PyTorch, in any dtype, forward and backward; every faster path must equal it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_unsloth.layer.spec import LayerSpec
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.ops.head_rotary import reference_heads
from sparse_unsloth.ops.norms import normalise
from sparse_unsloth.ops.projection import Projection


def reference_layer(
    spec: LayerSpec,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``.

    Args:
        hidden_states: ``[batch, sequence, hidden_size]``.
        position_embeddings: cosines and sines ``[batch or 1, sequence, rotary dimensions]``, the model's own.
        attention_mask: ``[batch, 1 or heads, sequence, sequence]``, bool (True: seen) or added to the scores; None:
            each token sees itself and those before it, as far as ``spec.window`` reaches.
        position_ids: ``[batch or 1, sequence]``; read for ``spec.query_scaling`` alone.
    """
    normed = normalise(hidden_states, spec.attention_norm)
    attended = _attention(spec, normed, position_embeddings, attention_mask, position_ids)
    if spec.parallel:
        return hidden_states + spec.residual_multiplier * (attended + _mlp(spec, normed))
    stream = hidden_states + spec.residual_multiplier * normalise(attended, spec.attention_output_norm)
    output = _mlp(spec, normalise(stream, spec.mlp_norm))
    return stream + spec.residual_multiplier * normalise(output, spec.mlp_output_norm)


def project(x: Tensor, projection: Projection) -> Tensor:
    """``x W' + bias + scale (x A') B'``, ``[..., out_features]``."""
    bias = projection.base.bias
    y = F.linear(x, projection.base.dense(x.dtype), None if bias is None else bias.to(x.dtype))
    lora = projection.lora
    return y if lora is None else y + lora.scale * F.linear(F.linear(x, lora.A.to(x.dtype)), lora.B.to(x.dtype))


def _attention(
    spec: LayerSpec,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    q, k, v = (project(x, spec.projections[f"self_attn.{name}_proj"]) for name in "qkv")
    angles = (None, None) if position_embeddings is None else position_embeddings
    heads = *reference_heads(q, k, *angles, spec.head_form), v.unflatten(-1, (-1, spec.head_dim))
    q, k, v = (one.transpose(1, 2) for one in heads)
    if spec.query_scaling is not None:
        beta, positions = spec.query_scaling
        factor = 1 + beta * torch.log1p(torch.floor(position_ids / positions))
        q = q * factor[:, None, :, None].to(q.dtype)
    groups = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = spec.scaling * q @ k.transpose(-1, -2)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if mask is None:
        mask = causal_mask(x.shape[1], spec.window, x.device)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return project((weights @ v).transpose(1, 2).flatten(-2), spec.projections["self_attn.o_proj"])


def _mlp(spec: LayerSpec, x: Tensor) -> Tensor:
    gate, up = (project(x, spec.projections[f"mlp.{name}_proj"]) for name in ("gate", "up"))
    return project(ACTIVATIONS[spec.activation](gate) * up, spec.projections["mlp.down_proj"])


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """``[length, length]``, True where a query (row) sees a key (column)."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
