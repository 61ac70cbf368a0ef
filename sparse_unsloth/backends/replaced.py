"""A module's own ``forward``, replaced on the instance and kept beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from sparse_unsloth.layer_runtime import LayerRuntime


class BoundMethod:
    """A function of a module's file, bound to an instance whose class does not have it; it can be copied and pickled.

    Python pickles a method by its name in the instance's class, so what is loaded would not find ours there.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable, instance: nn.Module):
        self.__func__, self.__self__ = function, instance

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


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that was there before."""
    original = module.__dict__["_sparse_original"]
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)
