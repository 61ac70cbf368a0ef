"""Checks a kernel's outputs against plain PyTorch, in memory that reveals wrong accesses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from sparse_unsloth.kernels.norms import Order
from sparse_unsloth.ops.norms import Norm

ROUNDING = {
    torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float8_e4m3fn: 0.0
}  # fmt: skip
"""Relative error that one rounding to the dtype, or another order of fp32 sums, explains. FP8 kernels sum nothing."""
MOST = 0.02
POISON = {
    torch.float64: (torch.int64, 0x7FF8000000001234),
    torch.float32: (torch.int32, 0x7FC01234),
    torch.float16: (torch.int16, 0x7E13),
    torch.bfloat16: (torch.int16, 0x7FD3),
    torch.float8_e4m3fn: (torch.uint8, 0xFF),
}
"""NaNs with a particular payload, as bits: a kernel's computed NaN has another one."""
POISON_INTEGER = {torch.uint8: 249}
"""-7 where there is a sign: no index, and near enough that who reads it finds poison."""
MARGIN = 4096
"""Poisoned elements on either side of a guarded tensor."""


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    ``ours`` and ``reference`` take the ``inputs`` and return the same tensors; ``exact``, where given, does so too, and
    is what outputs are compared with instead of the reference in a wider dtype. ``bytes`` and ``flops`` are what any
    implementation has to move and compute.
    """

    kernel: str
    shape: str
    inputs: tuple
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: float
    flops: float = 0.0
    exact: Callable[..., Any] | None = None


class WrongOutput(AssertionError):
    """A kernel's output differs from its reference's."""


def check(case: Case, inputs: tuple | None = None, memory: Guard | Bare | None = None) -> tuple[float, float]:
    """Runs the kernel with poisoned outputs; ``(its error, the reference's)``, the largest of all outputs.

    On a GPU it runs twice, and the second outputs count: `sparse_unsloth.kernels.launch` hands the first launch of a
    kind to Triton and later ones to the driver.

    Errors are relative, in norm, to the reference in a wider dtype: the kernel may be half as far off again as plain
    PyTorch in the dtype of the inputs, or as far as one rounding explains. Integers must be equal.

    Args:
        inputs: the kernel's inputs, where they are copies of the case's.
        memory: poisons tensors, and detects writes beyond them afterwards.

    Raises:
        WrongOutput: an output differs or holds a NaN, or memory beside the outputs was written.
    """
    inputs = case.inputs if inputs is None else inputs
    memory = Guard(margin=0) if memory is None else memory
    with memory.watching():
        for _ in range(2 if torch.cuda.is_available() else 1):
            ours = _tensors(case.ours(*inputs))
    memory.check(f"{case.kernel} {case.shape}")
    plain = _tensors(case.reference(*case.inputs))
    exact = _tensors((case.exact or case.reference)(*change_tensors(case.inputs, _widen)))
    errors = []
    for number, (output, reference, expected) in enumerate(zip(ours, plain, exact, strict=True)):
        name, output, expected = f"{case.kernel} {case.shape}: output {number}", output.to(expected.device), expected
        if output.shape != expected.shape:
            raise WrongOutput(f"{name} is {tuple(output.shape)}, not {tuple(expected.shape)}")
        if not output.is_floating_point():
            if not torch.equal(output, expected):
                raise WrongOutput(f"{name} differs in {(output != expected).sum()} of {output.numel()} places")
            continue
        error, least = _error(output, expected), _error(reference, expected)
        limit = min(max(1.5 * least, ROUNDING[output.dtype]), MOST)
        if not error <= limit:
            raise WrongOutput(f"{name} has a relative error of {error:.3g}, more than {limit:.3g}")
        errors.append((error, least))
    return tuple(max(values) for values in zip(*errors, strict=True)) if errors else (0.0, 0.0)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """Yields the tensors of nested results, in their order."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(tensor for part in result for tensor in _tensors(part))


def _error(output: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    expected = expected.to(_wider(output.dtype))
    return ((output.to(expected.dtype) - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wider(tensor.dtype)) if tensor.is_floating_point() else tensor


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes every tensor in ``value``; quantisation states keep the dtypes that their format fixes."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(change_tensors(part, change) for part in value)
    if isinstance(value, Order):
        return Order(change_tensors(value.place, change), value.num_dense, value.size)
    if isinstance(value, Norm):
        return replace(value, weight=change_tensors(value.weight, change))
    if isinstance(value, QuantState):
        state = copy.copy(value)
        state.__dict__.pop("_sparse_arguments", None)
        for name in ("absmax", "code", "offset", "state2"):
            part = getattr(value, name)
            if isinstance(part, Tensor):
                part = change(part).to(part.dtype)
            elif isinstance(part, QuantState):
                part = change_tensors(part, change)
            setattr(state, name, part)
        return state
    return value


class Guard:
    """Allocates tensors full of NaN between margins of ``margin`` poisoned elements, and checks the margins.

    Elements that a kernel leaves unwritten, or reads beyond a tensor, show as NaN in its output; `check` finds writes
    beyond a tensor. With a margin of 0 tensors are as PyTorch allocates them.
    """

    def __init__(self, margin: int = MARGIN):
        self.margin = margin
        self._kept: list[tuple[Tensor, int, Tensor, Tensor | None]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return such tensors."""

        def replaced(function: Callable) -> Callable:
            return lambda *args, **options: self._fresh(function(*args, **options))

        new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty
        with (
            mock.patch.object(torch.Tensor, "new_empty", replaced(new_empty)),
            mock.patch.object(torch, "empty_like", replaced(empty_like)),
            mock.patch.object(torch, "empty", replaced(empty)),
        ):
            yield

    def hold(self, tensor: Tensor, device: str) -> Tensor:
        """Copies an input to ``device``, with its strides; it must not be written."""
        held = self._fresh(tensor.new_empty_strided(tensor.shape, tensor.stride(), device=device))
        held.copy_(tensor)
        self._kept[-1] = (*self._kept[-1][:3], tensor)
        return held

    def check(self, name: str) -> None:
        """Checks and releases the tensors so far.

        Raises:
            WrongOutput: a margin of a tensor, or an input, was written.
        """
        kept, self._kept = self._kept, []
        for number, (buffer, poison, tensor, original) in enumerate(kept):
            if written := sum((part != poison).sum().item() for part in self._margins(buffer)):
                what = f"tensor {number}, {tuple(tensor.shape)} {tensor.dtype}"
                raise WrongOutput(f"{name}: {written} elements beside {what} were written")
            if original is not None and not torch.equal(tensor.cpu(), original.cpu()):
                raise WrongOutput(f"{name}: input {number} was written")

    def _margins(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return buffer[: self.margin], buffer[buffer.numel() - self.margin :]

    def _fresh(self, tensor: Tensor) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent *= tensor.numel() > 0
        bits, poison = POISON.get(tensor.dtype, (tensor.dtype, POISON_INTEGER.get(tensor.dtype, -7)))
        buffer = torch.full((extent + 2 * self.margin,), poison, dtype=bits, device=tensor.device)
        fresh = buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), self.margin)
        self._kept.append((buffer, poison, fresh, None))
        return fresh


class Bare:
    """Memory as PyTorch allocates it, for a checker that watches the allocations themselves."""

    watching = staticmethod(contextlib.nullcontext)

    @staticmethod
    def hold(tensor: Tensor, device: str) -> Tensor:
        """Copies an input to ``device``, with its strides."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)

    @staticmethod
    def check(name: str) -> None:
        """Does nothing: the external checker reports."""
