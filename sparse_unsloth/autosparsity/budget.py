"""Counts FLOPs of a recipe: of the context tokens' frozen-weight matmuls, which a budget bounds, and of a whole step.

The first does not depend on the data, the second does: if 24 % of the tokens are context tokens, half of their matmuls
is a small part of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_unsloth.autosparsity.probe import ProbeBatch
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops


def frozen_share(shape: ModelShape, recipe: Sequence[LayerSparsity], estimator_rank: int = 0) -> float:
    """FLOPs of one context token's frozen-weight matmuls, as a share of the dense ones.

    Counts forward, input gradient and estimator; not LoRA, attention itself and the head.
    """
    return sum(_frozen(shape, recipe, estimator_rank)) / sum(_frozen(shape, [(0.0, 0.0)] * shape.num_layers))


def part_cost(shape: ModelShape, part: str, sparsity: float, estimator_rank: int = 0) -> float:
    """The share of ``part`` ("mlp", "self_attn") of one layer in `frozen_share`, which is the sum over all parts."""
    layer, is_mlp = replace(shape, num_layers=1), part == "mlp"
    mlp, attention, scoring = _frozen(layer, [(sparsity, 0.0) if is_mlp else (0.0, sparsity)], estimator_rank)
    return ((mlp if is_mlp else attention) + scoring) / (sum(_frozen(layer, [(0.0, 0.0)])) * shape.num_layers)


def _frozen(shape: ModelShape, recipe, estimator_rank: int = 0) -> tuple[int, int, int]:
    """FLOPs of the MLPs, of attention's projections, and of the estimator."""
    step = TrainingStep(0, 1, [], 0, head_tokens=0, input_requires_grad=True, estimator_rank=estimator_rank)
    parts = step_flops(shape, recipe, step).parts
    return parts.mlp_base, parts.attention_projections, parts.estimator


@dataclass(frozen=True)
class DataShape:
    """Tokens of sample batches by role, without padding, and the lengths of their sequences.

    A sequence counts as one document: for packed documents the FLOPs of attention are overestimated.
    """

    dense_tokens: int
    context_tokens: int
    loss_tokens: int
    row_lengths: tuple[int, ...]

    @classmethod
    def of(cls, batches: Sequence[ProbeBatch]) -> DataShape:
        lengths = []
        for batch in batches:
            rows, width = batch.partition.shape
            lengths += batch.partition.rows.div(width, rounding_mode="floor").bincount(minlength=rows).tolist()
        return cls(
            dense_tokens=sum(batch.partition.num_dense for batch in batches),
            context_tokens=sum(batch.partition.num_context for batch in batches),
            loss_tokens=sum(len(batch.partition.loss) for batch in batches),
            row_lengths=tuple(lengths),
        )

    @property
    def context_share(self) -> float:
        """Context tokens over all tokens."""
        return self.context_tokens / max(self.context_tokens + self.dense_tokens, 1)

    def step_ratio(
        self, shape: ModelShape, recipe: Sequence[LayerSparsity], lora_rank: int, estimator_rank: int = 0
    ) -> float:
        """FLOPs of a training step with ``recipe``, over those of the dense step.

        Counts no checkpointing, and logits of loss positions alone.
        """

        def total(layers, rank: int) -> int:
            rows = self.dense_tokens, self.context_tokens, self.row_lengths
            step = TrainingStep(*rows, lora_rank, head_tokens=self.loss_tokens, estimator_rank=rank)
            return step_flops(shape, layers, step).total

        dense = [(0.0, 0.0)] * shape.num_layers
        return total(recipe, estimator_rank) / total(dense, 0)
