"""Turns gradient checkpointing off for as many layers as a memory budget allows, before each forward.

Checkpointing runs each layer's forward twice to save memory. The bytes that a layer stores without it are predicted
from the token roles of the micro-batch and the layer's sparsity; the layers that need least come first, and what is
left goes to the intermediates of context tokens in row-sparse whole layers (docs/how-it-works.md, section 8). Before
any keeps all, whole layers of long documents may keep attention alone (`KEEPS_ATTENTION`). The planner sets the flag
``gradient_checkpointing`` of each decoder layer, which transformers and Unsloth read. Loss and gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, inf

import torch
from torch import nn

from sparse_unsloth.config.layer_rules import LayerSparsity, keep_count
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.costs.flops import ATTENTION, ModelShape, recomputes_rows
from sparse_unsloth.costs.memory import (
    GIB,
    Forward,
    StepMemory,
    fused_logits,
    layer_activations,
    logit_bytes,
    loss_row_activations,
    plain_logits,
    row_layer_activations,
)
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.exact.loss import ROW_MULTIPLE
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.tokens.partition import TokenPartition

MARGIN = 1.1
"""Factor on the predicted bytes of activations."""
KEEPS_ATTENTION = False
"""Whether checkpointed layers may keep attention alone (`ops.kept_attention`). True once it is measured on a GPU:
tests/gpu/test_kept_attention.py and ``tests/gpu/acceptance.py --keep-attention`` pass, and the step of one document of
16,384 tokens is as much shorter as benchmarks/results/one-layer/kept_attention.md predicts, or what is found pays."""
LEAST_ATTENTION = 0.03
"""Of a layer's step, attention's forward: from here a byte of it saves more time than one of a layer's activations."""
SLOWER_ATTENTION = 1.5
"""Time of a FLOP of attention, relative to that of a product with a frozen weight."""
BYTES_PER_TRAINED = 12
"""Bytes that a trained parameter will need: its gradient and AdamW's two moments, which the first step allocates."""


class CheckpointPlanner:
    """Sets the layers' checkpointing flags before each training forward.

    Args:
        model: the outermost model.
        layers, layer_sparsity: its decoder layers, and the sparsity of each.
        budget: `SparsityConfig.memory_budget`.
        row_layers: by index of each row-sparse layer, whether it runs as a whole; others store inputs alone.
        backward_rows: `SparsityConfig.backward_rows`.
        fused_loss: the loss is Unsloth's, which stores few logits.
        config: of it `exact_removal` and `precision` count.

    Attributes:
        num_kept: how many layers kept their activations in the last forward.
        context_again: indices of those that kept them for loss tokens alone (`LayerPlan.keep_context`).
        attention_kept: indices of checkpointed layers that keep attention.

    Raises:
        ConfigError: the budget is a share of the memory, on a device whose size is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[DecoderLayer],
        layer_sparsity: Sequence[LayerSparsity],
        budget: float,
        *,
        row_layers: Mapping[int, bool],
        backward_rows: float,
        fused_loss: bool,
        config: SparsityConfig,
    ):
        self.num_kept, self.context_again, self.attention_kept = 0, frozenset(), frozenset()
        self._attention_reach: dict[int, float] = {}
        self._dense_whole = config.cuda_graphs or config.fp8  # elsewhere dense layers run their own forward
        self._model, self._layers, self._sparsity = model, layers, layer_sparsity
        self._row_layers, self._backward_rows = row_layers, backward_rows
        self._fused_loss, self._loss_only, self._fp8 = fused_loss, config.exact_removal, config.fp8
        self._shape = ModelShape.from_config(model.config)
        self._flags: dict[int, object] = {}
        self._devices = [next(layer.module.parameters()).device for layer in layers]
        self._tightest = self._devices[0]  # with the least room in the last forward
        self._budgets = {device: _bytes_of(budget, device) for device in set(self._devices)}
        parameters = list(model.parameters())
        self._future_bytes = BYTES_PER_TRAINED * sum(p.numel() for p in parameters if p.requires_grad)
        self._in_4bit = any(p.dtype == torch.uint8 or hasattr(p, "quant_state") for p in parameters)
        self._activation_bytes = max(2, self._norm_dtype(layers[0].module).itemsize)
        adapters = getattr(model, "peft_config", {})
        self._lora_rank = max((getattr(adapter, "r", 0) for adapter in adapters.values()), default=0)

    def note_whole(self, index: int, window: int | None, keeps: bool = True) -> None:
        """Notes that a layer ran as a whole, so that it may keep attention from now on.

        Args:
            window: of its attention.
            keeps: false where it should have kept attention, and found nothing to keep; then it never does again.
        """
        if self._attention_reach.get(index) != 0:
            self._attention_reach[index] = (window or inf) if keeps else 0

    def plan(self, partition: TokenPartition, scale: float, held: int = 0, document: float = 0) -> None:
        """Sets the flags for one forward.

        Args:
            partition: the token roles of its rows.
            scale: the schedule's factor on the configured sparsity.
            held: bytes that are not allocated, and that this forward cannot use (`GraphCache.kept_memory`).
            document: tokens of a document (`Batch.document_length`); 0: not known, so attention is not kept.
        """
        if not torch.is_grad_enabled():
            return
        kept, stored, attention, _ = self._choose(partition, scale, held, document)
        for index, flag in self._flags.items():
            self._layers[index].module.gradient_checkpointing = False if index in kept else flag
        self.num_kept, self.context_again = len(kept), frozenset(kept - stored)
        self.attention_kept = frozenset(attention)

    def fits(self, tokens: int, of: int | None = None, held: int = 0) -> bool:
        """Whether a dense forward of so many tokens fits into the budget; ``held`` as in `plan`.

        Args:
            of: it must keep as many layers as a forward of so many tokens; None: it may checkpoint all that it can.
        """
        kept, *_, spare = self._choose(_every_token_bears_loss(tokens), 0.0, held)
        if spare < 0 or of is None:
            return spare >= 0
        return len(kept) >= len(self._choose(_every_token_bears_loss(of), 0.0, held)[0])

    def forecast(
        self, partition: TokenPartition, scale: float, held: int = 0, document: float = 0
    ) -> tuple[int, Forward]:
        """How many layers would keep activations in such a forward, and its memory; arguments as `plan`.

        Of several devices the one with the least room counts.
        """
        kept, stored, attention, _ = self._choose(partition, scale, held, document)
        device, rows = self._tightest, partition.shape[0] * partition.shape[1]
        here = [layer.index for layer in self._layers if self._devices[layer.index] == device]
        managed = set(self._managed())
        keeping = [index for index in here if index in kept or index not in managed]
        ways = {self._kind(index): self._ways(index, partition, rows, scale) for index in keeping}
        whole = sum(ways[self._kind(index)][-1 if index in stored or index not in managed else 0] for index in keeping)
        forward = self._forward(partition, rows, scale, whole, len(keeping), len(here) - len(keeping))
        return len(kept), replace(forward, attention_kept=len(attention.intersection(here)))

    def peak(self, alone: Sequence[Forward], captured: Sequence[Forward] = ()) -> float:
        """Bytes at the peak of a training with such forwards (`StepMemory.peak`), with what is allocated by now."""
        return allocated(self._tightest) + self._future_bytes + self.memory.peak(alone, captured)

    @property
    def memory(self) -> StepMemory:
        """The bytes of a step, beside what stays allocated."""
        modes = {getattr(self._model, "_unsloth_gradient_checkpointing", None), *self._flags.values()}
        return StepMemory(self._shape, self._in_4bit, self._activation_bytes, self._fp8, "unsloth" in modes)

    @property
    def budget(self) -> float:
        """Bytes that training may use of a device; of several the smallest number."""
        return min(self._budgets.values())

    def _choose(
        self, partition: TokenPartition, scale: float, held: int, document: float = 0
    ) -> tuple[set[int], set[int], set[int], float]:
        """What to keep of the layers that are checkpointed.

        Returns:
            The layers that keep activations, those of them that keep all, the others that keep attention, and the bytes
            that are left on the device with the least room; below 0 the forward does not fit with nothing kept either.
        """
        managed, rows = self._managed(), partition.shape[0] * partition.shape[1]
        needs, alike = {}, {}  # most layers need the same
        for layer in self._layers:
            kind = self._kind(layer.index)
            if kind not in alike:
                alike[kind] = self._needs(layer.index, partition, rows, scale)
            needs[layer.index] = alike[kind]
        kept: set[int] = set()
        stored: set[int] = set()
        attention: set[int] = set()
        one = self.memory.attention(rows)
        reaches = self._attention_reach if scale > 0 or self._dense_whole else {}
        able = {index for index, reach in reaches.items() if self._pays_to_keep(min(document / 2, reach))}
        spare = inf
        self._tightest = self._devices[0]
        for device, budget in self._budgets.items():
            here = [index for index in managed if self._devices[index] == device]
            others = [
                needs[layer.index][-1]
                for layer in self._layers
                if layer.index not in managed and self._devices[layer.index] == device
            ]
            room = budget - held - allocated(device) - self._future_bytes - sum(others)
            room -= self._other_bytes(partition, rows, len(here) + len(others), scale)
            first, room = _within(room, {index: one for index in here if index in able})
            fit, room = _within(room, {index: needs[index][0] - one * (index in first) for index in here})
            kept |= fit
            attention |= first - fit
            every, room = _within(room, {index: needs[index][-1] - needs[index][0] for index in fit})
            stored |= every
            if room < spare:
                spare, self._tightest = room, device
        return kept, stored, attention, spare

    def restore(self) -> None:
        """Restores every layer's own flag."""
        for index, flag in self._flags.items():
            self._layers[index].module.gradient_checkpointing = flag
        self._flags, self.num_kept, self.context_again, self.attention_kept = {}, 0, frozenset(), frozenset()

    def _managed(self) -> list[int]:
        """The layers that are checkpointed apart from what the planner turned off.

        Where none of the layers that the planner left on is on any more, checkpointing was turned off for the model.
        """
        on = {
            layer.index: flag
            for layer in self._layers
            if (flag := getattr(layer.module, "gradient_checkpointing", False))
        }
        if not on and self.num_kept < len(self._flags):
            self._flags = {}
        self._flags |= on
        return list(self._flags)

    def _kind(self, index: int) -> tuple:
        """What decides a layer's bytes."""
        return (
            self._sparsity[index].mlp,
            self._row_layers.get(index),
            getattr(self._layers[index], "intermediate_size", None),
        )

    def _needs(self, index: int, partition: TokenPartition, rows: int, scale: float) -> list[float]:
        """Bytes that one layer needs without checkpointing, beyond what it needs with it, in each way, ascending."""
        inputs = self.memory.inputs(rows)
        return [MARGIN * kept - inputs for kept in self._ways(index, partition, rows, scale)]

    def _ways(self, index: int, partition: TokenPartition, rows: int, scale: float) -> list[float]:
        """Bytes that one layer without checkpointing stores, in each way, ascending.

        A row-sparse whole layer may keep what follows attention for loss tokens alone.
        """
        is_whole = self._row_layers.get(index) if scale > 0 else None
        if is_whole is False:
            return [row_layer_activations(self._shape, rows, self._activation_bytes)]
        sparsity = self._sparsity[index].mlp * scale
        channels = getattr(self._layers[index], "intermediate_size", self._shape.intermediate_size)
        every = layer_activations(
            self._shape,
            rows,
            partition.num_dense if sparsity else rows,
            kept_channels=keep_count(channels, sparsity),
            lora_rank=self._lora_rank,
            activation_bytes=self._activation_bytes,
        )
        few = loss_row_activations(self._shape, rows, partition.num_dense, self._activation_bytes)
        return [few, every] if is_whole and self._pays(few / every, partition, rows) else [every]

    def _pays(self, memory: float, partition: TokenPartition, rows: int) -> bool:
        """Whether chosen context rows that are computed again save more bytes a FLOP than a checkpointed layer does.

        Args:
            memory: the bytes of such a layer, relative to one that keeps every intermediate.
        """
        sizes = {name: inputs * outputs for name, (inputs, outputs) in self._shape.projections().items()}
        before = sum(sizes[name] for name in ATTENTION[:3])
        after = sizes["o_proj"] + sizes["gate_proj"] + sizes["up_proj"]
        chosen = ceil(self._backward_rows * partition.num_context)
        return after * chosen <= (1 - memory) * (before * rows + after * (partition.num_dense + chosen))

    def _pays_to_keep(self, keys: float) -> bool:
        """Whether attention's forward is a large share of a checkpointed layer's step, where a query sees so many keys.

        Counted for a token of a dense layer: forward, recompute without down, and gradient; attention's backward takes
        2.5 of its forwards.
        """
        if not (KEEPS_ATTENTION and keys):
            return False
        shape = self._shape
        sizes = {name: inputs * outputs for name, (inputs, outputs) in shape.projections().items()}
        products = 6 * sum(sizes.values()) - 2 * sizes["down_proj"]
        forward = SLOWER_ATTENTION * 4 * shape.num_heads * shape.head_dim * keys
        return forward >= LEAST_ATTENTION * (products + 4.5 * forward)

    def _other_bytes(self, partition: TokenPartition, rows: int, layers: int, scale: float = 0.0) -> float:
        """Bytes of everything else at the peak: the inputs of checkpointed layers, and one recompute or the loss."""
        memory, forward = self.memory, self._forward(partition, rows, scale, 0, 0, layers)
        return MARGIN * max(memory.working(forward), forward.logits) + memory.kept(forward)

    def _forward(
        self, partition: TokenPartition, rows: int, scale: float, stored: float, kept: int, checkpointed: int
    ) -> Forward:
        """Such a forward, for `StepMemory`."""
        if not self._fused_loss:
            logits = plain_logits(self._shape, rows, self._activation_bytes)
        else:
            few = min(rows, ceil(max(partition.num_labelled, 1) / ROW_MULTIPLE) * ROW_MULTIPLE)
            logits = fused_logits(self._shape, few if self._loss_only else rows, logit_bytes())
        recomputed, through = layer_activations(self._shape, rows, rows, activation_bytes=self._activation_bytes), None
        if scale > 0 and len(self._row_layers) == len(self._layers):
            through = partition.num_dense + ceil(self._backward_rows * partition.num_context)
            if recomputes_rows(all(self._row_layers.values()), self._loss_only):
                recomputed = row_layer_activations(self._shape, rows, self._activation_bytes)
        return Forward(rows, logits, stored, kept, checkpointed, recomputed, through)

    @staticmethod
    def _norm_dtype(layer: nn.Module) -> torch.dtype:
        """The dtype of a layer's norms, which is that of its residual stream."""
        return next((p.dtype for name, p in layer.named_parameters() if "norm" in name), torch.bfloat16)


def counted(dense: int, context: int, padding: int, loss: int, sequences: int = 1) -> TokenPartition:
    """The roles of so many tokens, for their counts alone; ``dense`` to ``loss`` as in `TokenPartition`."""
    rows = torch.empty(dense + context + padding, device="meta")
    shape = sequences, len(rows) // max(sequences, 1)
    return TokenPartition(shape, rows[:dense], rows[:context], rows[:padding], rows[:loss])


def _every_token_bears_loss(tokens: int) -> TokenPartition:
    return counted(tokens, 0, 0, tokens)


def _within(room: float, needs: Mapping[int, float]) -> tuple[set[int], float]:
    """The layers whose ``needs`` fit in ``room`` together, the cheapest first, and the room that is left."""
    chosen: set[int] = set()
    for index in sorted(needs, key=lambda index: (needs[index], -index)):  # of equal ones the last: freed first
        if needs[index] > room:
            break
        room -= needs[index]
        chosen.add(index)
    return chosen, room


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on ``device`` (weights, adapters, moments, stored activations); 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _bytes_of(budget: float, device: torch.device) -> float:
    if budget > 1:
        return budget * GIB
    if device.type != "cuda":
        raise ConfigError(f"memory_budget: {budget} is a share of a GPU's memory, and the model is on {device}")
    return budget * torch.cuda.get_device_properties(device).total_memory
