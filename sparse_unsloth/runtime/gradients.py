"""Checks backward passes: every trained tensor gets a gradient, and the loss reads labelled tokens only.

Both checks hook tensors of single forwards, so other forwards and steps cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.adapters import active_parameters
from sparse_unsloth.model.decoder_layer import DecoderLayer, first_tensor
from sparse_unsloth.tokens.partition import TokenPartition

CHECK_EVERY = 100
"""`LossRows` checks one of this many sparse training forwards."""
MULTI_TOKEN = re.compile(r"(^|[._])(mtp|nextn)", re.IGNORECASE)
"""Names of modules that predict several tokens ahead, with their own attention after the last layer."""
UNREAD_SHARE = 1e-8
"""Tokens with at most this share of the squared gradient count as not read by the loss."""


class FirstBackward:
    """Checks that the backward pass of one sparse training forward gives every trained tensor a gradient.

    Only layers whose output receives a gradient are checked, so that a loss may read a part of the model. Only parts
    that the sparse functions compute are checked, since a model may have unused parameters elsewhere.

    Args:
        layers: the layers that the sparse functions compute, each with its sparsity.
        row_sparse: `SparsityConfig.row_sparse`.
    """

    def __init__(self, layers: Sequence[tuple[DecoderLayer, LayerSparsity]], row_sparse: bool):
        self._names = {layer.index: layer.name for layer, _ in layers}
        self._missing = {layer.index: _trained(layer, sparsity, row_sparse) for layer, sparsity in layers}
        self._expected = {index: len(found) for index, found in self._missing.items()}
        self._ending: set[int] = set()  # layers that the running backward pass has reached
        self._reached: set[int] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, index, name))
            for index, found in self._missing.items()
            for name, parameter in found.items()
        ]

    def watch(self, index: int, output: Any) -> None:
        """Notes when the ``output`` of layer ``index`` receives a gradient."""
        output = first_tensor(output)
        if output is not None and output.requires_grad and index in self._missing:
            output.register_hook(partial(self._reach, index))

    def close(self) -> bool:
        """Ends the check, including gradients that FSDP2 sets only after the backward pass.

        Returns:
            Whether a backward pass ran and set gradients (with FSDP2 this may come a micro-batch later).

        Raises:
            AttachError: tensors without a gradient.
        """
        self.drop()
        late = {index for index in self._reached if 0 < len(self._missing[index]) < self._expected[index]}
        self._check_layers(late)
        came = any(len(self._missing[index]) < self._expected[index] for index in self._reached)
        return came or (bool(self._reached) and not any(self._expected.values()))

    def drop(self) -> None:
        """Ends the check without a result."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, index: int, name: str, parameter: Tensor) -> None:
        self._missing[index].pop(name, None)

    def _reach(self, index: int, gradient: Tensor) -> None:
        if not self._handles:
            return
        if _is_autograd_grad(self._missing[index].values()):
            self.drop()
            return
        if not self._ending:
            # Queued twice, so that it runs after the callbacks that DDP and FSDP2 have queued by then.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._end))
        self._ending.add(index)

    def _end(self) -> None:
        ended, self._ending = self._ending, set()
        self._reached |= ended
        sharded = {
            index for index in ended if any(isinstance(tensor, DTensor) for tensor in self._missing[index].values())
        }
        self._check_layers(ended - sharded)

    def _check_layers(self, indices: set[int]) -> None:
        found = [
            f"{self._names[index]}.{name}"
            for index in sorted(indices)
            for name, parameter in self._missing[index].items()
            if parameter.requires_grad
        ]
        if found:
            total = sum(self._expected[index] for index in indices)
            raise AttachError(
                f"{len(found)} of {total} trained tensors of the sparse layers got no gradient in the first sparse "
                f"backward pass: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}. The sparse path does not "
                "use them, or the loss does not depend on them: an adapter or a hook of another kind is on these "
                "modules. Train plain LoRA (peft.LoraConfig), freeze these tensors, or train dense (sparsity=None)."
            )


def _trained(layer: DecoderLayer, sparsity: LayerSparsity, row_sparse: bool) -> dict[str, nn.Parameter]:
    """The parameters of a layer that must get a gradient from its sparse functions, by name."""
    if row_sparse:  # experts without a row get none
        modules = {part.path or part.name: part.module for part in layer.row_parts if not part.is_routed}
    else:
        projections = layer.projections().items()
        modules = {name: module for name, module in projections if getattr(sparsity, name.partition(".")[0]) > 0}
    return {
        f"{place}.{name}": parameter
        for place, module in modules.items()
        for name, parameter in active_parameters(module).items()
    }


def _is_autograd_grad(parameters: Iterable[Tensor]) -> bool:
    """Whether the running pass is ``torch.autograd.grad``, which returns gradients of ``parameters`` instead."""
    with torch.enable_grad():
        for parameter in parameters:
            accumulates = parameter.view_as(parameter).grad_fn.next_functions[0][0]
            try:
                torch._C._will_engine_execute_node(accumulates)
            except RuntimeError:  # raised for a node whose gradient is returned
                return True
    return False


class LossRows:
    """Checks every `CHECK_EVERY` forwards whether the loss reads tokens without a label.

    After the last decoder layer come the final norm, the head and the loss, all row by row. So the gradient of the
    layer's output is exactly zero in every row that the loss does not read.

    Args:
        model: the outermost model.
        stack: every decoder layer, by name.
        warn: takes a warning, and gives it once.

    Attributes:
        last: the last decoder layer; None where something that mixes tokens may follow it.
        looks: how many backward passes were checked.
    """

    def __init__(self, model: nn.Module, stack: Mapping[str, nn.Module], warn: Callable[[str], None]):
        self._warn = warn
        self.last = next(reversed(stack.values())) if self._ends_the_model(model, stack) else None
        self.looks = 0
        self._forwards = 0
        self._in_flight: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def should_check(self) -> bool:
        """Whether to check the training forward that begins."""
        if self.last is None:
            return False
        self._forwards += 1
        return self._forwards % CHECK_EVERY == 1

    def watch(self, partition: TokenPartition, output: Any) -> None:
        """Checks the gradient of ``output``, the last layer's, when backward computes it; ``partition``: its rows."""
        output = first_tensor(output)
        if output is not None and output.requires_grad and output.shape[:-1] == partition.shape:
            output.register_hook(partial(self._check, partition))

    def collect(self) -> None:
        """Reads the checks whose copy to the host is done, and warns once."""
        waiting = []
        for shares, arrived in self._in_flight:
            if arrived is not None and not arrived.query():
                waiting.append((shares, arrived))
                continue
            read, everything = shares.tolist()
            if everything > 0 and UNREAD_SHARE * everything < read < float("inf"):
                self._warn(
                    f"The loss reads tokens that have no label: {read / everything:.1%} of the (squared) gradient "
                    "after the last decoder layer is theirs. They count as context tokens, so their gradients are "
                    "approximated. Causes: a custom loss over every token, or one that weighs prompts "
                    "(prompt_loss_weight), beside labels that mark answers only. Give labels to every "
                    "token that the loss reads, or train dense (sparsity=None)."
                )
        self._in_flight = waiting

    def _check(self, partition: TokenPartition, gradient: Tensor) -> None:
        self.looks += 1
        rows = gradient.detach().flatten(0, -2)
        squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32)).square()
        unlabelled = torch.cat((partition.context, partition.padding)).to(squares.device)
        shares = torch.stack((squares.index_select(0, unlabelled).sum(), squares.sum()))
        if shares.device.type != "cuda":
            self._in_flight.append((shares, None))
            self.collect()
            return
        host = torch.empty(shares.shape, dtype=shares.dtype, pin_memory=True).copy_(shares, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(shares.device))
        self._in_flight.append((host, arrived))

    @staticmethod
    def _ends_the_model(model: nn.Module, stack: Mapping[str, nn.Module]) -> bool:
        """Whether nothing that mixes tokens follows the last layer: one list of layers, and no MTP module."""
        heads = any(MULTI_TOKEN.search(name) for name, _ in model.named_modules())
        return len({name.rpartition(".")[0] for name in stack}) == 1 and not heads
