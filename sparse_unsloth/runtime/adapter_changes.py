"""The adapters of an attached model after attaching, which proved what holds for the adapters of then.

So before each forward `why_dense` looks whether they are still those, and proves it again where not.
"""

from __future__ import annotations

from typing import Any

from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.adapters import refuse_dropout, refuse_other_adapters
from sparse_unsloth.ops.projection import check_adapters, check_frozen
from sparse_unsloth.runtime.state import LayerRuntime, SparsityState

AGAIN = "Call detach(model), then attach it again."


def refuse_adapters(state: SparsityState) -> None:
    """Raises AttachError for adapters that are not LoRA, where layers are sparse or recorded."""
    layers = state.layers if state.dense_with_graphs else [runtime.layer for runtime in state.runtimes.values()]
    if layers:
        refuse_other_adapters(state.model, {layer.name: layer.module for layer in layers})


def note_proved(state: SparsityState) -> None:
    """Attaching proved what it proves for the adapters of now."""
    state.proved = state.seen = _adapters(state)


def why_dense(state: SparsityState) -> str:
    """Why a forward of now must be the model's own in every part, "" where it need not.

    A look at what may have changed in each hooked layer; what attaching refuses is looked for where something has.
    """
    adapters = _adapters(state)
    if adapters != state.seen:
        state.seen, state.reason = adapters, "" if adapters == state.proved else _reason(state)
    return state.reason


def _adapters(state: SparsityState) -> list[Any]:
    """What `_reason` depends on; compared by identity, but for names and flags."""
    found: list[Any] = []
    for layer in state.layers:
        if state.runtime(layer) is None:
            continue
        attention, mlp = layer.module._modules.get("self_attn"), layer.module._modules.get("mlp")
        found += attention, mlp
        for projection in layer.projections().values():
            own = projection.__dict__
            base = projection._modules.get("base_layer", projection)
            active, dropouts = own.get("_active_adapter"), projection._modules.get("lora_dropout", ())
            found += (
                projection,
                tuple(active) if isinstance(active, list) else active,
                own.get("_disable_adapters"),
                tuple(own.get("merged_adapters", ())),
                *(dropouts and dropouts._modules.values()),  # each adapter brings its own
                *(tensor is not None and tensor.requires_grad for tensor in base._parameters.values()),
            )
    return found


def _reason(state: SparsityState) -> str:
    hooked = {id(module) for module in state.hooked}
    try:
        refuse_adapters(state)
        for runtime in filter(None, map(state.runtime, state.layers)):
            _refuse_changes(runtime, hooked)
    except AttachError as error:
        return str(error)
    return ""


def _refuse_changes(runtime: LayerRuntime, hooked: set[int]) -> None:
    """Raises AttachError if the functions of a layer would compute something else now; ``hooked``: ids of modules."""
    state, layer, module = runtime.state, runtime.layer, runtime.layer.module
    projections, attached = layer.projections(), state.projections[layer.index]
    if (module.mlp, module.self_attn, *projections.values()) != (layer.mlp, layer.self_attn, *attached):
        raise AttachError(
            f"{layer.name}: projections were replaced after attaching (adapters on more of them, say). {AGAIN}"
        )
    row_sparse = state.row_sparse and layer.index in state.runtimes
    whole = id(module) in hooked and not (row_sparse and runtime.not_fusable)
    for name, projection in projections.items():
        part, where = getattr(layer, name.partition(".")[0]), f"{layer.name}.{name}"
        ours = whole or not hooked.isdisjoint(map(id, (part, *part.children())))
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
    reason = state.backend.why_not_whole(runtime) if whole else ""
    if reason:
        raise AttachError(f"{layer.name} runs as a whole no longer: {reason}. {AGAIN}")
