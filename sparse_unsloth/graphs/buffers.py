"""Holds what captured calls read at fixed addresses: inputs, tensors that layers share, and results that stay."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from sparse_unsloth.tokens.partition import TokenPartition


class Buffers:
    """Memory outside the graphs' pools, of which each piece keeps its address until `drop_buffers`."""

    def __init__(self) -> None:
        self.drop_buffers()

    def drop_buffers(self) -> None:
        """Forgets all of them."""
        self._buffers: dict[Hashable, Tensor] = {}
        self._storages: dict[Hashable, list[Tensor]] = {}
        self._buffer_places: set[tuple] = set()
        self._partitions: dict[Hashable, TokenPartition] = {}
        self._sources: dict[Hashable, object] = {}

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
