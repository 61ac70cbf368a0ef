"""Makes batches of a fixed shape with little padding: sequences are grouped by length, equally at every step and seed.

The items of a seed are sorted by length and cut into as many strata as a batch has places; each batch takes one item of
every stratum. So a place is padded to its stratum's longest item and no further, no step differs in shape (one CUDA
graph serves all), and every batch holds short and long tasks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.tasks import Items
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

GROUPS = 4
MULTIPLE = 8
"""Lengths are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Layout:
    """Concatenated sequences: ``(count, padded length)`` of each group."""

    groups: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(count * length for count, length in self.groups)

    def positions(self) -> Tensor:
        """Returns the position of each row in its sequence, int64 ``[rows]``."""
        return torch.cat([torch.arange(length).repeat(count) for count, length in self.groups])


@dataclass(frozen=True)
class Counts:
    """The numbers of tokens of one batch and seed by role, and the lengths of its sequences."""

    dense: int
    context: int
    loss: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One batch of every seed; tensors have a leading dimension of seeds.

    Attributes:
        ids: int64 ``[seeds, rows]``.
        context: bool ``[seeds, rows]``: prompt tokens but the last, no padding.
        loss_rows: int64 ``[seeds, places]``: rows that predict a token of an answer.
        targets: int64 ``[seeds, places]``: the token that each of them predicts.
        weights: fp32 ``[seeds, places]``: 1 over the seed's loss rows, 0 where a place is empty.
    """

    ids: Tensor
    context: Tensor
    loss_rows: Tensor
    targets: Tensor
    weights: Tensor


class Batches:
    """All batches of a training, or of an evaluation, on the device.

    Attributes:
        layout: of every batch.
        counts: by step, then by seed.
    """

    def __init__(self, items: Sequence[Items], order: np.ndarray, layout: Layout, device: torch.device | str):
        """``order`` int64 ``[seeds, steps, places]``: the items of each batch, in the places of ``layout``."""
        seeds, steps, _ = order.shape
        self.layout = layout
        offsets = np.cumsum([0] + [length for count, length in layout.groups for _ in range(count)])
        widths = np.diff(offsets)
        ids = np.zeros((steps, seeds, layout.rows), dtype=np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        mask = np.zeros_like(ids, dtype=bool)
        for seed, own in enumerate(items):
            for place, (start, width) in enumerate(zip(offsets, widths, strict=False)):
                chosen = order[seed, :, place]
                tokens = own.tokens[chosen, :width]
                tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
                at = np.arange(width)[None]
                real = at < own.lengths[chosen, None]
                answer = real & (at >= own.prompts[chosen, None])
                ids[:, seed, start : start + width] = tokens
                mask[:, seed, start : start + width] = real
                labels[:, seed, start : start + width] = np.where(answer, tokens, IGNORE_INDEX)
        self._store(ids, labels, mask, device)
        sums = [role.sum(-1).tolist() for role in (mask & ~self._context, self._context, self._loss)]
        lengths = np.stack([own.lengths[order[seed]] for seed, own in enumerate(items)])
        self.counts = [
            [Counts(*(part[step][seed] for part in sums), tuple(lengths[seed, step].tolist())) for seed in range(seeds)]
            for step in range(steps)
        ]

    def _store(self, ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, device) -> None:
        # One row a sequence would do as well; TokenPartition tells the roles apart by documents.
        documents = torch.as_tensor(self.layout.positions()).expand(ids.shape[0] * ids.shape[1], -1)
        flat = TokenPartition.from_labels(
            torch.as_tensor(labels).flatten(0, 1), torch.as_tensor(mask).flatten(0, 1).long(), documents
        )
        roles = {}
        for name in ("context", "loss"):
            role = torch.zeros(ids.size, dtype=torch.bool)
            role[getattr(flat, name)] = True
            roles[name] = role.view(ids.shape)
        self._context, self._loss = (roles[name].numpy() for name in ("context", "loss"))
        places = int(self._loss.sum(-1).max())
        loss_rows = np.argsort(~self._loss, axis=-1, kind="stable")[..., :places]
        filled = np.take_along_axis(self._loss, loss_rows, -1)
        following = np.minimum(loss_rows + 1, ids.shape[-1] - 1)
        targets = np.where(filled, np.take_along_axis(ids, following, -1), 0)
        weights = filled / filled.sum(-1, keepdims=True)
        self._tensors = Batch(
            ids=torch.as_tensor(ids).int().to(device),
            context=roles["context"].to(device),
            loss_rows=torch.as_tensor(loss_rows).to(device),
            targets=torch.as_tensor(targets).to(device),
            weights=torch.as_tensor(weights).float().to(device),
        )

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def padding_share(self) -> float:
        real = sum(count.dense + count.context for step in self.counts for count in step)
        return 1 - real / (len(self) * len(self.counts[0]) * self.layout.rows)

    @cached_property
    def context_share(self) -> float:
        real = sum(count.dense + count.context for step in self.counts for count in step)
        return sum(count.context for step in self.counts for count in step) / real

    def batch(self, step: int) -> Batch:
        return Batch(*(getattr(self._tensors, name)[step] for name in Batch.__dataclass_fields__))


def training_batches(
    items: Sequence[Items], size: int, steps: int, seeds: Sequence[int], device: torch.device | str
) -> Batches:
    """Makes ``steps`` batches of ``size`` items per seed, epoch after epoch, in an order that the seed decides.

    Args:
        items: of each seed, in equal numbers; a remainder that does not fill a batch is left out.
    """
    strata = len(items[0]) // size
    order = np.empty((len(items), steps, size), dtype=np.int64)
    longest = np.zeros(size, dtype=np.int64)
    for number, (own, seed) in enumerate(zip(items, seeds, strict=True)):
        rng = np.random.default_rng(seed)
        ranked = np.argsort(-own.lengths[: strata * size], kind="stable").reshape(size, strata)
        longest = np.maximum(longest, own.lengths[ranked].max(1))
        epochs = [rng.permuted(ranked, axis=1) for _ in range(-(-steps // strata))]
        order[number] = np.concatenate(epochs, axis=1)[:, :steps].T
    return Batches(items, order, _layout(longest), device)


def evaluation_batches(
    items: Items, size: int, seeds: int, device: torch.device | str
) -> tuple[list[Batches], np.ndarray]:
    """Makes batches of ``size`` held-out items, the same for all seeds, each of one length.

    Returns:
        The batches, and the items in their order, int64 ``[items]``.
    """
    order = np.argsort(-items.lengths, kind="stable")
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        layout = _layout(np.full(len(chosen), items.lengths[chosen].max()))
        batches.append(Batches([items] * seeds, np.tile(chosen, (seeds, 1, 1)), layout, device))
    return batches, order


def _layout(longest: np.ndarray) -> Layout:
    """Groups places of decreasing length into `GROUPS` groups, each as long as its longest place."""
    groups: dict[int, int] = {}
    for place in np.array_split(longest, min(GROUPS, len(longest))):
        length = -(-int(place.max()) // MULTIPLE) * MULTIPLE
        groups[length] = groups.get(length, 0) + len(place)
    return Layout(tuple((count, length) for length, count in groups.items()))
