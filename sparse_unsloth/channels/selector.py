"""Selects the channels that context tokens keep, from scores (docs/how-it-works.md, section 4.4; SparseLoRA section 3).

Scores are energies, the squares of the norms that the paper ranks by: the ranking is the same, and energies add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.channels.criteria import Criterion, make_criterion
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.kernels.select import (
    attention_channels,
    fits_attention,
    reference_attention_channels,
    top_channels,
    top_order,
)
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection


class ChannelSelector:
    """Selects the channels that the context tokens of a batch keep, without gradients and without host sync.

    Args:
        config: gives `criterion`, `seed` and the sparse layers.
        layers: all decoder layers of the model.
        estimator: for ``criterion="estimator"``, else unused.

    Raises:
        EstimatorError: the criterion needs an estimator and there is none, or it does not cover every sparse layer.
    """

    def __init__(self, config: SparsityConfig, layers: list[DecoderLayer], estimator: Estimator | None):
        layer_sparsity = config.layer_sparsity(len(layers))
        self._criterion: Criterion = make_criterion(config.criterion, estimator, layer_sparsity, config.seed)
        self._kept: dict[tuple[int, str, torch.device], tuple[float, MlpSelection | AttentionSelection]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without constant selections, which are on a device."""
        return {**self.__dict__, "_kept": {}}

    def mlp(
        self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float, rows: Tensor | None = None
    ) -> MlpSelection:
        """The MLP channels to keep.

        Args:
            hidden_states: the MLP's input, ``[..., hidden_size]``; leading dimensions are flattened.
            sparsity: share of the channels to leave out, in [0, 1).
            rows: int64, at least one: the context rows; None: ``hidden_states`` holds them alone.
        """
        return self._constant(layer, "mlp", hidden_states, sparsity, rows, self._choose_mlp)

    def attention(
        self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float, rows: Tensor | None = None
    ) -> AttentionSelection:
        """The channels of Q, K, V and O to keep; arguments as in `mlp`, with the input of q_proj, k_proj and v_proj."""
        return self._constant(layer, "self_attn", hidden_states, sparsity, rows, self._choose_attention)

    def rows_to_score(self, context: Tensor) -> Tensor:
        """The rows that the criterion needs, of ``context`` (int64 ``[N]``, at least one)."""
        limit = self._criterion.max_rows
        return context if limit is None else context[:: -(-len(context) // limit)]

    def _choose_mlp(self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float, rows) -> MlpSelection:
        scores = self._score(self._criterion.mlp, layer, hidden_states, rows)
        count = keep_count(layer.intermediate_size, sparsity)
        if scores.dtype != torch.float32 or not use_kernels(scores):
            return MlpSelection(top_channels(scores, count), scores=(scores,))
        order = top_order(scores, count)
        return MlpSelection(order[:count], order, (scores,))

    def _choose_attention(
        self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float, rows
    ) -> AttentionSelection:
        energy = self._score(self._criterion.attention, layer, hidden_states, rows)
        size, head_dim = layer.num_kv_heads * layer.head_dim, layer.head_dim
        keys = keep_count(size // 2, sparsity)  # pairs (d, d + head_dim / 2), which RoPE mixes
        by_kernels = energy.k.dtype == torch.float32 and fits_attention(layer.num_kv_heads, head_dim)
        choose = attention_channels if by_kernels and use_kernels(energy.k) else reference_attention_channels
        chosen = choose(*energy, keys, keep_count(size, sparsity), layer.groups, head_dim)
        return AttentionSelection(*chosen, scores=tuple(energy))

    def _score(self, score, layer: DecoderLayer, hidden_states: Tensor, rows: Tensor | None):
        if self._criterion.gathers:
            return score(layer, hidden_states, rows)
        with torch.no_grad():
            if rows is not None:
                hidden_states = hidden_states.flatten(0, -2).index_select(0, self.rows_to_score(rows))
            return score(layer, hidden_states)

    def _constant(self, layer, part, hidden_states, sparsity, rows, choose):
        """The result of ``choose``; for a constant criterion the stored one of the same sparsity."""
        if not self._criterion.constant:
            return choose(layer, hidden_states, sparsity, rows)
        key = (layer.index, part, hidden_states.device)
        if key not in self._kept or self._kept[key][0] != sparsity:
            self._kept[key] = sparsity, choose(layer, hidden_states, sparsity, rows)
        return self._kept[key][1]
