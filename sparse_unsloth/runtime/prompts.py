"""Opens and closes forwards outside training, where prompts may be sparse (docs/how-it-works.md, section 10)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition, is_sequence_classifier, partition_of


def open_prefill(state: SparsityState, batch: Batch) -> SparseContext | None:
    """The context of a forward outside training, or None where it is dense.

    Sparse are the first forward of a generation that fills a cache (``use_cache=True``, or an empty cache given), a
    forward with labels, which tell the prompts, and every forward of a classifier.
    """
    if not state.sparse_prefill:
        return None
    if is_sequence_classifier(state.model) or batch.labels is not None:
        partition = partition_of(state.model, batch, state.config.dense_tokens)
    else:
        partition = _prompts(state, batch)
    if partition is None or not partition.num_context:
        return None
    context = SparseContext(partition, scale=1.0)
    context.prefill = True
    return context


def close_prefill(state: SparsityState, context: SparseContext) -> None:
    """Warns once where parts of the model were dense all the same."""
    missing = state.expected_parts() - context.ran
    if missing:
        state.warn_once(
            f"sparse_prefill: {len(missing)} parts ran dense ({state.name_parts(missing)}): their adapter is merged or "
            "disabled, or several are active. Prompts are sparse with one active, unmerged adapter."
        )


def _prompts(state: SparsityState, batch: Batch) -> TokenPartition | None:
    """The roles of a generation's prompts; None for a later token, and without a cache to fill."""
    cache, tokens, mask = batch.arguments.get("past_key_values"), batch.inputs, batch.attention_mask
    if tokens is None or tokens.shape[1] < 2 or _is_filled(cache):
        return None
    if cache is None and not batch.arguments.get("use_cache"):
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        state.warn_once(
            "sparse_prefill: a prompt came with an attention mask that is not [batch, sequence] (static caches make "
            "such masks), which does not tell padding, so it ran dense. Generate with a dynamic cache."
        )
        return None
    return TokenPartition.from_prompts(tokens, mask, state.config.dense_tokens)


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    return int(cache.get_seq_length()) > 0 if hasattr(cache, "get_seq_length") else len(cache) > 0
