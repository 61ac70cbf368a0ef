"""Installs the sparse paths on a model, proves that they run, reports them, and takes them off again.

Unloading the adapters takes them off too, and what PEFT returns is a plain model then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_unsloth.backends.patching import BoundMethod, Uncompiled
from sparse_unsloth.backends.peft import hooks as peft
from sparse_unsloth.backends.unsloth import hooks as unsloth
from sparse_unsloth.channels.factors import obtain_estimator
from sparse_unsloth.config.sparsity import CONFIG_NAME, SparsityConfig
from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact.loss import install_loss_removal
from sparse_unsloth.graphs import packed_attention
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.model.decoder_layer import DecoderLayer, find_layers
from sparse_unsloth.model.training_flags import training_flags
from sparse_unsloth.ops.projection import forget_bases
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.runtime.adapter_changes import note_proved, refuse_adapters
from sparse_unsloth.runtime.attach_report import AttachReport, reasons, report
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext, runs_twice
from sparse_unsloth.runtime.forward import register_hooks
from sparse_unsloth.runtime.prefill import save_estimator_with_adapter
from sparse_unsloth.runtime.state import Backend, LayerRuntime, SparsityState, get_state
from sparse_unsloth.tokens.partition import TokenPartition
from sparse_unsloth.utils.distributed import is_main
from sparse_unsloth.utils.saved_adapters import left_unsaved

logger = logging.getLogger("sparse_unsloth")

LAST_LAYER_PARTS = {"self_attn": "the last layer's queries and O projection", "mlp": "the last layer's MLP"}


def attach(
    model: nn.Module,
    sparsity: SparsityConfig | Mapping[str, Any] | str | Path | None,
    calibration_samples: list[Mapping[str, Any]] | None = None,
) -> AttachReport:
    """Makes ``model`` train sparsely; every other use of it stays dense.

    Args:
        model: the outermost model, where labels enter: normally the ``PeftModel``. It is changed in place, instance by
            instance; no class is touched.
        sparsity: a configuration, the path of one, a mapping, or a preset's name.
        calibration_samples: batches as the model receives them (``input_ids``, ``labels``, ``attention_mask``, ...),
            for the estimators that calibrate. Without them such an estimator waits for the trainer's first samples.

    Returns:
        What was hooked in each layer.

    Raises:
        AttachError: a layer that the configuration names cannot be made sparse, differs from what the sparse function
            computes, or did not run in the probe forward; or the model, or one around it or inside, is attached. The
            model is then as before.
        ConfigError: the configuration is wrong, or names layers that the model does not have.
        EstimatorError: the estimator's file does not fit or is damaged, or the samples cannot calibrate.
    """
    if get_state(model) is not None:
        raise AttachError("This model is attached already; call detach(model) first to attach it differently.")
    config = SparsityConfig.from_any(sparsity)
    around = _attached_model(model)
    if around is not None:
        raise AttachError(
            f"The layers of this {type(model).__name__} are attached already, as those of a {type(around).__name__}. "
            "Call detach() on that model first."
        )
    layers = find_layers(model)
    state = SparsityState(model, layers, config, _backend_of(model, layers), _set_up_process)
    model.__dict__["_sparsity_state"] = state
    try:
        refuse_adapters(state)
        _refuse_shared_modules(state)
        _keep_four_bit_weights_unpacked(state, on=True)
        for runtime in state.runtimes.values():
            state.backend.install(runtime)
        removed = _remove_rows_without_loss(state)
        _replace_whole_layers(state)
        register_hooks(state)
        _keep_uncompiled(state)
        _probe(state)
        _keep_proved_layers(state)
        _prepare_graphs(state)
        _obtain_estimator(state, calibration_samples)
    except BaseException:
        detach(model)
        raise
    _save_config_with_adapter(model)
    _watch(state)
    forget_bases(module for layer in layers for module in layer.projections().values())
    done = report(state, removed)
    _warn_if_slow(done)
    return done


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
    _keep_four_bit_weights_unpacked(state, on=False)
    _unwatch(state)
    model.__dict__.pop("_sparsity_state", None)


def _refuse_shared_modules(state: SparsityState) -> None:
    """Raises AttachError where two layers have a module in common: its calls would be told apart by nothing."""
    owners: dict[nn.Module, str] = {}
    for runtime in state.runtimes.values():
        layer = runtime.layer
        for name, module in {"mlp": layer.mlp, "self_attn": layer.self_attn, **layer.projections()}.items():
            if module in owners:
                raise runs_twice(f"{owners[module]}, which is {layer.name}.{name} too,")
            owners[module] = f"{layer.name}.{name}"


def _backend_of(model: nn.Module, layers: list[DecoderLayer]) -> Backend:
    """Unsloth's hook points where its fast path put them, else the projections.

    Raises:
        AttachError: a model that Unsloth runs through its compiled path, which has no hook points.
    """
    if "apply_qkv" in layers[0].self_attn.__dict__:
        return unsloth.BACKEND
    if model.__dict__.get("_sparse_backend") == "unsloth":
        raise AttachError(
            f"Unsloth runs {type(layers[0].module).__name__} through its general compiled path, which has no hook "
            "points (as for Granite, Cohere, mixtures of experts and 8-bit bases). Load it with backend='peft'."
        )
    return peft.BACKEND


def _remove_rows_without_loss(state: SparsityState) -> str:
    """Hooks the exact removal (design section 5) where the configuration wants it and the backend has it.

    Returns:
        What leaves such rows out, for the report.
    """
    if state.backend.name != "unsloth" or not state.config.exact_removal:
        return ""
    last = state.layers[-1]
    state.handles.append(install_loss_removal(state.model, last.module, CONTEXT_ARGUMENT))
    stack = state.model.get_submodule(last.name.rpartition(".")[0])
    if not isinstance(stack, nn.ModuleList) or stack[-1] is not last.module:
        return "logits and loss; not the last layer, which is of another kind than the others"
    runtime = state.runtimes.get(last.index) or LayerRuntime(state, last, state.layer_sparsity[-1])
    left = unsloth.install_on_last_layer(runtime)
    state.last_layer = runtime if runtime.parts else None
    done = ["logits and loss", *(LAST_LAYER_PARTS[part] for part in runtime.parts)]
    return "; ".join([", ".join(done), *(f"not {LAST_LAYER_PARTS[part]}: {reason}" for part, reason in left.items())])


def _replace_whole_layers(state: SparsityState) -> None:
    """Lets the layers of a sparse model run as a whole where that is faster, dense ones among them too."""
    if state.backend.name != "unsloth" or not (state.runtimes or state.dense_with_graphs):
        return
    state.whole_forwards = [
        state.runtime(layer) or LayerRuntime(state, layer, sparsity)
        for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True)
    ]
    unsloth.install_whole_layers(state.whole_forwards)
    state.whole_layers = {
        runtime.layer.index: runtime
        for runtime in state.whole_forwards
        if runtime.layer.index not in state.runtimes and not runtime.not_whole
    }


def _keep_uncompiled(state: SparsityState) -> None:
    """Keeps hooked layers out of Unsloth's compiled regions."""
    for layer in filter(state.runtime, state.layers):
        state.uncompiled[layer.index] = Uncompiled(layer.module)
        state.handles.append(state.uncompiled[layer.index])


def _keep_proved_layers(state: SparsityState) -> None:
    """Gives layers whose whole forward failed in the probe their own back; what is sparse in them stays hooked."""
    for runtime in state.whole_forwards:
        if not runtime.not_whole:
            continue
        unsloth.uninstall_whole_layer(runtime)
        if state.whole_layers.pop(runtime.layer.index, None) is not None and runtime is not state.last_layer:
            state.uncompiled[runtime.layer.index].remove()


def _prepare_graphs(state: SparsityState) -> None:
    """Raises AttachError where `cuda_graphs` is wanted and no layer has the form for it, or there is no GPU."""
    if not state.config.cuda_graphs:
        return
    layers = [*state.whole_forwards] or [*state.runtimes.values()]
    if not layers:  # dense: the backend has no whole layers, and none has a hook
        raise AttachError(
            f"cuda_graphs: no layer of this model can be captured: {peft.NO_GRAPHS}. Set cuda_graphs: false."
        )
    for runtime in layers:
        runtime.not_captured = state.backend.why_not_captured(runtime)
    if all(runtime.not_captured for runtime in layers):
        why = "; ".join(f"{reason} ({count} layers)" for reason, count in reasons(layers, "not_captured"))
        raise AttachError(f"cuda_graphs: no layer of this model can be captured: {why}. Set cuda_graphs: false.")
    if len({next(layer.module.parameters()).device for layer in state.layers}) > 1:
        raise AttachError(
            "cuda_graphs: the layers lie on several devices, and a recording is one device's. Set cuda_graphs: false."
        )
    state.graphs = GraphCache()
    _try_documents(state)


def _try_documents(state: SparsityState) -> None:
    """Whether attention within packed documents can be recorded; a warning where it cannot, on a GPU."""
    layer = state.layers[0]
    like = layer.module.input_layernorm.weight.detach()
    if not like.is_cuda:
        return
    heads = layer.num_heads, layer.num_kv_heads, layer.head_dim
    reason = packed_attention.why_not_captured(*heads, like, state.graphs.recorder)
    state.graphs.clear()
    if reason:
        state.graphs.documents = False
        logger.warning(
            "cuda_graphs: attention within packed documents cannot be recorded (%s). In packed and padding-free "
            "batches it runs as it is, between recordings of what is before and behind it.",
            reason,
        )


def _obtain_estimator(state: SparsityState, samples: list[Mapping[str, Any]] | None) -> None:
    """Lets channels be chosen, unless that waits for the trainer's first samples.

    Raises:
        EstimatorError: the estimator cannot be had (see `obtain_estimator`).
    """
    config = state.config
    if state.row_sparse or not state.runtimes:
        return
    if config.criterion != "estimator":
        state.use(None)
    elif is_main():  # rank 0 makes it for all, see `SparsityState.begin_training`
        model = state.model, state.layers, state.layer_sparsity, config.estimator
        chosen = {"dense_tokens": config.dense_tokens, "seed": config.seed}
        estimator = obtain_estimator(*model, samples=samples, wait=True, **chosen)
        if estimator is not None:
            state.use(estimator)


def _probe(state: SparsityState) -> None:
    """A training-mode forward of a few tokens must pass every hooked part, and hand it this forward's context.

    Raises:
        AttachError: some part was not reached.
    """
    if not (state.runtimes or state.last_layer or state.whole_layers):
        return
    parameter = next(state.model.parameters())
    if parameter.device.type == "meta":
        raise AttachError("The model is on the meta device; load its weights first, then attach.")
    ids = torch.arange(4, device=parameter.device)[None]
    partition = TokenPartition.from_labels(torch.where(ids < 3, -100, ids))
    context = SparseContext(partition, scale=1.0, loss_only=state.last_layer is not None)
    context.loss_reached = True  # nobody reads what this forward returns
    context.probe = True
    for index, runtime in state.runtimes.items():
        layer, device = runtime.layer, next(runtime.layer.module.parameters()).device
        queries, keys = (
            torch.arange(heads * layer.head_dim, device=device) for heads in (layer.num_heads, layer.num_kv_heads)
        )
        context.selections[index, "mlp"] = MlpSelection(torch.arange(layer.intermediate_size, device=device))
        context.selections[index, "self_attn"] = AttentionSelection(q=queries, k=keys, v=keys, o=queries)
    with torch.no_grad(), training_flags(state.model):
        state.model(input_ids=ids, use_cache=False, **{CONTEXT_ARGUMENT: context})
    expected = state.hooked_parts()
    missing = expected - context.ran
    if missing:
        raise AttachError(
            f"A probe forward did not reach {len(missing)} of {len(expected)} hooked parts: "
            f"{state.name_parts(missing)}. {type(state.model).__name__} does not hand keyword arguments on to its "
            "decoder layers, or does not call the projections that it has; it has no sparse path."
        )


def _warn_if_slow(report: AttachReport) -> None:
    """Says where layers do not run in the fastest way that was asked for; the last layer alone never matters."""
    few = report.whole_layers < len(report.layers) - 1 and report.not_whole
    if few or (report.captured_layers and report.captured_layers < len(report.layers) - 1):
        logger.warning("Training is exact, and slower than it could be:\n%s", "\n".join(report.speed_lines()))


def _save_config_with_adapter(model: nn.Module) -> None:
    """Lets ``save_pretrained`` write configuration and estimator beside the adapter, which stays a plain PEFT one."""
    if not hasattr(model, "save_pretrained"):
        return
    model.__dict__["_sparse_save_pretrained"] = model.__dict__.get("save_pretrained")
    model.save_pretrained = BoundMethod(_save_pretrained, model)


def _save_pretrained(self: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    original = self.__dict__["_sparse_save_pretrained"]
    saved = (
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
        if original is None
        else original(save_directory, *args, **kwargs)
    )
    if kwargs.get("is_main_process", True):
        state = get_state(self)
        state.config.save(Path(save_directory) / CONFIG_NAME)
        save_estimator_with_adapter(state, Path(save_directory))
        if unsaved := left_unsaved(self, Path(save_directory)):
            state.warn_once(
                f"{len(unsaved)} trained tensors are no part of the adapter, and were not saved with it: "
                f"{', '.join(unsaved[:3])}{', ...' if len(unsaved) > 3 else ''}. Name their modules in "
                "modules_to_save, or save them yourself."
            )
    return saved


def _keep_four_bit_weights_unpacked(state: SparsityState, on: bool) -> None:
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


def _watch(state: SparsityState) -> None:
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
    _set_up_process(state)


def _unwatch(state: SparsityState) -> None:
    """Undoes `_watch`, as far as it came."""
    for layer in state.layers:
        layer.module.__dict__.pop("_sparsity_state", None)
    for tuner in _tuners(state.model):
        for name, original in tuner.__dict__.pop("_sparse_unloading", {}).items():
            del tuner.__dict__[name]
            if original is not None:
                tuner.__dict__[name] = original
        tuner.__dict__.pop("_sparsity_state", None)


def _set_up_process(state: SparsityState) -> None:
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


def _attached_model(model: nn.Module) -> nn.Module | None:
    """The attached model that has layers of ``model``, or None; one whose adapters were unloaded is detached."""
    for module in model.modules():
        state: SparsityState | None = module.__dict__.get("_sparsity_state")
        if state is not None and not _is_unloaded(state):
            return state.model
        if state is not None:
            detach(state.model)
    return None


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
    if kinds & {"BaseTuner", "PeftModel", "PeftMixedModel"} and _attached_model(child) is not None:
        raise AttachError(
            f"PEFT would build another {type(parent).__name__} around layers that are attached. Add adapters first and "
            "attach last: call detach(model), then add them, then attach the model that PEFT returns. One more adapter "
            "beside those that are there: model.add_adapter(name, config)."
        )
