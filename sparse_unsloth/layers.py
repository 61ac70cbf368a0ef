"""Finds the decoder layers of a model and what the sparse functions must know of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions.activations import ACTIVATIONS

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADDING_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""The parts of a decoder layer whose two outputs are added to the residual stream."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer with a gated MLP and grouped-query attention.

    ``activation`` is a key of `ACTIVATIONS`; ``num_heads`` counts query heads, ``num_kv_heads`` key and value heads.
    """

    index: int
    name: str
    module: nn.Module
    mlp: nn.Module
    self_attn: nn.Module
    activation: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @functools.cached_property
    def adds_mlp_output(self) -> bool:
        """Whether the MLP's output goes into the residual stream as it is, at most scaled, and the layer ends there.

        Told by the layer's parts: a norm behind the MLP (Gemma2, OLMo2) would be one more.
        """
        return {name for name, _ in self.module.named_children()} <= ADDING_PARTS

    def projections(self) -> dict[str, nn.Module]:
        """``{"mlp.gate_proj": module, ..., "self_attn.o_proj": module}``, in a fixed order."""
        found = {f"mlp.{name}": getattr(self.mlp, name) for name in MLP_PROJECTIONS}
        return found | {f"self_attn.{name}": getattr(self.self_attn, name) for name in ATTENTION_PROJECTIONS}


def find_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of ``model`` (bare, PEFT-wrapped or inside DDP), in depth order.

    Raises:
        AttachError: the model has no layer with gate/up/down and q/k/v/o projections, or an unknown activation.
    """
    found = []
    for name, module in model.named_modules():
        mlp, attention = getattr(module, "mlp", None), getattr(module, "self_attn", None)
        if all(hasattr(mlp, part) for part in MLP_PROJECTIONS) and all(
            hasattr(attention, part) for part in ATTENTION_PROJECTIONS
        ):
            found.append((name, module))
    if not found:
        kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise AttachError(
            f"{kind} has no decoder layer with mlp.gate_proj/up_proj/down_proj and "
            "self_attn.q_proj/k_proj/v_proj/o_proj. Supported families: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, "
            "Gemma2, Granite, and others of that form."
        )
    return [_describe(index, name, module) for index, (name, module) in enumerate(found)]


def _describe(index: int, name: str, module: nn.Module) -> DecoderLayer:
    mlp, attention = module.mlp, module.self_attn
    head_dim = int(attention.head_dim)
    out_features = {part: _features(getattr(attention, part)) for part in ("q_proj", "k_proj", "v_proj")}
    intermediate_size, hidden_size = _shape(mlp.gate_proj)
    if out_features["k_proj"] != out_features["v_proj"] or any(size % head_dim for size in out_features.values()):
        raise AttachError(f"{name}: projections of {out_features} do not divide into heads of {head_dim}.")
    return DecoderLayer(
        index=index,
        name=name,
        module=module,
        mlp=mlp,
        self_attn=attention,
        activation=_recognise(name, mlp.act_fn),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=out_features["q_proj"] // head_dim,
        num_kv_heads=out_features["k_proj"] // head_dim,
        head_dim=head_dim,
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base.out_features, base.in_features


def _features(module: nn.Module) -> int:
    return _shape(module)[0]


def _recognise(name: str, act_fn) -> str:
    """The activation by what it computes, not by what it is called: libraries rename and wrap these classes."""
    grid = torch.linspace(-6, 6, 97)
    values = act_fn(grid.to("cpu"))
    for kind, function in ACTIVATIONS.items():
        if torch.allclose(values, function(grid), atol=1e-6):
            return kind
    nearest = min(ACTIVATIONS, key=lambda kind: F.mse_loss(values, ACTIVATIONS[kind](grid)).item())
    raise AttachError(
        f"{name}.mlp: activation {act_fn} has no sparse path; it is none of {', '.join(ACTIVATIONS)} "
        f"(nearest: {nearest})."
    )
