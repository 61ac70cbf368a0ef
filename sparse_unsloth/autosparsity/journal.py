"""Stores measurements, one JSON line each, so that an interrupted calibration can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.channels.storage import fingerprint
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.utils.tensor_file import raw_bytes

SAMPLED_VALUES = 4096


class Journal:
    """Measurements (plain data) by name, each written at once. A later run with the same ``key`` reads them back.

    Args:
        path: the file; None keeps everything in memory.
        key: identifies model, data and settings (`journal_key`). A file with another key is overwritten.
    """

    def __init__(self, path: Path | None, key: str):
        self.path = path
        self._values: dict[str, Any] = {}
        if path is None:
            return
        if path.is_file() and self._read(path, key):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __len__(self) -> int:
        return len(self._values)

    def put(self, name: str, value: Any) -> None:
        self._values[name] = value
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")

    def _read(self, path: Path, key: str) -> bool:
        """Reads the file's values if it has this key, and returns whether it has; removes a truncated last line."""
        whole, lines = "", path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if number == 0 and (not isinstance(entry, dict) or entry.get("key") != key):
                return False
            if number:
                self._values[entry[0]] = entry[1]
            whole += line if line.endswith("\n") else line + "\n"
        if not whole:
            return False
        path.write_text(whole, encoding="utf-8")
        return True


def journal_key(
    model: nn.Module, layers: Iterable[DecoderLayer], batches: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> str:
    """SHA-256 of the weights (sampled, adapters included), of the batches and of ``settings`` (plain data)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for layer in layers:
        for part in ("mlp", "self_attn"):
            digest.update(fingerprint(layer, part).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = parameter.detach().reshape(-1)
            digest.update(name.encode() + raw_bytes(values[:: max(1, len(values) // SAMPLED_VALUES)]))
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            content = raw_bytes(torch.as_tensor(value)) if isinstance(value, Tensor) else repr(value).encode()
            digest.update(f"{name} {getattr(value, 'shape', '')}".encode() + content)
    return digest.hexdigest()
