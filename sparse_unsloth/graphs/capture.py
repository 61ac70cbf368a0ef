"""Captures and replays one CUDA graph, in a memory pool that it shares with others."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import BackendError


class GraphCapture:
    """Captures what functions launch as CUDA graphs, those of kept passes with a memory pool of their own.

    Raises:
        BackendError: there is no CUDA GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError("cuda_graphs needs an NVIDIA GPU, and PyTorch sees none. Set cuda_graphs: false.")
        self._pools: dict[bool, Any] = {}
        self._alive = {kept: weakref.WeakSet[torch.cuda.CUDAGraph]() for kept in (False, True)}
        self._streams: dict[int, torch.cuda.Stream] = {}

    def capture(
        self, function: Callable[[], Sequence[Tensor]], kept: bool = False
    ) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
        """Captures ``function`` and replays it once; returns its outputs, and a function that replays and returns them.

        As long as the first outputs are referenced, later captures do not use their memory. Outputs of a replay do not
        protect their memory.

        Args:
            kept: whether this is a call of a kept pass.
        """
        current = torch.cuda.current_stream()
        stream = self._streams.get(current.device_index)
        if stream is None:
            stream = self._streams[current.device_index] = torch.cuda.Stream(current.device)
        if not self._alive[kept]:  # PyTorch releases a pool with its last graph
            self._pools[kept] = torch.cuda.graph_pool_handle()
        if kept:  # a capture cannot take memory that PyTorch has cached, of which steps before left as much
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads may use the GPU meanwhile: data loaders that pin memory, and autograd.
            graph.capture_begin(pool=self._pools[kept], capture_error_mode="thread_local")
            try:
                outputs = list(function())
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the function's own error is more useful
                    graph.capture_end()
                raise
            graph.capture_end()
        self._alive[kept].add(graph)
        current.wait_stream(stream)
        graph.replay()
        views = [_unowned_view(output) for output in outputs]

        def replay() -> list[Tensor]:
            graph.replay()
            return views

        return outputs, replay

    def memory(self, kept_alone: bool = False) -> int:
        """Bytes that the pools hold, in use or free; ``kept_alone``: that of kept passes."""
        pools = {tuple(pool) for kept, pool in self._pools.items() if kept or not kept_alone}
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) in pools)

    def forget(self) -> None:
        """Waits for the GPU and abandons the pools; later captures have others."""
        torch.cuda.synchronize()
        self._pools.clear()
        for graphs in self._alive.values():
            graphs.clear()

    @staticmethod
    def kept_state(state: Any) -> Any:
        """The part of a call's ``state`` that replays need once the pass is captured: none."""
        return None


class _Memory:
    """An address and a size, as ``torch.as_tensor`` takes them."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _unowned_view(tensor: Tensor) -> Tensor:
    """A tensor of the same memory that does not own it: the graphs do."""
    if not tensor.numel():
        return tensor.new_empty(tensor.shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = _Memory(tensor.data_ptr(), extent * tensor.element_size())
    flat = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())
