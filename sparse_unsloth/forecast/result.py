"""Defines an estimate as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_unsloth.costs.memory import Memory
from sparse_unsloth.forecast.model import Model
from sparse_unsloth.forecast.tokens import TokenStatistics
from sparse_unsloth.planning.fits import Fitted


@dataclass(frozen=True)
class Step:
    """One optimiser step on one GPU, of average micro-batches.

    ``milliseconds`` is None where no comparable step was measured. ``host_bound``: the step is launch-bound.
    """

    flops: float
    milliseconds: float | None
    host_bound: bool


@dataclass(frozen=True)
class Preset:
    """The gain of another preset: sparse steps against dense steps, both as the backend runs them."""

    flops_ratio: float
    speedup: float | None


@dataclass(frozen=True)
class Estimate:
    """The result of `sparse-unsloth estimate`.

    Attributes:
        model, dataset, backend, backend_reason: what would be trained, and by which backend.
        tokens: of the data set.
        sequences, accumulation: samples of a micro-batch, and micro-batches of an optimiser step on one GPU.
        dense: a dense step of the backend; ``dense_exact`` skips unused rows (Unsloth backend, else None).
        sparse, sparse_exact: a sparse step, likewise; None for a recipe without sparsity.
        exact_removal: whether the training would skip unused rows.
        optimiser_steps, sparse_share: the training's number of steps, and the share of sparse ones.
        presets: the shipped presets on this model and data.
        fitted: the fit that predicts the times; None where nothing was measured.
        memory: the predicted peak.
        dense_layer_0: whether the MLP of layer 0 is dense, as recommended.
        backward_rows: the recipe's share of context tokens that the backward pass goes through.
        checkpointing: whether the layers run forward twice.
        recorded: a step of this training, sparse or dense, with `cuda_graphs`; None where a layer would not be
            captured, or no comparable step was measured.
        cuda_graphs: whether the recipe turns CUDA graphs on.
        precision: the recipe's; ``fp8``: a dense step in it, unused rows skipped if the recipe does so; None in bf16,
            and where no layer runs as a whole.
        auto: rows or dense, and CUDA graphs or not, are what `auto` decides by this forecast.
    """

    model: Model
    dataset: str
    backend: str
    backend_reason: str
    tokens: TokenStatistics
    sequences: int
    accumulation: int
    dense: Step
    dense_exact: Step | None
    sparse: Step | None
    sparse_exact: Step | None
    exact_removal: bool
    optimiser_steps: int
    sparse_share: float
    presets: dict[str, Preset]
    fitted: Fitted | None
    memory: Memory
    dense_layer_0: bool
    backward_rows: float = 1.0
    checkpointing: bool = True
    recorded: Step | None = None
    cuda_graphs: bool = False
    precision: str = "bf16"
    fp8: Step | None = None
    auto: bool = False

    @property
    def row_sparse(self) -> bool:
        """Whether the recipe uses row sparsity, instead of channel sparsity."""
        return self.backward_rows < 1

    @property
    def dense_as_trained(self) -> Step:
        """A dense step of this training: unused rows skipped if the recipe does so, captured if nothing is sparse."""
        if self.cuda_graphs and self.recorded and not self.sparse:
            return self.recorded
        if self.fp8 is not None:
            return self.fp8
        return self.dense_exact if self.exact_removal and self.dense_exact else self.dense

    @property
    def sparse_as_trained(self) -> Step | None:
        """A sparse step of this training, likewise; None where nothing is sparse."""
        if self.cuda_graphs and self.recorded and self.sparse:
            return self.recorded
        return self.sparse_exact if self.exact_removal and self.sparse_exact else self.sparse

    @property
    def graphs_speedup(self) -> float | None:
        """The predicted speed-up by `cuda_graphs` of a step of this training."""
        if self.recorded is None:
            return None
        without = replace(self, cuda_graphs=False)
        return time_ratio(without.sparse_as_trained or without.dense_as_trained, self.recorded)

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of the backend's dense step over those of a sparse step: the limit of the speed-up."""
        return None if self.sparse_as_trained is None else self.dense.flops / self.sparse_as_trained.flops

    @property
    def speedup(self) -> float | None:
        """The predicted speed-up of a sparse step over the backend's dense step."""
        return None if self.sparse_as_trained is None else time_ratio(self.dense, self.sparse_as_trained)

    @property
    def whole_speedup(self) -> float | None:
        """The predicted speed-up of the whole training, with dense phases, without set-up (calibration)."""
        if self.speedup is None:
            return None
        sparse, other = self.sparse_as_trained.milliseconds, self.dense_as_trained.milliseconds
        return self.dense.milliseconds / (self.sparse_share * sparse + (1 - self.sparse_share) * other)

    @property
    def free_speedup(self) -> float | None:
        """The predicted speed-up of dense training by skipping unused rows, which changes no result."""
        return None if self.dense_exact is None else time_ratio(self.dense, self.dense_exact)


def time_ratio(slow: Step, fast: Step) -> float | None:
    """Returns the ratio of the times of ``slow`` and ``fast``; None where no comparable step was measured."""
    return None if slow.milliseconds is None else slow.milliseconds / fast.milliseconds
