"""Decides which optimiser steps are sparse, by the step alone, so that a resumed run needs no stored state."""

import math
from dataclasses import dataclass

from sparse_unsloth.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Dense steps, sparse steps, then dense steps again (docs/how-it-works.md, section 10).

    The late start is SparseLoRA's (arXiv 2506.16500), the dense tail is added here.

    Args:
        start_step: first sparse step; an int counts optimiser steps, a float in [0, 1] is a fraction of the training.
        end_step: first dense step of the tail, in the same units; 1.0: there is no tail.
    """

    start_step: float | int
    end_step: float | int

    def scale(self, step: int, max_steps: int) -> float:
        """The factor on every layer's sparsity: 0.0 is dense, 1.0 the configured sparsity.

        Args:
            step: optimiser steps done so far, 0 for the first one (the trainer's ``global_step``).
            max_steps: optimiser steps of the whole training.

        Raises:
            ConfigError: ``max_steps`` is below 1.
        """
        first, end = self._bounds(max_steps)
        return 1.0 if first <= step < end else 0.0

    def sparse_steps(self, max_steps: int) -> range:
        """The optimiser steps of a training of ``max_steps`` that are sparse; empty when none is.

        Raises:
            ConfigError: ``max_steps`` is below 1.
        """
        first, end = self._bounds(max_steps)
        return range(first, int(min(end, max_steps)))

    def _bounds(self, max_steps: int) -> tuple[int, float]:
        if max_steps < 1:
            raise ConfigError(f"max_steps: must be at least 1 to place start_step and end_step, given {max_steps}")
        end = math.inf if _never_ends(self.end_step) else _in_steps(self.end_step, max_steps)
        return _in_steps(self.start_step, max_steps), end


def _never_ends(end_step: float | int) -> bool:
    return isinstance(end_step, float) and end_step == 1.0


def _in_steps(boundary: float | int, max_steps: int) -> int:
    if isinstance(boundary, int):
        return boundary
    # Rounded first: 0.07 * 100 is 7.000000000000001 in floating point.
    return math.ceil(round(boundary * max_steps, 6))
