"""Predicts whether `cuda_graphs` captures a training's steps, and the padded sizes of captured micro-batches."""

from __future__ import annotations

from dataclasses import replace

from sparse_unsloth.costs.flops import ATTENTION, MLP
from sparse_unsloth.forecast.model import LLAMA_LAYERS, Model
from sparse_unsloth.forecast.tokens import PADDED, MicroBatch
from sparse_unsloth.graphs.buckets import LENGTHS, round_up
from sparse_unsloth.training.recipe import Recipe


def can_capture(recipe: Recipe, model: Model, backend: str) -> bool:
    """Whether every layer would be captured as a whole, with its attention."""
    return (
        backend == "unsloth"
        and not recipe.training.use_cpu
        and model.model_type in LLAMA_LAYERS
        and set(model.lora_targets) >= {*ATTENTION, *MLP}
        and recipe.model.lora_dropout == 0
        and not recipe.model.use_dora
        and recipe.training.gradient_checkpointing
        and recipe.sparsity.exact_removal
    )


def padded_to_bucket(batch: MicroBatch, layout: str) -> MicroBatch:
    """Pads ``batch`` to a length bucket, as captured batches are (`sparse_unsloth.graphs.buckets`)."""
    if layout == PADDED:
        length, rows = max(batch.lengths), len(batch.lengths)
        longer = round_up(length, LENGTHS)
        return replace(batch, padding=batch.padding + rows * (longer - length), lengths=(longer,) * rows)
    extra = round_up(batch.rows, LENGTHS) - batch.rows
    if not extra:
        return batch
    return replace(batch, padding=batch.padding + extra, lengths=(*batch.lengths, extra))
