"""Scores of channels to the channels that context rows keep (SparseLoRA section 3; DESIGN.md section 2).

Scores are energies here, the squares of the norms that the paper ranks by: the ranking is the same, and energies add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_unsloth.criteria import Criterion, make_criterion
from sparse_unsloth.layers import DecoderLayer

if TYPE_CHECKING:
    from sparse_unsloth.config import SparsityConfig
    from sparse_unsloth.estimates import Estimator


@dataclass(frozen=True, eq=False)
class MlpSelection:
    """``channels`` int64 ``[k]``, ascending: rows of gate_proj and up_proj, columns of down_proj."""

    channels: Tensor


@dataclass(frozen=True, eq=False)
class AttentionSelection:
    """Ascending int64 indices: rows of q_proj, k_proj and v_proj, and columns of o_proj."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def keep_count(size: int, sparsity: float) -> int:
    """Channels kept of ``size``: the nearest whole number to ``(1 - sparsity) * size``, at least one."""
    return max(1, round((1 - sparsity) * size))


def top_channels(scores: Tensor, count: int) -> Tensor:
    """The ``count`` channels of highest score, int64, ascending."""
    return scores.topk(count, sorted=False).indices.sort().values


def query_channels(key_channels: Tensor, groups: int, head_dim: int) -> Tensor:
    """Channels of all query heads that belong to ``key_channels``, ascending.

    With grouped queries, query head ``h`` reads key and value head ``h // groups``: so channel ``d`` of key head ``j``
    comes with channel ``d`` of the query heads ``j * groups + g``, ``g < groups``. The same map takes value channels
    to columns of o_proj.
    """
    head, dim = key_channels // head_dim, key_channels % head_dim
    member = torch.arange(groups, device=key_channels.device)
    return ((head[:, None] * groups + member) * head_dim + dim[:, None]).flatten().sort().values


def key_channel_scores(query_energy: Tensor, key_energy: Tensor, groups: int, head_dim: int) -> Tensor:
    """Score of each key channel, ``(‖q̂‖ ‖k̂‖)²``: the energy of its group's query channels together times its own.

    Args:
        query_energy: ``[num_kv_heads * groups * head_dim]``.
        key_energy: ``[num_kv_heads * head_dim]``.
    """
    return query_energy.view(-1, groups, head_dim).sum(1).flatten() * key_energy


def top_key_channels(scores: Tensor, sparsity: float, head_dim: int, rope_pairs: bool) -> Tensor:
    """The key channels of highest score, ascending; as RoPE pairs ``(d, d + head_dim / 2)`` if asked, scores added."""
    if not rope_pairs:
        return top_channels(scores, keep_count(len(scores), sparsity))
    half = head_dim // 2
    pairs = top_channels(scores.view(-1, 2, half).sum(1).flatten(), keep_count(len(scores) // 2, sparsity))
    first = pairs // half * head_dim + pairs % half
    return torch.cat((first, first + half)).sort().values


class ChannelSelector:
    """Chooses the channels that the context rows of a batch keep; no gradient, no host sync.

    Args:
        config: `criterion`, `rope_pairs`, `seed` and the layers that must be covered.
        layers: all decoder layers of the model.
        estimator: for ``criterion="estimator"``, else unused.

    Raises:
        EstimatorError: the criterion needs an estimator and there is none, or it does not cover every sparse layer.
    """

    def __init__(self, config: SparsityConfig, layers: list[DecoderLayer], estimator: Estimator | None):
        self._rope_pairs = config.rope_pairs
        layer_sparsity = config.layer_sparsity(len(layers))
        self._criterion: Criterion = make_criterion(config.criterion, estimator, layer_sparsity, config.seed)
        self._kept: dict[tuple[int, str, torch.device], tuple[float, MlpSelection | AttentionSelection]] = {}

    @torch.no_grad()
    def mlp(self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float) -> MlpSelection:
        """The MLP channels to keep.

        Args:
            hidden_states: the MLP's input on context rows, ``[N, hidden_size]``, without padding, at least one row.
            sparsity: share of the channels to leave out, in [0, 1).
        """
        return self._constant(layer, "mlp", hidden_states, sparsity, self._choose_mlp)

    @torch.no_grad()
    def attention(self, layer: DecoderLayer, hidden_states: Tensor, sparsity: float) -> AttentionSelection:
        """The channels of Q, K, V and O to keep; arguments as in `mlp`, with the input of q_proj, k_proj and v_proj."""
        return self._constant(layer, "self_attn", hidden_states, sparsity, self._choose_attention)

    def rows_to_score(self, context: Tensor) -> Tensor:
        """Of the context rows (int64 ``[N]``, at least one), those that the choice needs: gather no more."""
        limit = self._criterion.max_rows
        return context if limit is None else context[:: -(-len(context) // limit)]

    def _choose_mlp(self, layer: DecoderLayer, rows: Tensor, sparsity: float) -> MlpSelection:
        count = keep_count(layer.intermediate_size, sparsity)
        return MlpSelection(top_channels(self._criterion.mlp(layer, rows), count))

    def _choose_attention(self, layer: DecoderLayer, rows: Tensor, sparsity: float) -> AttentionSelection:
        energy = self._criterion.attention(layer, rows)
        scores = key_channel_scores(energy.q, energy.k, layer.groups, layer.head_dim)
        keys = top_key_channels(scores, sparsity, layer.head_dim, self._rope_pairs)
        values = top_channels(energy.v, keep_count(len(energy.v), sparsity))
        return AttentionSelection(
            q=query_channels(keys, layer.groups, layer.head_dim),
            k=keys,
            v=values,
            o=query_channels(values, layer.groups, layer.head_dim),
        )

    def _constant(self, layer, part, rows, sparsity, choose):
        """``choose``, or for a criterion that looks at no row, its last result at the same sparsity."""
        if not self._criterion.constant:
            return choose(layer, rows, sparsity)
        key = (layer.index, part, rows.device)
        last, selection = self._kept.get(key, (None, None))
        if last != sparsity:
            selection = choose(layer, rows, sparsity)
            self._kept[key] = (sparsity, selection)
        return selection
