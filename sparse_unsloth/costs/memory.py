"""Predicts the peak GPU memory of a training step by part, and states its assumptions.

One model: `estimate` and `bench` ask `peak_memory`, and the planner of `memory_budget` and `auto` asks `StepMemory` for
forwards whose layers differ.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.costs.flops import ModelShape, recomputes_rows

GIB = 2**30
BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per parameter in NF4 with nested quantisation: half a byte, a byte per 64, four bytes per 64 * 256."""
BYTES_ADAPTER = 16
"""Bytes per trained parameter: float32 weight, gradient, and AdamW's two moments."""
BYTES_LOGIT, BYTES_COUNTED, LOSS_BUDGET = 3, 16, 4 * GIB
"""Of unsloth_zoo's fused loss, in bytes: a logit with its gradient, what it counts for one when it makes chunks, and
the limit of a chunk."""
FEWER_LOGIT_BYTES = (2026, 10, 9)
"""Unsloth's version from which a logit takes `BYTES_LOGIT`; before, it took `BYTES_COUNTED` (measured: README.md of
benchmarks/results/memory)."""
BUFFERS = 4
"""Hidden states that captured layers copy in and out, beside their pool."""
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
    "logits: Unsloth's fused loss takes 3 bytes each, in chunks of at most 2^28 (16 bytes before 2026.10.9); TRL's "
    "chunked loss next to nothing; plain transformers' loss holds all of them",
    "CUDA graphs: the pool of captured passes holds what the largest of them keeps and needs, as a dense one, and is "
    "not free to micro-batches that run without; a kept layer's input is in it twice",
    "not counted: CUDA's own context (some 0.5 GiB), fragmentation, evaluation",
)


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose at the peak of the largest micro-batch; ``graphs`` what captured passes need besides."""

    weights: float
    adapter: float
    kept_activations: float
    working_set: float
    estimator: float
    graphs: float = 0.0

    @property
    def peak(self) -> float:
        return sum(asdict(self).values())

    def gib(self) -> dict[str, float]:
        """The parts and their ``peak``, in GiB."""
        return {name: value / GIB for name, value in {**asdict(self), "peak": self.peak}.items()}


@dataclass(frozen=True)
class Forward:
    """What decides the memory of one forward and its backward.

    Attributes:
        rows: of the micro-batch, padding included.
        logits: bytes of the loss (`fused_logits`, `plain_logits`; 0 if negligible).
        stored: bytes that the layers which keep activations store together; ``kept`` is their number.
        checkpointed: the number of the others; ``recomputed`` the bytes that the recompute of one of them stores.
        backward_rows: rows that the backward of O and MLP goes through; None: of dense layers.
        attention_kept: how many of the checkpointed layers keep attention.
    """

    rows: int
    logits: float
    stored: float
    kept: int
    checkpointed: int
    recomputed: float
    backward_rows: int | None = None
    attention_kept: int = 0


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a step beside weights, adapter and optimiser.

    Attributes:
        in_4bit: whether the linear modules are in 4 bits.
        number: bytes of a number of an activation.
        fp8: whether products with frozen weights are in FP8.
        offloads: whether the inputs of checkpointed layers are on the host.
    """

    shape: ModelShape
    in_4bit: bool
    number: int = 2
    fp8: bool = False
    offloads: bool = False

    def inputs(self, rows: int) -> float:
        """Bytes of a checkpointed layer's input on the GPU."""
        return 0 if self.offloads else rows * self.shape.hidden_size * self.number

    def attention(self, rows: int) -> float:
        """Bytes that a checkpointed layer keeps of attention (`ops.kept_attention`)."""
        return rows * self.shape.num_heads * (self.shape.head_dim * self.number + 4)

    def working(self, forward: Forward) -> float:
        """Bytes that one layer's backward needs, with its recompute where a layer is checkpointed."""
        if forward.backward_rows is None:
            needed = backward_working_set(self.shape, forward.rows, self.in_4bit, self.number)
        else:
            needed = row_working_set(self.shape, forward.rows, forward.backward_rows, self.in_4bit, self.number)
        needed += fp8_working_set(self.shape, forward.rows, self.in_4bit) * self.fp8
        return needed + forward.recomputed * (forward.checkpointed > 0)

    def dense(self, forward: Forward) -> Forward:
        """What its captured passes need: as much as dense ones, measured; none of their tensors is freed in between."""
        one = layer_activations(self.shape, forward.rows, forward.rows, activation_bytes=self.number)
        return replace(forward, recomputed=max(forward.recomputed, one), backward_rows=None)

    def kept(self, forward: Forward) -> float:
        """Bytes that all layers keep until their backward."""
        attention = forward.attention_kept * self.attention(forward.rows)
        return forward.stored + forward.checkpointed * self.inputs(forward.rows) + attention

    def alone(self, forward: Forward) -> float:
        """Bytes of a forward that nothing of is captured, at its peak."""
        return self.kept(forward) + max(self.working(forward), forward.logits)

    def pool(self, forward: Forward) -> float:
        """Bytes of the graphs of a captured forward; a kept layer's input is copied into them."""
        return forward.stored + forward.kept * self._hidden(forward) + self.working(self.dense(forward))

    def replayed(self, forward: Forward) -> float:
        """Bytes of a captured forward at its peak, with its graphs'."""
        beside = forward.checkpointed * self.inputs(forward.rows) + BUFFERS * self._hidden(forward) + forward.logits
        copied = forward.attention_kept + (forward.attention_kept > 0)  # one copy is the recompute's input
        return self.pool(forward) + beside + copied * self.attention(forward.rows)

    def peak(self, alone: Sequence[Forward], captured: Sequence[Forward] = ()) -> float:
        """Bytes at the peak of a training.

        Args:
            alone: its forwards as they run without capture, which every size does first.
            captured: the same forwards captured, with their padding; none without CUDA graphs. If they have several
                sizes, others still run without capture while the pool of the largest one is there.
        """
        largest = max(map(self.alone, alone))
        if not captured:
            return largest
        pool = max(map(self.pool, captured)) if len({one.rows for one in captured}) > 1 else 0
        return max(largest + pool, *map(self.replayed, captured))

    def _hidden(self, forward: Forward) -> float:
        return forward.rows * self.shape.hidden_size * self.number


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
    recomputed: float | None = None,
    captured: Sequence[tuple[int, float]] = (),
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
        recomputed: bytes that a checkpointed layer's recompute stores; None: as those flags say.
        captured: with CUDA graphs, rows and ``logits`` of captured micro-batches.
    """
    model = StepMemory(shape, in_4bit, activation_bytes, fp8, checkpointing == "unsloth")
    few = backward_rows is not None and recomputes_rows(whole_layers, skips_output and checkpointing != "off")

    def forward(rows: int, logits: float) -> Forward:
        one = layer_activations(shape, rows, rows, activation_bytes=activation_bytes)
        one = row_layer_activations(shape, rows, activation_bytes) if few else one
        kept = shape.num_layers if checkpointing == "off" else 0
        again = one if recomputed is None else recomputed
        return Forward(rows, logits, kept * one, kept, shape.num_layers - kept, again, backward_rows)

    alone = forward(rows, logits)
    return Memory(
        weights=linear * (BYTES_4BIT if in_4bit else weight_bytes) + other * weight_bytes,
        adapter=adapter * BYTES_ADAPTER,
        kept_activations=model.kept(alone),
        working_set=max(model.working(alone), logits),
        estimator=4 * estimator_rank * sparse_parts * 2 * (shape.hidden_size + shape.intermediate_size),
        graphs=model.peak([alone], [forward(*one) for one in captured]) - model.alone(alone),
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


def sparse_layer_activations(
    shape: ModelShape, mlp: Sequence[float], rows: int, dense_rows: int, lora_rank: int, activation_bytes: int = 2
) -> float | None:
    """As `layer_activations` of the largest layer with channel sparsity; None if there is none.

    At the peak of channel-sparse training it counts, though some layers are dense: measured.

    Args:
        mlp: the sparsity of each layer's MLP.
    """
    kept = [keep_count(shape.intermediate_size, one) for one in mlp if one]
    if not kept:
        return None
    return layer_activations(
        shape, rows, dense_rows, kept_channels=max(kept), lora_rank=lora_rank, activation_bytes=activation_bytes
    )


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
    """As `backward_working_set`, with what O and MLP compute again for ``backward_rows`` rows, or gather of them.

    In 4 bits gate and up are dequantised together (`ops.weight_stack`).
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    numbers = backward_rows * (3 * inner + 6 * hidden) + rows * 6 * hidden + (2 * hidden * inner if in_4bit else 0)
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


def logit_bytes(unsloth: str | None = None) -> int:
    """Bytes of a logit in the fused loss of ``unsloth``, a version; None: of the installed one, or of the newest."""
    if unsloth is None:
        try:
            unsloth = importlib.metadata.version("unsloth")
        except importlib.metadata.PackageNotFoundError:
            return BYTES_LOGIT
    numbers = tuple(int(part) for part in unsloth.split(".")[:3] if part.isdecimal())
    return BYTES_LOGIT if numbers >= FEWER_LOGIT_BYTES else BYTES_COUNTED


def fused_logits(shape: ModelShape, rows: int, each: int = BYTES_LOGIT) -> float:
    """Bytes of one chunk of Unsloth's fused loss over ``rows``. With less than 8 GiB free chunks are smaller.

    Args:
        each: `logit_bytes`.
    """
    counted = rows * shape.vocab_size * BYTES_COUNTED
    budget = LOSS_BUDGET - rows * shape.hidden_size * 2
    chunks = 1 if counted <= budget else 4 * math.ceil(counted / budget / 4)
    return rows * shape.vocab_size * each / chunks


def plain_logits(shape: ModelShape, rows: int, activation_bytes: int = 2) -> float:
    """Bytes of all logits, their float32 copy, and their gradient."""
    return rows * shape.vocab_size * (activation_bytes + 4 + 4)
