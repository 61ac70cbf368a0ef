"""Decides whether Triton kernels or plain PyTorch compute on a tensor."""

from __future__ import annotations

import importlib.util
import os
import warnings

from torch import Tensor

from sparse_unsloth.errors import BackendError

VARIABLE = "SPARSE_UNSLOTH_KERNELS"
"""``auto`` (default): kernels on CUDA tensors; ``torch``: never; ``triton``: always (CPU: TRITON_INTERPRET=1)."""


def use_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels compute on ``tensor``; warns once if they should and Triton is not installed.

    Raises:
        BackendError: the environment variable has an unknown value, or asks for Triton where it is not installed.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise BackendError(f"{VARIABLE}={choice}: it must be auto, torch or triton.")
    if choice == "auto" and tensor.is_cuda and not _triton_installed():
        warnings.warn("Triton is not installed: sparse layers run as plain PyTorch, slower.", stacklevel=2)
        return False
    if choice == "triton" and not _triton_installed():
        raise BackendError(f"{VARIABLE}=triton: Triton is not installed: `pip install triton`.")
    return choice == "triton" or (choice == "auto" and tensor.is_cuda)


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
