"""Sets training flags temporarily, and tells what autograd does now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch import nn

NO_GRAPH_TASK = -1


@contextmanager
def training_mode(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Sets the ``training`` flag of every module, and restores the flags at exit.

    ``train()`` and ``eval()`` are not called: Unsloth and some wrappers give them other meanings.
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
    """Whether a backward pass is running; a forward in it is a recompute (gradient checkpointing)."""
    return torch._C._current_graph_task_id() != NO_GRAPH_TASK


def keeps_graph() -> bool:
    """Whether the backward pass that runs now may be followed by a second one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def checkpoint_hook() -> Callable | None:
    """What packs saved tensors where a function runs, or runs again, inside non-reentrant checkpointing; else None.

    Each checkpoint has its own. PyTorch before 2.8 does not tell: None.
    """
    hooks = _saving_hooks()
    return hooks[0] if hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__ else None


def keeps_saved_tensors() -> bool:
    """Whether what this forward saves stays where it is until its backward.

    Non-reentrant checkpointing and offloading replace it, by hooks. PyTorch before 2.8 does not tell: False.
    """
    known = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    return known and torch.is_grad_enabled() and not in_backward() and _saving_hooks() is None


def _saving_hooks() -> tuple[Callable, Callable] | None:
    """What packs and unpacks saved tensors now."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)
