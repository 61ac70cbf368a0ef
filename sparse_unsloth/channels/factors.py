"""Builds estimators of channel energies from the weights, with or without calibration, and stores them.

The kinds ``svd`` (SparseLoRA section 3.2) and ``prior`` are defined in docs/how-it-works.md, section 4.5. ``prior``
scores a channel by its calibrated energy ``s`` times ``(ĉ / c̄)^½``, where ``ĉ`` is the estimate by whitened factors and
``c̄`` its calibrated mean. Figures behind this choice:

Share of the oracle's energy captured in SmolLM2-135M's MLPs (layers 1-29, batches of 8, 32 calibration samples, rank 8,
shared prompt text left out) at 10 % / 25 % of the channels, other prompts of the calibrated tasks | unseen tasks:
svd .54 / .64 | .47 / .60, whitened .83 / .86 | .67 / .74, static .92 / .94 | .70 / .77, prior .94 / .95 | .72 / .78.
Others: the geometric mean of ``s`` and ``ĉ`` .89 / .92 | .72 / .77, their sum .91 / .93 | .71 / .77, ``s + ĉ - c̄``
.93 / .95 | .70 / .77, exponent 1 .93 / .93 | .70 / .76, exponent ¼ .94 / .95 | .72 / .78.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.channels.calibration import LayerStatistics, Statistics, collect_statistics
from sparse_unsloth.channels.energy import base_weight
from sparse_unsloth.channels.estimator import ENERGIES, FACTORED, Estimator, Factors, LayerEstimate
from sparse_unsloth.channels.storage import load_estimator, save_estimator
from sparse_unsloth.config.layer_rules import LayerSparsity, sparse_parts
from sparse_unsloth.config.sparsity import EstimatorConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.utils.distributed import is_main
from sparse_unsloth.utils.progress import bar
from sparse_unsloth.utils.tensor_file import DamagedFileError

DEFAULT_SEED = 3407


def obtain_estimator(
    model: nn.Module,
    layers: list[DecoderLayer],
    layer_sparsity: Sequence[LayerSparsity],
    config: EstimatorConfig,
    samples: Sequence[Mapping[str, Any]] | None = None,
    wait: bool = False,
    *,
    dense_tokens: str = "output",
    seed: int = DEFAULT_SEED,
    progress: bool = True,
) -> Estimator | None:
    """The estimator of ``config.path`` if that exists, else a new one, written there if a path is given.

    Args:
        model: the outermost model; the calibration pass runs it, densely and without gradients.
        layers: all its decoder layers.
        layer_sparsity: the sparsity of each of them.
        samples: batches as the model receives them, for calibrated kinds.
        wait: for calibrated kinds without samples, return None instead of raising ("auto": instead of using "svd").
        dense_tokens: as in `SparsityConfig`.
        seed: seed of the randomised SVD.
        progress: show a bar on a terminal.

    Raises:
        EstimatorError: the file does not fit the model or the configuration; it is damaged and cannot be built again
            from the arguments (a file that does not end in .safetensors is never overwritten); or the kind needs
            samples and there are none. See also `collect_statistics`.
    """
    path = Path(config.path) if config.path is not None else None
    damage = None
    if path is not None and path.exists():
        try:
            return load_estimator(path, layers, layer_sparsity, config)
        except DamagedFileError as error:
            if path.suffix != ".safetensors":
                raise
            damage = error
    if samples is None and config.kind != "svd":
        if wait:
            return None
        if config.kind == "prior":
            raise damage or _needs_samples(config.kind)
    if damage is not None:
        warnings.warn(f"{damage} It is built again now.", stacklevel=2)
    statistics = None
    if config.kind != "svd" and samples is not None:
        statistics = collect_statistics(
            model, layers, layer_sparsity, samples, dense_tokens=dense_tokens, progress=progress
        )
    estimator = build_estimator(layers, layer_sparsity, config, statistics, seed=seed, progress=progress)
    if path is not None:
        save_estimator(estimator, path, layers, *name_and_revision(model), write=is_main())
    return estimator


@torch.no_grad()
def build_estimator(
    layers: list[DecoderLayer],
    layer_sparsity: Sequence[LayerSparsity],
    config: EstimatorConfig,
    statistics: Statistics | None = None,
    *,
    seed: int = DEFAULT_SEED,
    progress: bool = True,
) -> Estimator:
    """Builds the estimator for every layer with sparsity above 0; kind "auto" is "prior" with statistics, else "svd".

    Factors come from a randomised SVD of the dequantised base weight, in fp32 on the weight's device.

    Raises:
        EstimatorError: the kind needs statistics, or they lack a layer; the rank exceeds a weight's.
    """
    kind = config.kind
    if kind == "auto":
        kind = "svd" if statistics is None else "prior"
        if statistics is None:
            warnings.warn(
                "The estimator falls back to plain SVD, because there are no calibration samples. Calibrated "
                "estimators keep far more (on SmolLM2-135M 0.94 of the oracle's energy against 0.54 at 10 % of the "
                "channels): pass calibration_samples=, or train through a trainer, whose first samples are used.",
                stacklevel=2,
            )
    if kind == "prior" and statistics is None:
        raise _needs_samples(kind)
    parts = sparse_parts(layer_sparsity)
    estimates: dict[int, LayerEstimate] = {}
    for index, part in bar(parts, f"Estimator ({kind})", "part", shown=progress):
        layer, before = layers[index], estimates.get(index, LayerEstimate())
        known = None if kind == "svd" else _statistics_of(statistics, layer, part)
        factors = _factorise(layer, part, config.rank, known, seed)
        energy = {name: known.energy[name] for name in ENERGIES[part]} if kind == "prior" else {}
        gain = _gains(layer, part, config.rank, factors, energy, known) if kind == "prior" else {}
        estimates[index] = LayerEstimate(before.factors | factors, before.energy | energy, before.gain | gain)
    return Estimator(kind, config.rank, estimates)


def _factorise(
    layer: DecoderLayer, part: str, rank: int, statistics: LayerStatistics | None, seed: int
) -> dict[str, Factors]:
    factors = {}
    for name in FACTORED[part]:
        weight = base_weight(layer, name).dense(torch.float32)
        if rank > min(weight.shape):
            raise EstimatorError(
                f"estimator.rank: {rank} exceeds the rank of {layer.name}.{name}, {tuple(weight.shape)}. Set it to "
                f"{min(weight.shape)} at most; 8 is usual."
            )
        left = weight if statistics is None else weight @ statistics.inputs[part].to(weight).t()
        up = _top_left(left, rank, seed)
        factors[name] = Factors((up.t() @ weight).cpu(), up.cpu())
    return factors


def _gains(
    layer: DecoderLayer,
    part: str,
    rank: int,
    factors: Mapping[str, Factors],
    energy: Mapping[str, Tensor],
    statistics: LayerStatistics,
) -> dict[str, Tensor]:
    estimate = Estimator("svd", rank, {layer.index: LayerEstimate(factors)})
    rows = statistics.inputs[part].to(base_weight(layer, FACTORED[part][0]).device, torch.float32)
    if part == "mlp":
        estimated = (estimate._factored_mlp(layer, rows),)
    else:
        estimated = estimate._factored_attention(layer, rows)
    gains = {}
    for name, value in zip(ENERGIES[part], estimated, strict=True):
        mean = (value / len(rows)).cpu()
        gains[name] = energy[name] / mean.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return gains


def _top_left(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """The top left singular vectors, ``[rows, rank]``, by a seeded randomised SVD; global generators stay unchanged."""
    cuda = [matrix.device.index] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[cuda[0]].manual_seed(seed)
        left, _, _ = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    if left.shape[1] < rank:
        left = nn.functional.pad(left, (0, rank - left.shape[1]))
    return left[:, :rank].contiguous()


def _statistics_of(statistics: Statistics, layer: DecoderLayer, part: str) -> LayerStatistics:
    known = statistics.layers.get(layer.index)
    if known is None or ENERGIES[part][0] not in known.energy or part not in known.inputs:
        raise EstimatorError(
            f"The calibration statistics lack what is needed for {layer.name}.{part}. Collect them again for this "
            "configuration."
        )
    return known


def _needs_samples(kind: str) -> EstimatorError:
    return EstimatorError(
        f"estimator.kind: {kind!r} is calibrated, and there are no calibration samples. Pass calibration_samples= "
        "(batches as the model receives them), or train through a trainer, whose first samples are used; or set "
        "estimator.kind: svd, which needs none."
    )


def name_and_revision(model: nn.Module) -> tuple[str, str]:
    """The name and revision of the base model, "" where unknown; stored with an estimator for error messages."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or ""), str(getattr(config, "_commit_hash", "") or "")
