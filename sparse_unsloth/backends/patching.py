"""Replaces a module's ``forward`` on the instance, keeps the one before, and keeps torch.compile out of both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_unsloth.runtime.state import LayerRuntime

BLOCK_MODE, OFF = "_unsloth_block_mode", 0
"""Unsloth's switch of one decoder layer's compiled region, and its value for "the plain forward"."""


@functools.cache
def untraced(function: Callable) -> Callable:
    """``function``, which torch.compile leaves alone: Triton launches and choices by data cannot be traced.

    The same object for the same function, so that it can be recognised where it was installed.
    """
    return torch.compiler.disable(function)


class BoundMethod:
    """A function of a module's file, bound to an instance whose class does not have it; it can be copied and pickled.

    Python pickles a method by its name in the instance's class, so what is loaded would not find ours there.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable, instance: nn.Module):
        self.__func__, self.__self__ = untraced(function), instance

    def __getstate__(self) -> tuple[Callable, nn.Module]:
        return inspect.unwrap(self.__func__), self.__self__  # a wrapped function would not be found by its name

    def __setstate__(self, state: tuple[Callable, nn.Module]) -> None:
        self.__init__(*state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def replace_forward(module: nn.Module, forward: Callable, runtime: LayerRuntime) -> None:
    """Puts a bound ``forward`` on the instance, keeps what was there; a deep copy of the module stays consistent."""
    module.__dict__["_sparse_original"] = module.__dict__.get("forward")
    module.__dict__["_sparse_runtime"] = runtime
    module.forward = BoundMethod(forward, module)
    runtime.state.hooked.append(module)


def restore_forward(module: nn.Module) -> None:
    """Gives ``module`` the forward back that `replace_forward` replaced."""
    original = module.__dict__.pop("_sparse_original")
    module.__dict__.pop("_sparse_runtime")
    module.__dict__.pop("_sparse_projection", None)
    if original is None:
        module.__dict__.pop("forward")
    else:
        module.forward = original


def runs(module: nn.Module, *forwards: Callable) -> bool:
    """Whether one of ``forwards`` stands on the instance, as `replace_forward` put it there."""
    ours = getattr(module.__dict__.get("forward"), "__func__", None) in map(untraced, forwards)
    return ours and "_sparse_runtime" in module.__dict__


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that was there before."""
    original = module.__dict__["_sparse_original"]
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)


def plain_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward of a decoder layer's class, beneath what compiles it."""
    forward = type(layer).forward
    while (beneath := getattr(forward, "_unsloth_block_original", None)) is not None:
        forward = beneath
    return forward(layer, *args, **kwargs)


class Uncompiled:
    """Keeps one decoder layer out of Unsloth's compiled regions, by Unsloth's own switch, until `remove`.

    Unsloth (2026.10.8 and later) compiles the forward of a decoder layer's *class*, and reads the switch of each
    instance; without such an Unsloth nothing reads it.
    """

    def __init__(self, layer: nn.Module):
        self._layer, self._before = layer, layer.__dict__.get(BLOCK_MODE)
        layer.__dict__[BLOCK_MODE] = OFF

    def remove(self) -> None:
        """Sets the switch back; may be called again."""
        if self._before is None:
            self._layer.__dict__.pop(BLOCK_MODE, None)
        else:
            self._layer.__dict__[BLOCK_MODE] = self._before
