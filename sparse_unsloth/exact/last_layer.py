"""Decides where the last decoder layer may skip rows that no loss reads (docs/how-it-works.md, section 5.2).

To the sparse functions these rows are padding, and with no context row left they compute densely. Loss and gradients
stay the same where only Unsloth's fused loss reads the last layer's output: `loss_is_fused`.
"""

from __future__ import annotations

import os

from torch import Tensor, nn

from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition

WORTH_REMOVING = 0.125
"""Share of rows without loss from which skipping them is worth the gathers and scatters that it takes."""
NEED_EVERY_ROW = (
    "output_attentions", "output_hidden_states", "logits_to_keep", "num_logits_to_keep", "past_key_values",
    "fused_lm_head",
)  # fmt: skip
"""Keyword arguments of a forward that read more of the last layer than the fused loss does, or compute another loss."""
ENVIRONMENT = ("UNSLOTH_RETURN_LOGITS", "UNSLOTH_RETURN_HIDDEN_STATES")
"""With one of these at "1" Unsloth returns what it computes for every row."""


def loss_is_fused(model: nn.Module, batch: Batch) -> bool:
    """Whether a training forward of Unsloth's fast path ends in its fused loss, and in nothing else.

    Args:
        model: the outermost model.
        batch: of the forward. Only ``packed_seq_lengths`` tell Unsloth's loss about documents. Where others do, its
            loss positions are not known.
    """
    labels, inputs = batch.labels, batch.inputs
    if labels is None or inputs is None or labels.shape != inputs.shape[:2] or labels.numel() == 1:
        return False
    if batch.is_context_parallel or (batch.layout != "padded" and batch.packed_seq_lengths is None):
        return False
    config = getattr(model, "config", None)
    asked = [getattr(config, name, None) for name in ("output_hidden_states", "output_attentions")]
    asked += [batch.arguments.get(name) for name in NEED_EVERY_ROW]
    if any(isinstance(value, Tensor) or value for value in asked):
        return False
    if any(os.environ.get(name, "0") == "1" for name in ENVIRONMENT):
        return False
    return _is_plain(model.get_output_embeddings())


def enough_unused_rows(partition: TokenPartition) -> bool:
    """Whether the loss reads few enough rows for skipping the others to pay."""
    num_rows = partition.shape[0] * partition.shape[1]
    return num_rows - len(partition.loss) >= WORTH_REMOVING * num_rows


def _is_plain(head: nn.Module | None) -> bool:
    """Whether the output head is a linear layer, bare or in PEFT's ``modules_to_save``, without fake quantisation."""
    if head is None:
        return False
    leaves = [module for module in head.modules() if next(module.children(), None) is None]
    return all(type(leaf) in (nn.Linear, nn.ModuleDict, nn.Identity) for leaf in leaves)
