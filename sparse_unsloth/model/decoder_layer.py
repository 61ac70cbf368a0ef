"""Finds the decoder layers of a model, and reads what the sparse functions need (docs/how-it-works.md, section 1.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.row_parts import RowLayer, RowPart, has_matrix

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADDING_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""All parts of a decoder layer that adds the outputs of attention and MLP to the residual stream directly."""


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
        """The number of query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @functools.cached_property
    def queries_alone(self) -> bool:
        """Whether ``q_proj`` computes queries only: its output is as wide as the input of ``o_proj``."""
        return _shape(self.self_attn.q_proj)[0] == _shape(self.self_attn.o_proj)[1]

    @functools.cached_property
    def adds_mlp_output(self) -> bool:
        """Whether the MLP's output, at most scaled, is added to the residual stream and the layer ends there.

        The layer's parts tell: a norm after the MLP (Gemma2, OLMo2) would be a further part.
        """
        return {name for name, _ in self.module.named_children()} <= ADDING_PARTS

    @property
    def row_parts(self) -> tuple[RowPart, RowPart]:
        """What row sparsity hooks where the layer runs part by part."""
        return RowPart("mlp", self.mlp, selects_rows=True), RowPart(
            "self_attn", self.self_attn.o_proj, path="self_attn.o_proj"
        )

    @property
    def is_intact(self) -> bool:
        """Whether the layer still has the modules that it was described by."""
        return self.module.mlp is self.mlp and self.module.self_attn is self.self_attn

    def projections(self) -> dict[str, nn.Module]:
        """``{"mlp.gate_proj": module, ..., "self_attn.o_proj": module}``, in a fixed order."""
        found = {f"mlp.{name}": getattr(self.mlp, name) for name in MLP_PROJECTIONS}
        return found | {f"self_attn.{name}": getattr(self.self_attn, name) for name in ATTENTION_PROJECTIONS}


AnyLayer: TypeAlias = "DecoderLayer | RowLayer"
"""What a model's decoder layer is described by: whole, or by its row parts alone."""


def find_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of ``model`` (bare, PEFT-wrapped or inside DDP), in depth order.

    In a multimodal model these are the layers of the text decoder.

    Raises:
        AttachError: the model has no layer with gate/up/down and q/k/v/o projections, or an unknown activation; or it
            is an encoder-decoder model.
    """
    within = _text_decoder(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(within) and hasattr(module, "mlp") and hasattr(module, "self_attn") and not _lacks(module)
    ]
    if not found:
        kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
        stacks = [module for name, module in model.named_modules() if name.startswith(within) and _is_stack(module)]
        first = max(stacks, key=len)[0] if stacks else None
        raise AttachError(
            f"{kind} has no decoder layer with mlp.gate_proj/up_proj/down_proj and "
            "self_attn.q_proj/k_proj/v_proj/o_proj"
            f"{'' if first is None else f' ({type(first).__name__}: {_lacks(first)})'}. "
            "Supported families: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, Gemma2, Granite, and others of that "
            "form. Row sparsity takes decoder layers of any kind: sparsity='rows'."
        )
    return [_describe(index, name, module) for index, (name, module) in enumerate(found)]


def layers_of_any_kind(model: nn.Module) -> list[AnyLayer]:
    """All layers of the text decoder's stack in depth order, for row sparsity.

    Those that `find_layers` does not describe, or that have matrices beside MLP and attention, have no parts yet.

    Raises:
        AttachError: there is no list of decoder layers, or it is an encoder-decoder model.
    """
    within = _text_decoder(model)
    stacks = [(name, module) for name, module in model.named_modules() if name.startswith(within) and _is_stack(module)]
    if not stacks:
        raise AttachError(f"{type(model).__name__} has no list of decoder layers, so it has no sparse path.")
    prefix, stack = max(stacks, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))
    members = stack._modules.items()  # iterating may repeat them, in a decoder that loops
    found = [_of_any_kind(index, f"{prefix}.{name}", module) for index, (name, module) in enumerate(members)]
    first = {layer.module: layer for layer in reversed(found)}
    return [layer for layer in found if isinstance(layer, RowLayer) or first[layer.module] is layer]


def _of_any_kind(index: int, name: str, module: nn.Module) -> AnyLayer:
    for inner, layer in module.named_modules():
        others = (child for part, child in layer.named_children() if part not in ("mlp", "self_attn"))
        if not _lacks(layer) and not any(map(has_matrix, others)):
            try:
                return _describe(index, f"{name}.{inner}".rstrip("."), layer)
            except AttachError:  # an activation that our functions do not compute
                break
    return RowLayer(index, name, module, (), {})


def decoder_stack(model: nn.Module, layers: Sequence[AnyLayer]) -> dict[str, nn.Module]:
    """All decoder layers of ``model``, by name and in depth order: ``layers``, and others in the same stack."""
    modules, stack = dict(model.named_modules()), {}
    for layer in layers:
        above = layer.name
        while above and not _is_stack(modules[above]):
            above = above.rpartition(".")[0]
        if not _is_stack(modules[above]):
            stack[layer.name] = layer.module
            continue
        for number, member in enumerate(modules[above]):
            inside = next((layer for layer in layers if layer.name.startswith(f"{above}.{number}.")), None)
            name, module = (f"{above}.{number}", member) if inside is None else (inside.name, inside.module)
            stack[name] = module
    return stack


def left_out_layers(stack: Mapping[str, nn.Module], layers: Sequence[AnyLayer]) -> dict[str, str]:
    """The layers of a `decoder_stack` that are not in ``layers``, by name: what each lacks to be a `DecoderLayer`."""
    found = {layer.module for layer in layers}
    return {name: f"{type(module).__name__}: {_lacks(module)}" for name, module in stack.items() if module not in found}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0


def first_tensor(output: Any) -> Tensor | None:
    """The hidden states in a decoder layer's output."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def _text_decoder(model: nn.Module) -> str:
    """The prefix of the names of the text decoder's modules.

    Raises:
        AttachError: an encoder-decoder model, where labels are not those of the next token.
    """
    for module in model.modules():
        if not hasattr(type(module), "get_decoder"):
            continue
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise AttachError(
                f"{type(module).__name__} is an encoder-decoder model: its prompt is in the encoder, and its labels "
                "belong to the decoder's rows, so no token has the role of context. It has no sparse path; train it "
                "dense."
            )
        decoder = module.get_decoder()
        return next((f"{name}." for name, other in model.named_modules() if name and other is decoder), "")
    return ""


def _lacks(module: nn.Module) -> str:
    """What ``module`` lacks to be a `DecoderLayer`; "" if nothing."""
    for part, names in (("mlp", MLP_PROJECTIONS), ("self_attn", ATTENTION_PROJECTIONS)):
        holder = getattr(module, part, None)
        if not isinstance(holder, nn.Module):
            return f"no {part} (it has {', '.join(name for name, _ in module.named_children()) or 'no parts'})"
        absent = [name for name in names if getattr(holder, name, None) is None]
        if absent:
            return f"no {', '.join(absent)} in {part} ({type(holder).__name__})"
        for name in names:
            if not all(hasattr(_base(getattr(holder, name)), size) for size in ("in_features", "out_features")):
                return f"{part}.{name} is a {type(_base(getattr(holder, name))).__name__}"
    return ""


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


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _shape(module: nn.Module) -> tuple[int, int]:
    base = _base(module)
    return base.out_features, base.in_features


def _features(module: nn.Module) -> int:
    return _shape(module)[0]


def _recognise(name: str, act_fn) -> str:
    """Identifies the activation by its values, as libraries rename and wrap its class."""
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
