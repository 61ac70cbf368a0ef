"""Loads the model that a benchmark trains, through this package or as Unsloth alone loads it."""

from __future__ import annotations

import argparse
import importlib
import time

import torch
from torch import Tensor, nn

from sparse_unsloth.bench.arms import Arm

CHECKPOINTING = {"unsloth": "unsloth", "True": True, "False": False}
"""The value of ``use_gradient_checkpointing`` for each word of the command line."""


def load_model(
    args: argparse.Namespace, backend: str, max_seq_length: int = 2048, checkpointing: bool | str | None = None
) -> nn.Module:
    """Loads the model with adapters that are not zero, nothing attached, ready to train.

    Args:
        args: with ``model``, ``dtype`` ("4bit" or "bf16"), ``rank`` and ``checkpointing``.
        backend: "unsloth" or "peft".
        checkpointing: instead of that of ``args``.
    """
    if backend == "unsloth":
        importlib.import_module("unsloth")  # first, as it asks
    from sparse_unsloth import FastSparseLanguageModel, detach

    checkpointing = CHECKPOINTING[args.checkpointing] if checkpointing is None else checkpointing
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
    print(f"{args.model} loaded for {backend} in {time.perf_counter() - began:.1f} s", flush=True)
    return _ready(model)


def load_arm(args: argparse.Namespace, arm: Arm, max_seq_length: int) -> nn.Module:
    """Loads the model of an arm, with adapters that are not zero; Unsloth's arms without this package.

    Args:
        args: with ``model``, ``dtype`` and ``rank``.
    """
    checkpointing = {"use_gradient_checkpointing": arm.lora.get("use_gradient_checkpointing", "unsloth")}
    if arm.backend == "peft":
        model = load_model(args, "peft", max_seq_length, *checkpointing.values())
        if arm.liger:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(model, None)
        return model
    from unsloth import FastLanguageModel

    began = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=max_seq_length,
        dtype=torch.bfloat16,
        load_in_4bit=args.dtype == "4bit",
        **checkpointing,
    )
    model = FastLanguageModel.get_peft_model(model, r=args.rank, lora_alpha=args.rank, **{**checkpointing, **arm.lora})
    print(f"{args.model} loaded by Unsloth alone in {time.perf_counter() - began:.1f} s", flush=True)
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    """Makes ``lora_B`` nonzero: zeros would hide faults in the gradients of ``lora_A``."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def as_collated(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch as the model's trainer collates it: only Unsloth's gives the lengths of documents."""
    if not _is_of_peft(model):
        return batch
    return {name: value for name, value in batch.items() if name != "packed_seq_lengths"}


def _is_of_peft(model: nn.Module) -> bool:
    return model.__dict__.get("_sparse_backend") == "peft"
