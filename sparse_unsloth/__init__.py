"""Faster LoRA and QLoRA fine-tuning by contextual sparsity, as a plugin for Unsloth, TRL and PEFT.

The names below are loaded when first used: importing this package imports neither transformers nor Unsloth.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_unsloth.attachment import attach, detach, get_state
    from sparse_unsloth.autosparsity.search import calibrate
    from sparse_unsloth.callback import SparsityCallback
    from sparse_unsloth.config.sparsity import SparsityConfig
    from sparse_unsloth.language_model import FastSparseLanguageModel

__version__ = "0.1.0"

_HOMES = {
    "FastSparseLanguageModel": "language_model",
    "SparsityCallback": "callback",
    "SparsityConfig": "config.sparsity",
    "attach": "attachment",
    "calibrate": "autosparsity.search",
    "detach": "attachment",
    "get_state": "attachment",
}
__all__ = [
    "FastSparseLanguageModel",
    "SparsityCallback",
    "SparsityConfig",
    "attach",
    "calibrate",
    "detach",
    "get_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
