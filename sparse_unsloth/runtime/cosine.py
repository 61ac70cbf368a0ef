"""Measures, rarely and on one micro-batch, how near the gradient under row sparsity is to the dense one.

Before that micro-batch's own forward, the model's plain forward and backward run beside the training: dense, without
CUDA graphs. Their gradients are taken out of the parameters at once, and random numbers are given back, so that the
training goes on bitwise as without it. The micro-batch's own backward then passes its gradients by, and the cosine of
all of them together follows. Cosines do not depend on the scale of a loss.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.utils.distributed import world_size

METRIC = "sparsity/gradient_cosine"


class GradientCosine:
    """Measures the first micro-batch of every ``every``-th optimiser step until `remove`.

    Memory: a copy of the trained parameters' gradients during that micro-batch, and what a dense micro-batch needs.

    Args:
        state: of the model, with a training begun.
        every: optimiser steps between two measurements.
    """

    def __init__(self, state: SparsityState, every: int):
        self._state, self._every = state, every
        self._seen: int | None = None
        self._said = False
        self._dense: dict[Tensor, Tensor] = {}
        self._sums: Tensor | None = None  # products of both gradients, squares of the sparse one, squares of the dense
        self._handles: list[Any] = []
        self._hook = state.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Ends all measurements."""
        self._hook.remove()
        self._end()

    def take(self) -> dict[str, float]:
        """The cosine that was measured since the last call, by the name of its metric; empty without one."""
        self._end()
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        product, sparse, dense = sums.tolist()
        norms = math.sqrt(sparse * dense)
        return {METRIC: product / norms} if 0 < norms < math.inf else {}

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Measures the dense gradient of the forward that begins, if it is its turn."""
        self._end()
        state = self._state
        turn = state.step and state.step % self._every == 0 and state.step != self._seen
        sparse = state.row_sparse and state.scale > 0 and state.gradients_seen
        trains = model.training and torch.is_grad_enabled() and read_batch(kwargs).labels is not None
        if not (turn and sparse and trains) or CONTEXT_ARGUMENT in kwargs:
            return
        self._seen = state.step
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        began = time.perf_counter()
        reason = _why_not(trained) or self._measure(model, args, kwargs, trained)
        if reason:
            state.warn_once(f"cosine_steps: {METRIC} is not measured: {reason}. The training itself is as without it.")
            self._hook.remove()
            return
        self._say_cost(time.perf_counter() - began)

    def _say_cost(self, seconds: float) -> None:
        if not self._said:
            self._said = True
            self._state.warn_once(
                f"cosine_steps: every {self._every} optimiser steps one micro-batch runs dense as well, forward and "
                f"backward, for {METRIC}: {seconds:.2g} s this time. The training is bitwise as without it."
            )

    def _measure(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], trained: list[nn.Parameter]) -> str:
        """Keeps the dense gradients for comparison with those that come; why that was not possible, or ""."""
        try:
            found = dense_gradients(self._state, model, args, kwargs, trained)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "memory ran out in the dense forward and backward"
        if not found:
            return "the model returned no loss, or one without a gradient"
        self._sums = torch.zeros(3, device=trained[0].device)
        for gradient in found.values():
            self._sums[2] += gradient.float().square().sum().to(self._sums.device)
        self._dense = found
        self._handles = [parameter.register_hook(partial(self._compare, parameter)) for parameter in found]
        if self._sums.is_cuda:
            torch.cuda.synchronize()
        return ""

    def _compare(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds one parameter's gradient of the training, before it is accumulated."""
        dense = self._dense.pop(parameter, None)
        if dense is not None and self._sums is not None:
            ours, theirs = gradient.detach().float().flatten(), dense.float().flatten()
            products = torch.stack((ours.dot(theirs), ours.dot(ours)))
            self._sums[:2] += products.to(self._sums.device)

    def _end(self) -> None:
        """Ends the comparison; parameters that got no gradient since count as zeros."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._dense.clear()


def dense_gradients(
    state: SparsityState, model: nn.Module, args: tuple, kwargs: dict[str, Any], trained: list[nn.Parameter]
) -> dict[Tensor, Tensor]:
    """The gradients of the model's own loss with nothing left out; their ``grad`` and random numbers stay.

    Args:
        args, kwargs: of a forward of the model that is about to begin; they hold no context.
        trained: the parameters, without hooks.

    Returns:
        By parameter; empty where the model returns no loss that has a gradient.
    """
    held, inside = [parameter.grad for parameter in trained], state.inside
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    if state.planner is not None:  # it planned for sparse layers; the forward that follows is planned anew
        state.planner.restore()
    for parameter in trained:
        parameter.grad = None
    state.inside = True
    try:
        with torch.random.fork_rng(devices):
            loss = getattr(model.forward(*args, **kwargs), "loss", None)  # without the hooks that open a forward
            if loss is not None and loss.requires_grad:
                loss.backward()
        return {parameter: parameter.grad for parameter in trained if parameter.grad is not None}
    finally:
        state.inside = inside
        for parameter, gradient in zip(trained, held, strict=True):
            parameter.grad = gradient


def _why_not(trained: list[nn.Parameter]) -> str:
    """Why a second backward would disturb the training; "" where it does not."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(parameter, name, None) for parameter in trained for name in hooks):
        return "something hooks the gradients of trained parameters (an optimiser that runs in backward, say)"
    return ""


def begin_cosine(state: SparsityState) -> GradientCosine | None:
    """Measures cosines in the training that begins, if `SparsityConfig.cosine_steps` asks for it.

    Where it would disturb the training, a warning says why, and nothing is measured.
    """
    if not state.config.cosine_steps:
        return None
    reason = ""
    if world_size() > 1:
        reason = "with several processes a second backward would be synchronised among them"
    elif state.handing is not None:
        reason = "this model does not pass arguments on to its layers, so a second forward cannot be told from its own"
    if reason:
        state.warn_once(f"cosine_steps: {METRIC} is not measured: {reason}.")
        return None
    return GradientCosine(state, state.config.cosine_steps)
