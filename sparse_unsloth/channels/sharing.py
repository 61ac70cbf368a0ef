"""Shares one estimator among all ranks: rank 0 loads, builds or calibrates it, and all hold the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import nn

from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.factors import obtain_estimator
from sparse_unsloth.channels.storage import fingerprint
from sparse_unsloth.config.layer_rules import LayerSparsity, sparse_parts
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.utils.distributed import from_main, has_group, is_sharded, uses_fsdp, world_size

Samples = list[Mapping[str, Any]] | None

BATCH = 8
"""How many samples of the trainer's data set are collated together."""


def obtain_for_all_ranks(
    model: nn.Module,
    layers: list[DecoderLayer],
    layer_sparsity: Sequence[LayerSparsity],
    config: SparsityConfig,
    estimator: Estimator | None,
    dataset: Any,
    collate_fn: Callable[[list], Mapping[str, Any]] | None,
) -> Estimator | None:
    """The estimator for a training, on every rank; None for criteria that need none. Every rank must call this.

    With whole weights (DDP) rank 0 alone calibrates, and the others wait. Sharded weights (FSDP2) are gathered layer by
    layer, so every rank runs the same pass on rank 0's samples. Training itself communicates nothing of this.

    Args:
        model, layers, layer_sparsity: of the attached model.
        estimator: this rank's, or None; rank 0's is used.
        dataset, collate_fn: the trainer's, whose first samples calibrate; None: there are none.

    Raises:
        EstimatorError: see `obtain_estimator`; or the ranks hold different base weights.
    """

    def read() -> Samples:
        count = config.estimator.calibration_samples
        if dataset is None or collate_fn is None or count == 0:
            return None
        rows = list(islice(dataset, count))
        return [collate_fn(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)] or None

    def make(samples: Samples) -> Estimator:
        chosen = {"dense_tokens": config.dense_tokens, "seed": config.seed}
        return obtain_estimator(model, layers, layer_sparsity, config.estimator, samples=samples, **chosen)

    if config.criterion != "estimator":
        return None
    if world_size() == 1 or not has_group():
        return make(read()) if estimator is None else estimator
    sharded = any(is_sharded(layer.module) for layer in layers)
    # accelerate may leave ranks other than 0 without weights until FSDP distributes them
    if not (sharded or uses_fsdp()):
        _check_same_weights(layers, layer_sparsity)
    if from_main(lambda: estimator is not None):
        return from_main(lambda: estimator)
    if sharded:
        samples = from_main(read)
        return from_main(lambda: make(samples), together=True)
    return from_main(lambda: make(read()))


def _check_same_weights(layers: list[DecoderLayer], layer_sparsity: Sequence[LayerSparsity]) -> None:
    digest = hashlib.sha256()
    for index, part in sparse_parts(layer_sparsity):
        digest.update(fingerprint(layers[index], part).encode())
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, digest.hexdigest())
    other = [number for number, found in enumerate(every) if found != every[0]]
    if other:
        raise EstimatorError(
            f"Rank {', '.join(map(str, other))} holds other base weights than rank 0, so they cannot share an "
            "estimator (nor train one model). Load the same checkpoint on every rank, in the same dtype; random "
            "weights need the same seed."
        )
