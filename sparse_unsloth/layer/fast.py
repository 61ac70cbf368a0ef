"""Tells which layers the fast functions of `sparse_unsloth.ops.decoder_layer` compute, and reads them at each call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.attention import COSINES, MASK, POSITIONS, SINES, AttentionCall
from sparse_unsloth.layer.probe import find_spec
from sparse_unsloth.layer.spec import LayerSpec, head_norm_modules, place_norms, read_spec
from sparse_unsloth.model.decoder_layer import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.ops.norms import Norm
from sparse_unsloth.ops.projection import Projection, is_present, read_projection


class FastLayer:
    """A layer that the fast functions compute.

    Attributes:
        spec: what it computes. How it rotates queries and keys is known after `prove`.
        returns_tuple: whether its own forward returns a tuple that begins with the hidden states.

    Raises:
        AttachError: the fast functions do not compute such a layer.
    """

    def __init__(self, layer: DecoderLayer):
        self.spec = read_spec(layer)
        _refuse_slow(self.spec, layer)
        self.returns_tuple = False
        self._known: list[Projection] | None = None
        self._norms = place_norms({name: part for name, part in layer.module.named_children() if name.endswith("norm")})
        self._head_norms = head_norm_modules(layer.self_attn)
        self._projections = [
            *(getattr(layer.self_attn, name) for name in ATTENTION_PROJECTIONS),
            *(getattr(layer.mlp, name) for name in MLP_PROJECTIONS),
        ]

    def prove(self, forward: Callable[[Tensor], Any], hidden_states: Tensor, call: AttentionCall) -> None:
        """Finds what the layer computes between Q, K, V and O, by its own ``forward``, with its gradient.

        Args:
            call: what attention computes in this forward, as far as its arguments tell.

        Raises:
            AttachError: see `find_spec`.
        """
        angles = [call.tensors[name] for name in (COSINES, SINES) if name in call.tensors]
        arguments = {
            "position_embeddings": tuple(angles) or None,
            **{name: call.tensors.get(name) for name in (MASK, POSITIONS)},
        }
        spec = replace(self.spec, window=call.window)
        self.spec, _ = find_spec(spec, lambda x, **_: forward(x), hidden_states, arguments)

    def norms(self) -> list[Norm | None] | None:
        """N1 to N4 of `LayerSpec` with their present weights, which FSDP replaces; None if one is trained now."""
        spec = self.spec
        if any(getattr(getattr(module, "weight", None), "requires_grad", False) for module in self._norms):
            return None
        known = spec.attention_norm, spec.attention_output_norm, spec.mlp_norm, spec.mlp_output_norm
        return [_present(norm, module) for norm, module in zip(known, self._norms, strict=True)]

    def present_spec(self) -> LayerSpec:
        """`spec` with the present weights of the head norms; its other weights are not for use."""
        if self._head_norms == (None, None):
            return self.spec
        query_norm, key_norm = map(_present, (self.spec.query_norm, self.spec.key_norm), self._head_norms)
        return replace(self.spec, query_norm=query_norm, key_norm=key_norm)

    def projections(self) -> list[Projection] | None:
        """q, k, v, o, gate, up, down; None if only the layer's own forward computes one (merged, disabled, several)."""
        known = self._known
        if known is None or not all(map(is_present, self._projections, known)):
            read = [read_projection(module) for module in self._projections]
            known = self._known = None if None in read else read
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: a copy reads its own modules."""
        return {**self.__dict__, "_known": None}


def why_not_fast(layer: DecoderLayer) -> str:
    """Why the fast functions do not compute ``layer``; "" where they do."""
    try:
        FastLayer(layer)
    except AttachError as error:
        return str(error)
    return ""


def _present(norm: Norm | None, module: nn.Module | None) -> Norm | None:
    if norm is None or norm.weight is None:
        return norm
    return replace(norm, weight=module.weight.detach())


def _refuse_slow(spec: LayerSpec, layer: DecoderLayer) -> None:
    """Raises AttachError for what `LayerSpec` describes and the fast functions do not compute."""
    norms = [spec.attention_norm, spec.attention_output_norm, spec.mlp_norm, spec.mlp_output_norm]
    reason = ""
    if spec.parallel:
        reason = "its attention and MLP are computed side by side"
    elif any(norm is not None and (norm.centred or norm.bias is not None) for norm in norms):
        reason = "it has layer norms, and the fast functions compute RMS norms"
    elif any(spec.projections[f"mlp.{name}"].base.bias is not None for name in MLP_PROJECTIONS):
        reason = "the MLP has a bias"
    if reason:
        raise AttachError(f"{layer.name}: {reason}.")
