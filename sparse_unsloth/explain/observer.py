"""Records what sparsity did in some steps.

Under channel sparsity it compares the channel selection with that of the step before, and with the oracle: every
`SparsityConfig.explain_steps` sparse steps, two consecutive ones are observed, the first for its channels, the second
for a record. All other steps cost nothing. Figures stay on the device until `Observer.take`.

Under row sparsity every backward pass adds up the energy of the rows that it chose (`sparse_unsloth.rows.energy`);
`Observer.take_energy` reads it, and makes a record of it by layer as often.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.channels.energy import attention_energy, mlp_energy
from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.explain.records import ENERGY, ROWS
from sparse_unsloth.kernels.select import key_channel_scores
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.rows.energy import GradientEnergy
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition

ORACLE_ROWS = 1024
"""Most rows, evenly spaced, that are computed exactly for the oracle."""


@dataclass
class Observation:
    """One observed forward.

    Args:
        step: optimiser steps done before it.
        compare: whether it gives a record; else only its channels are kept, for the next step.
        rows: int64: the context rows that the oracle uses, without first tokens; None: none.
        places: the same rows by their indices among the context rows.
        record: the values that are known without the device.
    """

    step: int
    compare: bool
    rows: Tensor | None
    places: Tensor | None
    record: dict[str, Any]
    channels: dict[tuple[int, str], tuple[Tensor, ...]] = field(default_factory=dict)
    figures: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)


class Observer:
    """Observes the channel selections, or the row choices, of one model's training.

    Args:
        every: sparse steps between two records; 0: none.

    Attributes:
        energy: of the rows that backward passes choose; they add to it, whatever ``every`` is.
    """

    def __init__(self, every: int):
        self.every, self.energy = every, GradientEnergy()
        self.clear()

    def clear(self) -> None:
        """Forgets everything; called before a training."""
        self._sparse_steps = 0
        self._due: int | None = None
        self._before: Observation | None = None
        self._last: Observation | None = None
        self._done: list[Observation] = []
        self._step = 0
        self._energy_records: list[dict[str, Any]] = []
        self._energy_due = 0
        self.energy.clear()

    def begin_step(self, step: int, sparse: bool) -> None:
        """Called before each optimiser step."""
        self._due, self._step = None, step
        if not self.every or not sparse:
            return
        if self._sparse_steps % self.every < 2:
            self._due = step
        self._sparse_steps += 1

    def should_observe(self, step: int | None) -> bool:
        """Whether to observe this forward: the first one with gradients in a step that is due."""
        return step is not None and self._due == step and torch.is_grad_enabled()

    def open(
        self, step: int, partition: TokenPartition, batch: Batch, layers: list[DecoderLayer], sparsity: dict
    ) -> Observation:
        """Begins to look at a forward.

        Args:
            partition: its roles.
            batch: tells the first tokens of documents: attention sinks, which hold nearly all energy of a layer, and
                say nothing of the others.
            layers: all of the model.
            sparsity: by ``(layer index, part)``, of this forward.
        """
        compare = self._last is not None and self._last.step == step - 1
        rows, places, context = None, None, partition.context
        if compare and len(context):
            places = (~batch.sequence_starts.flatten()[context]).nonzero().flatten()
            places = places[:: max(1, -(-len(places) // ORACLE_ROWS))]
            rows = context[places]
        found = Observation(step, compare, rows, places, _counts(step, partition, layers, sparsity))
        self._due = None
        if compare:
            self._done.append(found)
        self._before, self._last = self._last, found
        return found

    @torch.no_grad()
    def see(
        self,
        observation: Observation,
        layer: DecoderLayer,
        part: str,
        hidden_states: Tensor,
        selection: MlpSelection | AttentionSelection,
        context_alone: bool = False,
    ) -> None:
        """Notes the channels of one part ("mlp", "self_attn"), once in a forward and its recompute.

        Args:
            hidden_states: the part's input; with ``context_alone``, of the context rows only.
        """
        key = (layer.index, part)
        if key in observation.channels:
            return
        mlp = isinstance(selection, MlpSelection)
        channels = (selection.channels,) if mlp else (selection.k, selection.v)
        observation.channels[key] = channels
        if not observation.compare:
            return
        figures = observation.figures[key] = {}
        before = self._before.channels.get(key)
        if before is not None and list(map(len, before)) == list(map(len, channels)):
            size = layer.intermediate_size if mlp else layer.num_kv_heads * layer.head_dim
            kept = [_overlap(old, new, size) for old, new in zip(before, channels, strict=True)]
            figures["overlap"] = torch.stack(kept).mean()
        rows = observation.places if context_alone else observation.rows
        if rows is None or not len(rows):
            return
        inputs = hidden_states.detach().flatten(0, -2).index_select(0, rows)
        if mlp:
            figures["captured"] = _share(mlp_energy(layer, inputs), channels[0])
            return
        energy = attention_energy(layer, inputs)
        scores = key_channel_scores(energy.q, energy.k, layer.groups, layer.head_dim)
        figures["captured"] = (_share(scores, channels[0]) + _share(energy.v, channels[1])) / 2

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call, as plain data; the host waits for the device."""
        done, self._done = [each for each in self._done if each.figures], []
        records, self._energy_records = self._energy_records, []
        return [*map(_plain, done), *records]

    def take_energy(self) -> dict[str, float]:
        """Values for a log line: the share of the energy that chosen rows held since the last call, mean and least.

        Empty where no backward pass chose rows. The host waits for the device.
        """
        shares = self.energy.take()
        if not shares:
            return {}
        if self.every and self._step >= self._energy_due:
            layers = [{"layer": layer, "part": ROWS, ENERGY: share} for layer, share in shares.items()]
            self._energy_records.append({"step": self._step, "layers": layers})
            self._energy_due = self._step + self.every
        mean = sum(shares.values()) / len(shares)
        return {f"sparsity/{ENERGY}": mean, f"sparsity/{ENERGY}_min": min(shares.values())}


def _overlap(before: Tensor, now: Tensor, size: int) -> Tensor:
    """The share of ``now`` that was in ``before``."""
    was = torch.zeros(size, device=now.device).index_fill_(0, before.to(now.device), 1.0)
    return was.index_select(0, now).mean()


def _share(energy: Tensor, kept: Tensor) -> Tensor:
    """The energy of the channels ``kept``, over that of as many best ones."""
    best = energy.topk(len(kept)).values.sum()
    return (energy.index_select(0, kept).sum() / best.clamp_min(torch.finfo(torch.float32).tiny)).float()


def _counts(step: int, partition: TokenPartition, layers: list[DecoderLayer], sparsity: dict) -> dict[str, Any]:
    """The part of a record that follows from the numbers of rows and channels."""
    rows = max(partition.num_dense + partition.num_context, 1)
    saved, weights, by_part = 0.0, 0, {}
    for layer in layers:
        keys, queries = (heads * layer.head_dim for heads in (layer.num_kv_heads, layer.num_heads))
        sizes = {
            "mlp": (layer.intermediate_size, 3 * layer.hidden_size * layer.intermediate_size),
            "self_attn": (keys, layer.hidden_size * (2 * queries + 2 * keys)),
        }
        for part, (channels, weight) in sizes.items():
            weights += weight
            left_out = sparsity.get((layer.index, part), 0.0)
            share = partition.num_context / rows * (1 - keep_count(channels, left_out) / channels) if left_out else 0.0
            by_part[layer.index, part] = share
            saved += share * weight
    return {
        "step": step,
        "context_share": partition.context_share,
        "saved_flops": saved / weights,
        "saved_by_part": by_part,
    }


def _plain(observation: Observation) -> dict[str, Any]:
    record = dict(observation.record)
    saved = record.pop("saved_by_part")
    keys = list(observation.figures)
    flat = [(key, metric, value) for key in keys for metric, value in observation.figures[key].items()]
    values = torch.stack([value.to("cpu", torch.float32) for *_, value in flat]).tolist() if flat else []
    layers: dict[tuple[int, str], dict[str, Any]] = {}
    for index, name in sorted(keys):
        layers[index, name] = {"layer": index, "part": name, "saved_flops": saved[index, name]}
    for (key, metric, _), value in zip(flat, values, strict=True):
        layers[key][metric] = value
    return record | {"layers": list(layers.values())}
