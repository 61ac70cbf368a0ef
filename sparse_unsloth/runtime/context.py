"""What travels with one forward."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from sparse_unsloth.errors import AttachError
from sparse_unsloth.explain.observer import Observation
from sparse_unsloth.graphs.packed_attention import Packing
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.ops.mlp import MlpMemo
from sparse_unsloth.ops.projection import Projection
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.runtime.gradients import FirstBackward, LossRows
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense, rows_with_loss

CONTEXT_ARGUMENT = "sparse_context"
"""The keyword argument by which a `SparseContext` travels from the outermost model to each decoder layer."""


def runs_twice(where: str) -> AttachError:
    """What a module or a layer that is called again in one forward is refused with."""
    return AttachError(
        f"{where} runs more than once in one forward (a decoder that loops over its layers, or one module that several "
        "layers share), so its two calls' rows and channels cannot be told apart. It has no sparse path; train it "
        "dense (sparsity=None)."
    )


@dataclass
class LayerMemo(MlpMemo):
    """What a layer keeps from one forward to its recompute.

    Attributes:
        rows: those of its backward pass.
        projections: as the first pass read them, for a layer that runs as a whole.
        captured: the first pass was recorded or replayed, and so its recompute is.
    """

    rows: RowChoice | None = None
    projections: list[Projection] | None = None
    captured: bool = False


class SparseContext:
    """One forward: its partition, its share of the configured sparsity, and the channels that its layers chose.

    It travels as a keyword argument, so a recompute under gradient checkpointing sees the object of its own forward and
    finds there the channels that the first pass chose.

    Attributes:
        partition: the roles of the rows.
        scale: share of the configured sparsity; at 0 every layer is dense.
        loss_only: the last layer leaves out the rows without loss.
        loss_reached: set by the loss that makes this right.
        probe: the forward that attaching proves the hooks by; it keeps every channel.
        prefill: a forward outside training whose prompts are sparse all the same (`sparse_unsloth.runtime.prefill`).
        observation: where this forward is one that `explain` looks at.
        paused: parts that are dense all the same (`sparse_unsloth.channels.score_watch`).
        graphs: what records and replays the layers' work in this forward; None: it runs as it is.
        packing: the documents of its row, where recordings may attend within them.
        ran: the hooked parts that our functions computed; ``whole``: the layers that they computed as a whole;
            ``captured``: those whose work is in CUDA graphs.
        first_backward: of the first sparse forward, what looks whether its backward pass reaches every trained tensor.
        loss_rows: where this forward is one that it looks at.
        entered: names of the decoder layers that it came through.
        recomputed: the layer that was recomputed last: the backward pass, its place, and whether its output is zeros.
    """

    def __init__(
        self,
        partition: TokenPartition,
        scale: float,
        loss_only: bool = False,
        paused: frozenset[tuple[int, str]] = frozenset(),
    ):
        self.partition = partition
        self.scale = scale
        self.loss_only = loss_only
        self.paused = paused
        self.loss_reached = False
        self.probe = False
        self.prefill = False
        self.observation: Observation | None = None
        self.graphs: GraphCache | None = None
        self.packing: Packing | None = None
        self.first_backward: FirstBackward | None = None
        self.loss_rows: LossRows | None = None
        self.selections: dict[tuple[int, str], MlpSelection | AttentionSelection] = {}
        self.ran: set[tuple[int, str]] = set()
        self.whole: set[int] = set()
        self.captured: set[int] = set()
        self.entered: set[str] = set()
        self.recomputed: tuple[int, int, bool] | None = None
        self._memos: defaultdict[int, LayerMemo] = defaultdict(LayerMemo)
        self._derived: dict[str, TokenPartition] = {}

    @functools.cached_property
    def batch_key(self) -> Hashable:
        """The batch signature: all that decides how much each layer computes, so equal ones launch the same kernels."""
        rows, room = self.partition, self.packing and self.packing.room
        return rows.shape, rows.num_dense, rows.num_context, rows.num_padding, self.scale, self.paused, room

    def memo(self, index: int) -> LayerMemo:
        """What layer ``index`` keeps from this forward to its recompute."""
        return self._memos[index]

    def row_choice(self, index: int, share: float) -> RowChoice:
        """The one of layer ``index`` in this forward; its parts share it."""
        memo = self.memo(index)
        if memo.rows is None:
            memo.rows = RowChoice(self.partition, share)
        return memo.rows

    def chosen_rows(self, choice: RowChoice) -> TokenPartition:
        """Those of a layer's backward pass by themselves, all dense: `RowChoice.as_partition`, made once a forward."""
        if "chosen rows" not in self._derived:
            self._derived["chosen rows"] = choice.as_partition()
        return self._derived["chosen rows"]

    def rows_with_loss(self, sparse: bool) -> TokenPartition:
        """The partition of the last layer behind its keys and values, where it is sparse or dense."""
        key = f"loss rows, sparse={sparse}"
        if key not in self._derived:
            self._derived[key] = rows_with_loss(self.partition, sparse)
        return self._derived[key]

    def every_row_dense(self) -> TokenPartition:
        """The partition of what the last layer computes densely for all rows."""
        if "every row" not in self._derived:
            self._derived["every row"] = every_row_dense(self.partition)
        return self._derived["every row"]
