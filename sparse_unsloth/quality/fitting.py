"""Calibration of every seed by the library, and stand-ins for dropped channels fitted to the adapters as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparse_unsloth.calibration import DroppedMoments, collect_statistics
from sparse_unsloth.config import EstimatorConfig, LayerSparsity
from sparse_unsloth.energy import base_weight
from sparse_unsloth.estimator import build_estimator, fit_compensation
from sparse_unsloth.layers import find_layers
from sparse_unsloth.partition import IGNORE_INDEX
from sparse_unsloth.quality.batches import Batch, Layout
from sparse_unsloth.quality.lockstep import Adapters, Lockstep
from sparse_unsloth.quality.network import DENSE, Mode, attention, gated_mlp, rms_norm, roles_of
from sparse_unsloth.quality.tasks import Items

FACTOR_RANK = 8
SAMPLES = 32
"""As the library's default; `SAMPLES` calibrate channels."""


@dataclass(frozen=True)
class Calibration:
    """What the library's calibration says of each layer and seed; fp32 on the device.

    Attributes:
        energy: ``[layers, seeds, intermediate_size]``, mean square of each MLP channel.
        down: ``[layers, seeds, 2 rank, hidden_size]``; up_gate, up_up: ``[layers, seeds, intermediate_size, rank]``.
        gain: of kind "prior", ``[layers, seeds, intermediate_size]``.
        norms: ``[layers, intermediate_size]``, of the down projection's columns.
        attention: energies of q, k and v, each ``[layers, seeds, width]``.
    """

    energy: Tensor
    down: Tensor
    up_gate: Tensor
    up_up: Tensor
    gain: Tensor
    norms: Tensor
    attention: tuple[Tensor, Tensor, Tensor]


def calibrate(model: nn.Module, items: Sequence[Items], count: int = SAMPLES) -> Calibration:
    """Calibrates each seed on its first ``count`` items, with the base model."""
    layers = find_layers(model)
    everything = [LayerSparsity(0.5, 0.5)] * len(layers)
    only_mlp = [LayerSparsity(0.5, 0.0)] * len(layers)
    found: dict[str, list[list[Tensor]]] = {}
    device = next(model.parameters()).device
    for own in items:
        statistics = collect_statistics(model, layers, everything, _samples(own.first(count)), progress=False)
        config = EstimatorConfig(kind="prior", rank=FACTOR_RANK)
        estimator = build_estimator(layers, only_mlp, config, statistics, progress=False)
        of: dict[str, list[Tensor]] = {}
        for index in range(len(layers)):
            known, estimate = statistics.layers[index], estimator.layers[index]
            gate, up = (estimate.factors[f"mlp.{name}_proj"] for name in ("gate", "up"))
            values = {"energy": known.energy["mlp"], "gain": estimate.gain["mlp"]}
            values |= {"down": torch.cat((gate.down, up.down)), "up_gate": gate.up, "up_up": up.up}
            values |= {name: known.energy[name] for name in "qkv"}
            for name, value in values.items():
                of.setdefault(name, []).append(value)
        for name, values in of.items():
            found.setdefault(name, []).append(torch.stack(values))
    stacked = {name: torch.stack(values, dim=1).to(device) for name, values in found.items()}
    norms = torch.stack([base_weight(layer, "mlp.down_proj").dense(torch.float32).norm(dim=0) for layer in layers])
    attention_energy = tuple(stacked.pop(name) for name in "qkv")
    return Calibration(norms=norms, attention=attention_energy, **stacked)


def _samples(items: Items, size: int = 8) -> list[dict[str, Tensor]]:
    """Batches as a collator makes them, padded on the right."""
    batches = []
    for start in range(0, len(items), size):
        lengths, prompts = items.lengths[start : start + size], items.prompts[start : start + size]
        tokens = items.tokens[start : start + size, : lengths.max()]
        at = np.arange(tokens.shape[1])
        real = at < lengths[:, None]
        labels = np.where(real & (at >= prompts[:, None]), tokens, IGNORE_INDEX)
        arrays = {"input_ids": tokens, "attention_mask": real.astype(np.int64), "labels": labels}
        batches.append({name: torch.as_tensor(array) for name, array in arrays.items()})
    return batches


@torch.no_grad()
def fit_stand_ins(
    lockstep: Lockstep, batches: Sequence[Batch], layout: Layout, rank: int, stream: str = "dense"
) -> None:
    """Fits every layer's stand-in to the difference that its mask makes, with the adapters as they are, and writes it.

    Args:
        batches: whose context rows, without each sequence's first, are the samples.
        rank: of the fit; the tensors of `Sparsity` may hold more, which stay zero.
        stream: "dense": layers see what they would in the dense model; "sparse": what they see behind the layers
            before them, masked and compensated.
    """
    network, sparsity, leaves = lockstep.network, lockstep.sparsity, lockstep.adapters.leaves
    rotary = network.rotary(layout)
    first = (layout.positions() == 0).to(network.head.device)[:, None]
    hidden = [torch.nn.functional.embedding(batch.ids, network.embedding) for batch in batches]
    hidden = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in hidden]
    masked, compensated = Mode("forward"), Mode("forward", compensation=True)
    for index, weights in enumerate(network.layers):
        selection, roles = sparsity(index), [roles_of(batch, masked) for batch in batches]
        inputs = []
        for number, x in enumerate(hidden):
            normed = rms_norm(x, weights.attention_norm, network.epsilon)
            mixed = attention(normed, weights, leaves[index], None, roles[number], rotary, network, layout, DENSE)
            hidden[number] = x + mixed
            inputs.append(rms_norm(hidden[number], weights.mlp_norm, network.epsilon))
        outputs = [gated_mlp(x, weights, leaves[index], None, roles[0], network, DENSE) for x in inputs]
        if bool((~selection.channels).any()):
            sums = [0.0] * 5
            for x, dense, role in zip(inputs, outputs, roles, strict=True):
                sparse = gated_mlp(x, weights, leaves[index], selection, role, network, masked)
                sums = [a + b for a, b in zip(sums, _moments(x, dense - sparse, role.context & ~first), strict=True)]
            _write_stand_ins(lockstep.adapters, sparsity(index), sums, rank)
            if stream == "sparse":
                outputs = [
                    gated_mlp(x, weights, leaves[index], selection, role, network, compensated)
                    for x, role in zip(inputs, roles, strict=True)
                ]
        hidden = [x + y for x, y in zip(hidden, outputs, strict=True)]


def _moments(x: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, z = (y.to(wide) * rows for y in (x, z))
    terms = (x.sum(1), z.sum(1), torch.bmm(x.mT, x), torch.bmm(z.mT, x), rows.sum((1, 2)))
    return tuple(term.double() for term in terms)


def _write_stand_ins(adapters: Adapters, selection, sums: Sequence[Tensor], rank: int) -> None:
    for seed in range(len(adapters.seeds)):
        x, z, xx, zx = (term[seed] / sums[4][seed] for term in sums[:4])
        moments = DroppedMoments(
            sparsity=0.0,
            mean_input=x.float(),
            mean_dropped=z.float(),
            input_covariance=(xx - torch.outer(x, x)).float(),
            cross_covariance=(zx - torch.outer(z, x)).float(),
        )
        fitted = fit_compensation(moments, rank, x.device)
        selection.stand_in_down[seed].zero_()[:rank].copy_(fitted.down)
        selection.stand_in_up[seed].zero_()[:, :rank].copy_(fitted.up)
        selection.stand_in_bias[seed].copy_(fitted.bias)
