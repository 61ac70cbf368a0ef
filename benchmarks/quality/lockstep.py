"""Trains several adapters at once: each step is one captured CUDA graph, or plain calls on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from benchmarks.quality.batches import Batch, Layout
from benchmarks.quality.network import (
    PROJECTIONS,
    Mode,
    Network,
    Selection,
    answer_logits,
    answer_loss,
    layer_forward,
    run,
)

MAX_GRADIENT_NORM = 1.0


class Adapters:
    """LoRA on all seven projections, one adapter a seed.

    Attributes:
        master: fp32 ``[seeds, parameters]``, what the optimiser changes; ``gradient`` likewise.
        leaves: of each layer, A ``[seeds, rank, in]`` and B ``[seeds, out, rank]`` of each projection in turn: views of
            a copy of the master in the network's dtype.
    """

    def __init__(self, network: Network, seeds: Sequence[int], rank: int):
        self.seeds, self.rank = tuple(seeds), rank
        device, self._sizes = network.head.device, []
        for _ in network.layers:
            for name in PROJECTIONS:
                inputs, outputs = network.shape.projections()[name]
                self._sizes += [(rank, inputs), (outputs, rank)]
        total = sum(rows * columns for rows, columns in self._sizes)
        wide = torch.promote_types(network.dtype, torch.float32)
        self.master = torch.zeros(len(self.seeds), total, device=device, dtype=wide)
        self.gradient = torch.zeros_like(self.master)
        self._work = torch.zeros_like(self.master, dtype=network.dtype)
        pieces = self._work.split([rows * columns for rows, columns in self._sizes], dim=1)
        flat = [
            piece.view(len(self.seeds), *size).detach().requires_grad_()
            for piece, size in zip(pieces, self._sizes, strict=True)
        ]
        step = 2 * len(PROJECTIONS)
        self.flat_leaves = flat
        self.leaves = [tuple(flat[start : start + step]) for start in range(0, len(flat), step)]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initialises as PEFT does: A uniform in ``±in^-½``, B zero; a seed gives the same values on every device."""
        for row, seed in enumerate(self.seeds):
            generator = torch.Generator().manual_seed(seed)
            pieces = [
                torch.rand(rows * columns, generator=generator).mul_(2).sub_(1).mul_(columns**-0.5)
                if number % 2 == 0
                else torch.zeros(rows * columns)
                for number, (rows, columns) in enumerate(self._sizes)
            ]
            self.master[row].copy_(torch.cat(pieces))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master to the leaves."""
        self._work.copy_(self.master)

    @torch.no_grad()
    def load(self, row: int, layers: Sequence[Sequence[Tensor]]) -> None:
        """Copies A and B of each projection of each layer, for one seed."""
        self.master[row].copy_(torch.cat([tensor.flatten() for layer in layers for tensor in layer]))
        self.refresh()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Splits ``[seeds, parameters]`` into views of the leaves' shapes, in one list."""
        pieces = flat.split([rows * columns for rows, columns in self._sizes], dim=1)
        return [piece.view(len(self.seeds), *size) for piece, size in zip(pieces, self._sizes, strict=True)]


class Sparsity:
    """The tensors of `Selection` for all layers, written in place: captured graphs read them.

    Attributes:
        tensors: each with a first dimension of layers.
    """

    def __init__(self, network: Network, seeds: int, factor_rank: int):
        shape, device, dtype = network.shape, network.head.device, network.dtype
        hidden, inner = shape.hidden_size, shape.intermediate_size
        first = (shape.num_layers, seeds)

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        wide = torch.promote_types(dtype, torch.float32)
        self.tensors = Selection(
            channels=torch.ones(*first, inner, dtype=torch.bool, device=device),
            keep=zeros(shape.num_layers, dtype=torch.int64),
            down=zeros(*first, 2 * factor_rank, hidden),
            up_gate=zeros(*first, inner, factor_rank),
            up_up=zeros(*first, inner, factor_rank),
            gain=zeros(*first, inner, dtype=wide),
        )
        self.ranks = torch.zeros(*first, inner, dtype=torch.int64, device=device)
        """Of each channel: 0 for the one that is kept longest."""

    def __call__(self, layer: int) -> Selection:
        return Selection(*(tensor[layer] for tensor in self.tensors))

    def keep(self, counts: Sequence[int]) -> None:
        """Sets the number of channels of lowest rank that each layer keeps."""
        self.tensors.keep.copy_(torch.tensor(counts))
        torch.lt(self.ranks, self.tensors.keep[:, None, None], out=self.tensors.channels)


class Lockstep:
    """Optimiser steps of all adapters: AdamW, each seed's gradient clipped to norm 1.

    Attributes:
        losses: ``[seeds]``, of the last batch.
        capture_seconds: spent on capturing graphs, compilation included.
    """

    def __init__(self, network: Network, adapters: Adapters, sparsity: Sparsity, layer: Callable = layer_forward):
        self.network, self.adapters, self.sparsity, self._layer = network, adapters, sparsity, layer
        self.losses = torch.zeros_like(adapters.master[:, 0])
        adapters.master.grad = adapters.gradient
        on_gpu = adapters.master.is_cuda
        self._rate = torch.zeros((), device=adapters.master.device)
        self._optimiser = torch.optim.AdamW(
            [adapters.master],
            lr=self._rate if on_gpu else 0.0,
            weight_decay=0.0,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._rotary: dict[Layout, dict[float, tuple[Tensor, Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        # Matmuls have a workspace for each stream that captures them: graphs replayed at once must not share it.
        self._capturing = torch.cuda.Stream() if on_gpu else None
        self.capture_seconds = 0.0

    def reset(self) -> None:
        """Fresh adapters, and an optimiser without memory."""
        self.adapters.reset()
        for state in self._optimiser.state.values():
            for tensor in state.values():
                tensor.zero_()

    def step(self, batch: Batch, layout: Layout, mode: Mode, rate: float) -> None:
        """One optimiser step; the batch's losses are in ``losses`` afterwards."""
        if self._pool is None:
            self._optimiser.param_groups[0]["lr"] = rate
            self._body(batch, layout, mode)
            return
        self._rate.fill_(rate)
        key = (mode, layout, batch.targets.shape)
        if key not in self._graphs:
            began = time.perf_counter()
            self._graphs[key] = self._capture(batch, layout, mode)
            torch.cuda.synchronize()
            self.capture_seconds += time.perf_counter() - began
        graph, static = self._graphs[key]
        _copy(static, batch)
        graph.replay()

    def gradients(self, batch: Batch, layout: Layout, mode: Mode) -> list[Tensor]:
        """Returns the gradient of each leaf; the batch's losses are in ``losses`` afterwards."""
        hidden = self.hidden(batch, layout, mode, self._layer)
        losses = answer_loss(answer_logits(hidden, batch.loss_rows, self.network), batch)
        self.losses.copy_(losses.detach())
        return list(torch.autograd.grad(losses.sum(), self.adapters.flat_leaves))

    def hidden(self, batch: Batch, layout: Layout, mode: Mode, layer: Callable = layer_forward) -> Tensor:
        """Hidden states before the final norm, ``[seeds, rows, hidden_size]``."""
        if layout not in self._rotary:
            self._rotary[layout] = self.network.rotary(layout)
        context, rotary = batch.context[..., None], self._rotary[layout]
        return run(self.network, batch.ids, self.adapters.leaves, self.sparsity, context, rotary, layout, mode, layer)

    def _body(self, batch: Batch, layout: Layout, mode: Mode) -> None:
        gradients = self.gradients(batch, layout, mode)
        with torch.no_grad():
            flat = self.adapters.gradient
            flat.copy_(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1))
            norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
            flat.mul_((MAX_GRADIENT_NORM / (norms + 1e-6)).clamp_max(1.0))
        self._optimiser.step()
        self.adapters.refresh()

    def _capture(self, batch: Batch, layout: Layout, mode: Mode) -> tuple[torch.cuda.CUDAGraph, Batch]:
        """Warms up, captures, and restores adapters and optimiser."""
        static = Batch(*(getattr(batch, field.name).clone() for field in fields(Batch)))
        tensors = [self.adapters.master, *(t for state in self._optimiser.state.values() for t in state.values())]
        before = [tensor.clone() for tensor in tensors]
        self._capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capturing):
            for _ in range(2):
                self._body(static, layout, mode)
        torch.cuda.current_stream().wait_stream(self._capturing)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing):
            self._body(static, layout, mode)
        for state in self._optimiser.state.values():
            for tensor in state.values():
                tensor.zero_()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        self.adapters.refresh()
        return graph, static


def _copy(static: Batch, batch: Batch) -> None:
    for field in fields(Batch):
        getattr(static, field.name).copy_(getattr(batch, field.name), non_blocking=True)
