"""Calibrates every seed by the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Items
from sparse_unsloth.channels.calibration import collect_statistics
from sparse_unsloth.channels.factors import build_estimator
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.config.sparsity import EstimatorConfig
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.tokens.partition import IGNORE_INDEX

FACTOR_RANK = 8
SAMPLES = 32
"""As the library's default; `SAMPLES` calibrate channels."""


@dataclass(frozen=True)
class Calibration:
    """The library's calibration of each layer and seed; fp32 on the device.

    Attributes:
        down: ``[layers, seeds, 2 rank, hidden_size]``; up_gate, up_up: ``[layers, seeds, intermediate_size, rank]``.
        gain: of kind "prior", ``[layers, seeds, intermediate_size]``.
    """

    down: Tensor
    up_gate: Tensor
    up_up: Tensor
    gain: Tensor


def calibrate(model: nn.Module, items: Sequence[Items], count: int = SAMPLES) -> Calibration:
    """Calibrates each seed on its first ``count`` items, with the base model."""
    layers = find_layers(model)
    sparsity = [LayerSparsity(0.5, 0.0)] * len(layers)
    found: dict[str, list[list[Tensor]]] = {}
    device = next(model.parameters()).device
    for own in items:
        statistics = collect_statistics(model, layers, sparsity, _samples(own.first(count)), progress=False)
        config = EstimatorConfig(kind="prior", rank=FACTOR_RANK)
        estimator = build_estimator(layers, sparsity, config, statistics, progress=False)
        of: dict[str, list[Tensor]] = {}
        for index in range(len(layers)):
            estimate = estimator.layers[index]
            gate, up = (estimate.factors[f"mlp.{name}_proj"] for name in ("gate", "up"))
            values = {"down": torch.cat((gate.down, up.down)), "up_gate": gate.up, "up_up": up.up}
            values["gain"] = estimate.gain["mlp"]
            for name, value in values.items():
                of.setdefault(name, []).append(value)
        for name, values in of.items():
            found.setdefault(name, []).append(torch.stack(values))
    return Calibration(**{name: torch.stack(values, dim=1).to(device) for name, values in found.items()})


def _samples(items: Items, size: int = 8) -> list[dict[str, Tensor]]:
    """Makes right-padded batches, as a collator does."""
    batches = []
    for start in range(0, len(items), size):
        lengths, prompts = items.lengths[start : start + size], items.prompts[start : start + size]
        tokens = items.tokens[start : start + size, : lengths.max()]
        at = np.arange(tokens.shape[1])
        real = at < lengths[:, None]
        labels = np.where(real & (at >= prompts[:, None]), tokens, IGNORE_INDEX)
        arrays = {"input_ids": tokens, "attention_mask": real.astype(np.int64), "labels": labels}
        batches.append({name: torch.as_tensor(array) for name, array in arrays.items()})
    return batches
