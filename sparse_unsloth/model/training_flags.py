"""The mode that a forward runs in: training flags, set for a moment and put back; inside a backward pass or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

NO_GRAPH_TASK = -1


@contextmanager
def training_mode(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Every module's ``training`` flag is ``training`` inside, and what it was before afterwards.

    Written directly, without ``train()`` or ``eval()``: Unsloth and some wrappers give those other meanings.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def in_backward() -> bool:
    """Whether this is called from within a backward pass: a forward there is a recompute (gradient checkpointing)."""
    return torch._C._current_graph_task_id() != NO_GRAPH_TASK
