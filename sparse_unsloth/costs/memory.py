"""Predicts the peak GPU memory of a training step by part, and states its assumptions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from sparse_unsloth.costs.flops import ModelShape, recomputes_rows

GIB = 2**30
BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per parameter in NF4 with nested quantisation: half a byte, a byte per 64, four bytes per 64 * 256."""
BYTES_ADAPTER = 16
"""Bytes per trained parameter: float32 weight, gradient, and AdamW's two moments."""
BYTES_LOGIT, LOSS_BUDGET = 16, 4 * GIB
"""Of unsloth_zoo's fused loss, in bytes: a logit with its gradient, and the limit of a chunk."""
ASSUMPTIONS = (
    "weights: NF4 with nested quantisation 0.516 bytes a parameter, embeddings, norms and head in 16 bits",
    "adapter: 16 bytes a parameter (float32 weight, gradient, AdamW's two moments)",
    "activations in 16 bits: a layer keeps 2 x intermediate + 7 x hidden numbers a row for its backward, which itself "
    "needs intermediate + 6 x hidden more, in one layer at a time; checkpointing keeps only each layer's input "
    "(Unsloth's on the host), and one layer's numbers",
    "backward_rows: a layer keeps what a dense one keeps; where its backward computes chosen rows of O and MLP again "
    "(with gradient checkpointing, or on a CPU) 4 x hidden + 2 x queries + 2 x keys numbers a row; counted as dense "
    "wherever a step or a micro-batch is",
    "FP8: a product quantises its rows and converts its weights into memory that is freed again",
    "logits: Unsloth's fused loss takes up to 4 GiB for a chunk of them (16 bytes each); TRL's chunked loss next to "
    "nothing; plain transformers' loss holds all of them",
    "not counted: CUDA's own context (some 0.5 GiB), fragmentation, evaluation",
)


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose at the peak of the largest micro-batch."""

    weights: float
    adapter: float
    kept_activations: float
    working_set: float
    estimator: float

    @property
    def peak(self) -> float:
        return sum(asdict(self).values())

    def gib(self) -> dict[str, float]:
        """The parts and their ``peak``, in GiB."""
        return {name: value / GIB for name, value in {**asdict(self), "peak": self.peak}.items()}


def peak_memory(
    shape: ModelShape,
    *,
    linear: int,
    other: int,
    adapter: int,
    rows: int,
    checkpointing: str,
    in_4bit: bool,
    weight_bytes: int = 2,
    activation_bytes: int = 2,
    logits: float = 0,
    estimator_rank: int = 0,
    sparse_parts: int = 0,
    backward_rows: int | None = None,
    whole_layers: bool = True,
    skips_output: bool = True,
    fp8: bool = False,
) -> Memory:
    """The peak of a step that is dense in some layer, or of one that is row-sparse in every layer.

    Args:
        shape: of the model.
        linear, other, adapter: numbers of parameters: of the layers' linear modules, other frozen ones, trained ones.
        rows: of the largest micro-batch, padding included.
        checkpointing: "unsloth" (layer inputs on the host), "on", or "off".
        in_4bit: whether the linear modules are in 4 bits.
        weight_bytes: per other parameter; ``activation_bytes``: per number of an activation.
        logits: bytes of the loss and its gradient, `fused_logits` or `plain_logits`; 0 if negligible.
        estimator_rank, sparse_parts: each sparse part has factors in float32 of this rank.
        backward_rows: the number of ``rows`` that the backward of O and MLP goes through; None for dense training.
        whole_layers, skips_output: with ``backward_rows``; see `recomputes_rows`.
        fp8: whether products with frozen weights are in FP8; weights stay in memory as they are.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    row = rows * activation_bytes
    kept = layer_activations(shape, rows, rows, activation_bytes=activation_bytes)
    working = backward_working_set(shape, rows, in_4bit, activation_bytes)
    if backward_rows is not None:
        working = row_working_set(shape, rows, backward_rows, in_4bit, activation_bytes)
        if recomputes_rows(whole_layers, skips_output and checkpointing != "off"):
            kept = row_layer_activations(shape, rows, activation_bytes)
    working += fp8_working_set(shape, rows, in_4bit) * fp8
    stored = {"unsloth": 0, "on": row * hidden * shape.num_layers, "off": kept * shape.num_layers}[checkpointing]
    if checkpointing != "off":
        working += kept
    return Memory(
        weights=linear * (BYTES_4BIT if in_4bit else weight_bytes) + other * weight_bytes,
        adapter=adapter * BYTES_ADAPTER,
        kept_activations=stored,
        working_set=max(working, logits),
        estimator=4 * estimator_rank * sparse_parts * 2 * (hidden + inner),
    )


def layer_activations(
    shape: ModelShape,
    rows: int,
    dense_rows: int,
    *,
    kept_channels: int = 0,
    lora_rank: int = 0,
    activation_bytes: int = 2,
) -> float:
    """Bytes that one layer without checkpointing keeps for its backward.

    Args:
        rows: of the micro-batch.
        dense_rows: rows that keep gate and up of every channel: all, or in a sparse MLP the loss tokens.
        kept_channels, lora_rank: of a sparse MLP; they decide what its context tokens keep of gate and up.
    """
    inner = dense_rows * 2 * shape.intermediate_size + (rows - dense_rows) * (2 * kept_channels + 4 * lora_rank)
    return activation_bytes * (inner + 7 * rows * shape.hidden_size)


def row_layer_activations(shape: ModelShape, rows: int, activation_bytes: int = 2) -> float:
    """As `layer_activations` for a row-sparse layer that `recomputes_rows`: the inputs of attention and its norm,
    queries, keys, values, attention's output, the inputs of the MLP and its norm (these two not in a whole layer).
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return activation_bytes * rows * (4 * shape.hidden_size + 2 * queries + 2 * keys)


def loss_row_activations(shape: ModelShape, rows: int, loss_rows: int, activation_bytes: int = 2) -> float:
    """As `layer_activations` for a row-sparse whole layer that keeps what follows attention for ``loss_rows`` alone.

    Of all rows it keeps its input, the norm of it, queries, keys, values and attention's output.
    """
    hidden = shape.hidden_size
    return activation_bytes * (5 * rows * hidden + loss_rows * 2 * (hidden + shape.intermediate_size))


def row_working_set(
    shape: ModelShape, rows: int, backward_rows: int, in_4bit: bool, activation_bytes: int = 2
) -> float:
    """As `backward_working_set`, with what O and MLP compute again for ``backward_rows`` rows, or gather of them."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    numbers = backward_rows * (3 * inner + 6 * hidden) + rows * 6 * hidden + (hidden * inner if in_4bit else 0)
    return activation_bytes * numbers


def backward_working_set(shape: ModelShape, rows: int, in_4bit: bool, activation_bytes: int = 2) -> float:
    """Bytes that the backward of one layer needs temporarily, besides its activations."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return activation_bytes * (rows * (inner + 6 * hidden) + (hidden * inner if in_4bit else 0))


def fp8_working_set(shape: ModelShape, rows: int, in_4bit: bool) -> float:
    """Bytes that products in FP8 need beside `backward_working_set`: the quantised gradients of gate and up, and their
    weights converted; in 4 bits these take the place of a weight in bf16. (Scales take 9 MB in an 8B model.)
    """
    return 2 * shape.intermediate_size * (rows + (0 if in_4bit else shape.hidden_size))


def fused_logits(shape: ModelShape, rows: int) -> float:
    """Bytes of one chunk of Unsloth's fused loss over ``rows``. With less than 8 GiB free chunks are smaller."""
    whole = rows * shape.vocab_size * BYTES_LOGIT
    budget = LOSS_BUDGET - rows * shape.hidden_size * 2
    return whole if whole <= budget else whole / (4 * math.ceil(whole / budget / 4))


def plain_logits(shape: ModelShape, rows: int, activation_bytes: int = 2) -> float:
    """Bytes of all logits, their float32 copy, and their gradient."""
    return rows * shape.vocab_size * (activation_bytes + 4 + 4)
