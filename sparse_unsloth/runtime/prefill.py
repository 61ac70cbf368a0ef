"""Computes the prompts of a generation by the masked forward, as in training, and decoded tokens densely.

This avoids the train/inference mismatch of channel sparsity (docs/how-it-works.md, section 10). The training's
estimator selects channels from the prompts of the generation's batch. The last token of each prompt stays dense. The
prompt's keys and values in the cache are those of the masked forward.
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
"""The file that `save_pretrained` writes beside the adapter, which sparse prefill reads."""


def switch(state: SparsityState, on: bool) -> None:
    """Turns sparse prefill on or off.

    Raises:
        SparsityError: no layer is sparse, or the model is row-sparse, whose forward is exact.
        EstimatorError: there is no estimator yet, and none beside the adapter, or that one does not fit.
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
    if inner is not state.model:  # its `generate` calls the inner model, not the wrapper
        state.prefill_handles += [
            inner.register_forward_pre_hook(partial(_enter_model, state), with_kwargs=True),
            inner.register_forward_hook(partial(_leave_model, state), with_kwargs=True),
        ]


def save_estimator_with_adapter(state: SparsityState, folder: Path) -> None:
    """Writes the estimator beside an adapter, unless it is built from the weights alone (kind "svd")."""
    if state.estimator is None or state.estimator.kind == "svd":
        return
    if any(isinstance(p, DTensor) for layer in state.layers for p in layer.module.parameters()):
        state.warn_once(
            "The weights are sharded over several GPUs, so the estimator is not written beside the adapter, where "
            "sparse prefill would read it. Set estimator.path to keep it."
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
