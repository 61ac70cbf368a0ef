"""One estimator for every recipe that a search may try: its factors and energies hold at any sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_unsloth.autosparsity.probe import Recipe
from sparse_unsloth.calibration import collect_statistics
from sparse_unsloth.config import LayerSparsity, SparsityConfig
from sparse_unsloth.estimates import Estimator
from sparse_unsloth.estimator import build_estimator
from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.layers import DecoderLayer


@dataclass(frozen=True)
class CandidateEstimators:
    """An estimator for all candidate parts, and the compensation of each layer at each MLP sparsity.

    ``estimator`` is None for criteria without one, ``stand_ins`` empty without compensation.
    """

    estimator: Estimator | None
    stand_ins: Mapping[tuple[int, float], Compensation]

    def final(self, recipe: Recipe) -> Estimator | None:
        """The estimator of the recipe's sparse layers, with the compensation of their sparsity."""
        if self.estimator is None:
            return None
        sparsity = {index: layer.mlp for index, layer in enumerate(recipe) if layer.mlp and self.stand_ins}
        return Estimator(
            self.estimator.kind,
            self.estimator.rank,
            {index: self.estimator.layers[index] for index, layer in enumerate(recipe) if any(layer)},
            {index: self.stand_ins[index, value] for index, value in sparsity.items()},
            sparsity,
        )


def fit_estimators(
    model: nn.Module,
    layers: list[DecoderLayer],
    config: SparsityConfig,
    mlp_levels: Sequence[float],
    samples: Sequence[Mapping[str, Any]],
    progress: bool = True,
) -> CandidateEstimators:
    """Calibrates on ``samples`` for every part that ``config`` makes sparse.

    Compensation depends on what is dropped, so it takes a pass for each of ``mlp_levels``.

    Raises:
        EstimatorError: see `collect_statistics` and `build_estimator`.
    """
    if config.criterion != "estimator":
        return CandidateEstimators(None, {})
    options = {"dense_tokens": config.dense_tokens, "progress": progress}
    settings, sparsity = config.estimator, config.layer_sparsity(len(layers))
    if not settings.compensation_rank or not mlp_levels:
        statistics = None
        if settings.kind != "svd":
            inputs = settings.kind != "static"
            statistics = collect_statistics(model, layers, sparsity, samples, inputs=inputs, **options)
        return CandidateEstimators(
            build_estimator(layers, sparsity, settings, statistics, seed=config.seed, progress=progress), {}
        )
    estimator, stand_ins = None, {}
    for level in mlp_levels:
        at_level = [LayerSparsity(level, layer.self_attn) for layer in sparsity]
        statistics = collect_statistics(model, layers, at_level, samples, inputs=False, dropped=True, **options)
        estimator = build_estimator(layers, at_level, settings, statistics, seed=config.seed, progress=progress)
        stand_ins |= {(index, level): part for index, part in estimator.compensation.items()}
    estimator.compensation = {}
    return CandidateEstimators(estimator, stand_ins)
