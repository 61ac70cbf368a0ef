"""Attaches sparse paths to a model: installs hooks, proves them with a probe forward, reports them; and detaches them.

Unloading the adapters detaches them too, so PEFT returns a plain model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_unsloth.backends import capturing, precision, whole_layer
from sparse_unsloth.backends.patching import BoundMethod, Uncompiled
from sparse_unsloth.backends.peft import compiled
from sparse_unsloth.backends.peft import hooks as peft
from sparse_unsloth.backends.reach import probe_reach
from sparse_unsloth.backends.row_parts import find_row_layers
from sparse_unsloth.backends.unsloth import hooks as unsloth
from sparse_unsloth.channels.factors import obtain_estimator
from sparse_unsloth.config.sparsity import CONFIG_NAME, SparsityConfig
from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact.loss import install_loss_removal
from sparse_unsloth.model.decoder_layer import AnyLayer, DecoderLayer, decoder_stack, find_layers, left_out_layers
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.projection import forget_bases
from sparse_unsloth.planning.progress import AutoPlan
from sparse_unsloth.runtime.adapter_changes import note_proved, refuse_adapters
from sparse_unsloth.runtime.attach_report import AttachReport, report
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, runs_twice
from sparse_unsloth.runtime.forward import register_hooks
from sparse_unsloth.runtime.prefill import save_estimator_with_adapter
from sparse_unsloth.runtime.state import Backend, LayerRuntime, SparsityState, get_state
from sparse_unsloth.utils.distributed import is_main
from sparse_unsloth.utils.progress import bar
from sparse_unsloth.utils.saved_adapters import left_unsaved

logger = logging.getLogger("sparse_unsloth")

PLAN_NAME = "sparsity_plan.yaml"
"""The file beside `CONFIG_NAME` with what `auto` decided, which can be given as ``sparsity`` as well."""
OF_THE_TRAINING = (
    "auto", "driver", "scale", "step", "_max_steps", "inside", "warned", "counts", "adapter_folder", "observer",
    "left_out",
)  # fmt: skip
"""What of a state stays when its model is attached again."""
LAST_LAYER_PARTS = {"self_attn": "the last layer's queries and O projection", "mlp": "the last layer's MLP"}


def attach(
    model: nn.Module,
    sparsity: SparsityConfig | Mapping[str, Any] | str | Path | None = "auto",
    calibration_samples: list[Mapping[str, Any]] | None = None,
) -> AttachReport:
    """Makes ``model`` train sparsely; every other use of it stays dense.

    Args:
        model: the outermost model, where labels enter: normally the ``PeftModel``. Its instances are changed in
            place, no class is.
        sparsity: a configuration, the path of one, a mapping, or a preset's name. "auto" attaches the model densely;
            how it trains is decided when training begins (`runtime.auto`).
        calibration_samples: batches as the model receives them (``input_ids``, ``labels``, ``attention_mask``, ...),
            for calibrated estimators. Without them such an estimator waits for the trainer's first samples.

    Returns:
        What was hooked in each layer.

    Raises:
        AttachError: a layer that the configuration names cannot be made sparse, differs from what the sparse function
            computes, or did not run in the probe forward; or the model, or one around it or inside, is attached
            already. The model is then unchanged.
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
    first = config.decided() if config.is_auto else config
    layers, left_out = _layers_of(model, config)
    state = SparsityState(model, layers, first, _backend_of(layers), _set_up_process)
    state.left_out |= left_out
    if config.is_auto:
        state.auto = AutoPlan(config, _attach_again)
    return _install(state, calibration_samples)


def _layers_of(model: nn.Module, config: SparsityConfig) -> tuple[list[AnyLayer], dict[str, str]]:
    """The decoder layers that ``config`` may make sparse, and why others are left out, by name.

    Raises:
        AttachError: there are none, or `auto` would have to predict the time of layers that only row sparsity takes.
    """
    if config.row_sparse and not config.is_auto:
        return find_row_layers(model)
    layers = find_layers(model)
    if config.is_auto and (why := _why_not_predicted(model, layers)):
        raise AttachError(why)
    return list(layers), {}


def why_unplanned(model: nn.Module) -> str:
    """Why `auto` cannot plan the training of ``model`` ("": it can): only layers of the Llama kind have a forecast."""
    try:
        return _why_not_predicted(model, find_layers(model))
    except AttachError as error:
        return str(error)


def _why_not_predicted(model: nn.Module, layers: list[DecoderLayer]) -> str:
    others = left_out_layers(decoder_stack(model, layers), layers)
    if not others:
        return ""
    return (
        f"sparsity='auto' predicts the time of layers of the Llama kind alone, and {len(others)} of "
        f"{len(others) + len(layers)} decoder layers are others ({next(iter(others.values()))}). Choose by hand: "
        "sparsity='rows', or sparsity=None for dense training."
    )


def _attach_again(state: SparsityState, config: SparsityConfig) -> None:
    """Attaches the model of ``state`` by ``config`` instead, in a training too; ``state`` stays the same object.

    Raises:
        AttachError: as `attach`; the model is then not attached, and this may be called again.
    """
    if get_state(state.model) is not None:
        detach(state.model)
    kept = {name: state.__dict__[name] for name in OF_THE_TRAINING}
    state.__init__(  # type: ignore[misc]
        state.model, state.layers, config, state.backend, state.set_up_process
    )
    state.__dict__.update(kept)
    _install(state, None)


def _install(state: SparsityState, calibration_samples: list[Mapping[str, Any]] | None) -> AttachReport:
    """Installs all hooks of ``state``; raises as `attach`, and the model is then unchanged."""
    model, layers = state.model, state.layers
    model.__dict__["_sparsity_state"] = state
    try:
        refuse_adapters(state)
        _refuse_shared_modules(state)
        _keep_four_bit_weights_unpacked(state, on=True)
        # Restored, because Unsloth's own forwards change it.
        with torch.compiler.set_stance(
            compiled.stance(layers[0].module) if state.backend is peft.BACKEND else "default"
        ):
            for runtime in bar(state.runtimes.values(), "Proving layers", "layer"):
                state.backend.install(runtime)
            skipped = _skip_unused_rows(state)
            _replace_whole_layers(state)
            precision.check_before(state)
            register_hooks(state)
            _keep_uncompiled(state)
            probe_reach(state)
        _keep_proved_layers(state)
        precision.check_after(state)
        capturing.prepare_graphs(state)
        _obtain_estimator(state, calibration_samples)
    except BaseException:
        detach(model)
        raise
    _save_config_with_adapter(model)
    _watch(state)
    forget_bases(module for layer in layers for module in layer.projections().values())
    attached = report(state, skipped)
    _warn_if_slow(attached)
    return attached


def detach(model: nn.Module) -> None:
    """Removes every sparse path from ``model`` and restores its own forwards, hooks and methods.

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
    """Raises AttachError where two layers share a module, whose calls could not be told apart."""
    owners: dict[nn.Module, str] = {}
    for runtime in state.runtimes.values():
        layer = runtime.layer
        held = {part.module: part.path or part.name for part in layer.row_parts}
        for module, name in (held | {module: name for name, module in layer.projections().items()}).items():
            if module in owners:
                raise runs_twice(f"{owners[module]}, which is {layer.name}.{name} too,")
            owners[module] = f"{layer.name}.{name}"


def _backend_of(layers: Sequence[AnyLayer]) -> Backend:
    """The Unsloth backend where Unsloth's fast path prepared the layers, else the PEFT backend.

    Unsloth's compiled path (``FastModel``) leaves transformers' modules with other class forwards. The PEFT backend
    replaces forwards of instances, so it runs there too (docs/how-it-works.md, section 7.5).
    """
    fast = all(isinstance(layer, DecoderLayer) and "apply_qkv" in layer.self_attn.__dict__ for layer in layers)
    return unsloth.BACKEND if fast else peft.BACKEND


def _skip_unused_rows(state: SparsityState) -> str:
    """Hooks loss and last layer to skip unused rows (docs/how-it-works.md, section 5), if configured and supported.

    Returns:
        Where they are skipped, for the report.
    """
    if state.backend.name != "unsloth" or not state.config.exact_removal:
        return ""
    last = state.layers[-1]
    state.handles.append(install_loss_removal(state.model, last.module, CONTEXT_ARGUMENT))
    stack = state.model.get_submodule(last.name.rpartition(".")[0])
    if not isinstance(stack, nn.ModuleList) or stack[-1] is not last.module:
        return "logits and loss; not the last layer, which is built differently from the others"
    runtime = state.runtimes.get(last.index) or LayerRuntime(state, last, state.layer_sparsity[-1])
    problems = unsloth.install_on_last_layer(runtime)
    state.last_layer = runtime if runtime.loss_only_parts else None
    skipped = ["logits and loss", *(LAST_LAYER_PARTS[part] for part in runtime.loss_only_parts)]
    others = [f"not {LAST_LAYER_PARTS[part]}: {reason}" for part, reason in problems.items()]
    return "; ".join([", ".join(skipped), *others])


def _replace_whole_layers(state: SparsityState) -> None:
    """Replaces the forward of layers that can run as whole layers, dense ones included, where Triton's kernels run."""
    # Not for dense training without graphs: it is the baseline, and Unsloth compiles layers that nothing is attached to
    # (padded batches, torch 2.11), which launches less: 246 ms at 2,048 tokens, uncaptured whole layers 280 with rows
    # left out, captured ones 183 (benchmarks/results/unsloth-2026.10.9/speed.csv).
    parameter = next(state.model.parameters())
    if not (state.runtimes or state.dense_whole) or not (state.config.cuda_graphs or use_kernels(parameter)):
        return
    state.whole_forwards = [
        state.runtime(layer) or LayerRuntime(state, layer, sparsity)
        for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True)
    ]
    whole_layer.install(state.whole_forwards)
    state.whole_layers = {
        runtime.layer.index: runtime
        for runtime in state.whole_forwards
        if runtime.layer.index not in state.runtimes and not runtime.not_whole
    }


def _keep_uncompiled(state: SparsityState) -> None:
    """Excludes hooked layers from Unsloth's compiled regions."""
    for layer in filter(state.runtime, state.layers):
        state.uncompiled[layer.index] = Uncompiled(layer.module)
        state.handles.append(state.uncompiled[layer.index])


def _keep_proved_layers(state: SparsityState) -> None:
    """Restores the own forward of layers whose whole-layer forward failed in the probe; sparse parts stay hooked."""
    for runtime in state.whole_forwards:
        if not runtime.not_whole:
            continue
        whole_layer.uninstall(runtime)
        if state.whole_layers.pop(runtime.layer.index, None) is not None and runtime is not state.last_layer:
            state.uncompiled[runtime.layer.index].remove()


def _obtain_estimator(state: SparsityState, samples: list[Mapping[str, Any]] | None) -> None:
    """Loads or builds the estimator, unless it waits for the trainer's first samples.

    Raises:
        EstimatorError: see `obtain_estimator`.
    """
    config = state.config
    if state.row_sparse or not state.runtimes:
        return
    if config.criterion != "estimator":
        state.use(None)
    elif is_main():  # rank 0 builds it for all, see `SparsityState.begin_training`
        layers = [layer for layer in state.layers if isinstance(layer, DecoderLayer)]  # all: channels take no others
        model = state.model, layers, state.layer_sparsity, config.estimator
        chosen: dict[str, Any] = {"dense_tokens": config.dense_tokens, "seed": config.seed}
        estimator = obtain_estimator(*model, samples=samples, wait=True, **chosen)
        if estimator is not None:
            state.use(estimator)


def _warn_if_slow(report: AttachReport) -> None:
    """Warns where layers run slower than configured; the last layer alone does not count."""
    slow = report.whole_layers < len(report.layers) - 1 and report.not_whole
    if slow or (report.captured_layers and report.captured_layers < len(report.layers) - 1):
        logger.warning("Training is exact, and slower than it could be:\n%s", "\n".join(report.speed_lines()))


def _save_config_with_adapter(model: nn.Module) -> None:
    """Makes ``save_pretrained`` write configuration and estimator beside the adapter, a plain PEFT adapter."""
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
        assert state is not None
        _save_config(state, Path(save_directory))
        save_estimator_with_adapter(state, Path(save_directory))
        if unsaved := left_unsaved(self, Path(save_directory)):
            state.warn_once(
                f"{len(unsaved)} trained tensors are not part of the adapter, and were not saved with it: "
                f"{', '.join(unsaved[:3])}{', ...' if len(unsaved) > 3 else ''}. Name their modules in "
                "modules_to_save, or save them yourself."
            )
    return saved


def _save_config(state: SparsityState, folder: Path) -> None:
    """Writes the configuration that was asked for; under `auto` also the one that was decided."""
    asked = state.config if state.auto is None else state.auto.asked
    asked.save(folder / CONFIG_NAME)
    if state.auto is not None and state.auto.was_decided:
        state.config.save(folder / PLAN_NAME)


def _keep_four_bit_weights_unpacked(state: SparsityState, on: bool) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPU inference in evaluation: they could not train then."""
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
    """Makes unloading the adapters detach the model, and lets the state be found from each decoder layer.

    Unloading returns the base model, whose decoder layers are the attached ones.
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
    """Undoes `_watch`, also after a part of it."""
    for layer in state.layers:
        layer.module.__dict__.pop("_sparsity_state", None)
    for tuner in _tuners(state.model):
        for name, original in tuner.__dict__.pop("_sparse_unloading", {}).items():
            del tuner.__dict__[name]
            if original is not None:
                tuner.__dict__[name] = original
        tuner.__dict__.pop("_sparsity_state", None)


def _set_up_process(state: SparsityState) -> None:
    """Prepares the process for attached models: trainers drive them, and PEFT may not wrap them.

    Also excludes this package's functions from ``torch.compile``, since they branch on data.
    """
    global _is_set_up
    if not _is_set_up:
        register_module_module_registration_hook(_refuse_wrapping)
        import torch._dynamo

        torch._dynamo.trace_rules.add(__name__.partition(".")[0])
        _is_set_up = True
    if state.hooked or state.auto is not None or state.config.merge_micro_batches or state.config.memory_budget:
        from sparse_unsloth.callback import register_with_trainers

        register_with_trainers()


def _attached_model(model: nn.Module) -> nn.Module | None:
    """The attached model that shares layers with ``model``, or None; one whose adapters were unloaded is detached."""
    for module in model.modules():
        state: SparsityState | None = module.__dict__.get("_sparsity_state")
        if state is not None and not _is_unloaded(state):
            return state.model
        if state is not None:
            detach(state.model)
    return None


def _tuners(model: nn.Module) -> list[nn.Module]:
    """The modules of PEFT inside ``model`` that can unload their adapters."""
    return [module for module in model.modules() if all(hasattr(type(module), name) for name in UNLOADING)]


def _is_unloaded(state: SparsityState) -> bool:
    """Whether an attached projection was replaced by its base layer."""
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
"""The methods by which PEFT's tuners unload their adapters, and their replacements while the model is attached."""


def _unload_and_detach(tuner: nn.Module, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Calls PEFT's method ``name``, then detaches the model; an error of PEFT leaves it attached."""
    original = tuner.__dict__["_sparse_unloading"][name]
    base = getattr(type(tuner), name)(tuner, *args, **kwargs) if original is None else original(*args, **kwargs)
    state = tuner.__dict__.get("_sparsity_state")
    if state is not None:
        detach(state.model)
        state.model.__dict__["_sparsity_unloaded"] = True
    return base


_is_set_up = False


def _refuse_wrapping(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Raises AttachError when PEFT begins to build another model around an attached one; called for each new child.

    Trainers and ``save_pretrained`` of the outer model would not find the state of the attached one.
    """
    if parent._modules or child is None or not type(parent).__module__.startswith("peft."):
        return
    classes = {cls.__name__ for cls in type(parent).__mro__}
    if classes & {"BaseTuner", "PeftModel", "PeftMixedModel"} and _attached_model(child) is not None:
        raise AttachError(
            f"PEFT would build another {type(parent).__name__} around layers that are attached. Add adapters first and "
            "attach last: call detach(model), then add them, then attach the model that PEFT returns. One more adapter "
            "beside those that are there: model.add_adapter(name, config)."
        )
