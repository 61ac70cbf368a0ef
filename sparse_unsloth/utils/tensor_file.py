"""Reads and writes safetensors files with a checksum, atomically."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_unsloth.errors import EstimatorError

CHECKSUM = "content_sha256"


class DamagedFileError(EstimatorError):
    """The file is truncated, altered, or no tensor file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with a checksum of its tensors and metadata, atomically.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata, without the checksum, of a file of `write_tensors`.

    Raises:
        DamagedFileError: the file is truncated or altered, or no safetensors file.
        EstimatorError: the file is intact, but `write_tensors` did not write it.
    """
    tensors, metadata = read_unchecked(path)
    expected = metadata.pop(CHECKSUM, None)
    if expected is None:
        raise EstimatorError(
            f"{path} is a safetensors file, but no estimator of this package, so it is not overwritten. Point "
            "estimator.path to another file."
        )
    if _checksum(tensors, metadata) != expected:
        raise DamagedFileError(
            f"{path} is damaged: its contents do not match their checksum. Delete it, and it is built again."
        )
    return tensors, metadata


def read_unchecked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file.

    Raises:
        DamagedFileError: the file is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path} is damaged or no safetensors file ({error}). Delete it, and it is built again."
        ) from None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of the values of ``tensor``, in row-major order."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
