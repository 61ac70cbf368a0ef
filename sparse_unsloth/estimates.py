"""Estimates of channel energies that cost next to nothing, per layer and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_unsloth.energy import AttentionEnergy, base_weight, column_energy
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.functions.activations import ACTIVATIONS
from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.layers import DecoderLayer

if TYPE_CHECKING:
    from sparse_unsloth.config import LayerSparsity

FACTORED = {"mlp": ("mlp.gate_proj", "mlp.up_proj"), "self_attn": tuple(f"self_attn.{x}_proj" for x in "qkv")}
"""The projections that get factors, by part of the layer."""
ENERGIES = {"mlp": ("mlp",), "self_attn": ("q", "k", "v")}
"""The names of a part's energies."""
SCORED_ROWS = 1024
"""At most so many rows of a batch, evenly spaced, are looked at: 256 of 700 already lose under 0.001 of the energy."""


class Factors(NamedTuple):
    """A low-rank stand-in for a weight: ``x̂ = (x down') up'``, ``down [rank, in]``, ``up [out, rank]``."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class LayerEstimate:
    """What is known of one layer; tensors on the CPU, fp32.

    Args:
        factors: by projection ("mlp.gate_proj", ...).
        energy: calibrated mean square of each channel, by "mlp", "q", "k", "v".
        gain: for kind "prior", ``energy`` over the root of the estimate's own calibrated mean square.
    """

    factors: Mapping[str, Factors] = field(default_factory=dict)
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    gain: Mapping[str, Tensor] = field(default_factory=dict)


class Estimator:
    """Estimates channel energies of a batch (a `Criterion`). Lives outside the module tree: no checkpoint holds it.

    Args:
        kind: "svd", "whitened", "prior" or "static".
        rank: of the factors.
        layers: by layer index.
        compensation: stand-ins for the MLP channels that ``static`` drops, by layer index.
        compensation_sparsity: the MLP sparsity for which each of them was fitted.
    """

    def __init__(
        self,
        kind: str,
        rank: int,
        layers: Mapping[int, LayerEstimate],
        compensation: Mapping[int, Compensation] | None = None,
        compensation_sparsity: Mapping[int, float] | None = None,
    ):
        self.kind = kind
        self.rank = rank
        self.layers = dict(layers)
        self.compensation = dict(compensation or {})
        self.compensation_sparsity = dict(compensation_sparsity or {})
        self._placed: dict[tuple, Any] = {}

    @property
    def max_rows(self) -> int:
        """How many rows of a batch are looked at, at most."""
        return 1 if self.constant else SCORED_ROWS

    @property
    def constant(self) -> bool:
        """Whether the estimate looks at no row."""
        return self.kind == "static"

    @torch.no_grad()
    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        """Energy of each MLP channel over ``rows [N, hidden_size]``, up to a common factor: ``[intermediate_size]``."""
        if self.constant:
            return self._vectors(layer, "mlp", "energy", rows.device)[0]
        energy = self._factored_mlp(layer, _sample(rows))
        return energy.sqrt_().mul_(self._vectors(layer, "mlp", "gain", rows.device)[0]) if self._has_gain else energy

    @torch.no_grad()
    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        """Energies of the channels of Q, K and V over ``rows [N, hidden_size]``, each up to a common factor."""
        if self.constant:
            return AttentionEnergy(*self._vectors(layer, "self_attn", "energy", rows.device))
        energies = self._factored_attention(layer, _sample(rows))
        if not self._has_gain:
            return energies
        gains = self._vectors(layer, "self_attn", "gain", rows.device)
        return AttentionEnergy(*(energy.sqrt_().mul_(gain) for energy, gain in zip(energies, gains, strict=True)))

    def check_covers(self, layer_sparsity: Sequence[LayerSparsity]) -> None:
        """Raises EstimatorError if a layer with sparsity above 0 has no estimate here; the message names them."""
        missing = [f"{index}.{part}" for index, part in sparse_parts(layer_sparsity) if not self.covers(index, part)]
        if missing:
            raise EstimatorError(
                f"The estimator has nothing for {shorten(missing)}, which the configuration makes sparse. Build it "
                "for this configuration (another estimator.path, or delete the file), or leave these layers dense."
            )

    @property
    def _has_gain(self) -> bool:
        return self.kind == "prior"

    def covers(self, index: int, part: str) -> bool:
        """Whether there is an estimate for ``part`` ("mlp", "self_attn") of layer ``index``."""
        estimate = self.layers.get(index)
        if estimate is None:
            return False
        if self.constant:
            return all(name in estimate.energy for name in ENERGIES[part])
        return all(name in estimate.factors for name in FACTORED[part])

    def _factored_mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        down, (gate, up) = self._factors(layer, "mlp", rows)
        gate_bias, up_bias = (base_weight(layer, name).bias for name in FACTORED["mlp"])
        activation = ACTIVATIONS[layer.activation]

        def values(piece: Tensor) -> Tensor:
            gates, ups = linear(piece, down).split((gate.shape[1], up.shape[1]), dim=1)
            return activation(linear(gates, gate, gate_bias)).mul_(linear(ups, up, up_bias))

        return column_energy(rows, layer.intermediate_size, values)

    def _factored_attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        down, ups = self._factors(layer, "self_attn", rows)
        thin = linear(rows, down).split([up.shape[1] for up in ups], dim=1)
        return AttentionEnergy(
            *(
                column_energy(part, len(up), lambda piece, up=up: linear(piece, up))
                for part, up in zip(thin, ups, strict=True)
            )
        )

    def _factors(self, layer: DecoderLayer, part: str, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The part's stacked ``down`` and its ``up``s, on the device and in the dtype of ``rows``."""
        key = (layer.index, part, rows.device, rows.dtype)
        if key not in self._placed:
            factors = [self.layers[layer.index].factors[name] for name in FACTORED[part]]
            down = torch.cat([factor.down for factor in factors]).to(rows)
            self._placed[key] = down, [factor.up.to(rows) for factor in factors]
        return self._placed[key]

    def _vectors(self, layer: DecoderLayer, part: str, what: str, device: torch.device) -> list[Tensor]:
        key = (layer.index, part, what, device)
        if key not in self._placed:
            vectors = getattr(self.layers[layer.index], what)
            self._placed[key] = [vectors[name].to(device) for name in ENERGIES[part]]
        return self._placed[key]


def sparse_parts(layer_sparsity: Sequence[LayerSparsity]) -> list[tuple[int, str]]:
    """``(layer index, "mlp" | "self_attn")`` of everything with a sparsity above 0, in depth order."""
    return [
        (index, part)
        for index, sparsity in enumerate(layer_sparsity)
        for part, value in (("mlp", sparsity.mlp), ("self_attn", sparsity.self_attn))
        if value > 0
    ]


def _sample(rows: Tensor) -> Tensor:
    return rows[:: -(-len(rows) // SCORED_ROWS)]


def shorten(names: list[str]) -> str:
    """The first four of ``names``, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
