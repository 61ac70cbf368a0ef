"""Computes exact channel energies over a set of rows, from the base weights (docs/how-it-works.md, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.projection import BaseWeight, gather_base

CHUNK_ELEMENTS = 2**25
"""Most elements of an intermediate tensor; more rows are processed in chunks."""


class AttentionEnergy(NamedTuple):
    """Energy per output channel: ``q [num_heads * head_dim]``, ``k`` and ``v [num_kv_heads * head_dim]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def column_energy(rows: Tensor, width: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums of squares over ``rows``, accumulated in fp32 (fp64 for fp64 rows): ``[width]``.

    Args:
        rows: ``[N, in_features]``, at least one.
        width: the columns of the result of ``values``.
        values: maps ``[n, in_features]`` to ``[n, width]``, row by row.
    """
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    pieces = rows.split(max(1, CHUNK_ELEMENTS // width))
    total = torch.linalg.vector_norm(values(pieces[0]), dim=0, dtype=accumulator).square()
    for piece in pieces[1:]:
        total += torch.linalg.vector_norm(values(piece), dim=0, dtype=accumulator).square()
    return total


def base_weight(layer: DecoderLayer, projection: str) -> BaseWeight:
    """The frozen weight of ``projection`` ("mlp.gate_proj", ...) in ``layer``, without its LoRA branch.

    Outside a forward, a weight that FSDP2 shards is gathered; every rank must then call this.
    """
    return gather_base(layer.projections()[projection], f"{layer.name}.{projection}")


def mlp_values(layer: DecoderLayer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function from the MLP's input ``[n, hidden_size]`` to its hidden activations ``[n, intermediate_size]``."""
    gate, up = base_weight(layer, "mlp.gate_proj"), base_weight(layer, "mlp.up_proj")
    gate_weight, up_weight = gate.dense(dtype), up.dense(dtype)
    activation = ACTIVATIONS[layer.activation]

    def values(rows: Tensor) -> Tensor:
        gates = torch.nn.functional.linear(rows, gate_weight, gate.bias)
        return activation(gates).mul_(torch.nn.functional.linear(rows, up_weight, up.bias))

    return values


def mlp_energy(layer: DecoderLayer, rows: Tensor) -> Tensor:
    """Energy of ``act(x Wg') * (x Wu')`` per channel, ``[intermediate_size]``; ``rows [N, hidden_size]``."""
    return column_energy(rows, layer.intermediate_size, mlp_values(layer, rows.dtype))


def attention_energy(layer: DecoderLayer, rows: Tensor) -> AttentionEnergy:
    """Energy per channel of ``x Wq'``, ``x Wk'``, ``x Wv'``, without the biases; ``rows [N, hidden_size]``."""
    energies = []
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight = base_weight(layer, f"self_attn.{projection}").dense(rows.dtype)
        energies.append(column_energy(rows, len(weight), lambda piece, weight=weight: piece @ weight.t()))
    return AttentionEnergy(*energies)
