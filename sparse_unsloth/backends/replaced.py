"""A module's own ``forward``, replaced on the instance and kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from sparse_unsloth.layer_runtime import LayerRuntime


def replace_forward(module: nn.Module, forward: Callable, runtime: LayerRuntime) -> None:
    """Puts a bound ``forward`` on the instance, keeps what was there; a deep copy of the module stays consistent."""
    module.__dict__["_sparse_original"] = module.__dict__.get("forward")
    module.__dict__["_sparse_runtime"] = runtime
    module.forward = MethodType(forward, module)
    runtime.state.hooked.append(module)


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that was there before."""
    original = module.__dict__["_sparse_original"]
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)
