"""Captures layers in CUDA graphs and replays them (docs/how-it-works.md, section 9.1).

A `LayerCapture` is one pass through one layer: its first forward under gradient checkpointing, its recompute with the
backward after it, or, without checkpointing, a forward that keeps its intermediates until its own backward
(`KeptCapture`). The first pass captures each of its calls; later passes copy their inputs to the captured addresses and
replay.

The graphs of passes that keep nothing share one memory pool. While a pass is captured, its intermediates are kept
alive, so that its calls do not overwrite each other. Afterwards they are released, and the next layer's capture uses
the same memory. Hence three rules. A pass is captured completely or not at all. Outputs of its calls are valid until
another pass begins (`LayerCapture.call` raises an error if that is too early). Whoever needs them longer copies them.

The graphs of kept passes share a second pool, which no other graph writes to. There a forward's intermediates are alive
from its capture to the capture of its backward, so that nothing captured in between overwrites them, and nothing that
replays in between does if it was captured then. Hence three more rules. All kept passes of a batch signature are
captured in one forward and the backward after it (`KeptPasses`), or none is. A later forward replays any of them, in
the same order; where it needs another one, or one whose weights moved, that layer runs without capture, and the next
forward of the signature captures all of them anew. Batch signatures share the memory, so that a backward is refused
once another forward began.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import SparsityError
from sparse_unsloth.graphs.capture import GraphCapture
from sparse_unsloth.model.training_flags import keeps_saved_tensors
from sparse_unsloth.tokens.partition import TokenPartition

RUNS_BEFORE_CAPTURE = 2
"""Forwards of one batch signature that run without capture first, so that every kernel is compiled."""
MAX_KEYS = 64
"""Batch signatures that are captured: each takes some tenths of a second, and memory for all layers' graphs."""
MAX_RECAPTURES = 4
"""Captures are given up when, on average, each was repeated so often because weights moved."""
MAX_COUNTED_KEYS = 256
"""Recent batch signatures whose forwards are counted."""

Call = Callable[..., "tuple[Sequence[Tensor], Any]"]


class GraphCache:
    """The CUDA graphs of an attached model.

    Args:
        recorder: captures functions; a `GraphCapture` by default.

    Attributes:
        captured_keys, prepared: batch signatures that are captured, and those that prepare for it.
        reserved: layers, with batch signatures, whose buffers for selections are reserved.
        forward: the last forward whose layers were captured or replayed.
        serial: counts passes.
        kept_memory: bytes that the kept passes' pool held when they were last captured; other forwards cannot use them.
        captures_documents: whether attention within packed documents or a window is captured.
    """

    def __init__(self, recorder: Any = None):
        self.recorder = GraphCapture() if recorder is None else recorder
        self.serial = 0
        self.captures_documents = True
        self._start()

    def __reduce__(self) -> tuple[Callable[..., GraphCache | None], tuple]:
        """Graphs belong to one model's memory: a copy starts without any, and is None where there is no GPU."""
        return _empty_cache, (type(self.recorder), self.captures_documents)

    def _start(self) -> None:
        self.captured_keys: set[Hashable] = set()
        self.forward: object = None
        self.prepared: set[Hashable] = set()
        self.reserved: set[Hashable] = set()
        self.kept_memory = 0
        self._began = self.serial
        self._moved = 0
        self._counted: OrderedDict[Hashable, int] = OrderedDict()
        self._captures: dict[Hashable, _Pass] = {}
        self._kept: dict[Hashable, KeptPasses] = {}
        self._keeping: KeptPasses | None = None
        self._buffers: dict[Hashable, Tensor] = {}
        self._storages: dict[Hashable, list[Tensor]] = {}
        self._buffer_places: set[tuple] = set()
        self._partitions: dict[Hashable, TokenPartition] = {}
        self._sources: dict[Hashable, object] = {}

    def clear(self) -> None:
        """Deletes all graphs and frees their memory."""
        self.recorder.forget()
        self._start()

    def should_replay(self, batch_key: Hashable) -> bool:
        """Whether the present forward, with the batch signature ``batch_key``, is captured or replayed.

        Call it once per forward: it counts the forwards of each batch signature (docs/how-it-works.md, section 9.2).
        """
        if batch_key in self.captured_keys:
            return True
        count = self._counted.pop(batch_key, 0)
        if count >= RUNS_BEFORE_CAPTURE and not self.full:
            self.captured_keys.add(batch_key)
            return True
        self._counted[batch_key] = count + 1
        if len(self._counted) > MAX_COUNTED_KEYS:
            self._counted.popitem(last=False)
        return False

    def captures_next(self, batch_key: Hashable) -> bool:
        """Whether the present forward, which is not captured, must prepare the capture of the next such one."""
        if batch_key not in self.prepared:
            if self._counted.get(batch_key, 0) < RUNS_BEFORE_CAPTURE or len(self.prepared) >= 2 * MAX_KEYS:
                return False
            self.prepared.add(batch_key)
        return True

    @property
    def full(self) -> bool:
        """Whether no further batch signatures are captured."""
        return len(self.captured_keys) >= MAX_KEYS

    @property
    def recaptures_too_often(self) -> bool:
        """Whether weights move so often that captures take more time than they save."""
        passes = len(self._captures) + sum(len(kept.passes) for kept in self._kept.values())
        return self._moved > MAX_RECAPTURES * passes

    def memory(self) -> int:
        """GPU memory of all graphs in bytes, without the buffers of their inputs."""
        return self.recorder.memory()

    def open(self, layer: int, which: Hashable, tensors: Sequence[Tensor], constants: tuple) -> LayerCapture:
        """Begins a pass through a layer. Outputs of earlier passes become invalid.

        Args:
            which: identifies the pass among those of the layer.
            tensors: weights and trained tensors, which its calls read at fixed addresses. If one moves, the pass is
                captured again.
            constants: other values that its calls depend on; if one changes, the pass is captured again.
        """
        self.serial += 1
        signature = (*constants, *(tensor.data_ptr() for tensor in tensors))
        known = self._captures.get((layer, which))
        self._moved += known is not None and known[0] != signature
        if known is None or known[0] != signature or not all(call.complete for call in known[1].values()):
            known = self._captures[layer, which] = signature, {}, {}
        return LayerCapture(self, layer, *known[1:])

    def open_kept(
        self, layer: int, batch_key: Hashable, which: Hashable, tensors: Sequence[Tensor], constants: tuple
    ) -> KeptCapture | None:
        """Begins a forward of a layer whose intermediates are kept until its backward; arguments as in `open`.

        Returns:
            None where the layer must run without capture: in a replayed forward its pass is missing or its weights
            moved (`KeptPasses`), or saved tensors are replaced (`keeps_saved_tensors`).
        """
        if not keeps_saved_tensors():
            return None
        signature = (which, *constants, *(tensor.data_ptr() for tensor in tensors))
        kept = self._keeping
        if kept is None:  # the first of this forward, so that nothing that was kept is needed
            kept = self._kept.get(batch_key)
            if kept is None or not kept.holds(layer, signature):
                self._moved += 0 if kept is None else len(kept.passes)
                kept = self._kept[batch_key] = KeptPasses(self._began)
            self._keeping = kept
        if kept.began == self._began:
            kept.passes[layer] = signature, {}, {}
            kept.unfinished += 1
        elif not kept.holds(layer, signature):
            kept.outdated = True
            return None
        self.serial += 1
        return KeptCapture(self, layer, kept)

    def buffer(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for inputs of calls: the same memory for equal arguments, in all layers, also for smaller shapes."""
        key, size = (name, shape, dtype, device), math.prod(shape)
        if key not in self._buffers:
            storages = self._storages.setdefault((name, dtype, device), [])
            storage = next((each for each in storages if each.numel() >= size), None)
            if storage is None:  # smaller ones stay: graphs read them
                storage = torch.empty(size, dtype=dtype, device=device)
                storages.append(storage)
            self._add_buffer(key, storage[:size].view(shape))
        return self._buffers[key]

    def constant(self, name: str, values: Tensor) -> Tensor:
        """A copy of ``values``, which nothing changes, at a fixed address that all layers share."""
        key = (None, name, values.shape, values.dtype, values.device)
        if key not in self._buffers:
            self._add_buffer(key, torch.empty_like(values, memory_format=torch.contiguous_format))
        if self._sources.get(key) is not values:
            self._buffers[key].copy_(values)
            self._sources[key] = values
        return self._buffers[key]

    def begin_forward(self, forward: object) -> None:
        """Begins a ``forward`` of the model whose layers are captured or replayed."""
        self.forward, self._began = forward, self.serial
        before, self._keeping = self._keeping, None
        if before is not None and (before.unfinished or before.outdated):
            self._moved += len(before.passes)
            self._kept = {key: kept for key, kept in self._kept.items() if kept is not before}

    @property
    def unused(self) -> bool:
        """Whether no layer was captured or replayed since the last forward began."""
        return self.serial == self._began

    def check_forward(self, forward: object) -> None:
        """Checks that the selections and kept intermediates of ``forward`` are still there at its backward.

        Raises:
            SparsityError: another forward overwrote them.
        """
        if self.forward is not forward:
            raise SparsityError(
                "cuda_graphs: another forward of the model came before the backward of this one and overwrote its "
                "channel selections and intermediates. Call backward after each forward, or set cuda_graphs: false."
            )

    def reserve(self, layer: int, name: str, like: Tensor) -> None:
        """Allocates a buffer shaped as ``like`` outside the pool, for a captured result that outlives its pass."""
        key = (layer, "left", name, like.shape, like.dtype, like.device)
        if key not in self._buffers:
            self._add_buffer(key, torch.empty_like(like))

    def reserved_buffer(self, layer: int, name: str, like: Tensor) -> Tensor:
        """The buffer that was reserved."""
        return self._buffers[layer, "left", name, like.shape, like.dtype, like.device]

    def static_partition(self, partition: TokenPartition) -> TokenPartition:
        """A copy of ``partition`` at fixed addresses, one copy per shape and numbers of rows of each role."""
        key = (partition.shape, partition.num_dense, partition.num_context, partition.num_padding)
        if key not in self._partitions:
            rows, place = torch.empty_like(partition.rows), torch.empty_like(partition.place)
            dense, context = rows[: partition.num_dense], rows[partition.num_dense :]
            static = TokenPartition(partition.shape, dense, context, torch.empty_like(partition.padding), rows[:0])
            static.__dict__.update(rows=rows, place=place)
            self._partitions[key] = static
        static = self._partitions[key]
        if self._sources.get(key) is not partition:
            for name in ("rows", "place", "padding"):
                getattr(static, name).copy_(getattr(partition, name))
            self._sources[key] = partition
        return static

    def stage_input(self, name: Hashable, values: Tensor) -> Tensor:
        """``values`` copied to a buffer, unless they are in one already."""
        if (
            not values.numel()
            or (values.data_ptr(), values.shape, values.stride(), values.dtype) in self._buffer_places
        ):
            return values
        return self.buffer(name, tuple(values.shape), values.dtype, values.device).copy_(values)

    def _add_buffer(self, key: Hashable, tensor: Tensor) -> None:
        self._buffers[key] = tensor
        self._buffer_places.add((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))


def _empty_cache(recorder: type, captures_documents: bool) -> GraphCache | None:
    if recorder is GraphCapture and not torch.cuda.is_available():
        return None
    graphs = GraphCache(recorder())
    graphs.captures_documents = captures_documents
    return graphs


class LayerCapture:
    """One pass through a layer. The module's docstring says how long its outputs are valid.

    Attributes:
        selections: the channel selections that its graphs made, by part; empty before.
    """

    def __init__(self, graphs: GraphCache, layer: int, calls: dict[str, _CapturedCall], selections: dict[str, Any]):
        self.graphs, self.layer, self._calls, self.selections = graphs, layer, calls, selections
        self._serial = graphs.serial
        self._kept: KeptPasses | None = None

    def constant(self, name: str, values: Tensor) -> Tensor:
        """See `GraphCache.constant`."""
        return self.graphs.constant(name, values)

    def reserved_buffer(self, name: str, like: Tensor) -> Tensor:
        """See `GraphCache.reserved_buffer`."""
        return self.graphs.reserved_buffer(self.layer, name, like)

    def stage_input(self, name: str, values: Tensor) -> Tensor:
        """See `GraphCache.stage_input`."""
        return self.graphs.stage_input(name, values)

    def static_partition(self, partition: TokenPartition) -> TokenPartition:
        """See `GraphCache.static_partition`."""
        return self.graphs.static_partition(partition)

    def call(self, name: str, function: Call, inputs: Sequence[Tensor], after: str | None = None) -> list[Tensor]:
        """The outputs of ``function(*inputs)``, captured or replayed.

        Args:
            name: identifies the call in the pass; the function always launches the same kernels.
            function: returns its outputs and a state for a later call of the same pass.
            inputs: the tensors that it reads and that are not at fixed addresses; they are copied to buffers.
            after: the call whose state ``function`` takes as its first argument.

        Raises:
            SparsityError: another pass began before.
        """
        graphs = self.graphs
        self._check_intermediates()
        static = [graphs.stage_input((name, number), values) for number, values in enumerate(inputs)]
        call = self._calls.get(name)
        if call is None:
            state = () if after is None else (self._calls[after],)
            call = self._calls[name] = _CapturedCall(graphs.recorder, function, static, state, self._kept is not None)
            return [output.detach() for output in call.first]
        return call.replay(static)

    def finish(self) -> None:
        """Ends the pass: its intermediates are no longer needed."""
        for call in self._calls.values():
            if not call.complete:
                call.release(self.graphs.recorder)

    def _check_intermediates(self) -> None:
        if self.graphs.serial != self._serial:
            raise SparsityError(
                "cuda_graphs: the backward of a layer did not follow its recompute directly, so the intermediates of "
                "the recompute are overwritten. Train with Unsloth's or reentrant gradient checkpointing and one "
                "backward at a time, or set cuda_graphs: false."
            )


class KeptPasses:
    """The captures of a batch signature's passes that keep their intermediates, all of one forward and its backward.

    Args:
        began: the pass after which that forward began (`GraphCache.serial`).

    Attributes:
        passes: by layer.
        unfinished: how many of them have no captured backward yet.
        outdated: a later forward needed another pass.
    """

    def __init__(self, began: int):
        self.began = began
        self.passes: dict[int, _Pass] = {}
        self.unfinished = 0
        self.outdated = False

    def holds(self, layer: int, signature: tuple) -> bool:
        """Whether the pass of ``layer`` is among them, with these weights at these addresses."""
        return layer in self.passes and self.passes[layer][0] == signature


class KeptCapture(LayerCapture):
    """A forward through one layer that keeps its intermediates, and its backward after those of the layers after it.

    Outputs of its calls are valid until another pass begins.
    """

    def __init__(self, graphs: GraphCache, layer: int, kept: KeptPasses):
        super().__init__(graphs, layer, *kept.passes[layer][1:])
        self._kept, self._forward = kept, graphs.forward
        self._ended = False

    def call(self, name: str, function: Call, inputs: Sequence[Tensor], after: str | None = None) -> list[Tensor]:
        """See `LayerCapture.call`.

        Raises:
            SparsityError: another forward began before, or its backward ran before.
        """
        outputs = super().call(name, function, inputs, after)
        self._calls[name].first = []  # the caller copies them at once
        return outputs

    def finish(self) -> None:
        """Ends the pass after its backward."""
        captured = not all(call.complete for call in self._calls.values())
        super().finish()
        self._ended = True
        self._kept.unfinished -= captured
        if captured and not self._kept.unfinished:
            self.graphs.kept_memory = self.graphs.recorder.memory(kept_alone=True)

    def _check_intermediates(self) -> None:
        self.graphs.check_forward(self._forward)
        if self._ended:
            raise SparsityError(
                "cuda_graphs: a second backward came through a captured layer (retain_graph=True), whose intermediates "
                "were overwritten after the first one. Run the forward again, or set cuda_graphs: false."
            )


class _CapturedCall:
    """The CUDA graph of one call."""

    def __init__(
        self, recorder: Any, function: Call, inputs: Sequence[Tensor], earlier: tuple[_CapturedCall, ...], kept: bool
    ):
        self.state: Any = None
        self.complete = False
        self._addresses = _addresses(inputs)

        def run() -> Sequence[Tensor]:
            outputs, self.state = function(*(call.state for call in earlier), *inputs)
            return outputs

        self.first, self._replay = recorder.capture(run, kept)

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs after a replay."""
        if _addresses(inputs) != self._addresses:
            raise AssertionError("the inputs are not at the captured addresses")
        return [output.detach() for output in self._replay()]

    def release(self, recorder: Any) -> None:
        """Releases the memory that only the capture needed."""
        self.first, self.state, self.complete = [], recorder.kept_state(self.state), True


_Pass = tuple[tuple, dict[str, _CapturedCall], dict[str, Any]]
"""What a captured pass depends on, its calls by name, and the channel selections that they make."""


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
