"""Proves that a specification describes a layer: tries it against the layer's own forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.reference import reference_layer
from sparse_unsloth.layer.spec import LayerSpec, candidates
from sparse_unsloth.model.decoder_layer import first_tensor

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative, of the output and of the input's gradient; transformers computes some parts in float32 in any dtype."""
HALF_TOLERANCE = 0.03


def find_spec(
    spec: LayerSpec, forward: Callable[..., Any], hidden_states: Tensor, arguments: Mapping[str, Any]
) -> tuple[LayerSpec, float]:
    """The candidate of ``spec`` that computes what ``forward`` does, and by how much they differ (relative).

    In half precision that is the nearest one: at few positions a rotation changes hardly more than rounding does.

    Args:
        spec: as `sparse_unsloth.layer.spec.read_spec` gave it.
        forward: of the decoder layer.
        hidden_states: ``[batch, sequence, hidden_size]``, of several positions.
        arguments: the other arguments of the layer's forward in a training step of the model.

    Raises:
        AttachError: no candidate does.
    """
    expected = _output_and_gradient(lambda x: first_tensor(forward(x, **arguments)), hidden_states)
    named = {name: arguments.get(name) for name in ("position_embeddings", "attention_mask", "position_ids")}
    if not isinstance(named["attention_mask"], Tensor):  # flex attention's form of the causal mask
        named["attention_mask"] = None
    tolerance = TOLERANCE.get(hidden_states.dtype, HALF_TOLERANCE)
    least, nearest = float("inf"), spec
    for one in candidates(spec):
        ours = _output_and_gradient(lambda x, one=one: reference_layer(one, x, **named), hidden_states)
        apart = max(difference(a, b) for a, b in zip(ours, expected, strict=True))
        if apart < least:
            least, nearest = apart, one
        if apart <= tolerance and hidden_states.dtype in TOLERANCE:
            break
    if least <= tolerance:
        return nearest, least
    raise AttachError(
        f"its forward differs from every layer that sparse_unsloth knows (by {least:.2g} at "
        f"least, relative; {tolerance} is allowed)."
    )


def difference(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``, of all values together, in float32 at least."""
    dtype = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(dtype), expected.to(dtype)
    return ((found - expected).norm() / expected.norm().clamp_min(torch.finfo(dtype).tiny)).item()


def _output_and_gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``function`` gives for ``x``, and the gradient of ``x`` for a fixed gradient of that."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = function(x)
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    (dx,) = torch.autograd.grad(output, x, dy)
    return output.detach(), dx
