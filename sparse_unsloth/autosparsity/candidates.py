"""Builds one estimator for every recipe of a search; its factors and energies are valid at any sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_unsloth.autosparsity.probe import Recipe
from sparse_unsloth.channels.calibration import collect_statistics
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.factors import build_estimator
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.model.decoder_layer import DecoderLayer


def fit_estimator(
    model: nn.Module,
    layers: list[DecoderLayer],
    config: SparsityConfig,
    samples: Sequence[Mapping[str, Any]],
    progress: bool = True,
) -> Estimator | None:
    """Calibrates on ``samples`` for every part that ``config`` makes sparse; None for criteria without an estimator.

    Raises:
        EstimatorError: see `collect_statistics` and `build_estimator`.
    """
    if config.criterion != "estimator":
        return None
    settings, sparsity, statistics = config.estimator, config.layer_sparsity(len(layers)), None
    if settings.kind != "svd":
        options = {"dense_tokens": config.dense_tokens, "progress": progress}
        statistics = collect_statistics(model, layers, sparsity, samples, **options)
    return build_estimator(layers, sparsity, settings, statistics, seed=config.seed, progress=progress)


def of_recipe(estimator: Estimator | None, recipe: Recipe) -> Estimator | None:
    """``estimator`` restricted to the recipe's sparse layers."""
    if estimator is None:
        return None
    kept = {index: estimator.layers[index] for index, layer in enumerate(recipe) if any(layer)}
    return Estimator(estimator.kind, estimator.rank, kept)
