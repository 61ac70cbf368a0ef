"""Notes the rows that the layers of a trial choose, and repeats them, so that two ways to compute can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_unsloth.rows.choice import RowChoice


class TrialError(Exception):
    """A mode gives wrong results."""


@contextmanager
def noted_rows(noted: list[Tensor]) -> Iterator[list[RowChoice]]:
    """Notes the rows that each layer chooses, in the order of the backward pass; or repeats what was noted.

    Args:
        noted: filled where it is empty, otherwise repeated.

    Yields:
        The choices that were made or repeated, one a layer.

    Raises:
        TrialError: a context row that is left out has a larger gradient than a chosen one.
    """
    choose, repeats = RowChoice.select, bool(noted)
    seen: list[RowChoice] = []

    def select(self: RowChoice, gradient: Tensor) -> Tensor:
        rows = choose(self, gradient)
        if self not in seen:
            seen.append(self)
            if not repeats:
                noted.append(rows)
                _check_choice(self, gradient, rows)
        place = seen.index(self)
        self.rows = noted[place] if place < len(noted) else rows
        return self.rows

    RowChoice.select = select
    try:
        yield seen
    finally:
        RowChoice.select = choose


def _check_choice(choice: RowChoice, gradient: Tensor, rows: Tensor) -> None:
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    context = choice.partition.context
    left = norms[context[~torch.isin(context, rows)]]
    if not torch.isin(choice.partition.dense, rows).all():
        raise TrialError("a loss token is left out")
    if len(left) and not left.max() <= norms[rows[len(rows) - choice.num_context :]].min():
        raise TrialError("a context row that is left out has a larger gradient than a chosen one")
