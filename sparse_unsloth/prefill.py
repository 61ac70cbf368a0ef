"""Sparse prefill: generation reads its prompts with as many channels as training gave them.

Training computes prompt tokens on few channels, generation all of them: a model trained sparsely to the end of training
is then used under another forward than it learned under. With sparse prefill the first forward of a generation is
sparse like a training forward: prompt tokens are context, the last one of each prompt is dense, and so is every token
that is decoded. It is off unless asked for (`FastSparseLanguageModel.for_inference`).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_unsloth.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.errors import AttachError, EstimatorError
from sparse_unsloth.partition import TokenPartition, is_sequence_classifier
from sparse_unsloth.weights import read_projection

if TYPE_CHECKING:
    from sparse_unsloth.runtime import SparsityState


def switch(state: SparsityState, on: bool) -> None:
    """Has generations of ``state``'s model read their prompts sparsely from now on, or densely again.

    Raises:
        AttachError: a sparse layer's adapter is merged, disabled or not alone, so its sparse functions cannot run; or
            the model does not generate.
        EstimatorError: the estimator still waits for calibration samples.
    """
    if state.prefill is not None:
        state.prefill.remove()
        state.prefill = None
    if not on:
        return
    model = state.model
    if is_sequence_classifier(model):
        raise AttachError("sparse_prefill is for generation; a sequence classifier has no prompts. Leave it out.")
    if not state.runtimes:
        raise AttachError("sparse_prefill needs layers with sparsity, and the configuration of this model has none.")
    if state.selector is None:
        raise EstimatorError(
            f"sparse_prefill needs the estimator of kind {state.config.estimator.kind!r}, which still waits for "
            "calibration samples. Train first, pass calibration_samples= when attaching, or load an adapter that was "
            "saved with sparse_prefill: true in its sparsity configuration."
        )
    for runtime in state.runtimes.values():
        for name, module in runtime.layer.projections().items():
            if read_projection(module) is None:
                raise AttachError(
                    f"{runtime.layer.name}.{name}: its adapter is merged or disabled, or several are active, so its "
                    "prompts would be computed densely. Generate with one active, unmerged adapter."
                )
    # PEFT's generate() calls the model inside the wrapper.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    state.prefill = inner.register_forward_pre_hook(_Enter(state), with_kwargs=True)


class _Enter:
    """The pre-hook; an object, so that it holds the state without a closure and can be copied with the model."""

    def __init__(self, state: SparsityState):
        self.state = state

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if model.training or CONTEXT_ARGUMENT in kwargs:
            return None
        context = open_prompt(self.state, model, args, kwargs)
        return None if context is None else (args, {**kwargs, CONTEXT_ARGUMENT: context})


def open_prompt(state: SparsityState, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> SparseContext | None:
    """The context of a forward that reads prompts into an empty cache; None for every other forward, which is dense."""
    if args:
        kwargs = {**inspect.signature(type(model).forward).bind_partial(model, *args).arguments, **kwargs}
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or tokens.shape[1] < 2 or not kwargs.get("use_cache") or kwargs.get("labels") is not None:
        return None
    if _cached(kwargs.get("past_key_values")):
        return None
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        state.say_once("A prompt came with an attention mask that is not [batch, sequence]; it was read densely.")
        return None
    partition = TokenPartition.from_prompts(mask, state.config.dense_tokens)
    if not len(partition.context):
        return None
    context = SparseContext(partition, scale=1.0)
    context.prompt = True
    return context


def _cached(cache: Any) -> bool:
    """Whether the key-value cache holds tokens; as an object, or as Unsloth's tuples."""
    if cache is None:
        return False
    length = getattr(cache, "get_seq_length", None)
    return bool(length()) if length is not None else len(cache) > 0
