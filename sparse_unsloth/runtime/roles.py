"""Tells where the token roles of a training forward come from, and finds them in backward where no labels are given.

Without labels, rows with a gradient at the decoder stack's output bear loss (docs/how-it-works.md, section 2.5).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_unsloth.model.decoder_layer import first_tensor
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import (
    TokenPartition,
    completion_without_loss,
    is_sequence_classifier,
    partition_of,
)

WITHOUT = (
    "A training forward came without labels (label smoothing, compute_loss_func and trainers that compute their loss "
    "from the logits take them away), so"
)

OWN_LOSSES = (
    "row sparsity in DPO fell behind dense training of equal cost on a GPU, for a reason that is not found yet, and in "
    "GRPO gained nothing (benchmarks/results/preferences-notes.md); other losses were not measured."
)


def roles_of(state: SparsityState, batch: Batch) -> TokenPartition:
    """The roles of the tokens; a model without sparse layers only needs to know the loss positions."""
    if not state.runtimes and not is_sequence_classifier(state.model):
        batch = batch.changed(attention_mask=None, position_ids=None, cu_seq_lens_q=None)
    return partition_of(state.model, batch, state.config.dense_tokens, padding_masked=padding_is_masked(state))


def padding_is_masked(state: SparsityState) -> bool:
    """Whether tokens do not attend to padding; Unsloth drops the mask in training."""
    return state.backend.name != "unsloth"


def when_known(state: SparsityState, model: nn.Module, batch: Batch) -> Literal["forward", "backward"] | None:
    """When the roles of a training forward's tokens are known; None: never, and it says why."""
    if batch.labels is None:
        return _without_labels(state, batch)
    if batch.labels.is_meta:
        return None
    if not state.gradients_seen and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        state.warn_once(
            "A training forward came, and no tensor of the model is trained. A saved adapter is loaded for training by "
            "FastSparseLanguageModel.from_pretrained, or PeftModel.from_pretrained(..., is_trainable=True)."
        )
    return "forward"


def _without_labels(state: SparsityState, batch: Batch) -> Literal["forward", "backward"] | None:
    if state.planner is not None:
        state.planner.restore()
    if not state.row_sparse:
        _say_dense(state)
        return None
    reason = _why_not_awaited(state, batch)
    if reason:
        state.warn_once(f"{WITHOUT} its tokens have no roles and it ran dense: {reason}.")
        return None
    if is_sequence_classifier(state.model) and batch.input_ids is not None:
        return "forward"
    if state.graphs is not None and batch.num_completion:
        return "forward"
    uncaptured = "" if state.graphs is None else " CUDA graphs need the roles in forward, so it is not captured."
    state.warn_once(
        f"{WITHOUT} its backward pass tells roles: rows with a gradient at the decoder stack's output bear loss, the "
        f"others are context.{uncaptured} As for quality, {OWN_LOSSES}"
    )
    return "backward"


def _say_dense(state: SparsityState) -> None:
    if not (state.runtimes or state.dense_whole):
        return
    ran = "nothing of it is captured" if state.dense_with_graphs else "it ran dense"
    if state.dense_with_graphs and state.config.fp8:
        ran += " or in FP8"
    elif state.config.fp8:
        ran += ", in bf16"
    state.warn_once(f"{WITHOUT} its tokens have no roles and {ran}.")


def _why_not_awaited(state: SparsityState, batch: Batch) -> str:
    """Why the roles of a row-sparse forward's tokens cannot come from the gradient; "" where they can."""
    if state.auto is not None and "backward_rows" not in state.auto.asked.model_fields_set:
        return "sparsity='auto' leaves out no rows there; choose sparsity='rows' by hand"
    if state.loss_rows.last is None:
        return "something that mixes tokens may follow the last decoder layer, so gradients there do not tell"
    if state.config.precision == "fp8-context":
        return "precision fp8-context needs the roles in forward; fp8 and bf16 do not"
    return "" if batch.inputs is not None else "it came without input_ids and inputs_embeds"


class AwaitedRoles:
    """Finds the roles of a forward's tokens when its backward pass begins.

    Args:
        state: of the model.
        batch: of the forward, with ``input_ids`` or ``inputs_embeds``.
    """

    def __init__(self, state: SparsityState, batch: Batch):
        self._state, self._num_completion = state, batch.num_completion
        self._shape, mask = tuple(batch.inputs.shape[:2]), batch.attention_mask
        self._mask = mask if isinstance(mask, Tensor) and mask.shape == self._shape else None

    def watch(self, context: SparseContext, output: Any) -> None:
        """Makes the gradient of the decoder stack's ``output`` tell the roles of ``context``."""
        output = first_tensor(output)
        if output is None or not output.requires_grad:
            return
        rows = tuple(output.shape[:-1])
        if rows[-2:] == self._shape or rows == (self._shape[0] * self._shape[1],):
            output.register_hook(partial(self._learn, context))

    def _learn(self, context: SparseContext, gradient: Tensor) -> None:
        state, is_first = self._state, context.awaits_roles
        partition = TokenPartition.from_gradient(
            gradient.detach(), self._shape, self._mask, state.config.dense_tokens, padding_is_masked(state)
        )
        context.learn_roles(partition)
        if not is_first:  # a second backward pass through the same forward
            return
        state.counts.add(partition)
        state.counts.sparse_forwards += partition.num_context > 0
        state.context_seen = bool(state.context_seen or partition.num_context)
        if self._num_completion:
            found = completion_without_loss(partition, self._num_completion, self._mask)
            counted = state.counts.completion
            state.counts.completion = found if counted is None else counted + found
