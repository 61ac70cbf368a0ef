"""Searches a sparsity for each layer on samples (`calibrate`): measures parts, allocates, measures the whole, corrects.

Parts interact, the more the sparser they are. So after a joint measurement, groups of neighbouring MLPs and of
attention are measured beside the others, the curves are rescaled, and the allocation is repeated. The best recipe is
kept.

The prediction is of the divergence from the dense model, the expected increase of the loss on its own answers. The loss
of the labels follows it only on a model that already gives such answers: on SmolLM2-135M, with labels at 3.5 nats,
recipes of divergence 0.65 and 0.59 cost 0.33 and 0.62.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_unsloth.autosparsity.allocation import Option, allocate
from sparse_unsloth.autosparsity.budget import DataShape, frozen_share, part_cost
from sparse_unsloth.autosparsity.candidates import fit_estimator, of_recipe
from sparse_unsloth.autosparsity.curves import Curves, PartKey
from sparse_unsloth.autosparsity.journal import Journal, journal_key
from sparse_unsloth.autosparsity.probe import (
    LossProbe,
    Measured,
    ProbeBatch,
    Recipe,
    attached,
    prepare_batches,
    with_sparsity,
)
from sparse_unsloth.channels.calibration import CapturedEnergy, energy_captured
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.layer_rules import PARTS, LayerSparsity, collect, share, sparse_parts
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.errors import CalibrationError, EstimatorError
from sparse_unsloth.model.decoder_layer import DecoderLayer, find_layers
from sparse_unsloth.utils.environment import require, version_of

MLP_LEVELS = (0.5, 0.75, 0.9, 0.97)
ATTENTION_LEVELS = (0.25, 0.5, 0.75)
BUDGET = 0.5
ROUNDS = 2
"""Most corrections by measuring groups of parts beside the others."""
PART_BATCHES = 2
GROUPS = 6
"""Most groups of layers of one kind: single parts beside the others measure mostly noise, at five times the cost."""
TIGHTENINGS = 4
"""Most further allocations while a loss bound is not satisfied; each costs one joint measurement."""
JOURNAL_FILE = "measurements.jsonl"
RELATIVE_ERROR, ABSOLUTE_ERROR = 0.25, 0.02
"""A prediction within either of the measured divergence (a share of it; nats) is accurate enough."""


@dataclass(frozen=True)
class Round:
    """One allocation and its joint measurement.

    Args:
        recipe: the sparsities tried.
        share: FLOPs of the context tokens' frozen-weight matmuls, as a share of the dense ones.
        predicted: divergence in nats, predicted before it was measured.
        divergence: measured divergence in nats, the expected increase of the loss on the dense model's own answers.
        measured: measured increase of the loss of the labels, in nats.
        corrected: whether a joint measurement had rescaled the curves before.
    """

    recipe: Recipe
    share: float
    predicted: float
    divergence: float
    measured: float
    corrected: bool

    @property
    def foretold(self) -> bool:
        """Whether the prediction is within `RELATIVE_ERROR` or `ABSOLUTE_ERROR` of the measurement."""
        return abs(self.predicted - self.divergence) <= max(RELATIVE_ERROR * self.divergence, ABSOLUTE_ERROR)


@dataclass(frozen=True)
class HeldOut:
    """A recipe on held-out samples: losses in nats, FLOPs as in `Round.share`."""

    share: float
    dense_loss: float
    increase: float
    divergence: float
    positions: int


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Args:
        config: the recipe, ready for `attach`; without an estimator's path until it is saved.
        estimator: the estimator that the recipe was measured with; None for criteria without one.
        asked: the bound: ``{"budget": 0.5}`` or ``{"max_loss": 0.01}``.
        dense_loss: loss of the labels in nats, over ``positions`` loss positions of the probe samples.
        alone: the measurements of each part alone, by part and sparsity.
        rounds: every allocation tried; ``chosen`` is one of them.
        captured: share of the oracle's energy, by layer; None where nothing is sparse or the prompts are all alike.
        data: token counts of the samples.
        step_flops: FLOPs of a training step on these samples, sparse over dense (`DataShape`).
        held_out: results by "calibrated" and the presets' names, for comparison; empty without such samples.
    """

    config: SparsityConfig
    estimator: Estimator | None
    layers: list[DecoderLayer]
    model_name: str
    asked: dict[str, float]
    dense_loss: float
    positions: int
    alone: dict[PartKey, dict[float, Measured]]
    rounds: list[Round]
    chosen: Round
    captured: CapturedEnergy | None
    data: DataShape
    step_flops: float
    held_out: dict[str, HeldOut]

    @property
    def speedup(self) -> float:
        """The speed-up of a sparse step if time were proportional to FLOPs."""
        return 1 / self.step_flops


def calibrate(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    probe_samples: Sequence[Mapping[str, Any]] | None = None,
    part_batches: int = PART_BATCHES,
    held_out: Sequence[Mapping[str, Any]] | None = None,
    config: SparsityConfig | Mapping[str, Any] | str | Path | None = None,
    mlp_levels: Sequence[float] = MLP_LEVELS,
    attention_levels: Sequence[float] = ATTENTION_LEVELS,
    lora_rank: int = 16,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Finds a sparsity for each layer from this model and samples; the model is unchanged afterwards.

    Args:
        model: not attached, with its adapters as training will begin (under Unsloth it must have them). Base weights
            are frozen.
        samples: batches as the model receives them, with ``labels``; they calibrate the estimator.
        budget: FLOPs of the context tokens' frozen-weight matmuls (forward, input gradient and estimator) as a share
            of the dense ones, in (0, 1). The loss is minimised.
        max_loss: instead of ``budget``: bound on the measured increase of the answer loss and on the divergence from
            the dense model, in nats. The FLOPs are minimised. Without either: ``budget=0.5``.
        probe_samples: other batches, on which losses are measured. None uses every second batch of ``samples`` for
            this alone (a single batch for both), so that the estimator is tested on other batches.
        part_batches: how many of the probe batches measure single parts; recipes use all.
        held_out: further batches, on which recipe and dense model are compared in the end.
        config: everything but the layer rules: estimator, dense tokens, schedule, seed.
        mlp_levels, attention_levels: sparsities to choose from, besides 0; empty leaves that part dense.
        lora_rank: for the predicted FLOPs of a step.
        output_dir: stores measurements, so that a later call with the same model, samples and settings resumes; None:
            nothing is stored.
        progress: show bars on a terminal.

    Raises:
        CalibrationError: samples without context tokens, labels or loss; invalid levels or bounds; a bound that no
            recipe satisfies; an attached model.
        AttachError: a layer has no sparse path.
        EstimatorError: the estimator cannot be calibrated.
        InstallError: scipy is missing.
    """
    require("study", "calibrate()", "scipy")
    asked = _asked(budget, max_loss)
    base = SparsityConfig.from_any(config).whole_rows()
    levels = {"mlp": _levels("mlp_levels", mlp_levels), "self_attn": _levels("attention_levels", attention_levels)}
    if not any(levels.values()):
        raise CalibrationError("mlp_levels and attention_levels are both empty, so nothing could be made sparse.")
    samples, probe_samples = _divide(samples, probe_samples)
    shape = ModelShape.from_config(model.config)
    layers = find_layers(model)
    highest = {part: {"all": max(values)} if values else {} for part, values in levels.items()}
    every = base.model_copy(
        update={
            "preset": None,
            **highest,
            # The estimator is built separately; attaching would read or write a path.
            "estimator": base.estimator.model_copy(update={"path": None}),
        }
    )
    costs = _Costs(shape, base, levels)
    if "budget" in asked:
        costs.check_reachable(asked["budget"])
    with attached(model, every) as state:
        masked = state.backend.name != "unsloth"
        device = next(model.parameters()).device
        batches = prepare_batches(probe_samples, device, base, masked)
        kept_apart = prepare_batches(held_out, device, base, masked) if held_out else []
        settings = {
            "levels": levels,
            "config": every.model_dump(mode="json"),
            "backend": state.backend.name,
            "version": version_of("sparse-unsloth") or "unknown",
        }
        key = journal_key(model, layers, samples, settings)
        journal = Journal(None if output_dir is None else Path(output_dir) / JOURNAL_FILE, key)
        fitted = fit_estimator(model, layers, every, samples, progress)
        probe = LossProbe(state, fitted, journal, progress)
        search = _Search(probe, batches, part_batches, levels, costs, asked)
        chosen = search.run()
        recipe = chosen.recipe
        apart = _hold_out(probe, recipe, kept_apart, costs) if kept_apart else {}
    final = _config(base, recipe, fitted)
    estimator = of_recipe(fitted, recipe)
    judged = held_out or probe_samples
    data = DataShape.of([*batches, *kept_apart])
    return Calibration(
        config=final,
        estimator=estimator,
        layers=layers,
        model_name=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        asked=asked,
        dense_loss=search.dense.loss,
        positions=sum(len(batch.labels) for batch in batches),
        alone=search.alone,
        rounds=search.rounds,
        chosen=chosen,
        captured=_captured(model, layers, final, estimator, judged, progress),
        data=data,
        step_flops=data.step_ratio(shape, recipe, lora_rank, costs.rank),
        held_out=apart,
    )


class _Costs:
    """FLOPs of recipes and parts as shares of the context tokens' dense frozen-weight matmuls."""

    def __init__(self, shape: ModelShape, config: SparsityConfig, levels: Mapping[str, Sequence[float]]):
        self.rank = config.estimator.rank if config.criterion == "estimator" else 0
        self._shape, self._levels = shape, levels
        self._part = {
            (part, sparsity): part_cost(shape, part, sparsity, self.rank)
            for part in PARTS
            for sparsity in {0.0, *levels[part]}
        }

    def part(self, part: str, sparsity: float) -> float:
        """The cost of one layer's ``part`` at this sparsity."""
        return self._part[part, sparsity]

    def share(self, recipe: Recipe) -> float:
        return frozen_share(self._shape, recipe, self.rank)

    def bound(self, budget: float) -> float:
        """``budget`` without the cost of parts that are not candidates."""
        fixed = sum(part_cost(self._shape, part, 0.0, self.rank) for part in PARTS if not self._levels[part])
        return budget - fixed * self._shape.num_layers

    def check_reachable(self, budget: float) -> None:
        top = LayerSparsity(*(max(self._levels[part], default=0.0) for part in PARTS))
        least = self.share((top,) * self._shape.num_layers)
        if budget < least:
            raise CalibrationError(
                f"budget: {budget:g} cannot be reached: with every layer at its highest level (MLP {top.mlp:g}, "
                f"attention {top.self_attn:g}) context tokens still compute {least:.3g} of their dense FLOPs. Ask for "
                f"at least {least:.3g}, or give higher mlp_levels or attention_levels."
            )


@dataclass(frozen=True)
class _Joint:
    """Predicts the divergence of a recipe from the sum of its curves: ``divergence (sum / total)^power``.

    It passes through the divergence measured at one recipe, with the slope there: the rescaled curves are that slope,
    so the power is their sum over the divergence. Before any measurement the prediction is the sum itself.

    Args:
        total, divergence: sum of the curves and divergence at that recipe, in nats.
    """

    total: float = 1.0
    divergence: float = 1.0

    @property
    def _power(self) -> float:
        return min(4.0, max(0.5, self.total / self.divergence))

    def predict(self, total: float) -> float:
        """The divergence in nats where the curves add up to ``total``."""
        return self.divergence * (max(0.0, total) / self.total) ** self._power

    def invert(self, divergence: float) -> float:
        """The sum of the curves that gives ``divergence``."""
        return self.total * (divergence / self.divergence) ** (1 / self._power)


class _Search:
    """Curves, allocations and joint measurements on one set of batches."""

    def __init__(
        self,
        probe: LossProbe,
        batches: Sequence[ProbeBatch],
        part_batches: int,
        levels: Mapping[str, Sequence[float]],
        costs: _Costs,
        asked: Mapping[str, float],
    ):
        self._probe, self._levels, self._costs, self._asked = probe, levels, costs, asked
        self._batches, self._part_batches = batches, batches[:part_batches]
        self._parts: list[PartKey] = [
            (layer.index, part) for layer in probe.layers for part, values in levels.items() if values
        ]
        (self.dense,) = probe.measure([probe.dense], batches, "Dense loss")
        self.alone: dict[PartKey, dict[float, Measured]] = {part: {} for part in self._parts}
        self.rounds: list[Round] = []
        self._joint = _Joint()
        # Increase of the labels' loss over the divergence, at least 1.
        self._excess = 1.0

    def run(self) -> Round:
        alone = [(part, level) for part in self._parts for level in self._levels[part[1]]]
        recipes = [with_sparsity(self._probe.dense, [part], level) for part, level in alone]
        dense, *found = self._probe.measure([self._probe.dense, *recipes], self._part_batches, "Each part alone")
        for (part, level), measured in zip(alone, found, strict=True):
            self.alone[part][level] = measured._replace(loss=measured.loss - dense.loss)
        self._curves = Curves.fit(
            {part: {level: m.divergence for level, m in values.items()} for part, values in self.alone.items()}
        )
        for number in range(ROUNDS + 1 + TIGHTENINGS):
            recipe = self._allocate()
            if recipe in [outcome.recipe for outcome in self.rounds]:
                break
            outcome = self._measure(recipe)
            self.rounds.append(outcome)
            if number >= ROUNDS and self._keeps_bound(outcome):
                break
            if number < ROUNDS:
                self._correct(outcome)
            total = self._total(recipe)
            if total > 0 and outcome.divergence > 0:
                self._joint = _Joint(total, outcome.divergence)
                self._excess = max(1.0, outcome.measured / outcome.divergence)
        return self._best()

    def _total(self, recipe: Recipe) -> float:
        return self._curves.total({part: getattr(recipe[part[0]], part[1]) for part in self._parts})

    def _allocate(self) -> Recipe:
        options = {
            (layer.index, part): self._options(layer.index, part) for layer in self._probe.layers for part in PARTS
        }
        options = {part: choices for part, choices in options.items() if len(choices) > 1}
        if "budget" in self._asked:
            chosen = allocate(options, flops=self._costs.bound(self._asked["budget"]))
        else:
            chosen = allocate(options, loss=self._joint.invert(self._asked["max_loss"] / self._excess))
        recipe = self._probe.dense
        for part, level in chosen.items():
            recipe = with_sparsity(recipe, [part], level)
        return recipe

    def _options(self, index: int, part: str) -> list[Option]:
        return [
            Option(level, self._curves.increase((index, part), level), self._costs.part(part, level))
            for level in (0.0, *self._levels[part])
        ]

    def _measure(self, recipe: Recipe) -> Round:
        predicted, number = self._joint.predict(self._total(recipe)), len(self.rounds) + 1
        (measured,) = self._probe.measure([recipe], self._batches, f"All together, round {number}")
        increase = measured.loss - self.dense.loss
        return Round(recipe, self._costs.share(recipe), predicted, measured.divergence, increase, number > 1)

    def _correct(self, outcome: Round) -> None:
        """Rescales the curves by what groups of parts add beside the others of this recipe; each is made dense once."""
        groups = self._groups(outcome.recipe)
        recipes = [outcome.recipe, *(with_sparsity(outcome.recipe, group, 0.0) for group in groups)]
        whole, *found = self._probe.measure(recipes, self._part_batches, "Groups beside the others", outcome.recipe)
        chosen = {part: getattr(outcome.recipe[part[0]], part[1]) for part in self._parts}
        marginal = [whole.divergence - measured.divergence for measured in found]
        self._curves.rescale(chosen, groups, marginal)

    def _groups(self, recipe: Recipe) -> list[list[PartKey]]:
        """The sparse parts in groups of one kind and neighbouring layers, at most `GROUPS` of a kind."""
        size = -(-len(recipe) // GROUPS)
        groups: dict[tuple[str, int], list[PartKey]] = {}
        for index, part in self._parts:
            if getattr(recipe[index], part):
                groups.setdefault((part, index // size), []).append((index, part))
        return list(groups.values())

    def _keeps_bound(self, outcome: Round) -> bool:
        return "budget" in self._asked or max(outcome.measured, outcome.divergence) <= self._asked["max_loss"]

    def _best(self) -> Round:
        if "budget" in self._asked:
            return min(self.rounds, key=lambda outcome: outcome.divergence)
        kept = [outcome for outcome in self.rounds if self._keeps_bound(outcome) and any(map(any, outcome.recipe))]
        if not kept:
            least = min((m.divergence, part, level) for part, of in self.alone.items() for level, m in of.items())
            raise CalibrationError(
                f"max_loss: no recipe was found that raises the answer loss by at most {self._asked['max_loss']:g}. "
                f"The part that costs least, layer {least[1][0]}'s {least[1][1]} at {least[2]:g}, costs {least[0]:.2g} "
                f"alone; {len(self.rounds)} recipes were measured, the lowest at "
                f"{min(max(o.measured, o.divergence) for o in self.rounds):.2g}. Allow more, or give lower levels."
            )
        return min(kept, key=lambda outcome: outcome.share)


def _asked(budget: float | None, max_loss: float | None) -> dict[str, float]:
    if budget is not None and max_loss is not None:
        raise CalibrationError("budget and max_loss are both given; give one of them.")
    if max_loss is not None:
        if not max_loss > 0:
            raise CalibrationError(f"max_loss: must be above 0 nats, given {max_loss!r}.")
        return {"max_loss": float(max_loss)}
    budget = BUDGET if budget is None else budget
    if not 0 < budget < 1:
        raise CalibrationError(f"budget: must be between 0 and 1, a share of the dense FLOPs, given {budget!r}.")
    return {"budget": float(budget)}


def _levels(name: str, levels: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(sorted({share(level) for level in levels} - {0.0}))
    except ValueError as error:
        raise CalibrationError(f"{name}: {error}, given {list(levels)!r}.") from None
    return values


def _divide(samples, probe_samples) -> tuple[list, list]:
    samples = list(samples or ())
    if not samples:
        raise CalibrationError("There are no calibration samples; the data set is empty.")
    if probe_samples is not None:
        return samples, list(probe_samples)
    return (samples[::2], samples[1::2]) if len(samples) > 1 else (samples, samples)


def _config(base: SparsityConfig, recipe: Recipe, fitted: Estimator | None) -> SparsityConfig:
    kind = base.estimator.kind if fitted is None else fitted.kind
    estimator = base.estimator.model_copy(update={"kind": kind, "path": None})
    rules = {part: collect({i: getattr(s, part) for i, s in enumerate(recipe)}) for part in PARTS}
    return base.model_copy(update={"preset": None, **rules, "estimator": estimator})


def _hold_out(probe: LossProbe, recipe: Recipe, batches: Sequence[ProbeBatch], costs: _Costs) -> dict[str, HeldOut]:
    """Measures the recipe, and presets whose sparse parts are all candidates, on ``batches``."""
    tried = {"calibrated": recipe}
    for name in ("o1", "o2"):
        preset = SparsityConfig(preset=name).layer_sparsity(len(recipe))
        if probe.candidates >= set(sparse_parts(preset)):
            tried[name] = tuple(preset)
    dense, *all_measured = probe.measure([probe.dense, *tried.values()], batches, "Held out")
    positions = sum(len(batch.labels) for batch in batches)
    found = {}
    for (name, tested), measured in zip(tried.items(), all_measured, strict=True):
        increase = measured.loss - dense.loss
        found[name] = HeldOut(costs.share(tested), dense.loss, increase, measured.divergence, positions)
    return found


def _captured(
    model: nn.Module,
    layers: list[DecoderLayer],
    config: SparsityConfig,
    estimator: Estimator | None,
    samples: Sequence[Mapping[str, Any]],
    progress: bool,
) -> CapturedEnergy | None:
    sparsity = config.layer_sparsity(len(layers))
    if not any(map(any, sparsity)):
        return None
    selectors = {"recipe": ChannelSelector(config, layers, estimator)}
    options = {"dense_tokens": config.dense_tokens, "progress": progress}
    try:
        return energy_captured(model, layers, sparsity, selectors, samples, **options)["recipe"]
    except EstimatorError:  # all prompts are alike: measured with their shared text, or not at all
        try:
            return energy_captured(model, layers, sparsity, selectors, samples, skip_shared=False, **options)["recipe"]
        except EstimatorError:
            return None
