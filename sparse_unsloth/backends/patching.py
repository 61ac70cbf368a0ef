"""Replaces a module's ``forward`` on the instance, restores it, and keeps torch.compile out of both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_unsloth.runtime.state import LayerRuntime

BLOCK_MODE, OFF = "_unsloth_block_mode", 0
"""Unsloth's attribute that switches one decoder layer's compiled region, and its value for the plain forward."""


@functools.cache
def untraced(function: Callable) -> Callable:
    """``function``, excluded from torch.compile, which cannot trace Triton launches and choices by data.

    Cached: one object per function, so that an installed one can be recognised.
    """
    return torch.compiler.disable(function)


class BoundMethod:
    """Binds a function to an instance whose class lacks it; unlike a bound method it can be copied and pickled.

    Python pickles a method by its name in the instance's class, where our functions are not.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable, instance: nn.Module):
        self.__func__, self.__self__ = untraced(function), instance

    def __getstate__(self) -> tuple[Callable, nn.Module]:
        return inspect.unwrap(self.__func__), self.__self__  # a wrapped function cannot be found by its name

    def __setstate__(self, state: tuple[Callable, nn.Module]) -> None:
        self.__init__(*state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def replace_forward(module: nn.Module, forward: Callable, runtime: LayerRuntime) -> None:
    """Replaces the instance's forward by a bound ``forward``, and keeps the old one; deep copies stay consistent."""
    module.__dict__["_sparse_original"] = module.__dict__.get("forward")
    module.__dict__["_sparse_runtime"] = runtime
    module.forward = BoundMethod(forward, module)
    runtime.state.hooked.append(module)


def restore_forward(module: nn.Module) -> None:
    """Restores the forward that `replace_forward` replaced."""
    original = module.__dict__.pop("_sparse_original")
    module.__dict__.pop("_sparse_runtime")
    module.__dict__.pop("_sparse_projection", None)
    module.__dict__.pop("_sparse_part", None)
    if original is None:
        module.__dict__.pop("forward")
    else:
        module.forward = original


def runs(module: nn.Module, *forwards: Callable) -> bool:
    """Whether `replace_forward` installed one of ``forwards`` on the instance, and it is still there."""
    ours = getattr(module.__dict__.get("forward"), "__func__", None) in map(untraced, forwards)
    return ours and "_sparse_runtime" in module.__dict__


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that `replace_forward` replaced."""
    original = module.__dict__["_sparse_original"]
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)


def plain_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward of a decoder layer's class, without Unsloth's compiling wrapper."""
    forward = type(layer).forward
    while (wrapped := getattr(forward, "_unsloth_block_original", None)) is not None:
        forward = wrapped
    return forward(layer, *args, **kwargs)


class Uncompiled:
    """Excludes one decoder layer from Unsloth's compiled regions until `remove`.

    Unsloth (2026.10.8 and later) compiles the forward of a decoder layer's class, and reads this switch of each
    instance. Other versions ignore it.
    """

    def __init__(self, layer: nn.Module):
        self._layer, self._before = layer, layer.__dict__.get(BLOCK_MODE)
        layer.__dict__[BLOCK_MODE] = OFF

    def remove(self) -> None:
        """Restores the switch; may be called more than once."""
        if self._before is None:
            self._layer.__dict__.pop(BLOCK_MODE, None)
        else:
            self._layer.__dict__[BLOCK_MODE] = self._before
