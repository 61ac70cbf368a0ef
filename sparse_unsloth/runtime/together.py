"""Lets the processes of a DDP training try what may run out of memory: all of them go on with it, or none does.

A process that ran out of memory cannot go back alone while the others wait for it in a collective. So what is tried
runs without DDP's own (`apart`); before each one that is left, and at the end, the processes tell each other whether
one has failed; and gradients are averaged afterwards (`average`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")
COLLECTIVES = ("gather_for_metrics", "gather", "reduce")
"""Methods of accelerate's ``Accelerator`` that a trainer's ``compute_loss`` may call (TRL's calls the first one)."""
BUCKET = 2**26
"""Bytes of gradients that are averaged in one collective."""


class _FailedElsewhere(Exception):
    """Another process ran out of memory."""


def ddp_of(model: Any) -> DistributedDataParallel | None:
    """The DDP wrapper in ``model``, compiled or not; None where there is none."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DistributedDataParallel) else None


def try_together(accelerator: Any, function: Callable[[], Value], model: nn.Module | None = None) -> Value | None:
    """What ``function`` returns; None on every process where memory ran out on one of them.

    Args:
        accelerator: the trainer's; every process calls this, and ``function`` calls the same collectives on each.
        model: as the trainer calls it, which may be a DDP wrapper.
    """
    if accelerator.num_processes == 1:
        try:
            return function()
        except torch.OutOfMemoryError:
            return None
    ddp = ddp_of(model)
    synchronises = None if ddp is None else ddp.require_forward_param_sync
    result, failed, elsewhere = None, False, False
    try:
        with _watched(accelerator):
            result = function()
    except torch.OutOfMemoryError:
        failed = True
    except _FailedElsewhere:
        elsewhere = True
    if not (elsewhere or any_of(accelerator, failed)):
        return result
    if ddp is not None:  # noted after a forward, which some processes came to the end of, and others did not
        ddp.require_forward_param_sync = synchronises
    return None


def any_of(accelerator: Any, flag: bool) -> bool:
    """Whether ``flag`` is true on some process; every one must call it."""
    found = torch.tensor([int(flag)], device=accelerator.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def apart(accelerator: Any, model: nn.Module) -> contextlib.AbstractContextManager:
    """Forward and backward of ``model`` in it communicate nothing; `average` must follow the last one of a step."""
    return accelerator.no_sync(model=model) if accelerator.num_processes > 1 else contextlib.nullcontext()


def average(model: nn.Module) -> None:
    """Averages the gradients of a DDP model over its processes, as its own backward does; every one must call it.

    A gradient that only some processes have counts as zero on the others; one that none has stays None.

    Args:
        model: as the trainer calls it; without DDP nothing happens.
    """
    ddp = ddp_of(model)
    if ddp is None:
        return
    named = ddp.module.named_parameters()
    trained = [one for name, one in named if one.requires_grad and name not in ddp.parameters_to_ignore]
    used = torch.tensor([one.grad is not None for one in trained], dtype=torch.uint8, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=ddp.process_group)
    gradients = []
    for one, has in zip(trained, used.tolist(), strict=True):
        if has:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
            gradients.append(one.grad)
    size = dist.get_world_size(ddp.process_group)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(size)
        dist.all_reduce(flat, group=ddp.process_group)
        for gradient, averaged in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device that are averaged in one collective."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        new = bool(bucket) and (gradient.dtype, gradient.device) != (bucket[0].dtype, bucket[0].device)
        if new or size > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


@contextlib.contextmanager
def _watched(accelerator: Any) -> Iterator[None]:
    """Before each collective in it, the processes tell each other whether one has failed."""
    depth = 0  # of collectives that call others

    def watch(original: Callable) -> Callable:
        @wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if not depth and any_of(accelerator, False):
                raise _FailedElsewhere
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        return collective

    before = {name: vars(accelerator)[name] for name in COLLECTIVES if name in vars(accelerator)}
    for name in COLLECTIVES:
        setattr(accelerator, name, watch(getattr(accelerator, name)))
    try:
        yield
    finally:
        for name in COLLECTIVES:
            vars(accelerator).pop(name, None)
        vars(accelerator).update(before)
