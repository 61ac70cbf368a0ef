"""Checks, when a model is attached, that layers can multiply in FP8 (`SparsityConfig.precision`)."""

from __future__ import annotations

from sparse_unsloth.backends.whole_layer import NO_KERNELS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.ops.fp8 import check_device, check_shapes
from sparse_unsloth.runtime.attach_report import reasons
from sparse_unsloth.runtime.state import SparsityState


def check_before(state: SparsityState) -> None:
    """Checks devices, and the weights of the layers that may run as whole layers; before the probe forward.

    Raises:
        AttachError: see `check_device` and `check_shapes`.
    """
    if not state.config.fp8:
        return
    for device in {next(layer.module.parameters()).device for layer in state.layers}:
        check_device(device)
    for runtime in state.whole_forwards:
        if not runtime.not_whole:
            check_shapes(runtime.fast.spec.projections, runtime.layer.name)


def check_after(state: SparsityState) -> None:
    """Checks, after the probe forward, that some layer multiplies in FP8: those do that run as a whole.

    Raises:
        AttachError: none does.
    """
    if state.config.fp8 and all(runtime.not_whole for runtime in state.whole_forwards):
        found = "; ".join(f"{reason} ({count} layers)" for reason, count in reasons(state.whole_forwards, "not_whole"))
        raise AttachError(
            f"precision: {state.config.precision} needs layers that run as a whole, and none does: "
            f"{found or NO_KERNELS}. Set precision: bf16."
        )
