"""Times the optimiser steps of a run across interruptions, and measures its peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.runtime.state import get_state
from sparse_unsloth.utils.distributed import world_size

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class StepTimes:
    """Seconds of each optimiser step of a run, and whether the step was sparse.

    ``starts`` are the steps at which the parts of the run began: the first step, and each step after an interruption.
    """

    seconds: list[float] = field(default_factory=list)
    sparse: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def warm(self) -> list[tuple[float, bool]]:
        """Returns the steps without the first of each part, which warms up."""
        pairs = zip(self.seconds, self.sparse, strict=True)
        return [pair for index, pair in enumerate(pairs) if index not in self.starts]

    def median(self, sparse: bool) -> float | None:
        """Returns the median of the warm sparse, or dense, steps; None if there are none."""
        chosen = [seconds for seconds, was in self.warm() if was is sparse]
        return statistics.median(chosen) if chosen else None


class StepTimer(TrainerCallback, ExportableState):
    """Times optimiser steps: forward, backward and update, without loading data, logging, saving and evaluation.

    It also keeps in the checkpoints what transformers' Trainer resets when it resumes, so that times and losses are
    those of the whole run, without interruptions and without steps that were lost in them.

    Args:
        sparsity: decides which steps count as sparse, where no attached model is trained.
        num_layers: the model's number of layers, for the layer rules.

    Attributes:
        begins: called once, before the first step.
        data: the digest of the training data (`data_digest`), stored in checkpoints.
    """

    def __init__(self, sparsity: SparsityConfig, num_layers: int):
        self.times = StepTimes()
        self.setup_seconds = 0.0
        self.begins: Callable[[], None] = lambda: None
        self.data: str | None = None
        self._sparsity, self._num_layers = sparsity, num_layers
        self._created = self._begun = time.perf_counter()
        self._first = True
        self._trainer: Trainer | None = None
        self._before: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Seconds of the whole training so far."""
        return self._before.get("train_seconds", 0.0) + time.perf_counter() - self._created

    def start(self, trainer: Trainer | None = None, before: dict[str, Any] | None = None) -> None:
        """Starts the clock just before ``trainer.train()``: the time to the first step is set-up, with calibration.

        Args:
            trainer: the trainer, for its losses.
            before: what `state` stored in the checkpoint to resume from.
        """
        self._created, self._first, self._trainer, self._before = time.perf_counter(), True, trainer, before or {}
        if before:
            self.times = StepTimes(**before["times"])

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, as plain data."""
        stored = {
            "times": asdict(self.times),
            "train_seconds": self.seconds,
            "setup_seconds": self.setup_seconds,
            "memory": self.memory(),
            "data": self.data,
            "processes": world_size(),
        }
        if self._trainer is not None and hasattr(self._trainer, "_tr_loss"):
            # The first process's loss since the last log line stands for those of all processes.
            stored["loss"] = [
                self._trainer._total_loss_scalar,
                self._trainer._tr_loss.item(),
                self._trainer._globalstep_last_logged,
            ]
            stored["tokens"] = getattr(self._trainer, "_total_train_tokens", None)
        return {"args": {}, "attributes": stored}

    def memory(self) -> dict[str, int]:
        """Returns the `peak_memory` over all parts."""
        found, earlier = peak_memory(), self._before.get("memory", {})
        return {name: max(found.get(name, 0), earlier.get(name, 0)) for name in {**earlier, **found}}

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self._trainer
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # a checkpoint of an older version has none
        if trainer is None:
            return
        if "loss" in self._before:
            trainer._total_loss_scalar, waiting, trainer._globalstep_last_logged = self._before["loss"]
            trainer._tr_loss += waiting
        if self._before.get("tokens") is not None:
            trainer._total_train_tokens = self._before["tokens"]
        if state.global_step >= state.max_steps:
            # Interrupted after the last step: the trainer would run another one.
            trainer._run_epoch = lambda *args, **kwargs: None

    def on_step_begin(self, args, state, control, **kwargs):
        if self._first:
            self.begins()
        self._begun = now()
        if self._first:
            self.setup_seconds, self._first = (
                self._before.get("setup_seconds", 0.0) + self._begun - self._created,
                False,
            )
            self.times.starts.append(len(self.times.seconds))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.times.seconds.append(now() - self._begun)
        attached = get_state(model)
        sparsity = self._sparsity if attached is None else attached.config  # what `auto` decided
        # global_step counts this step already.
        scale = sparsity.schedule.scale(state.global_step - 1, state.max_steps)
        self.times.sparse.append(sparsity.is_sparse(self._num_layers) and scale > 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        earlier = self._before.get("train_seconds")
        if earlier is None or "train_runtime" not in (logs or {}):
            return
        # The trainer's last line: it counts the samples and steps of the whole run, and the seconds of the last part.
        whole = logs["train_runtime"] + earlier
        changes = {
            name: logs[name] * logs["train_runtime"] / whole
            for name in ("train_samples_per_second", "train_steps_per_second")
            if name in logs
        } | {"train_runtime": whole}
        logs.update(changes)
        if state.log_history and "train_runtime" in state.log_history[-1]:
            state.log_history[-1].update(changes)


def throughput(trainer: Trainer, times: StepTimes) -> dict[str, float | None]:
    """Estimates the tokens without padding, by the mean length of the samples, and tokens per second.

    Args:
        trainer: after its training.
        times: of the optimiser steps; steps that warm up do not count for the speed.

    Returns:
        ``{"tokens": ..., "tokens_per_second": ...}``, the latter over forward, backward and update only; None where the
        samples have no ``input_ids``, or there was one step only.
    """
    data, state = trainer.train_dataset, trainer.state
    if not times.seconds or "input_ids" not in (getattr(data, "column_names", None) or ()):
        return {"tokens": None, "tokens_per_second": None}
    lengths = sum(map(len, data["input_ids"]))
    by_step = lengths * state.epoch / max(state.global_step, 1)
    timed = [seconds for seconds, _ in times.warm()]
    return {
        "tokens": by_step * len(times.seconds),
        "tokens_per_second": by_step * len(timed) / sum(timed) if timed else None,
    }


def peak_memory() -> dict[str, int]:
    """Returns peaks in bytes: ``gpu_allocated`` and ``gpu_reserved`` of this process's fullest GPU since the last
    `forget_peak_memory`, and ``host``, the largest resident set of the process."""
    found = {}
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        found["gpu_allocated"] = max(torch.cuda.max_memory_allocated(device) for device in devices)
        found["gpu_reserved"] = max(torch.cuda.max_memory_reserved(device) for device in devices)
    if resource is not None:
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def forget_peak_memory() -> None:
    """Resets the peaks of GPU memory."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def now() -> float:
    """Returns the time in seconds, after waiting for the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
