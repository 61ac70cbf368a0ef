"""Hands the context to decoder layers in models that do not pass keyword arguments on to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.training_flags import in_backward
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext

CHECKPOINTS = "_gradient_checkpointing_func"
"""transformers' attribute of a module that checkpoints itself or its layers: the function that does."""


class Handing:
    """The context of the running forward, for layers that do not get it as an argument.

    What gradient checkpointing runs again gets the context of its own forward: the checkpointing functions of the
    model's modules are wrapped, so that they add it to the arguments of each layer.

    Attributes:
        context: of the running forward; None outside.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._wrapped: dict[nn.Module, Callable] = {}
        self.context: SparseContext | None = None

    def restarts(self) -> bool:
        """Forgets the context of a forward that failed; whether the probe of attaching begins instead."""
        if self.context is not None and self.context.probe:
            return True
        self.context = None
        self._wrap()  # a forward without a context has recomputes, too
        return False

    def begin(self, context: SparseContext) -> dict[str, Any]:
        """Hands ``context`` to the layers from now on; the model needs no argument for it."""
        self.context = context
        if context.probe:  # of others `restarts` has wrapped them
            self._wrap()
        return {}

    def _wrap(self) -> None:
        for module in self._model.modules():
            function = module.__dict__.get(CHECKPOINTS)
            if function is not None and getattr(function, "func", None) is not _checkpointed:
                self._wrapped[module] = function
                module.__dict__[CHECKPOINTS] = partial(_checkpointed, self, function)

    def end(self) -> SparseContext | None:
        """The context of the forward that ends."""
        context, self.context = self.context, None
        return context

    def of_layer(self, name: str) -> SparseContext | None:
        """The context for a layer that runs now without one.

        Raises:
            AttachError: it is a recompute, whose forward is not known.
        """
        if in_backward():
            raise AttachError(
                f"{name}: its model does not pass keyword arguments on to decoder layers, and its gradient "
                "checkpointing is not transformers' own, so its recompute cannot be told from a forward. Use "
                "gradient_checkpointing_enable(), or train without checkpointing, or dense (sparsity=None)."
            )
        return self.context

    def remove(self) -> None:
        """Restores the checkpointing functions."""
        for module, function in self._wrapped.items():
            if getattr(module.__dict__.get(CHECKPOINTS), "func", None) is _checkpointed:
                module.__dict__[CHECKPOINTS] = function
        self._wrapped.clear()


def _checkpointed(handing: Handing, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Runs ``checkpoint``, with the context, if only None, among the arguments of a decoder layer's forward."""
    return checkpoint(partial(function, **{CONTEXT_ARGUMENT: handing.context}), *args)
