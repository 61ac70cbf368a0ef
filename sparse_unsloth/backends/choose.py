"""Chooses the backend that runs a model: Unsloth where it can run, else PEFT."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch

from sparse_unsloth.errors import BackendError
from sparse_unsloth.utils.distributed import is_main, uses_fsdp

BackendName = Literal["auto", "unsloth", "peft"]


def choose_backend(backend: BackendName = "auto") -> ModuleType:
    """The loading module of the chosen backend; with "auto" the choice and its reason are printed.

    Raises:
        BackendError: "unsloth" cannot run here, or the name is unknown.
    """
    name, reason = explain_backend(backend)
    if backend == "auto" and is_main():
        print(f"sparse_unsloth: backend {name} ({reason})")
    return load_backend(name)


def explain_backend(backend: BackendName = "auto") -> tuple[str, str]:
    """``(name, reason)`` of the backend that `choose_backend` chooses, without importing it.

    Raises:
        BackendError: as `choose_backend`.
    """
    if backend not in ("auto", "unsloth", "peft"):
        raise BackendError(f"backend is {backend!r}; it must be 'auto', 'unsloth' or 'peft'.")
    installed = importlib.util.find_spec("unsloth") is not None
    if not torch.cuda.is_available():
        obstacle = "no CUDA GPU"
    elif not installed:
        obstacle = "Unsloth is not installed (`pip install 'sparse-unsloth[unsloth]'`)"
    elif uses_fsdp():
        obstacle = "FSDP shards the weights, which Unsloth's fused functions read whole"
    else:
        obstacle = None
    if backend == "unsloth" and obstacle:
        raise BackendError(f"backend 'unsloth' cannot run: {obstacle}. Use backend='peft', which runs anywhere.")
    if backend == "peft":
        return "peft", "as asked"
    return ("peft", obstacle) if obstacle else ("unsloth", "CUDA GPU and Unsloth found")


def load_backend(name: str) -> ModuleType:
    """The loading module of the backend "unsloth" or "peft"."""
    return importlib.import_module(f"sparse_unsloth.backends.{name}.loading")
