"""Predicts step times by a model of six numbers that is fitted to measured steps.

    time = larger of host and device        (rounded off where the two meet)
    device = a * (products - spared) + b * attention + c * rows + d * sparse rows + dequantising
    host = e * layers + f * sparse parts

`Work` defines the factors. All numbers are positive, and are found by least squares on the logarithm of the time,
that is, on relative errors. A weak pull to rough values of a data-centre GPU decides what the rows leave open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sparse_unsloth.planning.work import Work
from sparse_unsloth.utils.environment import require

SHARPNESS = 8
"""Sharpness of the smooth maximum of host and device time, which do not overlap completely."""
GRAPHS_HOST = 2.8
GRAPHS_RECOMPUTE = 1.7
"""Host milliseconds per layer in a step with `cuda_graphs`, and more for a layer whose forward runs again. Not fitted:
16 layers of a 1B, not checkpointed, took 42 ms a micro-batch where kernels ran in a fifth of the time; 32 layers of an
8B, checkpointed, took 147 ms at least (``benchmarks/results``: ``end_to_end-notes.md``, ``mixed_lengths.csv``)."""
DEQUANTISING = 0.82
"""Milliseconds per 10^9 elements of 4-bit weights. Not fitted: as much longer the products of an 8B layer in NF4 take
than in bf16, where the lines through both sizes reach no rows (``benchmarks/results/fp8``); 2.5 bytes at 3 TB/s."""
PULL = 0.03
"""Weight of the pull, as a relative error of one step for a coefficient off by a factor of e."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds per 10^12 FLOPs, per 10^9 elements, and per layer or sparse part on the host."""

    products: float
    attention: float
    rows: float
    sparse_rows: float
    host_layer: float
    host_sparse_part: float

    def device(self, work: Work) -> float:
        """Returns the GPU's time in milliseconds."""
        tera = self.products * (work.products - work.spared) + self.attention * work.attention
        rows = self.rows * work.rows + self.sparse_rows * work.sparse_rows
        return tera / 1e12 + (rows + DEQUANTISING * work.dequantised) / 1e9

    def host(self, work: Work) -> float:
        """Returns the host's launch time in milliseconds."""
        return self.host_layer * work.layers + self.host_sparse_part * work.sparse_parts

    def __call__(self, work: Work) -> float:
        """Returns milliseconds of one micro-batch: forward, backward and the optimiser's update."""
        return larger(self.host(work), self.device(work))

    def with_graphs(self, work: Work) -> float:
        """Returns milliseconds of one micro-batch with captured layers, which the host launches faster."""
        return larger(graphs_host(work), self.device(work))


def graphs_host(work: Work) -> float:
    """Returns the host's milliseconds of one micro-batch with captured layers."""
    return GRAPHS_HOST * work.layers + GRAPHS_RECOMPUTE * work.recomputed


def larger(host: float, device: float) -> float:
    """The smooth maximum of two times, which do not overlap completely."""
    longer, shorter = max(host, device), min(host, device)
    return longer * (1 + (shorter / longer) ** SHARPNESS) ** (1 / SHARPNESS)


ROUGHLY = StepTime(products=1.7, attention=2.5, rows=50, sparse_rows=30, host_layer=3, host_sparse_part=2)
"""600 and 400 TFLOP/s, some 80 bytes an element at 3 TB/s, some hundred launches a layer."""
STARTS = (0.1, 1.0, 5.0)
"""The fit begins with this many times the rough host time: a side that is never the larger would not move."""


def fit(steps: Sequence[tuple[Work, float]]) -> StepTime:
    """Fits the coefficients to measured steps.

    Args:
        steps: pairs of work and milliseconds; at least one.

    Raises:
        InstallError: scipy is missing.
    """
    require("study", "A fit of step times", "scipy")
    import numpy
    from scipy.optimize import least_squares

    rough = numpy.log(astuple(ROUGHLY))
    measured = numpy.log([milliseconds for _, milliseconds in steps])

    def errors(logarithms: numpy.ndarray) -> numpy.ndarray:
        predict = StepTime(*numpy.exp(logarithms))
        differences = [math.log(predict(work)) for work, _ in steps] - measured
        return numpy.concatenate([differences, PULL * (logarithms - rough)])

    tries = [least_squares(errors, rough + numpy.log([1, 1, 1, 1, start, start])) for start in STARTS]
    best = min(tries, key=lambda result: result.cost)
    return StepTime(*(float(f"{value:.4g}") for value in numpy.exp(best.x)))


def leave_one_out(steps: Sequence[tuple[Work, float]]) -> list[float]:
    """Predicts each step, in milliseconds, by a fit to all others."""
    return [fit([*steps[:index], *steps[index + 1 :]])(work) for index, (work, _) in enumerate(steps)]
