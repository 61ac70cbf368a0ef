"""Defines what travels with one forward: from the model to its layers, and on to their recomputes."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import AttachError
from sparse_unsloth.explain.observer import Observation
from sparse_unsloth.graphs.packed_attention import Packing
from sparse_unsloth.graphs.passes import CapturedForward
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.ops.kept_attention import KeptAttention
from sparse_unsloth.ops.mlp import MlpMemo
from sparse_unsloth.ops.projection import Projection
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.rows.energy import GradientEnergy
from sparse_unsloth.runtime.gradients import FirstBackward, LossRows
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense, rows_with_loss

CONTEXT_ARGUMENT = "sparse_context"
"""The keyword argument that hands a `SparseContext` from the outermost model to each decoder layer."""


def runs_twice(where: str) -> AttachError:
    """The error for a module or a layer that is called twice in one forward."""
    return AttachError(
        f"{where} runs more than once in one forward (a decoder that loops over its layers, or one module that several "
        "layers share), so its two calls' rows and channels cannot be told apart. It has no sparse path; train it "
        "dense (sparsity=None)."
    )


def wrong_rows(where: str, rows: torch.Size, labels: Sequence[int]) -> AttachError:
    """The error for a module that got ``rows``, in another number than the ``labels`` or the input; both are shapes."""
    return AttachError(
        f"{where} got {rows.numel()} rows, {list(rows)}, but the labels of this forward (without labels its input) "
        f"count {labels[0] * labels[1]}, {list(labels)}, so the rows' roles are not known. The model puts rows in "
        "front of the tokens (soft prompts, a prefix, images, sound), cuts its input off (max_seq_length), or cuts or "
        "reorders its rows. Give it embeddings and labels of the whole length (-100 for the rows in front), or train "
        "dense (sparsity=None)."
    )


@dataclass
class ForwardCounts:
    """Counts of training forwards whose tokens have roles, and of their loss and context tokens.

    Attributes:
        completion: of completions in forwards without labels, int64 ``[2]`` on the device: the tokens that no loss is
            taken of, and all; None without such forwards.
    """

    forwards: int = 0
    sparse_forwards: int = 0
    context_tokens: int = 0
    dense_tokens: int = 0
    whole_layers: int = 0
    captured_layers: int = 0
    """``whole_layers`` and ``captured_layers`` ran as whole layers and in CUDA graphs in the last forward."""
    completion: Tensor | None = None

    def add(self, partition: TokenPartition) -> None:
        """Counts the tokens of one forward."""
        self.context_tokens += partition.num_context
        self.dense_tokens += partition.num_dense


@dataclass
class LayerMemo(MlpMemo):
    """What a layer keeps from one forward to its recompute.

    Attributes:
        rows: the rows that its backward pass goes through.
        projections: as the first forward read them, for a whole layer.
        captured: the first forward was captured or replayed, so its recompute is, too.
        joined: a checkpoint holds this layer and a neighbour, so that recomputes read this one's output.
        attention: what attention's kernel gave in the first forward, if that is kept.
        choices: what routed parts chose for each row, by name (`sparse_unsloth.rows.routing.KeptChoices`).
    """

    rows: RowChoice | None = None
    projections: list[Projection] | None = None
    captured: bool = False
    joined: bool = False
    attention: KeptAttention | None = None
    choices: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


class SparseContext:
    """One forward: its token roles, its share of the configured sparsity, and the channels that its layers selected.

    It travels as a keyword argument, so that a recompute under gradient checkpointing receives the object of its own
    forward, and reuses the selections (docs/how-it-works.md, section 8).

    Attributes:
        partition: the token roles.
        scale: share of the configured sparsity; at 0 every layer is dense.
        loss_only: the last layer skips rows that the loss does not read.
        loss_reached: the fused loss ran, which makes ``loss_only`` correct.
        probe: this is the probe of attaching, which keeps every channel.
        prefill: a forward outside training with sparse prompts (`sparse_unsloth.runtime.prefill`).
        observation: where `explain` observes this forward.
        paused: parts that stay dense because their scores were not finite (`sparse_unsloth.channels.score_watch`).
        dense: nothing is left out in this forward, whatever is configured; it is open for CUDA graphs alone.
        graphs: captures and replays the layers of this forward; None: they run without CUDA graphs.
        captures: this forward, among those that `graphs` captured; None without.
        checkpoint: the `checkpoint_hook` of the last layer that ran.
        split: sequences are split over several GPUs (context parallelism), and attention communicates.
        packing: the documents of a packed sequence, where the batch gives their lengths.
        padded: the batch's shape and length before, where it was padded to a length bucket.
        ran: the hooked parts that our functions computed; ``whole``: the layers that they computed as a whole;
            ``captured``: the layers that are in CUDA graphs.
        first_backward: in the first sparse forward, checks that its backward pass reaches every trained tensor.
        loss_rows: where this is a forward whose loss it checks.
        find_roles: where there are no labels, makes the gradient of the stack's output tell the roles of this context;
            until then it ``awaits_roles``, and ``partition`` tells the number of rows alone.
        entered: names of the decoder layers that ran.
        recomputed: the last recomputed layer: its backward pass, its place, and whether its output was skipped.
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
        self.dense = False
        self.graphs: GraphCache | None = None
        self.captures: CapturedForward | None = None
        self.checkpoint: weakref.ref[Callable] | None = None
        self.split = False
        self.packing: Packing | None = None
        self.padded: tuple[torch.Size, int] | None = None
        self.first_backward: FirstBackward | None = None
        self.loss_rows: LossRows | None = None
        self.find_roles: Callable[[SparseContext, Any], None] | None = None
        self.awaits_roles = False
        self.selections: dict[tuple[int, str], MlpSelection | AttentionSelection] = {}
        self.ran: set[tuple[int, str]] = set()
        self.whole: set[int] = set()
        self.captured: set[int] = set()
        self.entered: set[str] = set()
        self.recomputed: tuple[int, int, bool] | None = None
        self._memos: defaultdict[int, LayerMemo] = defaultdict(LayerMemo)
        self._derived: dict[Hashable, Any] = {}

    @functools.cached_property
    def batch_key(self) -> Hashable:
        """The batch signature: forwards with equal ones launch the same kernels (docs/how-it-works.md, section 9.2)."""
        rows, room = self.partition, self.packing and self.packing.room
        return rows.shape, rows.num_dense, rows.num_context, rows.num_padding, self.scale, self.paused, room

    def memo(self, index: int) -> LayerMemo:
        """What layer ``index`` keeps from this forward to its recompute."""
        return self._memos[index]

    def row_choice(self, index: int, share: float, energy: GradientEnergy) -> RowChoice:
        """The row choice of layer ``index`` in this forward, which its parts share."""
        memo = self.memo(index)
        if memo.rows is None:
            found = energy.of(index, self.partition.dense.device)
            memo.rows = RowChoice(self.partition, share, found, self.awaits_roles)
        return memo.rows

    def learn_roles(self, partition: TokenPartition) -> None:
        """Takes ``partition`` as the roles of this forward's tokens from now on."""
        self.partition, self.awaits_roles = partition, False
        self._derived.clear()
        for memo in self._memos.values():
            if memo.rows is not None:
                memo.rows.learn(partition)

    def chosen_rows(self, choice: RowChoice) -> TokenPartition:
        """Those of a layer's backward pass by themselves, all dense: `RowChoice.as_partition`, made once a forward."""
        return self.once("chosen rows", choice.as_partition)

    def rows_with_loss(self, sparse: bool) -> TokenPartition:
        """The partition of the last layer after its keys and values, where it is sparse or dense."""
        return self.once(("loss rows", sparse), lambda: rows_with_loss(self.partition, sparse))

    def every_row_dense(self) -> TokenPartition:
        """The partition of what a layer computes densely for all rows."""
        return self.once("every row", lambda: every_row_dense(self.partition))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, made once for all layers of this forward and their recomputes."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
