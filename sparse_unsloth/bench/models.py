"""The model that a benchmark trains: loaded once for runs that can share it."""

from __future__ import annotations

import argparse
import gc
import importlib
import time

import torch
from torch import nn

CHECKPOINTING = {"unsloth": "unsloth", "True": True, "False": False}
"""What ``use_gradient_checkpointing`` is given, by the word of the command line."""


class Models:
    """One loaded model at a time, with adapters that are not zero, nothing attached, ready to train.

    Args:
        backend: "unsloth" or "peft".
        max_seq_length: of the longest shape.
    """

    def __init__(self, backend: str, max_seq_length: int):
        self.backend, self.max_seq_length = backend, max_seq_length
        self._model: nn.Module | None = None
        self._weights: tuple | None = None
        self._checkpointing: str | None = None

    def get(self, args: argparse.Namespace) -> nn.Module:
        """The model of these words; the one before it, if that differs in its checkpointing being off at most."""
        from sparse_unsloth import FastSparseLanguageModel

        weights = args.model, args.dtype, args.rank
        if self._weights != weights or args.checkpointing not in (self._checkpointing, "False"):
            self.drop()
            self._model = load_model(args, self.backend, self.max_seq_length)
            self._weights, self._checkpointing = weights, args.checkpointing
        return FastSparseLanguageModel.for_training(self._model, CHECKPOINTING[args.checkpointing])

    def drop(self) -> None:
        """Frees the model's memory; nobody else may hold it."""
        self._model = self._weights = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_model(args: argparse.Namespace, backend: str, max_seq_length: int = 2048) -> nn.Module:
    """The model with adapters that are not zero, nothing attached, ready to train.

    Args:
        args: with ``model``, ``dtype`` ("4bit" or "bf16"), ``rank`` and ``checkpointing``.
        backend: "unsloth" or "peft".
    """
    if backend == "unsloth":
        importlib.import_module("unsloth")  # first, as it asks
    from sparse_unsloth import FastSparseLanguageModel, detach

    checkpointing = CHECKPOINTING[args.checkpointing]
    began = time.perf_counter()
    model, _ = FastSparseLanguageModel.from_pretrained(
        args.model,
        max_seq_length=max_seq_length,
        dtype=torch.bfloat16,
        load_in_4bit=args.dtype == "4bit",
        backend=backend,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=args.rank, use_gradient_checkpointing=checkpointing, sparsity="dense"
    )
    detach(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, it would hide faults of the gradients of lora_A
            nn.init.normal_(parameter, std=0.02)
    print(f"{args.model} loaded for {backend} in {time.perf_counter() - began:.1f} s", flush=True)
    return model.train()
