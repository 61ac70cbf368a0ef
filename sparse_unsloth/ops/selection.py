"""Holds the channels that context tokens keep: `sparse_unsloth.channels` selects, `sparse_unsloth.ops` uses them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class MlpSelection:
    """The MLP channels that context tokens keep.

    Args:
        channels: int64 ``[k]``, ascending: rows of gate_proj and up_proj, columns of down_proj.
        order: int64 ``[intermediate_size]``: ``channels``, then the others, ascending; None if it was not made.
        scores: the scores of this micro-batch by which the channels were selected.
    """

    channels: Tensor
    order: Tensor | None = None
    scores: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class AttentionSelection:
    """Attention's channels, ascending int64: rows of q_proj, k_proj and v_proj, columns of o_proj; and their scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    scores: tuple[Tensor, ...] = ()
