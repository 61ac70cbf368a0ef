"""Exact removal in the last decoder layer: after its keys and values only rows that bear loss have an effect.

Behind the last layer come the final norm and the loss, both row by row, so the queries, the O projection and the MLP of
a row without loss reach nothing (design section 5). There such a row is given no query and adds nothing to the residual
stream; loss and gradients stay the same, and LoRA's gradients lose terms that were zero anyway. It needs nothing new of
the sparse functions: to them these rows are padding, and with no context row left they compute densely.

It is right only where nobody but Unsloth's fused loss reads what the last layer returns: `loss_is_fused`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_unsloth.tokens.partition import TokenPartition

WORTH_REMOVING = 0.125
"""Share of rows without loss from which the removal is worth the gathers and scatters that it takes."""
NEED_EVERY_ROW = (
    "output_attentions", "output_hidden_states", "logits_to_keep", "num_logits_to_keep", "past_key_values",
    "shift_labels", "fused_lm_head",
)  # fmt: skip
"""Keyword arguments of a forward that read more of the last layer than the fused loss does, or compute another loss."""
ENVIRONMENT = ("UNSLOTH_RETURN_LOGITS", "UNSLOTH_RETURN_HIDDEN_STATES")
"""With one of these at "1" Unsloth returns what it computes for every row."""


def loss_is_fused(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a training forward of Unsloth's fast path ends in its fused loss, and in nothing else.

    Args:
        model: the outermost model.
        arguments: what it was called with. Position ids without ``packed_seq_lengths`` cut documents for the partition
            but not for Unsloth's loss, so with them the rows that bear loss are not known well enough.
    """
    labels, tokens = arguments.get("labels"), arguments.get("input_ids")
    if tokens is None:
        embeddings = arguments.get("inputs_embeds")
        tokens = None if embeddings is None else embeddings[..., 0]
    if labels is None or tokens is None or labels.shape != tokens.shape or labels.numel() == 1:
        return False
    if arguments.get("position_ids") is not None and arguments.get("packed_seq_lengths") is None:
        return False
    config = getattr(model, "config", None)
    asked = [getattr(config, name, None) for name in ("output_hidden_states", "output_attentions")]
    asked += [arguments.get(name) for name in NEED_EVERY_ROW]
    if any(isinstance(value, Tensor) or value for value in asked):
        return False
    if any(os.environ.get(name, "0") == "1" for name in ENVIRONMENT):
        return False
    return _is_plain(model.get_output_embeddings())


def enough_unused_rows(partition: TokenPartition) -> bool:
    """Whether enough rows bear no loss."""
    num_rows = partition.shape[0] * partition.shape[1]
    return num_rows - len(partition.loss) >= WORTH_REMOVING * num_rows


def _is_plain(head: nn.Module | None) -> bool:
    """Whether the output head is a linear layer, bare or in PEFT's ``modules_to_save``, without fake quantisation."""
    if head is None:
        return False
    leaves = [module for module in head.modules() if next(module.children(), None) is None]
    return all(type(leaf) in (nn.Linear, nn.ModuleDict, nn.Identity) for leaf in leaves)
