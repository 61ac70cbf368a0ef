"""Reads layer rules such as ``{"3-30": 0.99, "5": 0.5, "all": 0.9}`` as a sparsity per layer."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PARTS = {"mlp": "MLP", "self_attn": "attention"}
"""The parts of a layer: their fields in `LayerSparsity`, and their names in reports."""


class LayerSparsity(NamedTuple):
    """The share of one decoder layer's channels that context tokens leave out, in [0, 1); 0 is dense."""

    mlp: float
    self_attn: float


def keep_count(size: int, sparsity: float) -> int:
    """How many of ``size`` channels are kept: ``(1 - sparsity) * size``, rounded, at least one."""
    return max(1, round((1 - sparsity) * size))


def sparse_parts(layer_sparsity: Sequence[LayerSparsity]) -> list[tuple[int, str]]:
    """``(layer index, "mlp" | "self_attn")`` of every part with a sparsity above 0, in order of depth."""
    return [
        (index, part)
        for index, sparsity in enumerate(layer_sparsity)
        for part, value in zip(PARTS, sparsity, strict=True)
        if value > 0
    ]


def canonical_rule(key: object) -> str:
    """A rule in its usual form: ``"all"``, one layer ``"5"`` or a range ``"3-30"`` with both ends.

    YAML's bare ``5:`` arrives as an int.

    Raises:
        ValueError: anything else, or a range from high to low.
    """
    text = str(key).strip() if isinstance(key, int | str) and not isinstance(key, bool) else ""
    if text == "all":
        return text
    match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", text)
    if match is None:
        raise ValueError("must name layers as 'all', one layer '5' or a range '3-30'")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ValueError(f"must run from low to high: '{last}-{first}'")
    return _rule(first, last)


def share(value: object) -> float:
    """``value`` as a sparsity, the share of channels left out.

    Raises:
        ValueError: it is not a number in [0, 1); bools and NaN are not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("must be a number in [0, 1), the share of channels left out (0.9 leaves out 90 %)")
    return float(value)


def expand(rules: Mapping[str, float], layers: list[float]) -> list[float]:
    """``layers`` with canonical ``rules`` applied in order, so that later rules win; absent layers are skipped."""
    layers = list(layers)
    for rule, sparsity in rules.items():
        first, last = _span(rule, len(layers))
        for layer in range(first, min(last + 1, len(layers))):
            layers[layer] = sparsity
    return layers


def collect(layers: Mapping[int, float]) -> dict[str, float]:
    """The fewest rules that give each layer its sparsity, without overlap; dense layers need none."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if not layers[layer]:
            continue
        if runs and layer == runs[-1][1] + 1 and layers[layer] == layers[runs[-1][0]]:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return {_rule(first, last): layers[first] for first, last in runs}


def absent_layers(part: str, rules: Mapping[str, float], num_layers: int) -> list[str]:
    """One line for each canonical rule of ``part`` that names a layer beyond a model's ``num_layers``."""
    problems = []
    for rule in rules:
        first, last = _span(rule, num_layers)
        if last >= num_layers:
            nearest = _rule(min(first, num_layers - 1), num_layers - 1)
            problems.append(f"{part}.{rule}: no such layer; did you mean {part}.{nearest}?")
    return problems


def _rule(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _span(rule: str, num_layers: int) -> tuple[int, int]:
    if rule == "all":
        return 0, num_layers - 1
    first, _, last = rule.partition("-")
    return int(first), int(last or first)
