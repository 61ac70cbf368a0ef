"""Sparse prefill: the prompt of a generation is computed as prompts were in training, what is decoded densely.

A model that was trained sparse and is used dense loses more by this difference than by what it did not learn (DESIGN.md
section 2). Here the channels of the prompt's rows are chosen by the training's estimator, from the prompts of the batch
that is generated for; the last token of each prompt stays dense, and so does every token behind it. The keys and values
that the prompt leaves in the cache are those of the sparse forward, as in training.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.channels.factors import name_and_revision
from sparse_unsloth.channels.storage import load_estimator, save_estimator
from sparse_unsloth.errors import EstimatorError, SparsityError
from sparse_unsloth.runtime import forward
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT
from sparse_unsloth.runtime.state import SparsityState

ESTIMATOR_NAME = "sparsity_estimator.safetensors"
"""The file that `save_pretrained` writes beside the adapter, for prompts to be computed sparsely where it is used."""


def switch(state: SparsityState, on: bool) -> None:
    """Turns sparse prefill on, or off again.

    Raises:
        SparsityError: no layer is sparse, or only the backward pass leaves out anything.
        EstimatorError: on, and the estimator is neither there nor stored beside the adapter, or that one does not fit.
    """
    state.end_prefill()
    if not on:
        return
    if not state.runtimes:
        raise SparsityError("sparse_prefill: no layer of this model is sparse, so its prompts cannot be either.")
    if state.row_sparse:
        raise SparsityError(
            "sparse_prefill: with backward_rows every forward is exact, so there is nothing to leave out of prompts. "
            "Generate without it."
        )
    if state.selector is None:
        state.use(_stored_estimator(state))
    state.sparse_prefill = True
    inner = state.model.get_base_model() if hasattr(state.model, "get_base_model") else state.model
    if inner is not state.model:  # whose `generate` calls the model within the adapters' wrapper
        state.prefill_handles += [
            inner.register_forward_pre_hook(partial(_enter_model, state), with_kwargs=True),
            inner.register_forward_hook(partial(_leave_model, state), with_kwargs=True),
        ]


def save_estimator_with_adapter(state: SparsityState, folder: Path) -> None:
    """Writes the estimator beside an adapter; one that is built from the weights alone is not needed there."""
    if state.estimator is None or state.estimator.kind == "svd":
        return
    if any(isinstance(p, DTensor) for layer in state.layers for p in layer.module.parameters()):
        state.warn_once(
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


def _enter_model(state: SparsityState, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    if model.training or CONTEXT_ARGUMENT in kwargs:
        return None
    return forward.enter_forward(state, model, args, kwargs)


def _leave_model(state: SparsityState, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    forward.close_forward(state, kwargs.get(CONTEXT_ARGUMENT))
