"""Ranks channels by the estimator or by a baseline of the paper's study (SparseLoRA section 3 and its ablations).

A criterion scores MLP channels ``[intermediate_size]`` and attention channels (`AttentionEnergy`) for the context
tokens of a batch, as energies up to a common factor, without LoRA branches (docs/how-it-works.md, section 4.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparse_unsloth.channels.energy import AttentionEnergy, attention_energy, base_weight, column_energy, mlp_energy
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import DecoderLayer


class Criterion(Protocol):
    """Scores channels from the inputs of context tokens, ``[N, hidden_size]``.

    Attributes:
        constant: whether the scores depend on the layer alone.
        max_rows: how many rows suffice; None: all are needed.
        gathers: whether `mlp` and `attention` take the indices of the rows to use as a third argument.
    """

    constant: bool
    max_rows: int | None
    gathers: bool

    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor: ...

    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy: ...


def make_criterion(
    name: str, estimator: Estimator | None, layer_sparsity: Sequence[LayerSparsity], seed: int
) -> Criterion:
    """The criterion called ``name`` in `SparsityConfig`.

    Raises:
        EstimatorError: "estimator" without one, or with one that lacks a sparse layer.
    """
    if name != "estimator":
        return {"oracle": Oracle, "wanda": Wanda, "magnitude": Magnitude}[name]() if name != "random" else Random(seed)
    if estimator is None:
        raise EstimatorError(
            "criterion 'estimator' needs an Estimator. Build one with obtain_estimator() or build_estimator(), or "
            "choose another criterion: oracle, wanda, magnitude or random."
        )
    estimator.check_covers(layer_sparsity)
    return estimator


class Oracle:
    """Scores by the exact energies of the MLP's hidden activations, of Q, K and V."""

    constant = False
    max_rows = None
    gathers = False

    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        return mlp_energy(layer, rows)

    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        return attention_energy(layer, rows)


class Wanda:
    """Scores by ``|W| ‖x‖``, summed over each output channel (Sun et al. 2024, arXiv 2306.11695, per weight there).

    An MLP channel's score is the sum of its gate row, up row and down column, each divided by its mean over the
    channels; the down column uses the exact norm of its input. Attention channels use their own row.
    """

    constant = False
    max_rows = None
    gathers = False

    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        norms = _input_norms(rows)
        gate, up = (_absolute(layer, f"mlp.{name}") @ norms for name in ("gate_proj", "up_proj"))
        down = _absolute(layer, "mlp.down_proj").sum(0) * mlp_energy(layer, rows).float().sqrt()
        return sum(part / part.mean() for part in (gate, up, down))

    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        norms = _input_norms(rows)
        sums = (_absolute(layer, f"self_attn.{name}") @ norms for name in ("q_proj", "k_proj", "v_proj"))
        return AttentionEnergy(*(part.square() for part in sums))


class Magnitude:
    """Scores by squared weight norms: gate row times up row times down column; rows of Q and K; V's row times O's."""

    constant = True
    max_rows = 1
    gathers = False

    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        gate, up = (_square_sums(layer, f"mlp.{name}", 1) for name in ("gate_proj", "up_proj"))
        return gate * up * _square_sums(layer, "mlp.down_proj", 0)

    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        q, k, v = (_square_sums(layer, f"self_attn.{name}", 1) for name in ("q_proj", "k_proj", "v_proj"))
        o = _square_sums(layer, "self_attn.o_proj", 0).view(-1, layer.groups, layer.head_dim).sum(1).flatten()
        return AttentionEnergy(q, k, v * o)


class Random:
    """Scores at random, uniformly and anew at every call; one ``seed`` gives one sequence on each kind of device."""

    constant = False
    max_rows = None
    gathers = False

    def __init__(self, seed: int):
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def mlp(self, layer: DecoderLayer, rows: Tensor) -> Tensor:
        return self._draw(layer.intermediate_size, rows.device)

    def attention(self, layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
        keys = layer.num_kv_heads * layer.head_dim
        queries = torch.ones(layer.num_heads * layer.head_dim, device=rows.device)
        return AttentionEnergy(queries, self._draw(keys, rows.device), self._draw(keys, rows.device))

    def _draw(self, size: int, device: torch.device) -> Tensor:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.rand(size, generator=self._generators[device], device=device)


def _input_norms(rows: Tensor) -> Tensor:
    return column_energy(rows, rows.shape[1], lambda piece: piece).float().sqrt()


def _absolute(layer: DecoderLayer, projection: str) -> Tensor:
    return base_weight(layer, projection).dense(torch.float32).abs()


def _square_sums(layer: DecoderLayer, projection: str, dim: int) -> Tensor:
    return base_weight(layer, projection).dense(torch.float32).square().sum(dim)
