"""Gradient checkpointing as little as a memory budget allows, decided anew for every forward.

Checkpointing runs each layer's forward twice to save memory. What a layer would keep instead is known beforehand: the
rows of this micro-batch by role, and how many channels its context rows keep. A sparse MLP keeps little of them, so
sparse layers come first; one whose backward pass goes through few rows (`backward_rows`) keeps nothing of its MLP but
the input. The result is the same: the flag of each decoder layer (transformers' ``gradient_checkpointing``, which
Unsloth reads too) only decides whether its activations are kept or computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.config.sparsity import LayerSparsity
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import (
    GIB,
    backward_working_set,
    fused_logits,
    layer_activations,
    plain_logits,
    row_layer_activations,
)
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.tokens.partition import TokenPartition

MARGIN = 1.1
"""On predicted activations."""
BYTES_TO_COME = 12
"""Of a trained parameter: its gradient, and AdamW's two moments, which the first step makes."""


class CheckpointPlanner:
    """Sets the layers' checkpointing flags before each training forward.

    Args:
        model: the outermost model.
        layers, layer_sparsity: its decoder layers, and the sparsity of each.
        budget: `SparsityConfig.memory_budget`.
        row_layers: by index, the layers whose backward pass goes through few rows, and whether each runs as a whole.
        fused_loss: the loss is Unsloth's, which keeps few logits; ``loss_only``: it computes rows with loss alone.

    Attributes:
        num_kept: layers that keep their activations in the last forward.

    Raises:
        ConfigError: a share of the memory, on a device whose size is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[DecoderLayer],
        layer_sparsity: Sequence[LayerSparsity],
        budget: float,
        *,
        row_layers: Mapping[int, bool],
        fused_loss: bool,
        loss_only: bool,
    ):
        self.num_kept = 0
        self._model, self._layers, self._sparsity = model, layers, layer_sparsity
        self._row_layers, self._fused_loss, self._loss_only = row_layers, fused_loss, loss_only
        self._shape = ModelShape.from_config(model.config)
        self._flags: dict[int, object] = {}
        self._devices = [next(layer.module.parameters()).device for layer in layers]
        self._budgets = {device: _bytes_of(budget, device) for device in set(self._devices)}
        parameters = list(model.parameters())
        self._to_come = BYTES_TO_COME * sum(p.numel() for p in parameters if p.requires_grad)
        self._in_4bit = any(p.dtype == torch.uint8 or hasattr(p, "quant_state") for p in parameters)
        self._activation_bytes = max(2, self._norm_dtype(layers[0].module).itemsize)
        adapters = getattr(model, "peft_config", {})
        self._lora_rank = max((getattr(adapter, "r", 0) for adapter in adapters.values()), default=0)

    def plan(self, partition: TokenPartition, scale: float) -> None:
        """Decides for a forward over these rows, at this share of the configured sparsity."""
        if not torch.is_grad_enabled():
            return
        managed = self._managed()
        rows = partition.shape[0] * partition.shape[1]
        needs = {index: self._needs(index, partition, rows, scale) for index in managed}
        kept: set[int] = set()
        for device, budget in self._budgets.items():
            here = [index for index in managed if self._devices[index] == device]
            room = budget - allocated(device) - self._to_come - self._rest(partition, rows, len(here))
            # The cheapest first: sparse ones; of equal ones the last, whose memory is free again first.
            for index in sorted(here, key=lambda index: (needs[index], -index)):
                room -= needs[index]
                if room < 0:
                    break
                kept.add(index)
        for index in managed:
            self._layers[index].module.gradient_checkpointing = False if index in kept else self._flags[index]
        self.num_kept = len(kept)

    def restore(self) -> None:
        """Gives every layer the flag that it had."""
        for index, flag in self._flags.items():
            self._layers[index].module.gradient_checkpointing = flag
        self._flags, self.num_kept = {}, 0

    def _managed(self) -> list[int]:
        """Layers that are checkpointed but for us. Where none of those that were left on is on, somebody else turned
        it off for the whole model."""
        on = {
            layer.index: flag
            for layer in self._layers
            if (flag := getattr(layer.module, "gradient_checkpointing", False))
        }
        if not on and self.num_kept < len(self._flags):
            self._flags = {}
        self._flags |= on
        return list(self._flags)

    def _needs(self, index: int, partition: TokenPartition, rows: int, scale: float) -> float:
        """Bytes more than with checkpointing, of one layer."""
        if scale > 0 and index in self._row_layers:
            kept = row_layer_activations(self._shape, rows, self._row_layers[index], self._activation_bytes)
            return MARGIN * kept - self._input_bytes(rows)
        layer, sparsity = self._layers[index], self._sparsity[index].mlp * scale
        dense_rows = partition.num_dense if sparsity else rows
        kept = layer_activations(
            self._shape,
            rows,
            dense_rows,
            kept_channels=keep_count(layer.intermediate_size, sparsity),
            lora_rank=self._lora_rank,
            activation_bytes=self._activation_bytes,
        )
        return MARGIN * kept - self._input_bytes(rows)

    def _rest(self, partition: TokenPartition, rows: int, layers: int) -> float:
        """Bytes of everything else at the peak: inputs of checkpointed layers, one recomputed layer, the loss."""
        size = self._activation_bytes
        one = layer_activations(self._shape, rows, rows, activation_bytes=size)
        working = one + backward_working_set(self._shape, rows, self._in_4bit, size)
        if self._fused_loss:
            logits = fused_logits(self._shape, len(partition.loss) if self._loss_only else rows)
        else:
            logits = plain_logits(self._shape, rows, size)
        return MARGIN * max(working, logits) + layers * self._input_bytes(rows)

    def _input_bytes(self, rows: int) -> float:
        """Of a checkpointed layer: its input, which Unsloth keeps on the host."""
        modes = {getattr(self._model, "_unsloth_gradient_checkpointing", None), *self._flags.values()}
        return 0 if "unsloth" in modes else rows * self._shape.hidden_size * self._activation_bytes

    @staticmethod
    def _norm_dtype(layer: nn.Module) -> torch.dtype:
        """Of a layer's norms, and so of its residual stream."""
        return next((p.dtype for name, p in layer.named_parameters() if "norm" in name), torch.bfloat16)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on ``device`` now: weights, adapters, moments, and what other forwards keep; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _bytes_of(budget: float, device: torch.device) -> float:
    if budget > 1:
        return budget * GIB
    if device.type != "cuda":
        raise ConfigError(f"memory_budget: {budget} is a share of a GPU's memory, and the model is on {device}")
    return budget * torch.cuda.get_device_properties(device).total_memory
