"""Splits queries and keys into heads, with their head norms and the rotary embedding.

`reference_heads` defines it in plain PyTorch, in any dtype; `prepare_heads` computes the same in one kernel each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_unsloth.kernels.rotary import HeadNorm, rotary_backward, rotary_forward
from sparse_unsloth.ops.decoder_layer import without_autocast
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.norms import Norm, normalise

Rotation = Literal["halves", "pairs", "interleaved", "none"]
"""Which two channels of a head turn together: ``i`` and ``i + n/2`` (halves), or ``2i`` and ``2i + 1``, where the model
gives each angle twice in a row (pairs) or all angles twice (interleaved); or none does."""


@dataclass(frozen=True)
class HeadForm:
    """What becomes of queries and keys between their projections and attention.

    Attributes:
        rotation: see `Rotation`.
        query_norm, key_norm: frozen; of each head, or of all heads together where the weight is as wide as they are.
        norm_after_rotation: whether the norms come after the rotary embedding.
    """

    head_dim: int
    rotation: Rotation = "halves"
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norm_after_rotation: bool = False


def prepare_heads(
    query: Tensor, key: Tensor, cosines: Tensor | None, sines: Tensor | None, form: HeadForm
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[batch, sequence, heads, head_dim]`` by ``form``, contiguous, in their own dtype.

    As `reference_heads`, but for rounding: the kernels compute in fp32, and round a norm as transformers does and the
    rotation once. They take RMS norms of each head, before the rotation. Other forms (norms after it, of all heads
    together, with a weight for each head, with a mean or a bias) and float64 run in plain PyTorch: exact, but slower.

    Args:
        query, key: ``[batch, sequence, heads * head_dim]``, each with its number of heads.
        cosines, sines: ``[1 or batch, sequence, n]``, ``n <= head_dim``, constants; None: no rotation.
    """
    if cosines is None or form.rotation == "none":
        cosines = sines = None
    if use_kernels(query) and _kernels_take(query, cosines, form):
        return _PrepareHeads.apply(query, key, cosines, sines, form)
    with without_autocast(query):
        query, key = reference_heads(query, key, cosines, sines, form)
    return query.contiguous(), key.contiguous()


def reference_heads(
    query: Tensor, key: Tensor, cosines: Tensor | None, sines: Tensor | None, form: HeadForm
) -> tuple[Tensor, Tensor]:
    """`prepare_heads` in plain PyTorch, differentiable."""
    heads = []
    for x, norm in ((query, form.query_norm), (key, form.key_norm)):
        x = _split_heads(x, None if form.norm_after_rotation else norm, form.head_dim)
        x = x if cosines is None else rotate(x, cosines, sines, form.rotation)
        heads.append(normalise(x, norm) if form.norm_after_rotation else x)
    return tuple(heads)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of ``x [batch, sequence, heads, head_dim]``; channels beyond the cosines' stay."""
    if rotation == "none":
        return x
    width = cosines.shape[-1]
    if rotation == "interleaved":
        cosines, sines = (angles[..., : width // 2].repeat_interleave(2, dim=-1) for angles in (cosines, sines))
    turned, rest = x[..., :width].to(torch.promote_types(x.dtype, cosines.dtype)), x[..., width:]
    if rotation == "halves":
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    else:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    turned = turned * cosines[:, :, None] + other * sines[:, :, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _split_heads(x: Tensor, norm: Norm | None, head_dim: int) -> Tensor:
    """``x [batch, sequence, heads * head_dim]`` as ``[batch, sequence, heads, head_dim]``, normalised."""
    whole = norm is not None and norm.weight is not None and norm.weight.shape[-1] == x.shape[-1] != head_dim
    if whole:
        x = normalise(x, norm)
    x = x.unflatten(-1, (-1, head_dim))
    return x if whole else normalise(x, norm)


def _kernels_take(query: Tensor, cosines: Tensor | None, form: HeadForm) -> bool:
    """Whether the kernels compute this; not where there is nothing to compute, or where broadcasting would fail."""
    norms = [norm for norm in (form.query_norm, form.key_norm) if norm is not None]
    if query.dtype == torch.float64 or (norms and form.norm_after_rotation):
        return False
    if any(norm.centred or norm.bias is not None for norm in norms):
        return False
    if any(norm.weight is not None and norm.weight.shape != (form.head_dim,) for norm in norms):
        return False
    if cosines is None:
        return bool(norms)
    batch, sequence, width = cosines.shape
    return batch in (1, query.shape[0]) and sequence == query.shape[1] and width <= form.head_dim


class _PrepareHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cosines: Tensor | None, sines: Tensor | None, form: HeadForm):
        if cosines is not None:
            cosines, sines = (angles.flatten(0, 1).contiguous() for angles in (cosines, sines))
        options = form.rotation, form.head_dim, _head_norm(form.query_norm), _head_norm(form.key_norm)
        outputs = rotary_forward(_rows(query), _rows(key), cosines, sines, *options)
        ctx.options = options
        kept = (query, key) if form.query_norm or form.key_norm else (None, None)
        ctx.save_for_backward(*kept, cosines, sines)
        return tuple(y.view(*query.shape[:-1], -1, form.head_dim) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_query: Tensor, d_key: Tensor):
        query, key, cosines, sines = ctx.saved_tensors
        gradients = (dy.contiguous().flatten(0, 1).flatten(1) for dy in (d_query, d_key))
        kept = (None if x is None else _rows(x) for x in (query, key))
        outputs = rotary_backward(*gradients, *kept, cosines, sines, *ctx.options)
        return *(dx.view(*d_query.shape[:2], -1) for dx in outputs), None, None, None


def _rows(x: Tensor) -> Tensor:
    """``x [batch, sequence, width]`` as ``[batch * sequence, width]`` with unit stride in the rows."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _head_norm(norm: Norm | None) -> HeadNorm | None:
    return None if norm is None else (norm.weight, norm.eps, norm.offset)
