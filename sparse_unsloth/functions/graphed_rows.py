"""A whole layer in CUDA graphs whose backward goes through few rows: `functions.graphed_layer` for `backward_rows`.

Forward computes every row densely. The recompute ends at the attention, and backward, recorded as well, chooses rows by
the gradient that comes, computes them behind the attention once more, and takes gradients through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from torch import Tensor

from sparse_unsloth.functions.backward_rows import RowChoice, backward_rows
from sparse_unsloth.functions.graphed_layer import Attention, first_forward, recompute
from sparse_unsloth.functions.layer import LayerPlan, Rows, before_attention, behind_attention, lora_tensors_of
from sparse_unsloth.partition import TokenPartition


def whole_layer_by_rows(
    hidden_states: Tensor,
    plan: LayerPlan,
    attention: Attention,
    tensors: Sequence[Tensor],
    partition: TokenPartition,
    share: float,
    chosen: TokenPartition,
) -> Tensor:
    """The layer's output ``[batch, sequence, hidden_size]``; zeros where ``plan`` says that nobody reads it.

    Args:
        plan: of all rows, dense, with ``graphs``.
        attention, tensors: as in `graphed_layer.whole_layer`.
        partition: the roles of the rows.
        share: of the context rows, that backward goes through.
        chosen: as many dense rows as are chosen: `RowChoice.alone`.
    """
    graphs = plan.graphs
    every, few = (Rows(graphs.rows(rows), False) for rows in (plan.mlp.partition, chosen))
    roles = graphs.rows(partition)
    static = replace(plan, graphs=None, attention=every, mlp=every)

    def compute(x: Tensor, loras: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        trained = static.with_loras(loras)
        *projected, residual = before_attention(x, trained)
        attention_output = attention(x, projected, tensors)
        if not plan.unread:
            return behind_attention(attention_output, residual, trained)
        again = replace(trained, attention=few, mlp=few, keep=False)
        return backward_rows(
            _not_called,
            [attention_output, residual],
            loras[6:],  # behind the attention
            RowChoice(roles, share),
            residual=1,
            unread=True,
            again=lambda rows, stream: behind_attention(rows, stream, again),
        )

    loras = lora_tensors_of(plan.projections)
    return (recompute if plan.unread else first_forward)(graphs, compute, hidden_states, tensors, loras)


def _not_called(*rows: Tensor) -> NoReturn:
    raise AssertionError("the output of a recompute is not computed")
