"""Keeps the choices that a module makes for each row, such as its router's experts, for the passes that follow.

A router that computes some rows again may rank nearly equal experts otherwise, as products of other shapes round
otherwise. Backward would then differentiate another function than forward computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_unsloth.errors import SparsityError

WITH_VALUES = {torch.topk, Tensor.topk, torch.max, Tensor.max, torch.sort, Tensor.sort}
INDICES_ALONE = {torch.argmax, Tensor.argmax, torch.argsort, Tensor.argsort}


class KeptChoices(TorchFunctionMode):
    """Records the indices that ``topk``, ``max``, ``sort`` and their like choose, or repeats recorded ones.

    Only choices among floating-point values along the last dimension are meant. Values are gathered at the repeated
    indices, with their gradient.

    Args:
        kept: int64 ``[num_rows, ...]`` each, in order of the calls; an empty list is filled, another one is repeated.
        num_rows: of the module's input in the first pass.
        rows: int64 ``[n]``, those of the present pass; None for all.

    Raises:
        SparsityError: on entering a function that chooses among rows, or makes other choices than in the first pass.
    """

    def __init__(self, kept: list[Tensor], num_rows: int, rows: Tensor | None = None):
        super().__init__()
        self._kept, self._num_rows, self._rows = kept, num_rows, rows
        self._repeats, self._place = bool(kept), 0

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in WITH_VALUES:
            indices = None if isinstance(result, Tensor) else result[1]
        else:
            indices = result if function in INDICES_ALONE else None
        source = args[0] if args else None
        if indices is None or not (isinstance(source, Tensor) and source.is_floating_point()):
            return result
        if not self._repeats:
            self._kept.append(self._by_row(indices, source))
            return result
        indices = self._next(indices)
        if function in INDICES_ALONE:
            return indices
        among = indices if indices.ndim == source.ndim else indices[..., None]
        return type(result)((source.gather(-1, among).view(indices.shape), indices))

    def _by_row(self, indices: Tensor, source: Tensor) -> Tensor:
        """``indices`` as ``[num_rows, ...]``."""
        leading = source.shape[:-1]
        for dims in (1, 2) if indices.shape[: len(leading)] == leading else ():
            if indices.shape[:dims].numel() == self._num_rows:
                return indices.flatten(0, dims - 1)
        raise SparsityError(
            f"A choice of shape {list(indices.shape)} is not one for each of {self._num_rows} rows, so it cannot be "
            "kept for the backward pass of chosen rows."
        )

    def _next(self, like: Tensor) -> Tensor:
        if self._place == len(self._kept):
            raise SparsityError("The same rows, computed again, make more choices than in the first pass.")
        kept = self._kept[self._place]
        self._place += 1
        return (kept if self._rows is None else kept.index_select(0, self._rows)).reshape(like.shape)
