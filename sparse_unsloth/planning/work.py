"""Counts the work of one micro-batch: FLOPs, and the other quantities that its time depends on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sparse_unsloth.costs.flops import ATTENTION, MLP, ModelShape, StepFlops, TrainingStep, step_flops
from sparse_unsloth.exact.last_layer import WORTH_REMOVING
from sparse_unsloth.exact.loss import ROW_MULTIPLE
from sparse_unsloth.graphs.buckets import bucket
from sparse_unsloth.tokens.batch import Batch
from sparse_unsloth.tokens.partition import TokenPartition

PADDED, PADDING_FREE, PACKED = "padded", "padding-free", "packed"
"""How micro-batches hold their samples."""
OUTPUT_NORMS = ("gemma2", "gemma3_text", "olmo2", "exaone4")
"""Families with a norm of the MLP's output, whose backward needs it (docs/how-it-works.md, section 1.3)."""
FP8_PRODUCTS = {
    True: {1664: (2.73, 2.12), 8192: (11.10, 6.96)},
    False: {1664: (2.38, 1.86), 8192: (10.78, 6.66)},
}
"""By whether weights are in 4 bits, and by rows: milliseconds of the products of an 8B layer on an H200, in bf16 and in
FP8 with everything that belongs to it (benchmarks/results/fp8/README.md)."""
TRL_ROWS = 256
"""TRL's chunked loss computes logits in multiples of this number of rows."""


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one forward by role, and the lengths of its documents as attention computes them.

    Attributes:
        dense, context, padding: loss tokens, context tokens and padding tokens; together all rows.
        loss: loss positions, a part of the loss tokens as a rule.
        lengths: of documents; of whole sequences, with padding, where these are padded.
        repeated: the micro-batch before has the same size, so that CUDA graphs hardly pad this one (`mark_repeated`).
    """

    dense: int
    context: int
    padding: int
    loss: int
    lengths: tuple[int, ...]
    repeated: bool = False

    @property
    def rows(self) -> int:
        return self.dense + self.context + self.padding

    @classmethod
    def of(cls, roles: TokenPartition, batch: Batch) -> MicroBatch:
        """Counts the ``roles`` of ``batch``, and its documents' lengths as attention computes them."""
        starts = batch.documents.starts.flatten().nonzero().flatten().tolist()
        tokens = roles.shape[0] * roles.shape[1]
        lengths = tuple(end - start for start, end in itertools.pairwise([*starts, tokens]))
        return cls(roles.num_dense, roles.num_context, roles.num_padding, len(roles.loss), lengths)

    def padded_to_bucket(self, layout: str) -> MicroBatch:
        """Pads it to a length bucket, as captured batches are (`sparse_unsloth.graphs.buckets`)."""
        rows, length = self.size(layout)
        longer = bucket(length, self.repeated)
        if layout == PADDED:
            return replace(self, padding=self.padding + rows * (longer - length), lengths=(longer,) * rows)
        extra = longer - length
        return replace(self, padding=self.padding + extra, lengths=(*self.lengths, extra)) if extra else self

    def size(self, layout: str) -> tuple[int, int]:
        """Sequences and the length of each, as the model receives them."""
        return (len(self.lengths), max(self.lengths)) if layout == PADDED else (1, self.rows)


def mark_repeated(batches: Sequence[MicroBatch], layout: str) -> tuple[MicroBatch, ...]:
    """Marks those of ``batches`` that have the size of the one before them.

    They are a sample of a longer training, so the first one counts as if it came after the last one.
    """
    sizes = [batch.size(layout) for batch in batches]
    if len(batches) < 2:
        return tuple(batches)
    return tuple(replace(batch, repeated=sizes[at] == sizes[at - 1]) for at, batch in enumerate(batches))


@dataclass(frozen=True)
class Plan:
    """The properties of a model and its training that decide the costs.

    Attributes:
        shape: of the model.
        layers: ``(mlp, self_attn)`` sparsity of each layer.
        backend: "unsloth" or "peft".
        checkpointing: whether the layers run forward twice.
        chunked_loss: TRL's loss over loss tokens only, whose logits are computed twice (PEFT backend).
        lora_rank, lora_targets: of the adapters.
        estimator_rank: of the factors that score channels; 0 where nothing is scored.
        backward_rows: see `SparsityConfig.backward_rows`.
        whole_layers: see `recomputes_rows`.
        captured: layers are captured in CUDA graphs, so that dense training has whole layers too, as in FP8.
        output_norm: the MLP's output is normalised, so that a recompute needs it.
        precision: see `SparsityConfig.precision`; ``in_4bit``: frozen weights are in 4 bits.
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
    captured: bool = False
    output_norm: bool = False
    precision: str = "bf16"
    in_4bit: bool = True

    def dense(self) -> Plan:
        """The same training without sparsity, in bf16."""
        layers = ((0.0, 0.0),) * len(self.layers)
        return replace(self, layers=layers, backward_rows=1.0, captured=False, precision="bf16")

    @property
    def row_sparse(self) -> bool:
        """Whether the training uses row sparsity, instead of channel sparsity."""
        return self.backward_rows < 1

    @property
    def is_sparse(self) -> bool:
        """Whether a step leaves out anything."""
        return self.row_sparse or self.sparse_parts > 0

    @property
    def sparse_parts(self) -> int:
        """The number of MLPs and attentions with channel sparsity."""
        return sum((mlp > 0) + (attention > 0) for mlp, attention in self.layers)


@dataclass(frozen=True)
class Work:
    """The quantities that decide the time of one micro-batch.

    Attributes:
        products: FLOPs of all matrix products outside the attention core.
        attention: FLOPs of the attention core.
        rows: rows times layers times hidden size, the work of norms, residuals and the like; with row sparsity reduced
            in proportion to the products.
        sparse_rows: context rows times sparse parts times hidden size, the work of gathering, scoring and scattering;
            with row sparsity the rows of the backward pass times layers times hidden size.
        layers, sparse_parts: the numbers that the host launches.
        dequantised: elements of 4-bit weights that are dequantised, however many rows there are.
        spared: FLOPs of `products` whose time FP8 saves; below 0 where there are too few rows for it.
        recomputed: layers whose forward runs again.
    """

    products: int
    attention: int
    rows: int
    sparse_rows: int
    layers: int
    sparse_parts: int
    dequantised: int = 0
    spared: int = 0
    recomputed: int = 0

    @property
    def flops(self) -> int:
        return self.products + self.attention


def batch_flops(plan: Plan, batch: MicroBatch, removal: bool) -> StepFlops:
    """Counts the FLOPs of one micro-batch; without context tokens it is dense.

    Args:
        removal: skip unused rows (docs/how-it-works.md, section 5): logits and the last layer after its keys and
            values, if enough rows are unused (Unsloth backend only), and with row sparsity the output of a recompute.
    """
    sparse = plan.is_sparse and batch.context > 0
    skips_output, removal = removal, removal and plan.backend == "unsloth"
    dense_whole = (plan.captured or plan.precision != "bf16") and not plan.is_sparse
    whole = plan.whole_layers and (sparse or dense_whole)
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
            whole_layers=plan.whole_layers,
            skips_output=skips_output,
            skips_down=skips_output and whole and not plan.output_norm,
        ),
    )
    if plan.chunked_loss and plan.backend == "peft":
        again = replace(flops.recompute, head=flops.forward.head)
        flops = replace(flops, recompute=again)
    return flops


def logit_rows(plan: Plan, batch: MicroBatch, removal: bool) -> int:
    """Counts the rows whose logits are computed; see `batch_flops`."""
    if removal and plan.backend == "unsloth":
        return min(batch.rows, _up(max(batch.dense, batch.loss), ROW_MULTIPLE))
    return min(batch.rows, _up(batch.loss, TRL_ROWS)) if plan.chunked_loss else batch.rows


def batch_work(plan: Plan, batch: MicroBatch, removal: bool) -> Work:
    """Returns the work of one micro-batch; see `batch_flops`."""
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
    elements = layers * sum(inputs * outputs for inputs, outputs in plan.shape.projections().values())
    dequantised = elements * (2 + plan.checkpointing) * plan.in_4bit
    again, spared = layers * plan.checkpointing, _spared(plan, batch, flops)
    return Work(products, core, rows, sparse_rows, layers, parts, dequantised, spared, again)


def fp8_time(rows: int, in_4bit: bool) -> float:
    """The time of products with frozen weights in FP8, relative to bf16: lines through `FP8_PRODUCTS`.

    Converting the weights takes as long for few rows as for many.
    """
    (few, at_few), (many, at_many) = FP8_PRODUCTS[in_4bit].items()
    bf16, fp8 = (a + (b - a) * (rows - few) / (many - few) for a, b in zip(at_few, at_many, strict=True))
    return fp8 / bf16


def _spared(plan: Plan, batch: MicroBatch, flops: StepFlops) -> int:
    rows = batch.context if plan.precision == "fp8-context" else batch.rows
    if plan.precision == "bf16" or not plan.whole_layers or not rows:
        return 0
    frozen = flops.parts.mlp_base + flops.parts.attention_projections
    return round(frozen * rows / batch.rows * (1 - fp8_time(rows, plan.in_4bit)))


def backward_rows_of(plan: Plan, batch: MicroBatch) -> int:
    """Counts the rows that the backward pass of O and MLP goes through; all, with padding, if none is left out."""
    if not (plan.row_sparse and batch.context):
        return batch.rows
    return batch.dense + math.ceil(plan.backward_rows * batch.context)


def _up(rows: int, multiple: int) -> int:
    return math.ceil(max(rows, 1) / multiple) * multiple
