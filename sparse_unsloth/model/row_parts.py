"""Describes decoder layers of any kind by their row parts, the modules that work row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class RowPart:
    """A module between two points of the residual stream that works row by row: an MLP, or an output projection.

    Attributes:
        name: its path below its layer; ``path``, where that differs.
        inputs: the places of its row inputs among the arguments of its forward: numbers and names.
        selects_rows: its backward selects the layer's rows; that of other parts uses them.
        is_routed: it sends each row to some of its experts, so that others may get no gradient.
    """

    name: str
    module: nn.Module
    inputs: tuple[int | str, ...] = (0,)
    selects_rows: bool = False
    is_routed: bool = False
    path: str = ""


@dataclass(frozen=True)
class RowLayer:
    """A decoder layer that only row sparsity computes, by the model's own code.

    Attributes:
        parts: its row parts.
        dense: the parts with weights that stay dense, by name: why.
        is_reached: whether a forward of tokens alone runs it; others run with images, say.
    """

    index: int
    name: str
    module: nn.Module
    parts: tuple[RowPart, ...]
    dense: Mapping[str, str]
    is_reached: bool = True
    adds_mlp_output = False
    """A recompute computes every output: where they are added is not known."""

    @property
    def row_parts(self) -> tuple[RowPart, ...]:
        return self.parts

    @property
    def is_intact(self) -> bool:
        """Whether the layer still has the modules that it was described by."""
        return all(dict(self.module.named_modules()).get(part.name) is part.module for part in self.parts)

    def projections(self) -> dict[str, nn.Module]:
        """Every module of the parts that has weights, by name; adapters as one module with what they wrap."""
        return {
            f"{part.name}.{name}".rstrip("."): module
            for part in self.parts
            for name, module in weighted_modules(part.module)
        }


def weighted_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules within ``module`` that have weights of their own, by name; PEFT's layers as one module."""
    if hasattr(module, "base_layer") or module._parameters:
        yield "", module
    if hasattr(module, "base_layer"):
        return
    for name, child in module.named_children():
        yield from ((f"{name}.{inner}".rstrip("."), found) for inner, found in weighted_modules(child))


def has_matrix(module: nn.Module) -> bool:
    """Whether ``module`` has a weight of two dimensions or more: it is no norm, scale or activation."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def returns_router_logits(model: nn.Module, asked: bool | None = None) -> bool:
    """Whether a forward returns the logits of routers, whose auxiliary loss then needs their gradient.

    Args:
        model: the outermost model, whose configuration says so where the call does not.
        asked: the call's argument ``output_router_logits``.
    """
    if asked is not None:
        return bool(asked)
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(one, "output_router_logits", False) for one in (config, text))


def rows_of(value: object) -> int:
    """The number of rows of a tensor ``[..., width]``; 0 for what is none."""
    return value.shape[:-1].numel() if isinstance(value, Tensor) and value.ndim > 1 else 0
