"""Compares the times of steps in pairs, and says whether the machine was too busy for that."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

WIDE = 0.2
"""The widest middle half of the pairs, of their median, that is judged. Steps on idle cores differ by half of it: their
batches have other lengths."""
BUSY = 1.25
"""Load averages a core from which other processes took much of the time. Training alone makes 1."""


@dataclass(frozen=True)
class Pairs:
    """How many times as fast the second of two steps on one batch is, over the pairs of a training.

    Attributes:
        speed: of each pair.
        load: the machine's load average of the last minute; None where the system has none.
        cores: of the machine.
    """

    speed: list[float]
    load: float | None
    cores: int

    @classmethod
    def of(cls, first: list[float], second: list[float]) -> Pairs:
        """Compares the seconds of two trainings' steps; the first pair warms up and does not count."""
        speed = [slow / fast for slow, fast in zip(first[1:], second[1:], strict=True)]
        return cls(speed, os.getloadavg()[0] if hasattr(os, "getloadavg") else None, os.cpu_count() or 1)

    @property
    def median(self) -> float | None:
        """The median speed; None without a pair."""
        return statistics.median(self.speed) if self.speed else None

    @property
    def middle_half(self) -> tuple[float, float] | None:
        """The quartiles; None with fewer than two pairs."""
        if len(self.speed) < 2:
            return None
        low, _, high = statistics.quantiles(self.speed, method="inclusive")
        return low, high

    def reasons_against(self) -> list[str]:
        """Returns why the machine was too busy to judge the times; empty where it was not."""
        reasons = []
        if self.load is not None and self.load > BUSY * self.cores:
            reasons.append(f"its load average was {self.load:.1f} on {self.cores} cores")
        if self.median is not None and self.middle_half is not None:
            low, high = self.middle_half
            if high - low > WIDE * self.median:
                reasons.append(f"the middle half of the pairs reaches from {low:.2f} to {high:.2f}")
        return reasons

    def verdict(self) -> str:
        """Returns a sentence that says whether this machine was too busy to compare times."""
        if self.middle_half is None:
            return "The times cannot be judged: there are fewer than two pairs."
        reasons = self.reasons_against()
        if reasons:
            return f"This machine was too busy to judge times: {', and '.join(reasons)}. Run it again on an idle one."
        low, high = self.middle_half
        load = "" if self.load is None else f", load average {self.load:.1f} on {self.cores} cores"
        return f"The times can be judged: the middle half of the pairs lies between {low:.2f} and {high:.2f}{load}."

    def as_dict(self) -> dict[str, object]:
        """Returns the figures as plain data."""
        return {
            "speed": self.speed,
            "median": self.median,
            "middle_half": self.middle_half,
            "load": self.load,
            "cores": self.cores,
            "verdict": self.verdict(),
        }
