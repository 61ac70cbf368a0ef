"""Describes a decoder layer of the Llama kind by what it computes, whatever class or library it comes from.

`read_spec` reads parts and numbers off the module: norms, projections with their LoRA branches, head norms, window,
soft cap, scales. What a class hides in its forward (how it rotates queries and keys) is not guessed from names:
`candidates` lists the forms that exist, and `sparse_unsloth.layer.probe` finds the one that the layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.decoder_layer import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.ops.head_rotary import HeadForm, Rotation
from sparse_unsloth.ops.norms import Norm, normalise
from sparse_unsloth.ops.projection import Projection, check_adapters, check_frozen, read_projection

T = TypeVar("T")

LAYER_PARTS = {
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "post_self_attn_layernorm", "post_mlp_layernorm", "self_attn", "mlp",
}  # fmt: skip
HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
MLP_PARTS = {*MLP_PROJECTIONS, "act_fn"}
EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class LayerSpec:
    """What a decoder layer computes: ``h = x + r N2(attention(N1(x)))``, ``y = h + r N4(mlp(N3(h)))``.

    A parallel layer computes ``y = x + r (attention(N1(x)) + mlp(N1(x)))``.

    Attributes:
        attention_norm, attention_output_norm, mlp_norm, mlp_output_norm: N1 to N4; None where there is none.
        query_norm, key_norm: of each head, or of all heads together where the weight is as wide as the projection.
        projections: ``{"self_attn.q_proj": ..., "mlp.down_proj": ...}``, with LoRA or without.
        rotation: see `sparse_unsloth.ops.head_rotary.Rotation`; cosines and sines are the model's own.
        norm_after_rotation: whether the head norms come after the rotary embedding.
        query_scaling: ``(beta, n)``: a query at position p is scaled by ``1 + beta log(1 + floor(p / n))``.
        scaling: of the scores ``Q K'``.
        softcap: scores become ``softcap tanh(scores / softcap)``.
        window: how many keys a query sees, its own included; None for all before it.
        residual_multiplier: r.
    """

    attention_norm: Norm | None
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp_output_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    projections: dict[str, Projection]
    activation: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    rotation: Rotation = "halves"
    norm_after_rotation: bool = False
    query_scaling: tuple[float, int] | None = None
    softcap: float | None = None
    window: int | None = None
    residual_multiplier: float = 1.0
    parallel: bool = False

    @property
    def head_form(self) -> HeadForm:
        """What becomes of queries and keys before attention; `query_scaling` apart."""
        return HeadForm(self.head_dim, self.rotation, self.query_norm, self.key_norm, self.norm_after_rotation)


def read_spec(layer: DecoderLayer) -> LayerSpec:
    """The specification of ``layer`` as its parts tell it, with the first of its `candidates`.

    Raises:
        AttachError: a part that no specification has, dropout, a trained norm or base weight, an adapter that is not
            plain LoRA, or one that is merged or disabled now.
    """
    module, attention, mlp = layer.module, layer.self_attn, layer.mlp
    parts = _parts(module, layer.name)
    _refuse_unknown(parts, LAYER_PARTS, layer.name)
    _refuse_unknown(_parts(mlp, f"{layer.name}.mlp"), MLP_PARTS, f"{layer.name}.mlp")
    inside = _parts(attention, f"{layer.name}.self_attn")
    _refuse_unknown(inside, {*ATTENTION_PROJECTIONS, "rotary_emb", *sum(HEAD_NORMS, ())}, f"{layer.name}.self_attn")
    if not layer.queries_alone:
        raise AttachError(
            f"{layer.name}.self_attn: q_proj gives more than queries (a gate), which is no plain attention."
        )
    if getattr(attention, "attention_dropout", 0.0) > 0:
        raise AttachError(
            f"{layer.name}.self_attn: attention_dropout is not zero. Set it to zero in the configuration."
        )
    norms = {name: read_norm(part, f"{layer.name}.{name}") for name, part in parts.items() if name.endswith("norm")}
    query_norm, key_norm = (
        None if norm is None else read_norm(norm, f"{layer.name}.self_attn's head norm")
        for norm in head_norm_modules(attention)
    )
    config = getattr(attention, "config", None)
    return LayerSpec(
        *place_norms(norms),
        query_norm=query_norm,
        key_norm=key_norm,
        projections={name: _projection(one, f"{layer.name}.{name}") for name, one in layer.projections().items()},
        activation=layer.activation,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        scaling=float(getattr(attention, "scaling", layer.head_dim**-0.5)),
        query_scaling=_query_scaling(config),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=_window(attention, config),
        residual_multiplier=float(getattr(module, "residual_multiplier", 1.0)),
        parallel=set(norms) == {"input_layernorm"},
    )


def head_norm_modules(attention: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and keys."""
    parts = {name: part for name, part in attention.named_children() if not isinstance(part, nn.Identity)}
    return next(((parts[q], parts[k]) for q, k in HEAD_NORMS if q in parts), (None, None))


def candidates(spec: LayerSpec) -> Iterator[LayerSpec]:
    """``spec`` in each form that its parts leave open."""
    norm, caps = spec.query_norm, {spec.softcap, None}  # PyTorch's attention ignores a soft cap
    orders = (False, True) if norm is not None and norm.weight.shape[-1] == spec.head_dim else (False,)
    for cap, rotation, after in product(sorted(caps, key=lambda cap: cap is None), get_args(Rotation), orders):
        yield replace(spec, softcap=cap, rotation=rotation, norm_after_rotation=after)


def read_norm(module: nn.Module, name: str) -> Norm:
    """What a norm computes, found by trying it.

    Raises:
        AttachError: it is trained, or it computes none of the known forms.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
        raise AttachError(f"{name} is trained; freeze it, or train this layer dense.")
    eps = next((float(getattr(module, word)) for word in EPSILONS if hasattr(module, word)), 1e-5)
    shape = module.normalized_shape if weight is None else weight.shape
    like = torch.empty(0) if weight is None else weight
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).add(0.5).to(like.device, like.dtype)
    tolerance = 1e-2 if x.dtype.itemsize == 2 else 1e-5
    weight, bias = (None if tensor is None else tensor.detach() for tensor in (weight, bias))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = module(x)
        if found.dtype != x.dtype:  # Unsloth's Gemma 3 on GPUs without bfloat16
            raise AttachError(f"{name} ({type(module).__name__}) gives {found.dtype} for {x.dtype}.")
        for offset, centred in ((0.0, False), (1.0, False), (0.0, True)):
            norm = Norm(weight, eps, offset, centred, bias)
            if torch.allclose(normalise(x, norm), found, rtol=tolerance, atol=tolerance):
                if x.dtype != torch.float32 or centred:
                    return norm
                return replace(norm, keeps_dtype=module(x.bfloat16()).dtype == torch.bfloat16)
    raise AttachError(f"{name} ({type(module).__name__}) is no RMS norm and no layer norm.")


def _parts(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The children of ``module`` by name, without those that do nothing.

    Raises:
        AttachError: dropout.
    """
    found = {}
    for child_name, child in module.named_children():
        if isinstance(child, nn.Dropout) and child.p > 0:
            raise AttachError(f"{name}.{child_name}: dropout of {child.p} has no fast path. Set it to zero.")
        if not isinstance(child, nn.Dropout | nn.Identity):
            found[child_name] = child
    return found


def _refuse_unknown(parts: dict[str, nn.Module], known: set[str], name: str) -> None:
    unknown = sorted(set(parts) - known)
    if unknown:
        raise AttachError(f"{name} has parts that are not of a Llama layer: {', '.join(unknown)}.")


def place_norms(norms: Mapping[str, T]) -> tuple[T | None, T | None, T | None, T | None]:
    """N1 to N4 of `LayerSpec`, by the names that transformers uses for each arrangement."""
    first, second = norms.get("input_layernorm"), norms.get("post_attention_layernorm")
    before_mlp, after_mlp = norms.get("pre_feedforward_layernorm"), norms.get("post_feedforward_layernorm")
    if before_mlp is not None:  # around both parts: Gemma 2 and 3
        return first, second, before_mlp, after_mlp
    if "post_self_attn_layernorm" in norms:  # around both parts: GLM 4
        return first, norms["post_self_attn_layernorm"], second, norms.get("post_mlp_layernorm")
    if after_mlp is not None:  # after both parts: OLMo 2, EXAONE 4
        return first, second, None, after_mlp
    return first, None, second, None  # before both parts: Llama


def _projection(module: nn.Module, name: str) -> Projection:
    check_adapters(module, name)
    found = read_projection(module, name)
    if found is None:
        raise AttachError(f"{name}: its adapter is merged or disabled, or several are active.")
    check_frozen(found.base, name)
    return found


def _window(attention: nn.Module, config: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)


def _query_scaling(config: Any) -> tuple[float, int] | None:
    rope = getattr(config, "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta") if isinstance(rope, dict) else None
    return None if beta is None else (float(beta), int(rope["original_max_position_embeddings"]))
