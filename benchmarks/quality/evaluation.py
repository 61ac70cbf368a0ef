"""Evaluates every seed on the held-out items with teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks.quality.batches import Batches
from benchmarks.quality.lockstep import Lockstep
from benchmarks.quality.network import Mode, answer_logits


@dataclass(frozen=True)
class Figures:
    """Figures of one seed: mean negative log-likelihood of answer tokens (nats), share of tokens that are most likely,
    share of answers in which every token is; and the first and last figure by part of the task.
    """

    answer_nll: float
    token_accuracy: float
    exact_match: float
    parts: tuple[tuple[float, float], ...]


@torch.no_grad()
def evaluate(lockstep: Lockstep, batches: Sequence[Batches], parts: Sequence[int], mode: Mode) -> list[Figures]:
    """Computes every seed's figures with the forward of ``mode``.

    Args:
        batches: as `evaluation_batches` makes them, one batch each.
        parts: of each item, in the order of the batches.
    """
    losses, hits, tokens = [], [], []
    for held_out in batches:
        batch, layout = held_out.batch(0), held_out.layout
        hidden = lockstep.hidden(batch, layout, mode)
        loss, hit = torch.empty_like(batch.weights), torch.empty_like(batch.weights)
        for seed in range(len(hidden)):  # the logits of all seeds together can take more than the memory
            logits = answer_logits(hidden[seed, None], batch.loss_rows[seed, None], lockstep.network)[0]
            loss[seed] = F.cross_entropy(logits, batch.targets[seed], reduction="none")
            hit[seed] = (logits.argmax(-1) == batch.targets[seed]).float()
        real = (batch.weights > 0).float()
        ((count, length),) = layout.groups
        item = batch.loss_rows // length
        sums = torch.zeros(3, len(batch.ids), count, device=batch.ids.device)
        for total, value in zip(sums, (loss, hit, torch.ones_like(hit)), strict=True):
            total.scatter_add_(1, item, value.float() * real)
        losses.append(sums[0])
        hits.append(sums[1])
        tokens.append(sums[2])
    loss, hit, count = (torch.cat(values, dim=1).double().cpu() for values in (losses, hits, tokens))
    exact, which = (hit == count).double(), torch.as_tensor(parts)
    figures = []
    for seed in range(len(loss)):
        own = [which == part for part in sorted(set(which.tolist()))]
        figures.append(
            Figures(
                answer_nll=(loss[seed].sum() / count[seed].sum()).item(),
                token_accuracy=(hit[seed].sum() / count[seed].sum()).item(),
                exact_match=exact[seed].mean().item(),
                parts=tuple(
                    ((loss[seed, at].sum() / count[seed, at].sum()).item(), exact[seed, at].mean().item()) for at in own
                ),
            )
        )
    return figures
