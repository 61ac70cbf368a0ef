"""An estimate as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_unsloth.costs.memory import Memory
from sparse_unsloth.forecast.model import Model
from sparse_unsloth.forecast.speed_table import Fitted
from sparse_unsloth.forecast.tokens import TokenStatistics


@dataclass(frozen=True)
class Step:
    """One optimiser step, on one GPU, of the average micro-batch.

    ``milliseconds`` is None where no step like it was measured; ``host_bound`` says that launching takes longer than
    computing.
    """

    flops: float
    milliseconds: float | None
    host_bound: bool


@dataclass(frozen=True)
class Preset:
    """What another sparsity would give: sparse steps against dense ones, both as the backend runs them."""

    flops_ratio: float
    speedup: float | None


@dataclass(frozen=True)
class Estimate:
    """All that `sparse-unsloth estimate` says.

    Attributes:
        model, dataset, backend, backend_reason: what would be trained, and by what.
        tokens: of the data set.
        sequences, accumulation: samples of a micro-batch, and micro-batches of an optimiser step on one GPU.
        dense: a step of the backend as it is; ``dense_exact`` with the exact removal (Unsloth backend, else None).
        sparse, sparse_exact: a sparse step, likewise; None for a recipe without sparsity.
        exact_removal: whether the training would use the exact removal.
        optimiser_steps, sparse_share: of the whole training, and how much of it is sparse.
        presets: the shipped presets on this model and data.
        fitted: the measurements behind the times; None where there are none.
        memory: the predicted peak.
        dense_layer_0: whether the MLP of layer 0 is dense, as it should be.
        backward_rows: share of the context rows that the backward pass goes through, as the recipe says.
        checkpointing: whether the layers run forward twice.
        recorded: the step that this training is made of, sparse or dense, with `cuda_graphs`; None where not all of it
            would be recorded, or nothing like it was measured.
        cuda_graphs: whether the recipe asks for that.
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

    @property
    def row_sparse(self) -> bool:
        """Whether the recipe's backward pass leaves out rows, instead of channels."""
        return self.backward_rows < 1

    @property
    def dense_as_trained(self) -> Step:
        """A dense step of this training: with the exact removal where it is on, recorded where nothing is sparse."""
        if self.cuda_graphs and self.recorded and not self.sparse:
            return self.recorded
        return self.dense_exact if self.exact_removal and self.dense_exact else self.dense

    @property
    def sparse_as_trained(self) -> Step | None:
        """A sparse step of this training, likewise; None where nothing is sparse."""
        if self.cuda_graphs and self.recorded and self.sparse:
            return self.recorded
        return self.sparse_exact if self.exact_removal and self.sparse_exact else self.sparse

    @property
    def graphs_speedup(self) -> float | None:
        """Predicted: what `cuda_graphs` makes of a step of this training."""
        if self.recorded is None:
            return None
        without = replace(self, cuda_graphs=False)
        return time_ratio(without.sparse_as_trained or without.dense_as_trained, self.recorded)

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of the backend's own dense step over those of a sparse one: the limit of the speed-up."""
        return None if self.sparse_as_trained is None else self.dense.flops / self.sparse_as_trained.flops

    @property
    def speedup(self) -> float | None:
        """Predicted: a sparse step against the backend's own dense step."""
        return None if self.sparse_as_trained is None else time_ratio(self.dense, self.sparse_as_trained)

    @property
    def whole_speedup(self) -> float | None:
        """Predicted for the whole training, dense phases included; its set-up (calibration) is not."""
        if self.speedup is None:
            return None
        sparse, other = self.sparse_as_trained.milliseconds, self.dense_as_trained.milliseconds
        return self.dense.milliseconds / (self.sparse_share * sparse + (1 - self.sparse_share) * other)

    @property
    def free_speedup(self) -> float | None:
        """Predicted for dense training with the exact removal, which changes no result."""
        return None if self.dense_exact is None else time_ratio(self.dense, self.dense_exact)


def time_ratio(slow: Step, fast: Step) -> float | None:
    """How many times as long ``slow`` takes; None where no step like it was measured."""
    return None if slow.milliseconds is None else slow.milliseconds / fast.milliseconds
