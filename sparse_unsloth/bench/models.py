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
MOST_LEFT = 1.0
"""GiB: buffers that Unsloth keeps for all models."""


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
        self._loaded_with = self._now = None  # checkpointing

    def get(self, args: argparse.Namespace) -> nn.Module | None:
        """The model of these words; the one before it, if that differs in its checkpointing being off at most.

        None if one before it could not be freed, and would be counted in every peak: take another process.
        """
        from sparse_unsloth import FastSparseLanguageModel

        weights = args.model, args.dtype, args.rank
        if self._weights != weights or args.checkpointing not in (self._loaded_with, "False"):
            if self.drop() > MOST_LEFT:
                return None
            self._model = load_model(args, self.backend, self.max_seq_length)
            self._weights, self._loaded_with, self._now = weights, args.checkpointing, args.checkpointing
        if args.checkpointing != self._now:
            self._model = FastSparseLanguageModel.for_training(self._model, CHECKPOINTING[args.checkpointing])
            self._now = args.checkpointing
        return self._model

    def drop(self) -> float:
        """Lets go of the model; what stays allocated, in GiB."""
        used = self._model is not None
        self._model = self._weights = None
        gc.collect()
        if not torch.cuda.is_available():
            return 0.0
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated() / 2**30
        if used:
            print(f"the model was dropped, {left:.2f} GiB stay allocated", flush=True)
        return left


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
