"""An attached model after attaching: it is detached, unloaded or wrapped again; it is copied, or stored.

Unloading the adapters detaches the model, and what PEFT returns is a plain one.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_unsloth.adapter_changes import note_proved
from sparse_unsloth.backends.replaced import BoundMethod
from sparse_unsloth.errors import AttachError
from sparse_unsloth.runtime import SparsityState, get_state


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
    note_proved(state)
    set_up_process(state)


def _unwatch(state: SparsityState) -> None:
    """Undoes `watch`, as far as it came."""
    for layer in state.layers:
        layer.module.__dict__.pop("_sparsity_state", None)
    for tuner in _tuners(state.model):
        for name, original in tuner.__dict__.pop("_sparse_unloading", {}).items():
            del tuner.__dict__[name]
            if original is not None:
                tuner.__dict__[name] = original
        tuner.__dict__.pop("_sparsity_state", None)


def set_up_process(state: SparsityState) -> None:
    """What an attached model needs of its process: trainers that drive it, and PEFT's wrappers noticed.

    And ``torch.compile`` leaves this package's functions alone: they decide by what they find, and would be compiled
    for it.
    """
    global _is_set_up
    if not _is_set_up:
        register_module_module_registration_hook(_refuse_wrapping)
        import torch._dynamo

        torch._dynamo.trace_rules.add(__name__.partition(".")[0])
        _is_set_up = True
    if state.hooked:
        from sparse_unsloth.callback import register_with_trainers

        register_with_trainers()


def attached_model(model: nn.Module) -> nn.Module | None:
    """The attached model that has layers of ``model``, or None; one whose adapters were unloaded is detached."""
    for module in model.modules():
        state: SparsityState | None = module.__dict__.get("_sparsity_state")
        if state is not None and not _is_unloaded(state):
            return state.model
        if state is not None:
            detach(state.model)
    return None


def detach(model: nn.Module) -> None:
    """Takes every sparse path off ``model`` again; its own forwards, hooks and methods are those of before.

    Raises:
        AttachError: the model is not attached.
    """
    state = get_state(model)
    if state is None:
        if "_sparsity_unloaded" in model.__dict__:
            return
        raise AttachError("This model is not attached.")
    model = state.model
    if state.planner is not None:
        state.planner.restore()
    if state.graphs is not None:
        state.graphs.clear()
    state.end_prefill()
    for module in state.hooked:
        state.backend.uninstall(module)
    for handle in state.handles:
        handle.remove()
    for module in state.stack.values():
        module.__dict__.pop("_sparse_runtime", None)
        module.__dict__.pop("_sparse_context", None)
    if state.first_backward is not None:
        state.first_backward.drop()
    if "_sparse_save_pretrained" in model.__dict__:
        original = model.__dict__.pop("_sparse_save_pretrained")
        if original is None:
            del model.__dict__["save_pretrained"]
        else:
            model.save_pretrained = original
    keep_four_bit_weights_unpacked(state, on=False)
    _unwatch(state)
    model.__dict__.pop("_sparsity_state", None)


def keep_four_bit_weights_unpacked(state: SparsityState, on: bool) -> None:
    """bitsandbytes repacks 4-bit weights for CPU inference in an evaluation forward; afterwards they cannot train."""
    for layer in state.layers:
        for module in layer.projections().values():
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if not hasattr(base, "support_avx512bf16_for_cpu"):
                continue
            if on:
                base.__dict__.setdefault("_sparse_cpu_repacking", base.support_avx512bf16_for_cpu)
                base.support_avx512bf16_for_cpu = False
            elif "_sparse_cpu_repacking" in base.__dict__:
                base.support_avx512bf16_for_cpu = base.__dict__.pop("_sparse_cpu_repacking")


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
