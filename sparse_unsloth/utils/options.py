"""Types of command-line options: numbers within bounds. argparse prints what they raise after the option's name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole(least: int = 1) -> Callable[[str], int]:
    """The type of an integer from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} on, given {text!r}")
        return value

    return parse


def real(
    *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The type of a finite number within the bounds that are given."""
    words = {"above": above, "of at least": least, "below": below, "at most": most}
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if math.isfinite(bound))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value < below and least <= value <= most):
            raise argparse.ArgumentTypeError(f"must be a number{bounds and f' {bounds}'}, given {text!r}")
        return value

    return parse
