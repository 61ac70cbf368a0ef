"""Estimators in files: saving, loading, what ties them to a model's weights, and the older published format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_unsloth.channels.energy import base_weight
from sparse_unsloth.channels.estimator import FACTORED, Estimator, Factors, LayerEstimate, shorten
from sparse_unsloth.config.layer_rules import LayerSparsity, sparse_parts
from sparse_unsloth.config.removed import REMOVED
from sparse_unsloth.config.sparsity import EstimatorConfig
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.model.decoder_layer import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.utils.environment import version_of
from sparse_unsloth.utils.tensor_file import DamagedFileError, raw_bytes, read_tensors, read_unchecked, write_tensors

SAMPLED_VALUES = 4096
_FORMAT, _VERSION = "sparse_unsloth.channels.factors", "1"
_PUBLISHED_KEY = re.compile(r"(\d+)\.(?:mlp\.|self_attn\.)?(gate_proj|up_proj|q_proj|k_proj|v_proj)\.(w1|w2)$")


def save_estimator(
    estimator: Estimator,
    path: str | Path,
    layers: list[DecoderLayer],
    model_name: str = "",
    revision: str = "",
    write: bool = True,
) -> None:
    """Writes one safetensors file, at once or not at all, with what `load_estimator` checks in its metadata.

    Args:
        model_name, revision: told to whoever loads the file for another model; ``layers`` identify the weights.
        write: False on the other ranks of a sharded model, which only take part in gathering its weights.

    Raises:
        OSError: the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    for index, estimate in estimator.layers.items():
        for name, factors in estimate.factors.items():
            tensors[f"{index}.{name}.down"], tensors[f"{index}.{name}.up"] = factors
        for what in ("energy", "gain"):
            tensors |= {f"{index}.{what}.{name}": vector for name, vector in getattr(estimate, what).items()}
        fingerprints |= {
            f"{index}.{part}": fingerprint(layers[index], part) for part in FACTORED if estimator.covers(index, part)
        }
    metadata = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "kind": estimator.kind,
        "rank": str(estimator.rank),
        "model_name": model_name,
        "model_revision": revision,
        "weight_fingerprints": json.dumps(fingerprints),
        "versions": json.dumps(
            {name: version_of(name) or "unknown" for name in ("sparse-unsloth", "torch", "safetensors")}
        ),
    }
    if write:
        write_tensors(Path(path), tensors, metadata)


def load_estimator(
    path: str | Path, layers: list[DecoderLayer], layer_sparsity: Sequence[LayerSparsity], config: EstimatorConfig
) -> Estimator:
    """Reads what `save_estimator` wrote, or a folder or file in the format published by SparseLoRA's authors.

    Layers that the configuration leaves dense are not read. The published format names no weights, so of it only the
    shapes, rank and layers are checked.

    Raises:
        EstimatorError: no such file; damaged (`DamagedFileError`); made for other weights, or with another kind, rank,
            or fewer layers than the configuration asks for. The message names which, and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise EstimatorError(f"estimator.path: there is no file {path}.")
    if _is_published(path):
        return _load_published(path, layers, layer_sparsity, config)
    if path.is_dir():
        raise EstimatorError(f"{path} is a folder without model.safetensors; estimator.path names a file.")
    tensors, metadata = read_tensors(path)
    if (metadata.get("format"), metadata.get("format_version")) != (_FORMAT, _VERSION):
        raise EstimatorError(
            f"{path} has format {metadata.get('format')!r} version {metadata.get('format_version')!r}, this package "
            f"reads {_FORMAT!r} version {_VERSION!r}. Delete the file, and it is built again."
        )
    kind, rank = metadata["kind"], int(metadata["rank"])
    _check_kind_and_rank(path, kind, rank, config)
    parts = sparse_parts(layer_sparsity)
    estimator = Estimator(kind, rank, _estimates_of(tensors, {index for index, _ in parts}))
    estimator.check_covers(layer_sparsity)
    fingerprints = json.loads(metadata["weight_fingerprints"])
    other = [
        f"{index}.{part}"
        for index, part in parts
        if fingerprints.get(f"{index}.{part}") != fingerprint(layers[index], part)
    ]
    if other:
        name = metadata["model_name"] or "a model without a name"
        revision = f" (revision {metadata['model_revision']})" if metadata["model_revision"] else ""
        raise EstimatorError(
            f"{path} was made from the weights of {name}{revision}; the fingerprints of {shorten(other)} differ from "
            "this model's. It is another model, revision, dtype or quantisation, or its adapter is merged. Point "
            "estimator.path to another file, or delete this one, and it is built again."
        )
    return estimator


def fingerprint(layer: DecoderLayer, part: str) -> str:
    """SHA-256 over shapes, types and an even sample of the stored values of a layer's ``part`` ("mlp", "self_attn").

    The same on every device; LoRA branches play no part.
    """
    digest = hashlib.sha256()
    for projection in MLP_PROJECTIONS if part == "mlp" else ATTENTION_PROJECTIONS:
        base = base_weight(layer, f"{part}.{projection}")
        stored = [base.weight.detach().reshape(-1)]
        kind = str(base.weight.dtype)
        if base.quant_state is not None:
            state = base.quant_state
            kind = f"{state.quant_type} {state.blocksize} {bool(state.nested)}"
            stored = [stored[0].view(torch.uint8), state.absmax, *([state.state2.absmax] if state.nested else [])]
        digest.update(f"{projection} {tuple(base.shape)} {kind}\n".encode())
        for values in stored:
            digest.update(raw_bytes(values[:: max(1, len(values) // SAMPLED_VALUES)]))
    return digest.hexdigest()


def _is_published(path: Path) -> bool:
    """Whether ``path`` holds factors in the format of the SparseLoRA authors' hub repositories.

    That is a folder with `model.safetensors` (and `config.json`), or such a file: every tensor is named
    ``<layer>.<projection>.w1`` or ``.w2``, for one ``model.layers.3.mlp.gate_proj.w1``.
    """
    if path.is_dir():
        return (path / "model.safetensors").is_file()
    with contextlib.suppress(DamagedFileError, OSError):
        tensors, _ = read_unchecked(path)
        return bool(tensors) and all(_PUBLISHED_KEY.search(name) for name in tensors)
    return False


def _read_published(path: Path) -> tuple[dict[tuple[int, str], dict[str, Tensor]], dict]:
    """Factors in the published format: ``{(layer, "mlp.gate_proj"): {"w1": ..., "w2": ...}}``, and its `config.json`.

    Raises:
        DamagedFileError: the tensor file or `config.json` is truncated or altered.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    tensors, _ = read_unchecked(file)
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PUBLISHED_KEY.search(name)
        if match:
            layer, projection, factor = match.groups()
            part = "mlp" if projection in MLP_PROJECTIONS else "self_attn"
            factors.setdefault((int(layer), f"{part}.{projection}"), {})[factor] = tensor
    config_file = file.with_name("config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except ValueError as error:
        raise DamagedFileError(f"{config_file} cannot be read as JSON: {error}. Download it again.") from None
    incomplete = [f"{layer}.{name}" for (layer, name), pair in factors.items() if len(pair) < 2]
    if not factors or incomplete:
        what = f"{incomplete[0]} has only one of w1 and w2" if incomplete else "it holds no <layer>.<projection>.w1"
        raise DamagedFileError(f"{file} is damaged or no estimator: {what}. Download it again.")
    return factors, config


def _estimates_of(tensors: Mapping[str, Tensor], wanted: set[int]) -> dict[int, LayerEstimate]:
    groups: dict[int, dict[str, dict]] = {}
    for name, tensor in tensors.items():
        index, first, second, *rest = name.split(".")
        if int(index) in wanted:
            group = groups.setdefault(int(index), {})
            key, part = (f"{first}.{second}", rest[0]) if rest else (first, second)
            group.setdefault(key, {})[part] = tensor
    estimates = {}
    for index, group in groups.items():
        factors = {name: Factors(**pair) for name, pair in group.items() if "." in name}
        estimates[index] = LayerEstimate(factors, group.get("energy", {}), group.get("gain", {}))
    return estimates


def _load_published(
    path: Path, layers: list[DecoderLayer], layer_sparsity: Sequence[LayerSparsity], config: EstimatorConfig
) -> Estimator:
    pairs, published = _read_published(path)
    ranks, estimates = set(), {}
    for index, part in sparse_parts(layer_sparsity):
        factors = {}
        for name in FACTORED[part]:
            if (index, name) in pairs:
                out_features, in_features = base_weight(layers[index], name).shape
                w1, w2 = pairs[index, name]["w1"].float(), pairs[index, name]["w2"].float()
                down, up = _oriented(path, f"{index}.{name}", w1, w2, in_features, out_features)
                ranks.add(len(down))
                factors[name] = Factors(down, up)
        before = estimates.get(index, LayerEstimate())
        estimates[index] = LayerEstimate(before.factors | factors)
    rank = published.get("predictor_rank") or max(ranks, default=config.rank)
    if ranks - {rank}:
        raise EstimatorError(
            f"{path}: factors of rank {sorted(ranks)}, but config.json says {rank}. Download it again."
        )
    _check_kind_and_rank(path, "svd", rank, config)
    estimator = Estimator("svd", rank, estimates)
    estimator.check_covers(layer_sparsity)
    return estimator


def _oriented(path: Path, name: str, w1: Tensor, w2: Tensor, in_features: int, out_features: int) -> Factors:
    """``w1`` is the input's factor, ``w2`` the output's; which way round each lies is told by its shape."""
    if w1.ndim == w2.ndim == 2 and in_features in w1.shape and out_features in w2.shape:
        down = w1 if w1.shape[1] == in_features else w1.t()
        up = w2 if w2.shape[0] == out_features else w2.t()
        if len(down) == up.shape[1]:
            return Factors(down.contiguous(), up.contiguous())
    raise EstimatorError(
        f"{path}: the factors of {name} are {list(w1.shape)} and {list(w2.shape)}, which do not fit this model's "
        f"weight [{out_features}, {in_features}]. They were made for another model."
    )


def _check_kind_and_rank(path: Path, kind: str, rank: int, config: EstimatorConfig) -> None:
    if kind in REMOVED["estimator.kind"].values:
        raise EstimatorError(
            f"{path} holds an estimator of kind {kind!r}. {REMOVED['estimator.kind'].was}, and point estimator.path to "
            "another file, or delete this one: it is built again."
        )
    cure = "or point estimator.path to another file; delete this one, and it is built again"
    if config.kind not in ("auto", kind):
        raise EstimatorError(
            f"{path} holds an estimator of kind {kind!r}, but the configuration asks for {config.kind!r}. Set "
            f"estimator.kind: {kind}, {cure}."
        )
    if config.rank != rank:
        raise EstimatorError(
            f"{path} holds factors of rank {rank}, but the configuration asks for {config.rank}. Set estimator.rank: "
            f"{rank}, {cure}."
        )
