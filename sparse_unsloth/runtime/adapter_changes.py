"""Checks before each forward whether the adapters are still those that attaching proved.

Where they changed, `why_dense` repeats the checks of attaching. It remembers a few sets of adapters, since some
trainers switch them in each step (TRL's DPO runs its reference under another adapter, or under none).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.fast import why_not_fast
from sparse_unsloth.model.adapters import refuse_dropout, refuse_other_adapters
from sparse_unsloth.ops.projection import check_adapters, check_frozen
from sparse_unsloth.runtime.state import LayerRuntime, SparsityState
from sparse_unsloth.utils.watch import Watch

REATTACH = "Call detach(model), then attach it again."
KNOWN_ADAPTERS = 4
"""How many sets of adapters are remembered."""


@dataclass(frozen=True)
class KnownAdapters:
    """A set of adapters that was checked.

    Attributes:
        watch: whether they are the present ones.
        read: the result of `_adapters`.
        problem: why a forward under them must be dense; "" where it need not.
        version: a number that no other set has.
    """

    watch: Watch
    read: list[Any]
    problem: str
    version: int


def refuse_adapters(state: SparsityState) -> None:
    """Raises AttachError for adapters that are not LoRA, where layers are sparse, captured or in FP8."""
    layers = state.layers if state.dense_whole else [runtime.layer for runtime in state.runtimes.values()]
    if layers:
        refuse_other_adapters(state.model, layers)


def note_proved(state: SparsityState) -> None:
    """Notes the present adapters as those that attaching proved."""
    state.proved_adapters, state.known_adapters = _adapters(state), []
    _remember(state, state.proved_adapters, "")


def why_dense(state: SparsityState) -> str:
    """Why this forward must leave nothing out and replace nothing; "" where it need not.

    The checks of attaching are repeated only for adapters that were not checked before.
    """
    known = state.known_adapters
    for place, one in enumerate(known):
        if one.watch.holds():
            known.insert(0, known.pop(place))
            state.adapter_version = one.version
            return one.problem
    adapters = _adapters(state)
    if adapters == state.proved_adapters:
        problem = ""
    else:
        problem = next((one.problem for one in known if one.read == adapters), None)
        problem = _problem(state) if problem is None else problem
    known[:] = [one for one in known if one.read != adapters]  # they would keep replaced weights alive
    _remember(state, adapters, problem)
    return problem


def _remember(state: SparsityState, adapters: list[Any], problem: str) -> None:
    state.last_adapter_version += 1
    state.adapter_version = state.last_adapter_version
    state.known_adapters.insert(0, KnownAdapters(_watch_adapters(state), adapters, problem, state.adapter_version))
    del state.known_adapters[KNOWN_ADAPTERS:]


def _adapters(state: SparsityState) -> list[Any]:
    """Everything that `_problem` depends on: modules, compared by identity, and names and flags."""
    found: list[Any] = []
    for layer in state.layers:
        if state.runtime(layer) is None:
            continue
        found += layer.module._modules.values()
        for projection in layer.projections().values():
            attributes = projection.__dict__
            base = projection._modules.get("base_layer", projection)
            active, dropouts = attributes.get("_active_adapter"), projection._modules.get("lora_dropout", ())
            found += (
                projection,
                tuple(active) if isinstance(active, list) else active,
                attributes.get("_disable_adapters"),
                tuple(attributes.get("merged_adapters", ())),
                *(dropouts and dropouts._modules.values()),  # each adapter brings its attributes
                *(tensor is not None and tensor.requires_grad for tensor in base._parameters.values()),
            )
    return found


def _watch_adapters(state: SparsityState) -> Watch:
    """Holds as long as `_adapters`, and what layers read of their projections, stay; tells it much sooner.

    The layers watch weights, LoRA's matrices and scales themselves, in each call (`FastLayer.projections`).
    """
    watch = Watch()
    for layer in filter(state.runtime, state.layers):
        projections = layer.projections()
        parents = {name.rpartition(".")[0] for name in projections}
        for parent in (layer.module, *(layer.module.get_submodule(name) for name in parents if name)):
            watch.equal(parent.__dict__, "_modules", dict(parent._modules))
        for projection in projections.values():
            attributes, base = projection.__dict__, projection._modules.get("base_layer", projection)
            watch.same(attributes, "_disable_adapters", "scaling")
            for name in ("_active_adapter", "merged_adapters"):
                watch.equal(attributes, name, copy.copy(attributes.get(name)))
            dropouts = projection._modules.get("lora_dropout")
            for module in (projection, base, *(() if dropouts is None else (dropouts,))):
                watch.equal(module.__dict__, "_modules", dict(module._modules))
            watch.type_of(base)
            watch.same(base._parameters, *base._parameters)
            for tensor in filter(lambda one: one is not None, base._parameters.values()):
                watch.trained(tensor)
                watch.same(tensor.__dict__, "quant_state")
    return watch


def _problem(state: SparsityState) -> str:
    hooked = {id(module) for module in state.hooked}
    try:
        refuse_adapters(state)
        for runtime in filter(None, map(state.runtime, state.layers)):
            _refuse_changes(runtime, hooked)
    except AttachError as error:
        return str(error)
    return ""


def _is_hooked(part: nn.Module, hooked: set[int]) -> bool:
    return not hooked.isdisjoint(map(id, (part, *part.children())))


def _refuse_changes(runtime: LayerRuntime, hooked: set[int]) -> None:
    """Raises AttachError if the functions of a layer no longer compute what it computes.

    Args:
        hooked: ids of the hooked modules.
    """
    state, layer, module = runtime.state, runtime.layer, runtime.layer.module
    projections, attached = layer.projections(), state.projections[layer.index]
    if not layer.is_intact or tuple(projections.values()) != attached:
        raise AttachError(
            f"{layer.name}: projections were replaced after attaching (adapters on more of them, say). {REATTACH}"
        )
    row_sparse = state.row_sparse and layer.index in state.runtimes
    whole = id(module) in hooked
    for name, projection in projections.items():
        where = f"{layer.name}.{name}"
        ours = row_sparse or whole or _is_hooked(getattr(layer, name.partition(".")[0]), hooked)
        if ours and (getattr(projection, "merged", False) or getattr(projection, "disable_adapters", False)):
            raise AttachError(f"{where}: its adapter is merged or disabled.")
        if row_sparse or not ours:
            continue
        check_adapters(projection, where)
        check_frozen(projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection, where)
        if len(set(getattr(projection, "active_adapters", ())) & set(getattr(projection, "lora_A", ()))) > 1:
            raise AttachError(f"{where}: several adapters are active, and the sparse functions compute one.")
    if row_sparse:
        refuse_dropout(layer)
    reason = why_not_fast(layer) if whole else ""
    if reason:
        raise AttachError(f"{layer.name} no longer runs as a whole layer: {reason}. {REATTACH}")
