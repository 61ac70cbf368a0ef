"""Looks at backward passes: whether every trained tensor gets a gradient, and whether the loss reads what labels say.

Both are looked at through hooks on tensors of one forward, so that other forwards and steps cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.config.sparsity import LayerSparsity
from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.adapters import active_parameters
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.tokens.partition import TokenPartition

LOOK_EVERY = 100
"""Of how many sparse training forwards one is looked at, by `LossRows`."""
MULTI_TOKEN = re.compile(r"(^|[._])(mtp|nextn)", re.IGNORECASE)
"""Names of modules that predict several tokens ahead, with attention of their own behind the last layer."""
UNREAD = 1e-8
"""Up to this share of the squared gradient, tokens count as not read by the loss; rounding leaves exact zeros."""


class FirstBackward:
    """Of one sparse training forward: whether its backward pass gives every trained tensor of the layers a gradient.

    Only layers whose output receives a gradient are judged, so a loss that reads a part of the model is no fault. Of a
    layer it is what the sparse functions compute: elsewhere a model may have parameters that it does not use.

    Args:
        layers: those that the sparse functions compute, and how sparse each is.
        row_sparse: `SparsityConfig.row_sparse`.
    """

    def __init__(self, layers: Sequence[tuple[DecoderLayer, LayerSparsity]], row_sparse: bool):
        self._names = {layer.index: layer.name for layer, _ in layers}
        self._missing = {layer.index: _trained(layer, sparsity, row_sparse) for layer, sparsity in layers}
        self._expected = {index: len(found) for index, found in self._missing.items()}
        self._ending: set[int] = set()  # layers that the running part of the backward pass has come to
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
        """Ends the look, and judges what came late (FSDP2 hands gradients on behind the backward pass).

        Returns:
            Whether a backward pass came, and handed its gradients on (FSDP2 may do so a micro-batch later).

        Raises:
            AttachError: tensors without a gradient.
        """
        self.drop()
        late = {index for index in self._reached if 0 < len(self._missing[index]) < self._expected[index]}
        self._judge(late)
        came = any(len(self._missing[index]) < self._expected[index] for index in self._reached)
        return came or (bool(self._reached) and not any(self._expected.values()))

    def drop(self) -> None:
        """Ends the look without a judgement."""
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
            # Twice, so that it comes behind the callbacks that DDP and FSDP2 have queued by then.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._end))
        self._ending.add(index)

    def _end(self) -> None:
        ended, self._ending = self._ending, set()
        self._reached |= ended
        sharded = {
            index for index in ended if any(isinstance(tensor, DTensor) for tensor in self._missing[index].values())
        }
        self._judge(ended - sharded)

    def _judge(self, indices: set[int]) -> None:
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
                f"backward pass: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}. The sparse path goes by "
                "them, or nothing of the loss depends on them: an adapter or a hook of another kind is on these "
                "modules. Train plain LoRA (peft.LoraConfig), freeze these tensors, or train dense (sparsity=None)."
            )


def _trained(layer: DecoderLayer, sparsity: LayerSparsity, row_sparse: bool) -> dict[str, nn.Parameter]:
    """The parameters of a layer that its sparse functions must give a gradient, by name."""
    modules = {"mlp": layer.mlp, "self_attn.o_proj": layer.self_attn.o_proj}
    if not row_sparse:
        projections = layer.projections().items()
        modules = {name: module for name, module in projections if getattr(sparsity, name.partition(".")[0]) > 0}
    return {
        f"{place}.{name}": parameter
        for place, module in modules.items()
        for name, parameter in active_parameters(module).items()
    }


def _is_autograd_grad(parameters: Iterable[Tensor]) -> bool:
    """Whether the running pass returns gradients of these (``torch.autograd.grad``) and accumulates none."""
    with torch.enable_grad():
        for parameter in parameters:
            accumulates = parameter.view_as(parameter).grad_fn.next_functions[0][0]
            try:
                torch._C._will_engine_execute_node(accumulates)
            except RuntimeError:  # so it says that the node's gradient is captured
                return True
    return False


class LossRows:
    """Looks, now and then, whether the loss reads other tokens than the labels say.

    Behind the last decoder layer come the final norm, the head and the loss, all row by row, so the gradient of the
    layer's output is exactly zero in every row that the loss does not read.

    Args:
        model: the outermost model.
        stack: every decoder layer, by name.
        warn: takes what there is to say, and says it once.

    Attributes:
        last: the last decoder layer; None where something that mixes tokens may come behind it.
        looks: backward passes that were looked at.
    """

    def __init__(self, model: nn.Module, stack: Mapping[str, nn.Module], warn: Callable[[str], None]):
        self._warn = warn
        self.last = next(reversed(stack.values())) if self._ends_the_model(model, stack) else None
        self.looks = 0
        self._forwards = 0
        self._on_the_way: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def wants_next(self) -> bool:
        """Whether the training forward that begins is looked at."""
        if self.last is None:
            return False
        self._forwards += 1
        return self._forwards % LOOK_EVERY == 1

    def watch(self, partition: TokenPartition, output: Any) -> None:
        """Looks at the gradient of ``output``, what the last layer gave, when it comes; ``partition``: its rows."""
        output = first_tensor(output)
        if output is not None and output.requires_grad and output.shape[:-1] == partition.shape:
            output.register_hook(partial(self._look, partition))

    def collect(self) -> None:
        """Reads the looks that have arrived, and warns once."""
        waiting = []
        for shares, arrived in self._on_the_way:
            if arrived is not None and not arrived.query():
                waiting.append((shares, arrived))
                continue
            read, everything = shares.tolist()
            if everything > 0 and UNREAD * everything < read < float("inf"):
                self._warn(
                    f"The loss reads tokens that have no label: {read / everything:.1%} of the (squared) gradient "
                    "behind the last decoder layer is theirs. They count as context, and their gradients are "
                    "approximated, as if they did not matter. Causes: a loss of your own over every token, or one that "
                    "weighs prompts (prompt_loss_weight), beside labels that mark answers only. Give labels to every "
                    "token that the loss reads, or train dense (sparsity=None)."
                )
        self._on_the_way = waiting

    def _look(self, partition: TokenPartition, gradient: Tensor) -> None:
        self.looks += 1
        rows = gradient.detach().flatten(0, -2)
        squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32)).square()
        unlabelled = torch.cat((partition.context, partition.padding)).to(squares.device)
        shares = torch.stack((squares.index_select(0, unlabelled).sum(), squares.sum()))
        if shares.device.type != "cuda":
            self._on_the_way.append((shares, None))
            self.collect()
            return
        host = torch.empty(shares.shape, dtype=shares.dtype, pin_memory=True).copy_(shares, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(shares.device))
        self._on_the_way.append((host, arrived))

    @staticmethod
    def _ends_the_model(model: nn.Module, stack: Mapping[str, nn.Module]) -> bool:
        """Whether nothing that mixes tokens comes behind the last layer: one list of layers, and no MTP."""
        heads = any(MULTI_TOKEN.search(name) for name, _ in model.named_modules())
        return len({name.rpartition(".")[0] for name in stack}) == 1 and not heads


def first_tensor(output: Any) -> Tensor | None:
    """The hidden states of what a decoder layer returns."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
