"""How much there is to compute in one micro-batch: FLOPs, and what else its time depends on."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from sparse_unsloth.costs.flops import ATTENTION, MLP, ModelShape, StepFlops, TrainingStep, step_flops
from sparse_unsloth.exact.last_layer import WORTH_REMOVING
from sparse_unsloth.exact.loss import ROW_MULTIPLE
from sparse_unsloth.forecast.tokens import MicroBatch

TRL_ROWS = 256
"""TRL's chunked loss computes logits in multiples of so many rows."""


@dataclass(frozen=True)
class Plan:
    """A model and how it is trained, as far as costs depend on it.

    Attributes:
        shape: of the model.
        layers: ``(mlp, self_attn)`` sparsity of each layer.
        backend: "unsloth" or "peft".
        checkpointing: whether the layers run forward twice.
        chunked_loss: TRL's loss over rows with loss only, whose logits are computed twice (PEFT backend).
        lora_rank, lora_targets: of the adapters.
        estimator_rank: of the factors that score channels; 0 where nothing is scored.
        backward_rows: see `SparsityConfig.backward_rows`.
        whole_layers: for it one function takes the place of O and MLP (Unsloth's Llama layers); else they are hooked
            one by one.
    """

    shape: ModelShape
    layers: tuple[tuple[float, float], ...]
    backend: str = "unsloth"
    checkpointing: bool = True
    chunked_loss: bool = False
    lora_rank: int = 16
    lora_targets: Collection[str] = (*ATTENTION, *MLP)
    estimator_rank: int = 8
    eager_attention: bool = False
    backward_rows: float = 1.0
    whole_layers: bool = True

    def dense(self) -> Plan:
        """The same training without sparsity."""
        return replace(self, layers=((0.0, 0.0),) * len(self.layers), backward_rows=1.0)

    @property
    def row_sparse(self) -> bool:
        """Whether the backward pass leaves out rows, instead of channels."""
        return self.backward_rows < 1

    @property
    def is_sparse(self) -> bool:
        """Whether a step leaves out anything."""
        return self.row_sparse or self.sparse_parts > 0

    @property
    def sparse_parts(self) -> int:
        """MLPs and attentions that choose channels."""
        return sum((mlp > 0) + (attention > 0) for mlp, attention in self.layers)


@dataclass(frozen=True)
class Work:
    """What the time of one micro-batch depends on.

    Attributes:
        products: FLOPs of all matrix products outside the attention core.
        attention: FLOPs of the attention core.
        rows: rows times layers times hidden size: what norms, residuals and the like must pass over. Of a backward pass
            through few rows less, in proportion to the products.
        sparse_rows: context rows times sparse parts times hidden size:
            gathering, scoring, scattering. Of a backward pass through few rows these rows times layers.
        layers, sparse_parts: how many of each the host has to launch.
    """

    products: int
    attention: int
    rows: int
    sparse_rows: int
    layers: int
    sparse_parts: int

    @property
    def flops(self) -> int:
        return self.products + self.attention


def batch_flops(plan: Plan, batch: MicroBatch, removal: bool) -> StepFlops:
    """FLOPs of one micro-batch; without a context row it is dense.

    Args:
        removal: leave out what no loss depends on: where enough rows bear none (Unsloth backend only) logits, and the
            last layer behind its keys and values; of a backward pass through few rows the MLP's recompute.
    """
    sparse = plan.is_sparse and batch.context > 0
    fully_recomputed = () if plan.whole_layers else ("o_proj",)
    if not removal:
        fully_recomputed = ("o_proj", *MLP)
    removal = removal and plan.backend == "unsloth"
    last_layer = None
    if removal and batch.rows - batch.loss >= WORTH_REMOVING * batch.rows:
        last_layer = batch.loss
    flops = step_flops(
        plan.shape,
        plan.layers if sparse else plan.dense().layers,
        TrainingStep(
            dense_tokens=batch.dense + (0 if sparse else batch.context),
            context_tokens=batch.context if sparse else 0,
            padding_tokens=batch.padding,
            seq_lengths=batch.lengths,
            lora_rank=plan.lora_rank,
            lora_targets=plan.lora_targets,
            checkpointing=plan.checkpointing,
            head_tokens=logit_rows(plan, batch, removal),
            last_layer_tokens=last_layer,
            attention="eager" if plan.eager_attention else "fused",
            estimator_rank=plan.estimator_rank,
            backward_rows=plan.backward_rows if sparse else 1.0,
            fully_recomputed=fully_recomputed,
        ),
    )
    if plan.chunked_loss and plan.backend == "peft":
        again = replace(flops.recompute, head=flops.forward.head)
        flops = replace(flops, recompute=again)
    return flops


def logit_rows(plan: Plan, batch: MicroBatch, removal: bool) -> int:
    """Rows whose logits are computed; arguments as `batch_flops`."""
    if removal and plan.backend == "unsloth":
        return min(batch.rows, _up(max(batch.dense, batch.loss), ROW_MULTIPLE))
    return min(batch.rows, _up(batch.loss, TRL_ROWS)) if plan.chunked_loss else batch.rows


def batch_work(plan: Plan, batch: MicroBatch, removal: bool) -> Work:
    """What the time of one micro-batch depends on; arguments as `batch_flops`."""
    flops = batch_flops(plan, batch, removal)
    core, hidden, layers = flops.parts.attention_core, plan.shape.hidden_size, plan.shape.num_layers
    products, rows = flops.total - core, batch.rows * layers * hidden
    if plan.row_sparse:
        dense = batch_flops(plan.dense(), batch, removal)
        rows = round(rows * products / (dense.total - core))
        sparse_rows, parts = backward_rows_of(plan, batch) * layers * hidden, 0
    else:
        parts = plan.sparse_parts if batch.context else 0
        sparse_rows = batch.context * parts * hidden
    return Work(products, core, rows, sparse_rows, layers, parts)


def backward_rows_of(plan: Plan, batch: MicroBatch) -> int:
    """Rows that the backward pass of O and MLP goes through; all, with padding, where it leaves out none."""
    if not (plan.row_sparse and batch.context):
        return batch.rows
    return batch.dense + math.ceil(plan.backward_rows * batch.context)


def _up(rows: int, multiple: int) -> int:
    return math.ceil(max(rows, 1) / multiple) * multiple
