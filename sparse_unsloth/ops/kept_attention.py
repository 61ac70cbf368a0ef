"""Keeps what attention's kernel gave in a layer's first forward, so that its recompute leaves the kernel out.

The kernel's own backward reads Q, K, V, the output and the logarithm of the sums; the first three are recomputed, the
others kept: ``rows (heads * head_dim e + 4 heads)`` bytes, e bytes a number. Kept is what one of PyTorch's fused
kernels gives, whoever calls it; attention that calls none (a soft cap, eager, flex) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = frozenset(
    f"aten::{name}"
    for name in (
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_flash_attention_forward",
    )
)  # fmt: skip
"""Operators that begin with Q, K, V, and whose backward takes what they gave."""


@dataclass(frozen=True)
class KeptAttention:
    """What a kernel gave.

    Attributes:
        kernel: the operator's name.
        shapes: of Q, K and V.
        outputs: all that it gave, with None for each of the ``tensors``.
        places: of the tensors among the outputs, with the order of their dimensions in memory: whoever copies tensors
            keeps the layout that the kernel gave them.
        tensors: the output and the logarithms of the sums, with their dimensions in that order.
    """

    kernel: str
    shapes: tuple[torch.Size, ...]
    outputs: tuple[Any, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, kernel: str, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> KeptAttention:
        """What ``kernel`` gave for Q, K, V and other arguments; seeds, of dropout, stay among the ``outputs``."""
        big = [isinstance(one, Tensor) and one.is_floating_point() and one.numel() > 0 for one in outputs]
        rest = tuple(None if tensor else one for one, tensor in zip(outputs, big, strict=True))
        places = tuple((place, _order(outputs[place])) for place, tensor in enumerate(big) if tensor)
        tensors = tuple(outputs[place].detach().permute(order) for place, order in places)
        return cls(kernel, tuple(one.shape for one in inputs[:3]), rest, places, tensors)

    def fits(self, kernel: str, inputs: Sequence[Tensor]) -> bool:
        """Whether it is what ``kernel`` would give for Q, K and V of the same forward."""
        return kernel == self.kernel and self.shapes == tuple(one.shape for one in inputs[:3])

    def with_tensors(self, tensors: Sequence[Tensor]) -> KeptAttention:
        """The same with other tensors."""
        return replace(self, tensors=tuple(tensors))

    def given(self) -> tuple[Any, ...]:
        """The kernel's outputs, as new tensors of the same memory: autograd writes to what an operator returns."""
        outputs = list(self.outputs)
        for (place, order), tensor in zip(self.places, self.tensors, strict=True):
            outputs[place] = tensor.detach().permute([order.index(dim) for dim in range(len(order))])
        return tuple(outputs)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _order(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim)))


class AttentionKeeper(TorchDispatchMode):
    """Keeps what attention's kernel gives, or gives what was kept in its place.

    Args:
        kept: of the first forward, in the recompute; None in the first forward.

    Attributes:
        kept: also after the first forward; None where attention did not call one of `KERNELS` once.
    """

    def __init__(self, kept: KeptAttention | None = None):
        super().__init__()
        self.kept, self.gives, self._calls = kept, kept is not None, 0

    def attend(self, compute: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *more: Any) -> Tensor:
        """``compute(query, key, value, *more)``, watched.

        In the first forward it runs with gradients, so that the kernel that backward will need is chosen and gives the
        logarithms. What autograd saves there is dropped, and a checkpoint or offloading around it must not see it.
        """
        if self.gives:
            with self:
                return compute(query, key, value, *more)
        self.kept, self._calls = None, 0
        with torch.enable_grad(), saved_tensors_hooks(_same, _same), self:
            leaves = (one.detach().requires_grad_() for one in (query, key, value))
            output = compute(*leaves, *more)
        return output.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kernel = func.name()
        if kernel not in KERNELS:
            return func(*args, **(kwargs or {}))
        if self.gives and self.kept.fits(kernel, args):
            return self.kept.given()
        outputs = func(*args, **(kwargs or {}))
        if not self.gives:
            self._calls += 1  # of several, none is kept: they cannot be told apart
            self.kept = KeptAttention.of(kernel, args, outputs) if self._calls == 1 else None
        return outputs
