"""Reads the ranks of processes (torchrun, accelerate), and shares with all what rank 0 computed.

Training does not communicate through this module: each rank selects channels for its own rows. Only results computed
once before training are shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.errors import SparsityError

Value = TypeVar("Value")


def rank() -> int:
    """This process's number among those launched together; 0 if it is alone."""
    return dist.get_rank() if has_group() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes were launched together."""
    return dist.get_world_size() if has_group() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its host, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process (rank 0) writes files and reports."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Whether accelerate was launched with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def has_group() -> bool:
    """Whether the processes can communicate; a trainer's arguments or accelerate's state set this up."""
    return dist.is_available() and dist.is_initialized()


def from_main(make: Callable[[], Value], together: bool = False) -> Value:
    """The result of ``make`` on rank 0, on every rank; its tensors must be on the CPU.

    Every rank must call it. An error of rank 0 is raised on all ranks, so that none waits for it.

    Args:
        make: called on rank 0 alone, or on every rank with ``together``.
        together: ``make`` takes part in collectives. Results of other ranks are dropped, so that all hold the same.

    Raises:
        SparsityError: ``make`` failed on rank 0; there its own error is raised.
    """
    if not has_group() or dist.get_world_size() == 1:
        return make()
    error, value = None, None
    if together or is_main():
        try:
            value = make()
        except Exception as caught:
            if together and not is_main():
                raise
            error = caught
    message = [(None, value) if error is None else (f"{type(error).__name__}: {error}", None)]
    dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    failure, value = message[0]
    if failure is not None:
        raise SparsityError(f"Rank 0 failed, and rank {rank()} stops with it. {failure}")
    return value


def from_all(value: Value) -> list[Value]:
    """``value`` of every rank, in their order, on every rank. Every rank must call it; its tensors are on the CPU."""
    if not has_group() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards parameters of ``module``."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def is_flattened(module: nn.Module) -> bool:
    """Whether FSDP1 flattened the module's weight: it replaces the parameter by a view, or marks it."""
    return "weight" in module.__dict__ or hasattr(getattr(module, "weight", None), "_fsdp_flattened")


def device_of(module: nn.Module) -> torch.device:
    """The device of the parameters of ``module``."""
    return next(module.parameters()).device
