"""Chooses the rows that a backward pass goes through: dense rows, and the context rows of largest gradient."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sparse_unsloth.tokens.partition import TokenPartition


class RowChoice:
    """The rows of one layer in one backward pass: all dense rows, and a share of the context rows.

    Args:
        partition: the roles of the rows.
        share: of the context rows, in (0, 1]; rounded up.
    """

    def __init__(self, partition: TokenPartition, share: float):
        self._partition = partition
        self.num_context = ceil(share * len(partition.context))
        self.rows: Tensor | None = None

    def alone(self) -> TokenPartition:
        """The partition of the chosen rows by themselves, all of them dense; every layer of a forward has the same."""
        count = len(self._partition.dense) + self.num_context
        rows = torch.arange(count, device=self._partition.dense.device)
        return TokenPartition((1, count), rows, rows[:0], rows[:0], rows)

    def choose(self, gradient: Tensor) -> Tensor:
        """int64 ``[n]``: dense rows, then the context rows where ``gradient [M, width]`` is largest, in L2 norm.

        They hold for the rest of the layer's backward pass (`rows`). No host sync.
        """
        partition = self._partition
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        largest = norms.index_select(0, partition.context).topk(self.num_context, sorted=False).indices
        self.rows = torch.cat((partition.dense, partition.context.index_select(0, largest)))
        return self.rows
