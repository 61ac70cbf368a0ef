"""Sparse prefill: the prompt of a generation is computed as prompts were in training, what is decoded densely.

A model that was trained sparse and is used dense loses more by this difference than by what it did not learn (DESIGN.md
section 2). Here the channels of the prompt's rows are chosen by the training's estimator, from the prompts of the batch
that is generated for; the last token of each prompt stays dense, and so does every token behind it. The keys and values
that the prompt leaves in the cache are those of the sparse forward, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.errors import EstimatorError, SparsityError
from sparse_unsloth.estimator import name_and_revision
from sparse_unsloth.partition import TokenPartition, is_sequence_classifier, partition_of
from sparse_unsloth.storage import load_estimator, save_estimator

if TYPE_CHECKING:
    from sparse_unsloth.runtime import SparsityState

ESTIMATOR_NAME = "sparsity_estimator.safetensors"
"""The file that `save_pretrained` writes beside the adapter, for prompts to be computed sparsely where it is used."""


def switch(state: SparsityState, on: bool) -> None:
    """Turns sparse prefill on, or off again.

    Raises:
        SparsityError: no layer is sparse, or only the backward pass leaves out anything.
        EstimatorError: on, and the estimator is neither there nor stored beside the adapter, or that one does not fit.
    """
    inner = state.model.get_base_model() if hasattr(state.model, "get_base_model") else state.model
    for handle in state.prefill_handles:
        handle.remove()
    state.prefill_handles.clear()
    inner.__dict__.pop("_sparse_prefill_state", None)
    state.sparse_prefill = False
    if not on:
        return
    if not state.runtimes:
        raise SparsityError("sparse_prefill: no layer of this model is sparse, so its prompts cannot be either.")
    if state.by_rows:
        raise SparsityError(
            "sparse_prefill: with backward_rows every forward is exact, so there is nothing to leave out of prompts. "
            "Generate without it."
        )
    if state.selector is None:
        state.use(_stored_estimator(state))
    state.sparse_prefill = True
    if inner is not state.model:  # whose `generate` calls the model within the adapters' wrapper
        inner.__dict__["_sparse_prefill_state"] = state
        state.prefill_handles += [
            inner.register_forward_pre_hook(_enter_model, with_kwargs=True),
            inner.register_forward_hook(_leave_model, with_kwargs=True),
        ]


def open_prefill(state: SparsityState, arguments: Mapping[str, Any]) -> SparseContext | None:
    """The context of a forward outside training, or None where it is dense.

    Sparse are the first forward of a generation that fills a cache (``use_cache=True``, or an empty cache given), a
    forward with labels, which tell the prompts, and every forward of a classifier.
    """
    if not state.sparse_prefill:
        return None
    if is_sequence_classifier(state.model) or arguments.get("labels") is not None:
        partition = partition_of(state.model, arguments, state.config.dense_tokens)
    else:
        partition = _prompts(state, arguments)
    if partition is None or not len(partition.context):
        return None
    context = SparseContext(partition, scale=1.0)
    context.prefill = True
    return context


def close_prefill(state: SparsityState, context: SparseContext) -> None:
    """Says it if parts of the model were dense all the same."""
    missing = state.expected_parts() - context.ran
    if missing:
        state.say_once(
            f"sparse_prefill: {len(missing)} parts ran dense ({state.name_parts(missing)}): their adapter is merged or "
            "disabled, or several are active. Prompts are sparse with one active, unmerged adapter."
        )


def save_estimator_with_adapter(state: SparsityState, folder: Path) -> None:
    """Writes the estimator beside an adapter; one that is built from the weights alone is not needed there."""
    if state.estimator is None or state.estimator.kind == "svd":
        return
    if any(isinstance(p, DTensor) for layer in state.layers for p in layer.module.parameters()):
        state.say_once(
            "The weights are in pieces on several GPUs, so the estimator is not written beside the adapter, where "
            "sparse prefill would read it; estimator.path keeps it."
        )
        return
    save_estimator(state.estimator, folder / ESTIMATOR_NAME, state.layers, *name_and_revision(state.model))


def _stored_estimator(state: SparsityState):
    path = state.adapter_folder and state.adapter_folder / ESTIMATOR_NAME
    if path is None or not path.is_file():
        raise EstimatorError(
            f"sparse_prefill: the estimator of kind {state.config.estimator.kind!r} is not calibrated yet"
            f"{'' if path is None else f', and there is no {path}'}. Train first, or pass calibration_samples= to "
            "attach() or get_peft_model(), or name its file with estimator.path; or generate densely, with "
            "sparse_prefill=False."
        )
    return load_estimator(path, state.layers, state.layer_sparsity, state.config.estimator)


def _prompts(state: SparsityState, arguments: Mapping[str, Any]) -> TokenPartition | None:
    cache = arguments.get("past_key_values")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or tokens.shape[1] < 2 or _is_filled(cache):
        return None
    if cache is None and not arguments.get("use_cache"):
        return None
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        state.say_once(
            "sparse_prefill: a prompt came with an attention mask that is not [batch, sequence] (static caches make "
            "such masks), which does not tell padding, so it ran dense. Generate with a dynamic cache."
        )
        return None
    return TokenPartition.from_prompts(tokens, mask, state.config.dense_tokens)


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    return int(cache.get_seq_length()) > 0 if hasattr(cache, "get_seq_length") else len(cache) > 0


def _enter_model(model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    state: SparsityState = model.__dict__["_sparse_prefill_state"]
    if model.training or CONTEXT_ARGUMENT in kwargs:
        return None
    context = state.open_forward(model, args, kwargs)
    return None if context is None else (args, {**kwargs, CONTEXT_ARGUMENT: context})


def _leave_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    model.__dict__["_sparse_prefill_state"].close_forward(kwargs.get(CONTEXT_ARGUMENT))
