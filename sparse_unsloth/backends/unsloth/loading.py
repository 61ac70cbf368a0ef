"""Loads models with Unsloth's own loader, and switches modes. Unsloth is imported only when a model is loaded."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

from sparse_unsloth.utils.saved_adapters import base_of, find_adapter, vocabulary_of

logger = logging.getLogger("sparse_unsloth")

NAME = "unsloth"


def load(
    model_name: str, max_seq_length: int | None, dtype: torch.dtype | None, load_in_4bit: bool, **kwargs: Any
) -> tuple[nn.Module, Any]:
    """Calls ``unsloth.FastLanguageModel.from_pretrained`` with every argument.

    Raises:
        DataError: the adapter that ``model_name`` names is damaged, or its base model was moved.
    """
    adapter = find_adapter(model_name)
    if adapter is not None:
        base, vocabulary = base_of(adapter), vocabulary_of(adapter)
        if vocabulary is not None:
            from transformers import AutoConfig

            hub = {name: kwargs[name] for name in ("token", "trust_remote_code") if name in kwargs}
            if AutoConfig.from_pretrained(base, **hub).get_text_config().vocab_size != vocabulary:
                kwargs.setdefault("resize_model_vocab", vocabulary)
    if "trl" in sys.modules and "unsloth" not in sys.modules:
        logger.warning(
            "TRL was imported before Unsloth, which replaces TRL's trainers when it is imported: trainers that your "
            "script imported already stay TRL's own. Put `import unsloth` at the top of the script."
        )
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        model_name=model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit, **kwargs
    )


def add_lora(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Calls ``unsloth.FastLanguageModel.get_peft_model`` with every argument."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **kwargs)


def for_training(model: nn.Module, use_gradient_checkpointing: bool | str | None = None) -> nn.Module:
    """Sets training mode by Unsloth's own function."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing)
    return model


def for_inference(model: nn.Module) -> nn.Module:
    """Sets evaluation mode by Unsloth's own function, with its fast decoding."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    return model
