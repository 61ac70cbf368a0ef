"""Building, loading or calibrating the estimator of an attached model, as soon as that can be done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_unsloth.distributed import has_group, is_main, world_size
from sparse_unsloth.estimates import Estimator
from sparse_unsloth.estimator import obtain_estimator
from sparse_unsloth.sharing import shared_estimator

if TYPE_CHECKING:
    from sparse_unsloth.runtime import SparsityState


def prepare(state: SparsityState, samples: list[Mapping[str, Any]] | None, last_chance: bool = False) -> None:
    """Builds, loads or calibrates the estimator if that can be done now.

    Args:
        samples: batches as the model receives them, or None.
        last_chance: without samples, fall back to what needs none (kind "auto") instead of waiting for them.

    Raises:
        EstimatorError: the estimator cannot be had (see `obtain_estimator`).
    """
    if state.selector is not None or state.by_rows or not state.runtimes:
        return
    if state.config.criterion != "estimator":
        state.use(None)
    elif last_chance or is_main():  # rank 0 makes it once for all, see `begin_training`
        estimator = _obtain(state, samples, wait=not last_chance)
        if estimator is not None:
            state.use(estimator)


def _obtain(state: SparsityState, samples: list[Mapping[str, Any]] | None, wait: bool) -> Estimator | None:
    return obtain_estimator(
        state.model,
        state.layers,
        state.layer_sparsity,
        state.config.estimator,
        samples=samples,
        wait=wait,
        dense_tokens=state.config.dense_tokens,
        seed=state.config.seed,
    )


def prepare_for_all(state: SparsityState, train_dataset, collate_fn) -> None:
    """`prepare`, once for all processes."""
    if state.by_rows:
        return
    if world_size() == 1 or not has_group() or state.config.criterion != "estimator":
        if state.selector is None:
            prepare(state, _samples_of(state, train_dataset, collate_fn), last_chance=True)
        return
    if state.shared:
        return
    state.use(
        shared_estimator(
            state.layers,
            state.layer_sparsity,
            state.estimator,
            lambda: _samples_of(state, train_dataset, collate_fn),
            lambda samples: _obtain(state, samples, wait=False),
        )
    )
    state.shared = True


def _samples_of(state: SparsityState, train_dataset, collate_fn) -> list[Mapping[str, Any]] | None:
    """Batches of the first samples of the trainer's data set, or None where it has none to give."""
    count = state.config.estimator.calibration_samples
    if train_dataset is None or collate_fn is None or count == 0:
        return None
    rows = []
    for row in train_dataset:
        rows.append(row)
        if len(rows) == count:
            break
    size = 8
    return [collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)] or None
