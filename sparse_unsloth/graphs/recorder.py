"""CUDA graphs: kernels that run alike in every step are recorded once and then launched together.

A LoRA step on a fast GPU is launch-bound where sparsity leaves little arithmetic. A `LayerCapture` goes through one
layer: its first forward under gradient checkpointing, or the recompute and the backward after it. Each of its calls is
captured where it is first made; later passes copy the inputs to where the captured ones lay, and replay.

All recordings of a model share one pool of memory. While a pass is recorded, what it still needs is held, so that its
calls do not overwrite each other; afterwards nothing is, and the next layer's recording uses the same memory. Hence
three rules: a pass is recorded as a whole or not at all; what its calls return holds until another pass begins
(`LayerCapture.call` says so when that comes too early); and whoever needs it longer copies it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import BackendError, SparsityError
from sparse_unsloth.tokens.partition import TokenPartition

RUNS_BEFORE_CAPTURE = 2
"""Forwards of one kind that run as they are, so that every kernel is compiled, before one is recorded."""
MAX_KEYS = 64
"""Kinds of forwards that are recorded: each takes some tenths of a second, and memory for all layers' graphs."""
MAX_RECAPTURES = 4
"""How often each recording may be made anew, because weights moved, before that is given up."""
MAX_COUNTED_KEYS = 256
"""Kinds that have come lately, and may be recorded when they come again."""

Call = Callable[..., "tuple[Sequence[Tensor], Any]"]


class GraphCapture:
    """Records what a function launches, in one pool of memory.

    Raises:
        BackendError: there is no CUDA GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError("cuda_graphs needs an NVIDIA GPU, and PyTorch sees none. Set cuda_graphs: false.")
        self.pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._streams: dict[int, torch.cuda.Stream] = {}

    def capture(self, function: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
        """Runs ``function`` once; returns its outputs, and what gives them again after a replay.

        The first outputs keep their memory from later recordings as long as they are held; those of a replay do not.
        """
        current = torch.cuda.current_stream()
        stream = self._streams.get(current.device_index)
        if stream is None:
            stream = self._streams[current.device_index] = torch.cuda.Stream(current.device)
        if not self._alive:  # PyTorch gives a pool up with its last graph
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads may use the GPU meanwhile: a data loader that pins memory, autograd's.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                outputs = list(function())
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the function's own error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        self._alive.add(graph)
        current.wait_stream(stream)
        graph.replay()
        places = [_view_at(output) for output in outputs]

        def again() -> list[Tensor]:
            graph.replay()
            return places

        return outputs, again

    def memory(self) -> int:
        """Bytes that the pool holds, in use or not."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self.pool))

    def forget(self) -> None:
        """Waits for what still runs; later recordings have a pool of their own."""
        torch.cuda.synchronize()
        self.pool, self._alive = torch.cuda.graph_pool_handle(), weakref.WeakSet()

    @staticmethod
    def kept_state(state: Any) -> Any:
        """What a call has to remember of its ``state`` once everything is recorded: nothing."""
        return None


class _Memory:
    """An address and a size, as ``torch.as_tensor`` takes them."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _view_at(tensor: Tensor) -> Tensor:
    """A tensor at the same place that does not own its memory: the graphs do."""
    if not tensor.numel():
        return tensor.new_empty(tensor.shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = _Memory(tensor.data_ptr(), extent * tensor.element_size())
    flat = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


class GraphCache:
    """The recordings of an attached model.

    Args:
        recorder: as `GraphCapture`.

    Attributes:
        kinds, prepared: the forwards that are recorded, and those that may be.
        ready: layers and kinds of forwards that have room for what they will leave.
        forward: the last one whose layers were recorded or replayed.
        serial: counts passes.
        documents: whether recordings hold attention within packed documents.
    """

    def __init__(self, recorder: Any = None):
        self.recorder = GraphCapture() if recorder is None else recorder
        self.serial = 0
        self.captures_documents = True
        self._start()

    def __reduce__(self) -> tuple[Callable[..., GraphCache | None], tuple]:
        """Recordings are of one model's memory: a copy has none yet, and records nothing where there is no GPU."""
        return _without_captures, (type(self.recorder), self.captures_documents)

    def _start(self) -> None:
        self.captured_keys: set[Hashable] = set()
        self.forward: object = None
        self.prepared: set[Hashable] = set()
        self.reserved: set[Hashable] = set()
        self._began = self.serial
        self._moved = 0
        self._counted: OrderedDict[Hashable, int] = OrderedDict()
        self._captures: dict[Hashable, tuple[tuple, dict[str, _CapturedCall], dict[str, Any]]] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._storages: dict[Hashable, list[Tensor]] = {}
        self._buffer_places: set[tuple] = set()
        self._partitions: dict[Hashable, TokenPartition] = {}
        self._sources: dict[Hashable, object] = {}

    def clear(self) -> None:
        """Forgets all recordings, and gives their memory back."""
        self.recorder.forget()
        self._start()

    def should_replay(self, batch_key: Hashable) -> bool:
        """Whether a forward of this ``batch_key`` (all that decides which kernels run, with which sizes) is recorded.

        Asked once for each forward: a kind must come several times first.
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
        """Whether a forward of this kind, which runs as it is now, is to prepare that the next one is recorded."""
        if batch_key not in self.prepared:
            if self._counted.get(batch_key, 0) < RUNS_BEFORE_CAPTURE or len(self.prepared) >= 2 * MAX_KEYS:
                return False
            self.prepared.add(batch_key)
        return True

    @property
    def full(self) -> bool:
        """Whether no other kinds are recorded."""
        return len(self.captured_keys) >= MAX_KEYS

    @property
    def recaptures_too_often(self) -> bool:
        """Whether weights keep moving, so that recording takes more time than it saves."""
        return self._moved > MAX_RECAPTURES * len(self._captures)

    def memory(self) -> int:
        """Bytes that recordings hold on the GPU, besides their inputs' buffers."""
        return self.recorder.memory()

    def open(self, layer: int, which: Hashable, tensors: Sequence[Tensor], constants: tuple) -> LayerCapture:
        """A pass through a layer begins; what an earlier one returned holds no longer.

        Args:
            which: tells its recordings from the layer's others.
            tensors: what its calls read at fixed places: weights, and what is trained.
            constants: what else they depend on, and what may change.
        """
        self.serial += 1
        signature = (*constants, *(tensor.data_ptr() for tensor in tensors))
        known = self._captures.get((layer, which))
        self._moved += known is not None and known[0] != signature
        if known is None or known[0] != signature or not all(call.complete for call in known[1].values()):
            known = self._captures[layer, which] = signature, {}, {}
        return LayerCapture(self, layer, *known[1:])

    def buffer(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same memory whenever it is asked for, of all layers and of smaller shapes. For inputs of calls."""
        key, size = (name, shape, dtype, device), math.prod(shape)
        if key not in self._buffers:
            storages = self._storages.setdefault((name, dtype, device), [])
            storage = next((one for one in storages if one.numel() >= size), None)
            if storage is None:  # earlier ones stay, for what was recorded reads them
                storage = torch.empty(size, dtype=dtype, device=device)
                storages.append(storage)
            self._add_buffer(key, storage[:size].view(shape))
        return self._buffers[key]

    def constant(self, layer: int | None, name: str, values: Tensor) -> Tensor:
        """``values``, that do not change, at a place of the layer's own; None: of all layers."""
        key = (layer, name, values.shape, values.dtype, values.device)
        if key not in self._buffers:
            self._add_buffer(key, torch.empty_like(values, memory_format=torch.contiguous_format))
        if self._sources.get(key) is not values:
            self._buffers[key].copy_(values)
            self._sources[key] = values
        return self._buffers[key]

    def begin_forward(self, forward: object) -> None:
        """A ``forward`` of the model begins whose layers are recorded or replayed."""
        self.forward, self._began = forward, self.serial

    @property
    def unused(self) -> bool:
        """Whether no layer was recorded or replayed since the last forward began."""
        return self.serial == self._began

    def check_forward(self, forward: object) -> None:
        """What the first passes of ``forward`` left must still be there at its recompute.

        Raises:
            SparsityError: another forward came since.
        """
        if self.forward is not forward:
            raise SparsityError(
                "cuda_graphs: another forward of the model came before the backward of this one, and chose other "
                "channels in the same place. Call backward after each forward, or set cuda_graphs: false."
            )

    def reserve(self, layer: int, name: str, like: Tensor) -> None:
        """Makes room for what a recording will leave for good, as none has memory outside the pool."""
        key = (layer, "left", name, like.shape, like.dtype, like.device)
        if key not in self._buffers:
            self._add_buffer(key, torch.empty_like(like))

    def reserved_buffer(self, layer: int, name: str, like: Tensor) -> Tensor:
        """The room that was reserved."""
        return self._buffers[layer, "left", name, like.shape, like.dtype, like.device]

    def static_partition(self, partition: TokenPartition) -> TokenPartition:
        """``partition`` at a place of its own: one for each number of rows of each kind."""
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
        """``values`` in a buffer, unless they are in one already."""
        if (
            not values.numel()
            or (values.data_ptr(), values.shape, values.stride(), values.dtype) in self._buffer_places
        ):
            return values
        return self.buffer(name, tuple(values.shape), values.dtype, values.device).copy_(values)

    def _add_buffer(self, key: Hashable, tensor: Tensor) -> None:
        self._buffers[key] = tensor
        self._buffer_places.add((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))


def _without_captures(recorder: type, documents: bool) -> GraphCache | None:
    if recorder is GraphCapture and not torch.cuda.is_available():
        return None
    graphs = GraphCache(recorder())
    graphs.captures_documents = documents
    return graphs


class LayerCapture:
    """One way through a layer. See the file's head for how long what its calls return holds.

    Attributes:
        kept: what its recordings left for good, by name; empty until then.
    """

    def __init__(self, graphs: GraphCache, layer: int, calls: dict[str, _CapturedCall], kept: dict[str, Any]):
        self.graphs, self.layer, self.selections, self._calls, self._serial = graphs, layer, kept, calls, graphs.serial

    def buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        """``[rows, width of like]``: see `GraphCache.buffer`."""
        return self.graphs.buffer(name, (rows, like.shape[1]), like.dtype, like.device)

    def constant(self, name: str, values: Tensor, shared: bool = False) -> Tensor:
        """See `GraphCache.index`; ``shared`` by all layers."""
        return self.graphs.constant(None if shared else self.layer, name, values)

    def reserved_buffer(self, name: str, like: Tensor) -> Tensor:
        """See `GraphCache.place`."""
        return self.graphs.reserved_buffer(self.layer, name, like)

    def stage_input(self, name: str, values: Tensor) -> Tensor:
        """See `GraphCache.input`: calls read it where it is then."""
        return self.graphs.stage_input(name, values)

    def static_partition(self, partition: TokenPartition) -> TokenPartition:
        """See `GraphCache.rows`."""
        return self.graphs.static_partition(partition)

    def call(self, name: str, function: Call, inputs: Sequence[Tensor], after: str | None = None) -> list[Tensor]:
        """The outputs of ``function(*inputs)``, which returns them with a state for a later call of this pass.

        Args:
            name: one of the pass; in every pass of its kind the function does the same.
            inputs: all that it reads and that is not where it was before.
            after: the call whose state ``function`` takes as its first argument.

        Raises:
            SparsityError: another pass began in between.
        """
        graphs = self.graphs
        if graphs.serial != self._serial:
            raise SparsityError(
                "cuda_graphs: the backward of a layer did not come right behind its recompute, so what the recompute "
                "kept is overwritten. Train with Unsloth's or reentrant gradient checkpointing and one backward at a "
                "time, or set cuda_graphs: false."
            )
        static = [graphs.stage_input((name, number), values) for number, values in enumerate(inputs)]
        call = self._calls.get(name)
        if call is None:
            state = () if after is None else (self._calls[after],)
            call = self._calls[name] = _CapturedCall(graphs.recorder, function, static, state)
            return [output.detach() for output in call.first]
        return call.again(static)

    def finish(self) -> None:
        """The pass is over: nothing of it is needed any more."""
        for call in self._calls.values():
            if not call.complete:
                call.release(self.graphs.recorder)


class _CapturedCall:
    """A function's recording."""

    def __init__(self, recorder: Any, function: Call, inputs: Sequence[Tensor], before: tuple[_CapturedCall, ...]):
        self.state: Any = None
        self.complete = False
        self._addresses = _addresses(inputs)

        def run() -> Sequence[Tensor]:
            outputs, self.state = function(*(call.state for call in before), *inputs)
            return outputs

        self.first, self._again = recorder.capture(run)

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs after a replay."""
        if _addresses(inputs) != self._addresses:
            raise AssertionError("inputs of other sizes than were recorded")
        return [output.detach() for output in self._again()]

    def release(self, recorder: Any) -> None:
        """Lets go of the memory that the recording needed to itself."""
        self.first, self.state, self.complete = [], recorder.kept_state(self.state), True


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
