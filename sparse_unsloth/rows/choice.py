"""Selects the rows that a backward pass goes through: all loss tokens, and the context tokens of largest gradient."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_unsloth.errors import SparsityError
from sparse_unsloth.tokens.partition import TokenPartition


class RowChoice:
    """The rows of one layer in one backward pass (docs/how-it-works.md, section 3.2).

    Args:
        partition: the token roles.
        share: the share of the context tokens, in (0, 1]; their number is rounded up.
        energy: float32 ``[2]``, to which `select` adds the sums of squares of the selected rows and of all
            (`sparse_unsloth.rows.energy`).
        awaited: the roles are not known before backward, see `learn`.

    Attributes:
        partition, share, energy: the arguments.
        num_context: how many context tokens are selected.
        rows: int64 ``[n]``, the selected rows; None before `select`.
    """

    def __init__(self, partition: TokenPartition, share: float, energy: Tensor | None = None, awaited: bool = False):
        self.share, self.energy = share, energy
        self.rows: Tensor | None = None
        self.learn(partition)
        self._awaited = awaited

    def learn(self, partition: TokenPartition) -> None:
        """Selects by these roles from now on."""
        self.partition, self._awaited = partition, False
        self.num_context = ceil(self.share * len(partition.context))

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

        Raises:
            SparsityError: the roles are still awaited.
        """
        if self._awaited:
            raise SparsityError(
                "Without labels the gradient at the decoder stack's output tells which rows bear loss, and a decoder "
                "layer got one before: the loss reads hidden states of inner layers only. Give labels, or train "
                "dense (sparsity=None)."
            )
        partition = self.partition
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        largest = norms.index_select(0, partition.context).topk(self.num_context, sorted=False).indices
        self.rows = torch.cat((partition.dense, partition.context.index_select(0, largest)))
        if self.energy is not None:
            held = norms.index_select(0, self.rows)
            self.energy.add_(torch.stack((held.dot(held), norms.dot(norms))))
        return self.rows
