"""Runs a step in which every decoder layer starts from what another step gave it, so that its own error shows.

Errors grow over the layers: in a random Llama-3-8B the gradients of bf16 are 12 % of their norm from float32's, a
hundred times bf16's rounding, and those of FP8, which rounds thirty times as much, have no digit in common with it.
Within one layer the errors of its products add up and grow no further.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparse_unsloth.model.decoder_layer import find_layers, first_tensor


class Streams:
    """What a step gave to each decoder layer, by the layer's index.

    Attributes:
        inputs: the residual stream before the layer, ``[batch, length, hidden_size]``.
        gradients: the loss's gradient of the layer's output, of the same shape.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Notes them in one step of the model."""
        with self._hooked(model, forced=False):
            yield

    @contextlib.contextmanager
    def forced(self, model: nn.Module) -> Iterator[None]:
        """Gives them to the layers in one step of the model, whatever came out of the other layers."""
        with self._hooked(model, forced=True):
            yield

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module, forced: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer in find_layers(model):
                before, after = self._hooks(layer.index, forced)
                module = layer.module
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            yield

    def _hooks(self, index: int, forced: bool) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if not forced:
                self.inputs[index] = hidden_states.detach().clone()
                return None
            replaced = self.inputs[index] + (hidden_states - hidden_states.detach())  # the gradient flows on
            if args:
                return (replaced, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": replaced}

        def note(gradient: Tensor) -> Tensor | None:
            if forced:
                return self.gradients[index]
            self.gradients[index] = gradient.detach().clone()
            return None

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor.requires_grad:
                tensor.register_hook(note)

        return before, after
