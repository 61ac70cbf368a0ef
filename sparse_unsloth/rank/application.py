"""Makes the adapter of a PEFT model rank-sparse, and undoes it."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparse_unsloth.rank.config import RankConfig, RankError
from sparse_unsloth.rank.layer import RankLayer
from sparse_unsloth.rank.state import STATE_NAME, RankState

SHARE_THE_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Projections that share the input of their parent module; fused forwards read their factors before calling them."""
_ATTACHED_SLOT = "_sparse_save_pretrained"
"""The attribute in which a model attached by `attach` keeps the ``save_pretrained`` that it wrapped."""


def apply(
    model: nn.Module,
    target_density: float = 0.08,
    importance_lambda: float = 1.0,
    *,
    adapter: str | None = None,
    resume_from: str | Path | None = None,
    **options: Any,
) -> RankState:
    """Makes the LoRA layers of ``model`` compute only the most important rank components in training.

    After warm-up, evaluation, generation and merging compute the retained components, those of
    ``save_pruned_checkpoint(model, path, target_density)``. Inside ``retained(model, 1)`` all components are computed,
    though they were never trained together. The step advances with every PyTorch optimiser that trains the adapter.
    ``save_pretrained`` writes all components and the state, so that ``load_adapter`` (a trainer's resume) continues the
    training; it warns where plain PEFT would compute another model from the file.

    Args:
        model: a ``PeftModel``, attached or not. Its instances are changed in place.
        target_density, importance_lambda, options: see `RankConfig`.
        adapter: the adapter's name; None: the active one.
        resume_from: an adapter folder saved from a rank-sparse model, whose state is loaded.

    Raises:
        RankError: wrong options, no PEFT model, no such adapter, LoRA variants that mix components (DoRA), a model that
            is rank-sparse already, or a state that does not fit.
    """
    config = RankConfig.from_any({"target_density": target_density, "importance_lambda": importance_lambda} | options)
    if get_rank_state(model) is not None:
        raise RankError("This model is rank-sparse already; call rank.remove(model) first.")
    if not hasattr(model, "peft_config"):
        raise RankError(f"{type(model).__name__} has no adapters. Call get_peft_model first, then rank.apply.")
    adapter = adapter or model.active_adapter
    layers = _find_layers(model, adapter, config)
    state = RankState(model, layers, config, adapter)
    for layer in layers:
        layer.install()
    _register_hooks(model, state)
    model.__dict__["_rank_state"] = state
    _wrap_saving(model)
    if resume_from is not None:
        try:
            state.load(resume_from)
        except RankError:
            remove(model)
            raise
    return state


def remove(model: nn.Module) -> None:
    """Makes a rank-sparse model compute every component again, in evaluation too; pruned ones stay zero.

    Raises:
        RankError: the model is not rank-sparse.
    """
    state = get_rank_state(model)
    if state is None:
        raise RankError("This model is not rank-sparse.")
    for layer in state.layers:
        layer.uninstall()
    for handle in state.handles:
        handle.remove()
    _unwrap_saving(model)
    del model.__dict__["_rank_state"]


def get_rank_state(model: nn.Module) -> RankState | None:
    """The state of a rank-sparse model, inside DDP and ``torch.compile`` wrappers too; None if it is not."""
    while model is not None:
        state = getattr(model, "__dict__", {}).get("_rank_state")
        if state is not None:
            return state
        modules = getattr(model, "_modules", {})
        model = modules.get("module") or modules.get("_orig_mod")
    return None


def _find_layers(model: nn.Module, adapter: str, config: RankConfig) -> list[RankLayer]:
    if adapter not in model.peft_config:
        raise RankError(f"There is no adapter {adapter!r}; the model has {', '.join(model.peft_config)}.")
    if str(getattr(model.peft_config[adapter], "peft_type", "")).rpartition(".")[2] != "LORA":
        raise RankError(f"Adapter {adapter!r} is of type {model.peft_config[adapter].peft_type}; only LoRA has ranks.")
    layers = []
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_embedding_A", {}):
            raise RankError(f"{name}: LoRA on an embedding has no rank-sparse path. Leave it out of target_modules.")
        if adapter not in getattr(module, "lora_A", {}):
            continue
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None:
            raise RankError(
                f"{name}: the LoRA variant {type(variant).__name__} (DoRA, ...) does not add up its components one by "
                "one. Use a plain LoraConfig."
            )
        for factor in (module.lora_A[adapter], module.lora_B[adapter]):
            if type(factor) is not nn.Linear:
                raise RankError(f"{name}: LoRA factors of type {type(factor).__name__} have no rank-sparse path.")
        layers.append(RankLayer(name, module, adapter, config))
    if not layers:
        raise RankError(f"Adapter {adapter!r} has no LoRA layers.")
    return layers


def _register_hooks(model: nn.Module, state: RankState) -> None:
    """Registers hooks: a layer chooses by its own input where its forward runs, else by its parent module's input."""
    around: dict[str, list[tuple[RankLayer, bool]]] = {}
    for layer in state.layers:
        parent, _, last = layer.name.rpartition(".")
        around.setdefault(parent, []).append((layer, last in SHARE_THE_INPUT))

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any], layer: RankLayer = layer) -> None:
            layer.open(_input(args, kwargs))

        def leave(module: nn.Module, args: tuple, output: Any, layer: RankLayer = layer) -> None:
            layer.close()

        state.handles.append(layer.module.register_forward_pre_hook(enter, with_kwargs=True))
        state.handles.append(layer.module.register_forward_hook(leave, always_call=True))
    for parent, children in around.items():

        def enter_parent(module: nn.Module, args: tuple, kwargs: dict[str, Any], children=children) -> None:
            source = _input(args, kwargs)
            for layer, shares in children:
                layer.open(source if shares else None)

        def leave_parent(module: nn.Module, args: tuple, output: Any, children=children) -> None:
            for layer, _ in children:
                layer.close()

        module = model.get_submodule(parent)
        state.handles.append(module.register_forward_pre_hook(enter_parent, with_kwargs=True))
        state.handles.append(module.register_forward_hook(leave_parent, always_call=True))
    # The process-wide hooks must not keep the model alive.
    reference = weakref.ref(state)

    def before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        alive = reference()
        if alive is not None and alive.trained_by(optimizer):
            alive.hold_unused(optimizer)

    def after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        alive = reference()
        if alive is not None and alive.trained_by(optimizer):
            alive.advance(optimizer)

    for handle in (register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)):
        weakref.finalize(state, handle.remove)
        state.handles.append(handle)


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    source = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    return source if torch.is_tensor(source) and source.is_floating_point() else None


def _wrap_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` write the rank state beside the adapter, and ``load_adapter`` read it."""
    # Inside the wrapper of `attach`, so that detaching leaves this in place.
    slot = _ATTACHED_SLOT if _ATTACHED_SLOT in model.__dict__ else "save_pretrained"
    model.__dict__["_rank_save_pretrained"] = model.__dict__.get(slot)
    model.__dict__[slot] = MethodType(_save_pretrained, model)
    model.__dict__["_rank_load_adapter"] = model.__dict__.get("load_adapter")
    model.__dict__["load_adapter"] = MethodType(_load_adapter, model)


def _unwrap_saving(model: nn.Module) -> None:
    for slot, kept, ours in (
        (_ATTACHED_SLOT, "_rank_save_pretrained", _save_pretrained),
        ("save_pretrained", "_rank_save_pretrained", _save_pretrained),
        ("load_adapter", "_rank_load_adapter", _load_adapter),
    ):
        if getattr(model.__dict__.get(slot), "__func__", None) is not ours:
            continue
        original = model.__dict__.pop(kept)
        if original is not None or slot == _ATTACHED_SLOT:
            model.__dict__[slot] = original
        else:
            del model.__dict__[slot]


def _save_pretrained(self: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    original = self.__dict__["_rank_save_pretrained"]
    save = MethodType(type(self).save_pretrained, self) if original is None else original
    saved = save(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        state = get_rank_state(self)
        state.save(save_directory)
        state.warn_that_all_were_saved(save_directory)
    return saved


def _load_adapter(self: nn.Module, model_id: str | Path, *args: Any, **kwargs: Any) -> Any:
    original = self.__dict__["_rank_load_adapter"]
    load = MethodType(type(self).load_adapter, self) if original is None else original
    loaded = load(model_id, *args, **kwargs)
    name = kwargs.get("adapter_name", args[0] if args else None)
    state = get_rank_state(self)
    if name == state.adapter and (Path(model_id) / STATE_NAME).is_file():
        state.load(model_id)
    return loaded
