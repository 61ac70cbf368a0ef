"""Which channels context rows keep: what `channels.selector` chooses and the sparse functions compute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class MlpSelection:
    """The MLP channels that context rows keep.

    Args:
        channels: int64 ``[k]``, ascending: rows of gate_proj and up_proj, columns of down_proj.
        order: int64 ``[intermediate_size]``: ``channels``, then the others, ascending; None where nothing made it.
        scores: of this batch's rows, those that the choice was made by.
    """

    channels: Tensor
    order: Tensor | None = None
    scores: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class AttentionSelection:
    """Ascending int64 indices: rows of q_proj, k_proj and v_proj, and columns of o_proj; ``scores`` as in the MLP's."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    scores: tuple[Tensor, ...] = ()
