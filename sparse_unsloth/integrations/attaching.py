"""Attaches a model that a front end has loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_unsloth.attachment import attach
from sparse_unsloth.errors import AttachError
from sparse_unsloth.utils.distributed import is_main

KEY = "sparse_unsloth"
"""The key of a front end's configuration; it takes what ``sparsity`` of a recipe takes, and is "auto" by default."""


def attach_adapters(model: nn.Module, sparsity: Any, fix: str) -> None:
    """Attaches a model whose adapters train, and prints the report; one that does not train stays as it is.

    Args:
        model: as it goes to the trainer.
        sparsity: see `attach`.
        fix: what makes the front end train adapters, a sentence for the error.

    Raises:
        AttachError: the model trains without adapters, or see `attach`.
        ConfigError, EstimatorError: see `attach`.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    if not hasattr(model, "peft_config"):
        raise AttachError(f"{KEY} speeds up LoRA training, and this model trains without adapters. {fix}")
    report = attach(model, sparsity)
    if is_main():
        print(report)
