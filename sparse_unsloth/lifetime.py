"""An attached model after attaching: its adapters change, are unloaded or wrapped again; it is copied, or stored.

What attaching proved holds for the adapters of then. So before each forward `why_dense` looks whether they are still
those, and proves it again where not; unloading them detaches the model, and what PEFT returns is a plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_unsloth.backends import row_hooks, unsloth_layer
from sparse_unsloth.backends.replaced import BoundMethod
from sparse_unsloth.errors import AttachError
from sparse_unsloth.weights import check_adapters, check_frozen

if TYPE_CHECKING:
    from sparse_unsloth.layer_runtime import LayerRuntime
    from sparse_unsloth.runtime import SparsityState

AGAIN = "Call detach(model), then attach it again."


def watch(state: SparsityState) -> None:
    """Lets whoever unloads the adapters detach the model, and finds the state from each decoder layer.

    PEFT returns the base model then, whose decoder layers are the attached ones.
    """
    for layer in state.layers:
        layer.module.__dict__["_sparsity_state"] = state
    for tuner in _tuners(state.model):
        tuner.__dict__["_sparsity_state"] = state
        tuner.__dict__["_sparse_unloading"] = {name: tuner.__dict__.get(name) for name in UNLOADING}
        for name, function in UNLOADING.items():
            tuner.__dict__[name] = BoundMethod(function, tuner)
    state.model.__dict__.pop("_sparsity_unloaded", None)
    state.proved = state.seen = _adapters(state)
    set_up_process(state)


def unwatch(state: SparsityState) -> None:
    """Undoes `watch`, as far as it came."""
    for layer in state.layers:
        layer.module.__dict__.pop("_sparsity_state", None)
    for tuner in _tuners(state.model):
        for name, original in tuner.__dict__.pop("_sparse_unloading", {}).items():
            del tuner.__dict__[name]
            if original is not None:
                tuner.__dict__[name] = original
        tuner.__dict__.pop("_sparsity_state", None)


def was_unloaded(model: nn.Module) -> bool:
    """Whether ``model`` was attached until its adapters were unloaded."""
    return "_sparsity_unloaded" in model.__dict__


def set_up_process(state: SparsityState) -> None:
    """What an attached model needs of its process: trainers that drive it, and PEFT's wrappers noticed.

    And ``torch.compile`` leaves this package's functions alone: they decide by what they find, and would be compiled
    for it.
    """
    global _is_set_up
    if not _is_set_up:
        register_module_module_registration_hook(_refuse_wrapping)
        import torch._dynamo

        torch._dynamo.trace_rules.add(__package__)
        _is_set_up = True
    if state.hooked:
        from sparse_unsloth.callback import register_with_trainers

        register_with_trainers()


def attached_model(model: nn.Module) -> nn.Module | None:
    """The attached model that has layers of ``model``, or None; one whose adapters were unloaded is detached."""
    from sparse_unsloth.attachment import detach

    for module in model.modules():
        state: SparsityState | None = module.__dict__.get("_sparsity_state")
        if state is not None and not _is_unloaded(state):
            return state.model
        if state is not None:
            detach(state.model)
    return None


def why_dense(state: SparsityState) -> str:
    """Why a forward of now must be the model's own in every part, "" where it need not.

    A look at what may have changed in each hooked layer; what attaching refuses is looked for where something has.
    """
    adapters = _adapters(state)
    if adapters != state.seen:
        state.seen, state.reason = adapters, "" if adapters == state.proved else _reason(state)
    return state.reason


def say_bypassed(state: SparsityState) -> None:
    """Called in a training forward of a hooked layer that nobody opened, and that is not a recompute: warns once."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
        state.say_once(
            f"A training forward reached the decoder layers, but not through the attached {type(state.model).__name__} "
            "(a part of it was called, or its forward() directly), so nothing was left out. Call the model itself; "
            "detach(model) takes the sparse paths off."
        )


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
        state.refuse_other_adapters()
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
    by_rows = state.by_rows and layer.index in state.runtimes
    whole = id(module) in hooked and not (by_rows and runtime.not_fusable)
    for name, projection in projections.items():
        part, where = getattr(layer, name.partition(".")[0]), f"{layer.name}.{name}"
        ours = whole or not hooked.isdisjoint(map(id, (part, *part.children())))
        if ours and (getattr(projection, "merged", False) or getattr(projection, "disable_adapters", False)):
            raise AttachError(f"{where}: its adapter is merged or disabled.")
        if by_rows or not ours:
            continue
        check_adapters(projection, where)
        check_frozen(projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection, where)
        if len(set(getattr(projection, "active_adapters", ())) & set(getattr(projection, "lora_A", ()))) > 1:
            raise AttachError(f"{where}: several adapters are active, and the sparse functions compute one.")
    if by_rows:
        row_hooks.refuse_dropout(layer)
    reason = unsloth_layer.why_not(runtime) if whole else ""
    if reason:
        raise AttachError(f"{layer.name} runs as a whole no longer: {reason}. {AGAIN}")


def _tuners(model: nn.Module) -> list[nn.Module]:
    """PEFT's modules inside ``model`` that can unload their adapters."""
    return [module for module in model.modules() if all(hasattr(type(module), name) for name in UNLOADING)]


def _is_unloaded(state: SparsityState) -> bool:
    """Whether a projection of an attached layer is the bare one now that had an adapter around it."""
    for layer in state.layers:
        for old, now in zip(state.projections[layer.index], layer.projections().values(), strict=True):
            if old is not now and hasattr(old, "get_base_layer") and old.get_base_layer() is now:
                return True
    return False


def _merge_and_unload(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return _unload_and_detach(self, "merge_and_unload", *args, **kwargs)


def _unload(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return _unload_and_detach(self, "unload", *args, **kwargs)


UNLOADING = {"merge_and_unload": _merge_and_unload, "unload": _unload}
"""What PEFT's tuners take their adapters off by, and what stands there while the model is attached."""


def _unload_and_detach(tuner: nn.Module, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """As PEFT's; the model is detached then, and stays as it is where that failed."""
    from sparse_unsloth.attachment import detach

    original = tuner.__dict__["_sparse_unloading"][name]
    base = getattr(type(tuner), name)(tuner, *args, **kwargs) if original is None else original(*args, **kwargs)
    state = tuner.__dict__.get("_sparsity_state")
    if state is not None:
        detach(state.model)
        state.model.__dict__["_sparsity_unloaded"] = True
    return base


_is_set_up = False


def _refuse_wrapping(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called when a module gets a child: PEFT begins to build another model around an attached one.

    Raises:
        AttachError: its trainers and `save_pretrained` would not find what is attached inside.
    """
    if parent._modules or child is None or not type(parent).__module__.startswith("peft."):
        return
    kinds = {kind.__name__ for kind in type(parent).__mro__}
    if kinds & {"BaseTuner", "PeftModel", "PeftMixedModel"} and attached_model(child) is not None:
        raise AttachError(
            f"PEFT would build another {type(parent).__name__} around layers that are attached. Add adapters first and "
            "attach last: call detach(model), then add them, then attach the model that PEFT returns. One more adapter "
            "beside those that are there: model.add_adapter(name, config)."
        )
