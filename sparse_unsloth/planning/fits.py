"""Holds step times that were fitted to measured steps, and chooses among those that the package ships."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sparse_unsloth.errors import ConfigError
from sparse_unsloth.planning.step_time import StepTime

STORED = Path(__file__).with_name("step_times.json")


@dataclass(frozen=True)
class Errors:
    """Errors of predictions by a fit to all other rows, relative to the measurement (0.05 is 5 %).

    ``step`` is of step times, ``speedup`` of speed-ups over the dense baseline at the same shape; None without one.
    ``memory`` is of the peak that `peak_memory` predicts, which is not fitted. ``recorded`` is of steps with
    `cuda_graphs`, which the fit does not see; None where none were measured.
    """

    step_median: float
    step_worst: float
    speedup_median: float | None
    speedup_worst: float | None
    memory_median: float
    memory_worst: float
    recorded_median: float | None = None
    recorded_worst: float | None = None


@dataclass(frozen=True)
class Fitted:
    """Fitted step times of one GPU, backend and dtype, and their source.

    Attributes:
        device: the GPU's name.
        backend: "unsloth" or "peft".
        dtype: "4bit" or "bf16", of the base weights.
        step_time: the fitted model.
        errors: of predictions for rows that it was not fitted to.
        rows: the number of fitted rows; ``newest`` the date of the newest run, ``commits`` the measured code.
        smallest, largest: FLOPs of the measured steps; predictions beyond them extrapolate.
    """

    device: str
    backend: str
    dtype: str
    step_time: StepTime
    errors: Errors
    rows: int
    newest: str
    commits: tuple[str, ...]
    smallest: float
    largest: float


def load(path: Path = STORED) -> list[Fitted]:
    """Reads the fits of the package."""
    return [
        Fitted(
            **one
            | {
                "step_time": StepTime(**one["step_time"]),
                "errors": Errors(**one["errors"]),
                "commits": tuple(one["commits"]),
            }
        )
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]


def choose(fitted: list[Fitted], backend: str, dtype: str, device: str | None = None) -> Fitted | None:
    """Chooses the fit for a training: that of ``device`` if given, else the newest; None where nothing was measured.

    Args:
        device: a part of the GPU's name, in any case ("h100").

    Raises:
        ConfigError: no GPU with that name was measured.
    """
    if device is not None:
        known = sorted({one.device for one in fitted})
        fitted = [one for one in fitted if device.lower() in one.device.lower()]
        if not fitted:
            raise ConfigError(
                f"--device {device}: no steps were measured on such a GPU; known are {', '.join(known) or 'none'}. "
                "Measure yours with `sparse-unsloth bench --model DIR --out mine.csv`, and give --speed-table mine.csv."
            )
    same = [one for one in fitted if one.backend == backend]
    exact = [one for one in same if one.dtype == dtype]
    return max(exact or same, key=lambda one: one.newest, default=None)
