"""Runs a setting on a task: calibrate, train all seeds in lockstep, evaluate under both forwards, count the cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from benchmarks.quality.batches import evaluation_batches, training_batches
from benchmarks.quality.cost import StepTimes, costs, forward_flops, training_flops
from benchmarks.quality.evaluation import Figures, evaluate
from benchmarks.quality.fitting import FACTOR_RANK, SAMPLES, Calibration, calibrate
from benchmarks.quality.lockstep import Adapters, Lockstep, Sparsity
from benchmarks.quality.network import DENSE, layer_forward, read_network
from benchmarks.quality.settings import Setting
from benchmarks.quality.tasks import Items

AHEAD = 50
"""The host waits for the GPU after so many steps."""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings that all trainings of a task share.

    Attributes:
        steps: of the dense run.
        items: training items of each seed; they are repeated after ``items / batch_size`` steps.
        rate: peak learning rate, after a warm-up over the share ``warmup`` of the steps; then linear to 0.
    """

    steps: int
    items: int
    seeds: int = 5
    batch_size: int = 16
    rate: float = 1e-3
    warmup: float = 0.06
    lora_rank: int = 16
    lora_alpha: int = 32

    def rates(self, steps: int) -> list[float]:
        """Returns the learning rate of each step, by transformers' linear schedule with warm-up."""
        warm = max(1, round(self.warmup * steps))
        return [
            self.rate * (step / warm if step < warm else (steps - step) / max(1, steps - warm)) for step in range(steps)
        ]


@dataclass(frozen=True)
class Outcome:
    """One setting: figures and costs of each seed, training losses (means over seeds), the seconds that its
    steps took (without capturing graphs), and the whole."""

    dense: list[Figures]
    sparse: list[Figures]
    cost_flops: list[float]
    cost_time: list[float]
    losses: list[float]
    train_seconds: float
    seconds: float


class Experiment:
    """A task, its data on the device, the model and the calibration; settings run in turn, and beside each other in
    twins.

    Args:
        model: the base model, fp32, on the device.
        items: training items of each seed, at least ``settings.items``; held-out items are ``test``.
        calibration_items: of each seed, what channels are calibrated on.
        dtype: of frozen weights and products.
        layer: `layer_forward`, or it compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        items: Sequence[Items],
        test: Items,
        calibration_items: Sequence[Items],
        times: StepTimes,
        dtype: torch.dtype,
        layer: Callable = layer_forward,
        test_batch: int = 50,
    ):
        device, seeds = next(model.parameters()).device, range(settings.seeds)
        self.settings, self._times = settings, times
        self.network = read_network(model, dtype, settings.lora_alpha / settings.lora_rank)
        items = [own.first(settings.items) for own in items]
        self.batches = training_batches(items, settings.batch_size, settings.steps, seeds, device)
        self._test, order = evaluation_batches(test, test_batch, settings.seeds, device)
        self._parts = test.parts[order].tolist()
        passes = -(-SAMPLES // settings.batch_size)
        self._calibrated_on = training_batches(calibration_items, settings.batch_size, passes, seeds, device).counts
        self._model, self._calibration_items = model, calibration_items
        self._layer = layer
        self._own_adapters()
        self._dense_flops = [self._flops(Setting(), seed) for seed in seeds]

    def _own_adapters(self) -> None:
        self.adapters = Adapters(self.network, range(self.settings.seeds), self.settings.lora_rank)
        self.sparsity = Sparsity(self.network, self.settings.seeds, FACTOR_RANK)
        self.lockstep = Lockstep(self.network, self.adapters, self.sparsity, self._layer)
        self.stream = torch.cuda.Stream() if self.network.head.is_cuda else None
        if self.stream is not None:
            torch.cuda.synchronize()  # what was made on another stream is there

    def twin(self) -> Experiment:
        """Makes an experiment with the same model and data that can train at the same time, on a stream of its own."""
        other = copy.copy(self)
        other._own_adapters()
        return other

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration, computed when the first sparse setting needs it."""
        items = self._calibration_items
        return calibrate(self._model, items, min(SAMPLES, len(items[0])))

    def run(self, setting: Setting) -> Outcome:
        """Trains and evaluates ``setting``."""
        training = self.training(setting)
        while True:
            try:
                next(training)
            except StopIteration as end:
                return end.value

    def training(self, setting: Setting) -> Generator[None, None, Outcome]:
        """Trains and evaluates ``setting``, a step at a time, on the experiment's stream."""
        began = time.perf_counter()
        shape, steps = self.network.shape, round(self.settings.steps * setting.steps)
        plans = setting.plan(steps, shape.num_layers, shape.intermediate_size)
        with torch.cuda.stream(self.stream):
            self.lockstep.reset()
            generator = torch.Generator(self.network.head.device).manual_seed(0)
            if setting.mode.kind == "forward":
                choose(self.sparsity, setting, self.calibration if setting.calibrated else None, generator)
            losses, last = torch.zeros(steps, device=self.network.head.device), None
        started, captured = time.perf_counter(), self.lockstep.capture_seconds
        for step, (plan, rate) in enumerate(zip(plans, self.settings.rates(steps), strict=True)):
            with torch.cuda.stream(self.stream):
                if setting.selector == "random" and plan.mode.kind == "forward":
                    draw(self.sparsity, generator)
                    last = None
                if plan.mode != DENSE and plan.keep != last:
                    self.sparsity.keep(plan.keep)
                    last = plan.keep
                self.lockstep.step(self.batches.batch(step), self.batches.layout, plan.mode, rate)
                losses[step] = self.lockstep.losses.mean()
            if step % AHEAD == AHEAD - 1:
                self._synchronize()
            yield
        self._synchronize()
        train_seconds = time.perf_counter() - started - (self.lockstep.capture_seconds - captured)
        with torch.cuda.stream(self.stream):
            dense = evaluate(self.lockstep, self._test, self._parts, DENSE)
            sparse = dense
            if setting.mode.kind == "forward":
                self.sparsity.keep(setting.keep(shape.num_layers, shape.intermediate_size))
                sparse = evaluate(self.lockstep, self._test, self._parts, setting.mode)
        spent = [self.costs(setting, seed) for seed in range(self.settings.seeds)]
        return Outcome(
            dense=dense,
            sparse=sparse,
            cost_flops=[flops for flops, _ in spent],
            cost_time=[seconds for _, seconds in spent],
            losses=losses.tolist(),
            train_seconds=train_seconds,
            seconds=time.perf_counter() - began,
        )

    def _flops(self, setting: Setting, seed: int) -> list[int]:
        shape, steps = self.network.shape, round(self.settings.steps * setting.steps)
        plans = setting.plan(steps, shape.num_layers, shape.intermediate_size)
        counts = [self.batches.counts[step][seed] for step in range(steps)]
        return training_flops(shape, plans, counts, self.settings.lora_rank, FACTOR_RANK)

    def costs(self, setting: Setting, seed: int) -> tuple[float, float]:
        """Returns ``(FLOPs, time)`` of a run over those of the dense run.

        The calibration counts too: two passes over its samples.
        """
        shape, rank = self.network.shape, self.settings.lora_rank
        calibration = 0
        if setting.calibrated:
            calibration = 2 * forward_flops(shape, [step[seed] for step in self._calibrated_on], rank)
        share = self.batches.context_share
        return costs(setting, self._flops(setting, seed), self._dense_flops[seed], calibration, self._times, share)

    def _synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@torch.no_grad()
def choose(sparsity: Sparsity, setting: Setting, calibration: Calibration | None, generator: torch.Generator) -> None:
    """Writes the tensors that decide the channels of ``setting``: the calibrated factors, or random ranks."""
    if calibration is None:
        draw(sparsity, generator)
        return
    for name in ("down", "up_gate", "up_up", "gain"):
        getattr(sparsity.tensors, name).copy_(getattr(calibration, name))


@torch.no_grad()
def draw(sparsity: Sparsity, generator: torch.Generator) -> None:
    """Draws new random ranks."""
    scores = torch.rand(sparsity.ranks.shape, generator=generator, device=sparsity.ranks.device)
    sparsity.ranks.copy_(scores.argsort(dim=-1).argsort(dim=-1))
