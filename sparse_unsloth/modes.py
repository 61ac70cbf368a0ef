"""Training flags, set for a moment and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_flags(model: nn.Module, training: bool = True) -> Iterator[None]:
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
