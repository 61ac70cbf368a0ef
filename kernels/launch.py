"""Launches a Triton kernel with little host time.

Small LoRA steps are launch-bound, and Triton's own launch binds and specialises every argument each time: 20 us and
more for a kernel with many arguments. Here the first launch goes through Triton. Later launches pass the compiled
kernel to the driver directly, if Triton would specialise their arguments in the same way: dtypes, addresses and
integers divisible by 16, integers equal to 1 or beyond 32 bits, absent tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.kernels.language import triton

_compiled: dict[tuple, tuple[Any, tuple]] = {}
_knobs = getattr(triton, "knobs", None)
_MAX_INT32 = 2147483647
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_device = getattr(torch._C, "_cuda_getDevice", None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Tensor | int | float | None],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current stream.

    Args:
        kernel: the ``triton.jit`` function; its ``constexpr`` parameters come last.
        grid: the numbers of programs in one to three dimensions.
        arguments: those before the constants, in order. Tensors are on the current device.
        constants: the ``constexpr`` parameters, in order.
        num_warps, num_stages: Triton's options.
    """
    if not arguments[0].is_cuda or _hooked():
        _check(kernel, arguments, constants)
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    device = _device()
    bits = 1  # three bits per argument: what Triton specialises on
    dtypes: list[object] = []
    values: list[int | float | None] = []
    for argument in arguments:
        if type(argument) is int:
            values.append(argument)
            if argument == 1:
                bits <<= 3
            else:
                bits = bits << 3 | 1 | (not argument & 15) << 1 | (argument > _MAX_INT32) << 2
        elif argument is None or type(argument) is float:
            values.append(argument)
            bits = bits << 3 | (2 if argument is None else 4)
        else:
            address = argument.data_ptr()
            values.append(address)  # the driver need not look up an integer
            dtypes.append(argument.dtype)
            bits = bits << 3 | (6 if address & 15 else 4)
    key = (id(kernel), device, num_warps, num_stages, bits, *dtypes, *constants.values())
    known = _compiled.get(key)  # id(): a kernel lives as long as its module, and hashing it takes 2 us
    if known is None:
        _check(kernel, arguments, constants)
        compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
        _compiled[key] = compiled, tuple(constants.values())
        return
    compiled, tail = known
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x, y, z, _stream(device), compiled.function, compiled.packed_metadata, None, None, None, *values, *tail
    )


def _check(kernel: Any, arguments: Sequence, constants: dict[str, Any]) -> None:
    names = list(kernel.arg_names)[len(arguments) :]
    if names != list(constants):
        raise TypeError(f"{kernel.__name__} takes the constants {names} after its arguments, not {list(constants)}")


def _hooked() -> bool:
    """Whether a profiler has hooked Triton's launches, which then take Triton's own path."""
    runtime = _knobs and _knobs.runtime
    if not runtime:
        return False
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(enter is not None and getattr(enter, "calls", True)) or bool(
        leave is not None and getattr(leave, "calls", True)
    )
