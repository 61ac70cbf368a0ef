"""Captures row-sparse layers in CUDA graphs (docs/how-it-works.md, sections 3.1 and 9.1).

Forward computes every row. The captured backward selects rows by the incoming gradient, and takes gradients through
them: by what forward kept, or, after a recompute that ends with attention, by computing what follows again for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sparse_unsloth.graphs.layer import Attention, GraphedPass, run_captured
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, pre_attention
from sparse_unsloth.ops.stored_rows import post_attention_by_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition


def row_sparse_whole_layer(
    hidden_states: Tensor,
    plan: LayerPlan,
    graphed: GraphedPass,
    attention: Attention,
    tensors: Mapping[str, Tensor],
    choice: RowChoice,
    chosen: TokenPartition,
) -> Tensor | None:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros in a recompute, where it is unused; None uncaptured.

    Args:
        plan: computes every row densely.
        graphed, attention, tensors: as in `sparse_unsloth.graphs.layer.whole_layer`.
        choice: tells the token roles, the share of the context tokens that backward goes through, and where their
            energy is added up: at an address that stays.
        chosen: the chosen rows alone, see `RowChoice.as_partition`.
    """
    fixed = graphed.capture.static_partition
    all_rows, chosen_rows = (RowOrder(fixed(rows), False) for rows in (plan.mlp.partition, chosen))
    roles, share, energy = fixed(choice.partition), choice.share, choice.energy

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = replace(plan, attention=all_rows, mlp=all_rows).with_loras(loras)
        *projected, residual = pre_attention(x, trained)
        attention_output = attention(x, projected, tensors)
        return post_attention_by_rows(attention_output, residual, trained, RowChoice(roles, share, energy), chosen_rows)

    return run_captured(plan, graphed, compute, hidden_states, tensors)
