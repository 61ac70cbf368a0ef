"""Captures and replays one CUDA graph, in a memory pool that it shares with others."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import BackendError

SHORT = 1 / 8
"""Of the GPU's memory: if less is free, what PyTorch has cached is freed before a capture."""


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

        Raises:
            RuntimeError: something in ``function`` cannot be captured, or there is no memory. Nothing is left of it.
        """
        current = torch.cuda.current_stream()
        stream = self._streams.get(current.device_index)
        if stream is None:
            stream = self._streams[current.device_index] = torch.cuda.Stream(current.device)
        if not self._alive[kept]:  # PyTorch releases a pool with its last graph
            self._pools[kept] = torch.cuda.graph_pool_handle()
        free, total = torch.cuda.mem_get_info()
        if kept or free < SHORT * total:  # a capture cannot take what PyTorch has cached; steps before left much of it
            torch.cuda.empty_cache()
        graph, pool = torch.cuda.CUDAGraph(), self._pools[kept]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            ended = False
            try:
                # Other threads may use the GPU meanwhile: data loaders that pin memory, and autograd.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                outputs = list(function())
                ended = True
                graph.capture_end()
            except BaseException:
                _end_failed(graph, pool, ended)
                raise
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


def _end_failed(graph: torch.cuda.CUDAGraph, pool: Any, ended: bool) -> None:
    """Ends a capture that failed, so that the stream, its allocator and its random numbers work as before.

    Args:
        ended: whether ``graph.capture_end`` was called, and failed.
    """
    try:
        if not ended:
            graph.capture_end()
    except RuntimeError:  # the function's own error is more useful
        ended = True
    if not ended:
        torch.cuda.synchronize()  # graphs that run may be deleted now
        return
    # PyTorch stops at CUDA's error, before it tells its allocator and its generator that the capture has ended.
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it had told them
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    torch.cuda.synchronize()
    empty = torch.cuda.CUDAGraph()
    value = torch.zeros(1, device=device)
    empty.capture_begin(capture_error_mode="thread_local")
    value.zero_()
    empty.capture_end()


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
