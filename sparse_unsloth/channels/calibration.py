"""Runs sample batches once, dense: collects the inputs of each sparse layer and its channel energies.

Only context tokens count (docs/how-it-works.md, section 4.6): no padding, prompts as they will be
trained. The first token of each sequence is left out: this attention sink holds up to 99.9 % of a layer's MLP energy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.channels.energy import attention_energy, mlp_energy
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.layer_rules import LayerSparsity, sparse_parts
from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.kernels.select import key_channel_scores
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.model.training_flags import training_mode
from sparse_unsloth.tokens.batch import Batch, read_batch
from sparse_unsloth.tokens.partition import partition_of
from sparse_unsloth.utils.progress import bar

INPUT_ROWS = 2048
"""Inputs kept of each layer, evenly spaced: a square root of their second moment. On SmolLM2-135M, 1024 rows give the
figures of all 2100 of 32 samples, 512 lose 0.01 of the energy at rank 8 (factors alone) or 0.001 (prior)."""


@dataclass
class LayerStatistics:
    """Of one layer, over the context rows of the samples; tensors on the CPU.

    Args:
        inputs: by "mlp" and "self_attn", the inputs ``[rows, hidden_size]`` of gate/up and of Q/K/V, at most about
            `INPUT_ROWS` of them.
        energy: by "mlp", "q", "k", "v", the mean square of each channel, fp32: ``[intermediate_size]``,
            ``[num_heads * head_dim]``, ``[num_kv_heads * head_dim]``.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """What a calibration pass saw: ``layers`` by index, and the number of context rows behind the figures."""

    layers: dict[int, LayerStatistics]
    rows: int


@dataclass(frozen=True)
class CapturedEnergy:
    """The share of the oracle's energy that a selector captures, by layer: of MLP, query-key and value channels.

    The energy of a query-key channel is ``(‖q‖ ‖k‖)²``. Shares are means over the batches.
    """

    mlp: dict[int, float]
    qk: dict[int, float]
    v: dict[int, float]

    def mean(self, what: str) -> float:
        """Mean over the layers of "mlp", "qk" or "v"."""
        shares = getattr(self, what)
        return sum(shares.values()) / len(shares)


def collect_statistics(
    model: nn.Module,
    layers: list[DecoderLayer],
    layer_sparsity: Sequence[LayerSparsity],
    samples: Sequence[Mapping[str, Any]],
    *,
    dense_tokens: str = "output",
    progress: bool = True,
) -> Statistics:
    """Runs ``model`` densely and without gradients over ``samples``; the model and the random state are then as before.

    Args:
        model: the outermost model.
        layers: all its decoder layers; those with sparsity above 0 are looked at.
        layer_sparsity: of each of them.
        samples: batches as the model receives them, with ``labels``; on any device.
        dense_tokens: as in `SparsityConfig`: which tokens are not context.
        progress: show a bar on a terminal.

    Raises:
        EstimatorError: no samples, none with labels or context rows, or a layer that the forward does not reach.
    """
    runs = _Runs(model, samples, dense_tokens, progress)
    quota = INPUT_ROWS // len(runs.batches)
    found = {layer.index: LayerStatistics() for layer in layers if any(layer_sparsity[layer.index])}
    parts = [(layers[index], part) for index, part in sparse_parts(layer_sparsity)]

    def observe(layer: DecoderLayer, part: str, rows: Tensor) -> None:
        statistics = found[layer.index]
        if part == "mlp":
            energies = {"mlp": mlp_energy(layer, rows)}
        else:
            energies = attention_energy(layer, rows)._asdict()
        for name, energy in energies.items():
            total = statistics.energy.get(name)
            statistics.energy[name] = energy.double() if total is None else total + energy
        if quota:
            kept = rows[:: -(-len(rows) // quota)].cpu()
            before = statistics.inputs.get(part)
            statistics.inputs[part] = kept if before is None else torch.cat((before, kept))

    runs.visit(parts, observe, "Calibration")
    for statistics in found.values():
        statistics.energy = {name: (total / runs.rows).float().cpu() for name, total in statistics.energy.items()}
    return Statistics(found, runs.rows)


def energy_captured(
    model: nn.Module,
    layers: list[DecoderLayer],
    layer_sparsity: Sequence[LayerSparsity],
    selectors: Mapping[str, ChannelSelector],
    samples: Sequence[Mapping[str, Any]],
    *,
    dense_tokens: str = "output",
    skip_shared: bool = True,
    progress: bool = True,
) -> dict[str, CapturedEnergy]:
    """Judges selectors: the energy of the channels that one keeps, over that of the best channels, batch by batch.

    Args:
        model, layers, layer_sparsity, samples, dense_tokens, progress: as in `collect_statistics`; the samples should
            not be those that the estimator was calibrated on.
        selectors: by a name of their own; the result has the same names.
        skip_shared: leave out the tokens with which all prompts begin and end alike (system prompt, chat template),
            which flatter a static ranking; for the selectors as for the oracle.

    Raises:
        EstimatorError: as `collect_statistics`; or nothing is left of the prompts.
    """
    runs = _Runs(model, samples, dense_tokens, progress)
    if skip_shared:
        runs.skip_shared()
    shares: dict[str, dict[str, dict[int, list[Tensor]]]] = {name: {"mlp": {}, "qk": {}, "v": {}} for name in selectors}

    def judge(name: str, what: str, layer: DecoderLayer, energy: Tensor, kept: Tensor) -> None:
        share = energy[kept].sum() / energy.topk(len(kept)).values.sum()
        shares[name][what].setdefault(layer.index, []).append(share)

    def observe(layer: DecoderLayer, part: str, rows: Tensor) -> None:
        sparsity = getattr(layer_sparsity[layer.index], part)
        if part == "mlp":
            energy = mlp_energy(layer, rows)
            for name, selector in selectors.items():
                judge(name, "mlp", layer, energy, selector.mlp(layer, rows, sparsity).channels)
            return
        energies = attention_energy(layer, rows)
        scores = key_channel_scores(energies.q, energies.k, layer.groups, layer.head_dim)
        for name, selector in selectors.items():
            chosen = selector.attention(layer, rows, sparsity)
            judge(name, "qk", layer, scores, chosen.k)
            judge(name, "v", layer, energies.v, chosen.v)

    parts = [(layers[index], part) for index, part in sparse_parts(layer_sparsity)]
    runs.visit(parts, observe, "Energy captured")
    return {
        name: CapturedEnergy(**{what: _means(values) for what, values in of.items()}) for name, of in shares.items()
    }


def _means(shares: Mapping[int, list[Tensor]]) -> dict[int, float]:
    return {index: torch.stack(values).mean().item() for index, values in shares.items()}


class _Runs:
    """Sample batches with the context rows that count in each, to be run through the model as often as needed."""

    def __init__(self, model: nn.Module, samples: Sequence[Mapping[str, Any]], dense_tokens: str, progress: bool):
        self._model = model
        self._progress = progress
        device = next(model.parameters()).device
        samples = list(samples or ())
        if not samples:
            raise EstimatorError(
                "There are no calibration samples. Pass at least one batch as the model receives it, or set "
                "estimator.calibration_samples above 0."
            )
        self.batches: list[tuple[Batch, Tensor]] = []
        self._starts: list[Tensor] = []
        for number, sample in enumerate(samples):
            batch = read_batch(sample).to(device)
            if batch.labels is None:
                raise EstimatorError(
                    f"Calibration sample {number} has no labels (its keys: {', '.join(sample) or 'none'}), so its "
                    "tokens have no roles. Pass batches as the trainer's collator makes them."
                )
            partition = partition_of(model, batch, dense_tokens)
            starts = batch.sequence_starts.flatten()
            rows = partition.context[~starts[partition.context]]
            if len(rows):
                self.batches.append((batch, rows))
                self._starts.append(starts)
        if not self.batches:
            raise EstimatorError(
                f"None of the {len(samples)} calibration samples has a context token: every token bears loss (or is "
                "padding), so nothing could be computed sparsely. Mask the prompts (completion_only_loss or "
                "assistant_only_loss in TRL, train_on_responses_only in Unsloth), or train densely."
            )

    @property
    def rows(self) -> int:
        """Context rows that count, of all batches."""
        return sum(len(rows) for _, rows in self.batches)

    def skip_shared(self) -> None:
        """Leaves out the tokens with which the context of every sequence begins and ends alike."""
        texts: list[tuple[int, Tensor, list[int]]] = []
        for number, ((batch, rows), starts) in enumerate(zip(self.batches, self._starts, strict=True)):
            sequence = starts.cumsum(0)[rows]
            ids = batch.input_ids.flatten()[rows]
            for which in sequence.unique():
                mine = sequence == which
                texts.append((number, rows[mine], ids[mine].tolist()))
        shortest = min(len(ids) for _, _, ids in texts)
        prefix = _common([ids for _, _, ids in texts], shortest)
        suffix = _common([ids[::-1] for _, _, ids in texts], shortest - prefix)
        left: dict[int, list[Tensor]] = {}
        for number, rows, ids in texts:
            if len(ids) > prefix + suffix:
                left.setdefault(number, []).append(rows[prefix : len(ids) - suffix])
        if not left:
            raise EstimatorError(
                f"All {len(texts)} prompts are alike, so nothing is left without the text that they share. Pass other "
                "prompts, or skip_shared=False."
            )
        self.batches = [(self.batches[number][0], torch.cat(rows)) for number, rows in left.items()]

    @torch.no_grad()
    def visit(
        self, parts: list[tuple[DecoderLayer, str]], observe: Callable[[DecoderLayer, str, Tensor], None], title: str
    ) -> None:
        """Runs each batch and hands ``observe`` the counted rows ``[N, hidden_size]`` of each part's input."""
        current: list[Tensor] = []
        seen: set[tuple[int, str]] = set()

        def hook_for(layer: DecoderLayer, part: str):
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
                seen.add((layer.index, part))
                observe(layer, part, hidden.detach().flatten(0, -2).index_select(0, current[0].to(hidden.device)))

            return hook

        handles = []
        devices = sorted({parameter.device.index for parameter in self._model.parameters() if parameter.is_cuda})
        batches = bar(self.batches, title, "batch", shown=self._progress)
        try:
            for layer, part in parts:
                module = layer.mlp if part == "mlp" else layer.self_attn
                handles.append(module.register_forward_pre_hook(hook_for(layer, part), with_kwargs=True))
            with torch.random.fork_rng(devices=devices), training_mode(self._model, False), _unpacked(self._model):
                for batch, rows in batches:
                    current[:] = [rows]
                    self._forward(batch)
        finally:
            batches.close()
            for handle in handles:
                handle.remove()
        missed = [f"{layer.name}.{part}" for layer, part in parts if (layer.index, part) not in seen]
        if missed:
            raise EstimatorError(
                f"The model's forward never called {missed[0]} ({len(missed)} of {len(parts)} parts), so it cannot be "
                "calibrated. Pass the outermost model that holds these layers."
            )

    def _forward(self, batch: Batch) -> None:
        given = batch.without_labels
        causal = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        if "logits_to_keep" in inspect.signature(type(causal).forward).parameters:
            given["logits_to_keep"] = 1
        self._model(**given, use_cache=False)


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """bitsandbytes must not repack 4-bit weights for CPU inference: no gradient would pass them any more."""
    name = "support_avx512bf16_for_cpu"
    flags = [(module, getattr(module, name)) for module in model.modules() if hasattr(module, name)]
    try:
        for module, _ in flags:
            setattr(module, name, False)
        yield
    finally:
        for module, flag in flags:
            setattr(module, name, flag)


def _common(texts: list[list[int]], limit: int) -> int:
    """Leading tokens, ``limit`` at most, that all ``texts`` share."""
    return next((n for n in range(limit) if len({text[n] for text in texts}) > 1), limit)
