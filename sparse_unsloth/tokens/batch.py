"""Reads a micro-batch once per forward: what of the model's arguments tells labels, padding and documents.

Only this package knows the arguments' names and what they mean (docs/how-it-works.md, section 2.2). Nothing here makes
the host wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["shift_labels", "packed_seq_lengths", "position_ids", "cu_seq_lens_q", "padded"]
LAYOUTS: tuple[Layout, ...] = ("shift_labels", "packed_seq_lengths", "position_ids", "cu_seq_lens_q")
"""Arguments that tell documents apart; of several the first one counts."""
NOT_WITHOUT_LOSS = ("labels", "num_items_in_batch")
"""Arguments that only the model's loss reads."""


class Documents(NamedTuple):
    """Where the documents of a micro-batch are.

    Attributes:
        starts: bool ``[batch, sequence]``, the first token of each document and of each sequence.
        after_last: bool ``[batch, sequence]``, tokens after the last document whose length is given.
        num_tokens: int64 scalar on the device, the sum of the lengths that are given.
    """

    starts: Tensor
    after_last: Tensor
    num_tokens: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch as a model receives it; every field but ``arguments`` is None where it was not given.

    Attributes:
        labels: integers ``[batch, sequence]``, not shifted, -100 for none; of a sequence classifier one per sequence.
        input_ids: integers ``[batch, sequence]``.
        inputs_embeds: ``[batch, sequence, hidden_size]``.
        attention_mask: ``[batch, sequence]``, 0 marks padding; a model may also take other shapes.
        position_ids: integers ``[batch, sequence]``, ``[1, sequence]`` or ``[sequence]``.
        packed_seq_lengths: integers ``[documents]``, lengths of the documents over all flattened rows (Unsloth, TRL).
        cu_seq_lens_q: integers ``[documents + 1]``, their running sums from 0 (transformers' padding-free collators).
        shift_labels: integers ``[batch, sequence]``, what each token predicts (context parallelism).
        arguments: all arguments of the forward by name, those above too.
    """

    labels: Tensor | None = None
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    packed_seq_lengths: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    shift_labels: Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def layout(self) -> Layout:
        """The argument that tells documents apart; "padded": every sequence is one document."""
        return next((name for name in LAYOUTS if getattr(self, name) is not None), "padded")

    @property
    def is_context_parallel(self) -> bool:
        """Whether sequences are split over several GPUs, and these are parts of them."""
        return self.layout == "shift_labels"

    @property
    def is_packed(self) -> bool:
        """Whether the lengths of the documents are given and count."""
        return self.lengths is not None

    @functools.cached_property
    def lengths(self) -> Tensor | None:
        """The documents' lengths ``[documents]`` where these tell documents apart."""
        if self.layout == "packed_seq_lengths":
            return self.packed_seq_lengths
        return self.cu_seq_lens_q.diff() if self.layout == "cu_seq_lens_q" else None

    @property
    def document_length(self) -> float:
        """Tokens of a document, on average: the host need not wait for the device to learn it.

        Documents that position ids tell apart count as one: attention has a mask of the whole sequence there.
        """
        sequences, length = (self.inputs if self.inputs is not None else self.labels).shape[:2]
        return length if self.lengths is None else sequences * length / max(len(self.lengths), 1)

    @property
    def inputs(self) -> Tensor | None:
        """``input_ids``, or without them ``inputs_embeds``."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @functools.cached_property
    def documents(self) -> Documents:
        """The documents by ``layout``, on the device of the labels (of the inputs, where labels are not per token)."""
        labels = self.labels
        per_token = labels is not None and labels.ndim == 2 and not labels.is_floating_point()
        like = labels if per_token else self.inputs
        none = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
        covered = none.new_zeros((), dtype=torch.int64)
        if self.lengths is not None:
            ends = self.lengths.to(none.device, non_blocking=True).cumsum(0)
            tokens = torch.arange(none.numel(), device=none.device)
            document = torch.searchsorted(ends, tokens, right=True).view(none.shape)
            starts = document.diff(dim=1, prepend=document[:, :1] - 1) != 0
            return Documents(starts, document == len(ends), ends[-1])
        if self.layout == "position_ids":  # a document starts wherever they do not go up by one, as in transformers
            positions = self.position_ids.expand_as(none)
            return Documents(positions.diff(dim=1, prepend=positions[:, :1]) != 1, none, covered)
        starts = none.clone()
        starts[:, :1] = True
        return Documents(starts, none, covered)

    @functools.cached_property
    def sequence_starts(self) -> Tensor:
        """First tokens of documents and sequences, and first tokens after left padding: bool ``[batch, sequence]``."""
        starts = self.documents.starts
        if self.attention_mask is None:
            return starts
        real = self.attention_mask != 0
        return starts | real & (real.cumsum(1) == 1)

    @property
    def num_completion(self) -> int:
        """How many tokens at the end of each sequence a trainer's loss is about; 0 where the batch does not tell.

        GRPO and RLOO ask for the logits of these positions and of the one before, and drop the last one's.
        """
        kept = self.arguments.get("logits_to_keep")
        if not isinstance(kept, int) or self.input_ids is None:
            return 0
        return max(min(kept, self.input_ids.shape[1]) - 1, 0)

    @property
    def without_labels(self) -> dict[str, Any]:
        """The arguments of the same forward without a loss."""
        return {name: value for name, value in self.arguments.items() if name not in NOT_WITHOUT_LOSS}

    def changed(self, **changes: Tensor | None) -> Batch:
        """This batch with other tensors in some fields, in ``arguments`` too."""
        return replace(self, arguments={**self.arguments, **changes}, **changes)

    def to(self, device: torch.device) -> Batch:
        """This batch with all tensors on ``device``."""
        return read_batch(
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()}
        )


def read_batch(arguments: Mapping[str, Any]) -> Batch:
    """The batch of a forward that is called with these ``arguments``, by name."""
    named = {name: arguments.get(name) for name in Batch.__dataclass_fields__ if name != "arguments"}
    return Batch(**named, arguments=arguments)
