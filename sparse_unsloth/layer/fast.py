"""Tells which layers the fast functions of `sparse_unsloth.ops.decoder_layer` compute, and reads them at each call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

from torch import Tensor, nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.attention import COSINES, MASK, POSITIONS, SINES, AttentionCall
from sparse_unsloth.layer.probe import find_spec
from sparse_unsloth.layer.spec import LayerSpec, head_norm_modules, place_norms, read_spec
from sparse_unsloth.model.decoder_layer import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.ops.decoder_layer import LayerPlan, lora_tensors_of
from sparse_unsloth.ops.norms import Norm
from sparse_unsloth.ops.projection import Projection, read_projection, watch_projection
from sparse_unsloth.utils.watch import Watch

KNOWN_ADAPTERS = 4
"""Of how many adapters a layer remembers what it read: DPO switches between two in each step."""


@dataclass
class _KnownProjections:
    """What a layer read of its projections under one adapter.

    Attributes:
        others, tensors: the two watches of `watch_projection`.
        version: of the model's adapters when it was last used.
    """

    projections: list[Projection]
    others: Watch
    tensors: Watch
    version: int | None


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
        self._known: list[_KnownProjections] = []
        self._norms_watch = Watch()
        self._present: tuple[list[Norm | None] | None, LayerSpec] | None = None
        self._weights: tuple[tuple, list[Tensor], tuple] | None = None
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
        self._present = None

    def norms(self) -> list[Norm | None] | None:
        """N1 to N4 of `LayerSpec` with their present weights, which FSDP replaces; None if one is trained now.

        The same list as long as nothing of them changed.
        """
        return self._read_norms()[0]

    def present_spec(self) -> LayerSpec:
        """`spec` with the present weights of the head norms; its other weights are not for use."""
        return self._read_norms()[1]

    def _read_norms(self) -> tuple[list[Norm | None] | None, LayerSpec]:
        if self._present is not None and self._norms_watch.holds():
            return self._present
        spec, watch = self.spec, Watch()
        known = spec.attention_norm, spec.attention_output_norm, spec.mlp_norm, spec.mlp_output_norm
        norms = [_present(norm, module, watch) for norm, module in zip(known, self._norms, strict=True)]
        if self._head_norms != (None, None):
            heads = zip((spec.query_norm, spec.key_norm), self._head_norms, strict=True)
            query_norm, key_norm = (_present(norm, module, watch) for norm, module in heads)
            spec = replace(spec, query_norm=query_norm, key_norm=key_norm)
        trained = any(getattr(getattr(module, "weight", None), "requires_grad", False) for module in self._norms)
        self._present, self._norms_watch = (None if trained else norms, spec), watch
        return self._present

    def projections(self, version: int | None = None) -> list[Projection] | None:
        """q, k, v, o, gate, up, down; None if only the layer's own forward computes one (merged, disabled, several).

        Args:
            version: of the model's adapters (`SparsityState.adapter_version`): where something was read under it,
                weights, LoRA's matrices and scales alone are compared with what was read. None: everything is.
        """
        for place, known in enumerate(self._known):
            same = version is not None and version == known.version
            if known.tensors.holds() and (same or known.others.holds()):
                known.version = known.version if version is None else version
                if place:
                    self._known.insert(0, self._known.pop(place))
                return known.projections
        read = [read_projection(module) for module in self._projections]
        if None in read:
            return None
        known = _KnownProjections(read, Watch(), Watch(), version)
        watches = known.others, known.tensors
        self._known = [one for one in self._known if not one.others.holds()]  # their weights were replaced
        if all(watch_projection(*watches, *one) for one in zip(self._projections, read, strict=True)):
            self._known = [known, *self._known][:KNOWN_ADAPTERS]
        return read

    def weights(self, plan: LayerPlan, spec: LayerSpec) -> tuple[list[Tensor], tuple]:
        """Every tensor that the layer's kernels read at the addresses of ``plan`` and ``spec``, and its LoRA scales."""
        norms = plan.attention_norm, plan.attention_output_norm, plan.mlp_norm, plan.mlp_output_norm
        read = plan.projections, spec, *norms
        if self._weights is not None and all(map(is_, self._weights[0], read)):
            return self._weights[1:]
        tensors = [
            *lora_tensors_of(plan.projections),
            *(tensor for projection in plan.projections for tensor in projection.base.tensors()),
            *(
                tensor
                for norm in (*norms, spec.query_norm, spec.key_norm)
                if norm
                for tensor in (norm.weight, norm.bias)
            ),
        ]
        loras = [projection.lora for projection in plan.projections]
        scales = tuple(None if lora is None else (lora.scale, len(lora.A)) for lora in loras)
        self._weights = read, [tensor for tensor in tensors if tensor is not None], scales
        return self._weights[1:]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: a copy reads its own modules."""
        return {**self.__dict__, "_known": [], "_present": None, "_weights": None}


def why_not_fast(layer: DecoderLayer) -> str:
    """Why the fast functions do not compute ``layer``; "" where they do."""
    try:
        FastLayer(layer)
    except AttachError as error:
        return str(error)
    return ""


def _present(norm: Norm | None, module: nn.Module | None, watch: Watch) -> Norm | None:
    """``norm`` with the present weight of ``module``, which ``watch`` tells changes of."""
    if norm is None or norm.weight is None:
        return norm
    watch.same(module._parameters, "weight")
    watch.trained(module.weight)
    watch.address(module.weight)
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
