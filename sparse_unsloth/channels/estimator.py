"""Estimates channel energies for each layer and batch by low-rank factors (docs/how-it-works.md, section 4.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_unsloth.channels.energy import AttentionEnergy, base_weight, column_energy
from sparse_unsloth.config.layer_rules import LayerSparsity, sparse_parts
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.kernels.scores import DTYPES, MAX_RANK, attention_energies, low_rank_activations, mlp_scores
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.dispatch import use_kernels

FACTORED = {"mlp": ("mlp.gate_proj", "mlp.up_proj"), "self_attn": tuple(f"self_attn.{x}_proj" for x in "qkv")}
"""The projections that have factors, by part of the layer."""
ENERGIES = {"mlp": ("mlp",), "self_attn": ("q", "k", "v")}
"""The names of a part's energies."""
SCORED_ROWS = 1024
"""Most rows of a batch that are scored, evenly spaced: even 256 of 700 lose less than 0.001 of the energy."""


class Factors(NamedTuple):
    """Low-rank factors of a weight: the estimate is ``(x down') up'``; ``down [rank, in]``, ``up [out, rank]``."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class LayerEstimate:
    """The estimate of one layer; tensors on the CPU, fp32.

    Args:
        factors: by projection ("mlp.gate_proj", ...).
        energy: calibrated mean square of each channel, by "mlp", "q", "k", "v".
        gain: for kind "prior", ``energy`` over the root of the estimate's own calibrated mean square.
    """

    factors: Mapping[str, Factors] = field(default_factory=dict)
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    gain: Mapping[str, Tensor] = field(default_factory=dict)


class Estimator:
    """Estimates channel energies of a batch (a `Criterion`). It is outside the module tree, so no checkpoint holds it.

    Args:
        kind: "svd" or "prior".
        rank: rank of the factors.
        layers: estimates by layer index.
    """

    def __init__(self, kind: str, rank: int, layers: Mapping[int, LayerEstimate]):
        self.kind = kind
        self.rank = rank
        self.layers = dict(layers)
        self._placed: dict[tuple, Any] = {}

    gathers = True
    constant = False

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without tensors placed on a device."""
        return {**self.__dict__, "_placed": {}}

    @property
    def max_rows(self) -> int:
        """Most rows of a batch that are scored."""
        return SCORED_ROWS

    def mlp(self, layer: DecoderLayer, hidden_states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Energy of each MLP channel over a batch, up to a common factor: ``[intermediate_size]``.

        Args:
            hidden_states: ``[..., hidden_size]``; leading dimensions are flattened.
            rows: int64, at least one: the rows to score; None: all.
        """
        if not self._by_kernels(hidden_states):
            return self._mlp_by_torch(layer, _sample(hidden_states, rows))
        down, up, *biases_and_gain = self._stacked(layer, "mlp", hidden_states)
        low_rank = low_rank_activations(hidden_states, rows, _step(hidden_states, rows), down)
        return mlp_scores(low_rank, up, layer.activation, *biases_and_gain)

    def attention(self, layer: DecoderLayer, hidden_states: Tensor, rows: Tensor | None = None) -> AttentionEnergy:
        """Energies of the channels of Q, K and V over a batch, each up to a common factor; arguments as in `mlp`."""
        if not self._by_kernels(hidden_states):
            return self._attention_by_torch(layer, _sample(hidden_states, rows))
        down, up, sizes, gain = self._stacked(layer, "self_attn", hidden_states)
        low_rank = low_rank_activations(hidden_states, rows, _step(hidden_states, rows), down)
        return AttentionEnergy(*attention_energies(low_rank, up, *sizes[:2], gain).split_with_sizes(sizes))

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
        return all(name in estimate.factors for name in FACTORED[part])

    def _by_kernels(self, hidden_states: Tensor) -> bool:
        return self.rank <= MAX_RANK and hidden_states.dtype in DTYPES and use_kernels(hidden_states)

    @torch.no_grad()
    def _mlp_by_torch(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        energy = self._factored_mlp(layer, rows)
        return energy.sqrt_().mul_(self._gains(layer, "mlp", rows.device)[0]) if self._has_gain else energy

    @torch.no_grad()
    def _attention_by_torch(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        energies = self._factored_attention(layer, rows)
        if not self._has_gain:
            return energies
        gains = self._gains(layer, "self_attn", rows.device)
        return AttentionEnergy(*(energy.sqrt_().mul_(gain) for energy, gain in zip(energies, gains, strict=True)))

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
        low_rank = linear(rows, down).split([up.shape[1] for up in ups], dim=1)
        return AttentionEnergy(
            *(
                column_energy(part, len(up), lambda piece, up=up: linear(piece, up))
                for part, up in zip(low_rank, ups, strict=True)
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

    def _stacked(self, layer: DecoderLayer, part: str, like: Tensor) -> tuple:
        """The kernels' arguments for a part, on the device and in the dtype of ``like``.

        ``(down, up, gate bias, up bias, gain)`` of the MLP, ``(down, up, sizes of q, k, v, gain)`` of attention.
        """
        key = (layer.index, part, like.device, like.dtype, "stacked")
        if key not in self._placed:
            factors = [self.layers[layer.index].factors[name] for name in FACTORED[part]]
            down, ups = torch.cat([factor.down for factor in factors]), [factor.up.t() for factor in factors]
            gain = torch.cat(self._gains(layer, part, like.device)) if self._has_gain else None
            if part == "mlp":
                up, rest = torch.cat(ups), _mlp_biases(layer)
            else:
                up, rest = torch.cat(ups, dim=1), ([factor.shape[1] for factor in ups],)
            self._placed[key] = (down.to(like).contiguous(), up.to(like).contiguous(), *rest, gain)
        return self._placed[key]

    def _gains(self, layer: DecoderLayer, part: str, device: torch.device) -> list[Tensor]:
        """The gains of a part's channels, on ``device``."""
        key = (layer.index, part, device, "gain")
        if key not in self._placed:
            gain = self.layers[layer.index].gain
            self._placed[key] = [gain[name].to(device) for name in ENERGIES[part]]
        return self._placed[key]


def _step(hidden_states: Tensor, rows: Tensor | None) -> int:
    """The stride at which rows are scored."""
    count = hidden_states.numel() // hidden_states.shape[-1] if rows is None else rows.shape[0]
    return -(-count // SCORED_ROWS)


def _sample(hidden_states: Tensor, rows: Tensor | None) -> Tensor:
    flat, step = hidden_states.flatten(0, -2), _step(hidden_states, rows)
    return flat[::step] if rows is None else flat.index_select(0, rows[::step])


def _mlp_biases(layer: DecoderLayer) -> tuple[Tensor | None, Tensor | None]:
    gate, up = (base_weight(layer, name).bias for name in FACTORED["mlp"])
    if gate is None and up is None:
        return None, None
    return tuple(torch.zeros_like(other) if bias is None else bias for bias, other in ((gate, up), (up, gate)))


def shorten(names: list[str]) -> str:
    """The first four of ``names``, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
