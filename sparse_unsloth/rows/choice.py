"""Selects the rows that a backward pass goes through: all loss tokens, and the context tokens of largest gradient."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_unsloth.tokens.partition import TokenPartition


class RowChoice:
    """The rows of one layer in one backward pass (docs/how-it-works.md, section 3.2).

    Args:
        partition: the token roles.
        share: the share of the context tokens, in (0, 1]; their number is rounded up.
        energy: float32 ``[2]``, to which `select` adds the sums of squares of the selected rows and of all
            (`sparse_unsloth.rows.energy`).

    Attributes:
        partition, share, energy: the arguments.
        rows: int64 ``[n]``, the selected rows; None before `select`.
    """

    def __init__(self, partition: TokenPartition, share: float, energy: Tensor | None = None):
        self.partition, self.share, self.energy = partition, share, energy
        self.num_context = ceil(share * len(partition.context))
        self.rows: Tensor | None = None

    def as_partition(self) -> TokenPartition:
        """A partition of the selected rows alone, all computed densely; equal for all layers of a forward."""
        count = len(self.partition.dense) + self.num_context
        rows = torch.arange(count, device=self.partition.dense.device)
        return TokenPartition((1, count), rows, rows[:0], rows[:0], rows)

    def select(self, gradient: Tensor) -> Tensor:
        """int64 ``[n]``: loss tokens, then the context tokens whose rows of ``gradient`` have the largest L2 norms.

        Loss tokens are never left out, however small their gradients. The result is kept in `rows` for the layer's
        other functions. No host sync.

        Args:
            gradient: ``[M, width]``; norms are computed in float32 at least.
        """
        partition = self.partition
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        largest = norms.index_select(0, partition.context).topk(self.num_context, sorted=False).indices
        self.rows = torch.cat((partition.dense, partition.context.index_select(0, largest)))
        if self.energy is not None:
            held = norms.index_select(0, self.rows)
            self.energy.add_(torch.stack((held.dot(held), norms.dot(norms))))
        return self.rows
