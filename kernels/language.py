"""Triton and its language; where Triton is not installed, stand-ins by which kernels can be imported, and not launched.

PyTorch's builds for GPUs bring Triton, its build for CPUs does not: there the references in PyTorch run
(`sparse_unsloth.ops.dispatch`), and an installation without Triton is 0.9 GB smaller.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Takes the place of ``triton``: its decorator returns the function as it is."""

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return (lambda decorated: decorated) if function is None else function

    triton: Any = _Absent()
    tl: Any = None

__all__ = ["tl", "triton"]
