"""Installs the sparse paths on a model, proves that they run, reports them, and takes them off again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth import lifetime, prefill
from sparse_unsloth.backends.replaced import BoundMethod, Uncompiled
from sparse_unsloth.channel_selections import AttentionSelection, MlpSelection
from sparse_unsloth.config import CONFIG_NAME, SparsityConfig
from sparse_unsloth.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions import packed_attention
from sparse_unsloth.functions.graphs import GraphCache
from sparse_unsloth.layer_rules import keep_count
from sparse_unsloth.layer_runtime import LayerRuntime, runs_twice
from sparse_unsloth.layers import DecoderLayer, find_layers, left_out_layers
from sparse_unsloth.loss import install_loss_removal
from sparse_unsloth.modes import in_backward, training_flags
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.preparation import prepare
from sparse_unsloth.runtime import SparsityState
from sparse_unsloth.saved_adapters import left_unsaved
from sparse_unsloth.weights import forget_bases

logger = logging.getLogger("sparse_unsloth")

LAST_LAYER_PARTS = {"self_attn": "the last layer's queries and O projection", "mlp": "the last layer's MLP"}


@dataclass(frozen=True)
class LayerReport:
    """What was hooked in one decoder layer: sparsities (0 is dense) and how many channels context rows keep."""

    name: str
    mlp: float
    self_attn: float
    mlp_channels: tuple[int, int]
    key_channels: tuple[int, int]


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer.

    Attributes:
        exact_removal: what leaves out rows without loss, "" for nothing.
        backward_rows: see `SparsityConfig.backward_rows`; ``row_layers``: in how many layers.
        whole_layers: layers that the project's functions compute as a whole, proved in a probe forward.
        captured_layers: those of them that CUDA graphs will hold (`SparsityConfig.cuda_graphs`).
        not_whole, not_captured: ``(reason, number of layers)`` of the others that could have been; they train as
            exactly, and slower.
        left_out: decoder layers that no sparse path is for, by name: what each lacks.
    """

    backend: str
    layers: tuple[LayerReport, ...]
    exact_removal: str = ""
    backward_rows: float = 1.0
    row_layers: int = 0
    whole_layers: int = 0
    captured_layers: int = 0
    not_whole: tuple[tuple[str, int], ...] = ()
    not_captured: tuple[tuple[str, int], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_sparse(self) -> int:
        return self.row_layers or sum(bool(layer.mlp or layer.self_attn) for layer in self.layers)

    @property
    def num_layers(self) -> int:
        """Of all decoder layers."""
        return len(self.layers) + len(self.left_out)

    def __str__(self) -> str:
        lines = [
            f"sparse_unsloth: {self.num_sparse} of {self.num_layers} layers sparse on context tokens ({self.backend})"
        ]
        if self.row_layers:
            lines.append(f"  exact forward; backward through {self.backward_rows:.3g} of the context tokens in each")
        for first, last, layer in () if self.row_layers else self._runs():
            span = f"layer {first}" if first == last else f"layers {first}-{last}"
            mlp = _kept(layer.mlp, layer.mlp_channels)
            attention = _kept(layer.self_attn, layer.key_channels)
            lines.append(f"  {span}: MLP {mlp}; attention {attention}")
        lines += [f"  {places}: left out, dense ({reason})" for reason, places in self._reasons().items()]
        if self.exact_removal:
            lines.append(f"  rows without loss: left out of {self.exact_removal}")
        return "\n".join([*lines, *self.speed_lines()])

    def speed_lines(self) -> list[str]:
        """How the layers run: whole, captured in CUDA graphs, or part by part and why."""
        lines = []
        if self.backend == "peft" and self.num_sparse:
            lines.append(
                "  layers run part by part: the PEFT backend hooks parts; backend='unsloth' runs them as a whole"
            )
        if self.whole_layers or self.not_whole:
            lines.append(f"  {self.whole_layers} of {len(self.layers)} layers run as a whole")
        lines += [f"  {count} of {len(self.layers)} part by part: {reason}" for reason, count in self.not_whole]
        if self.captured_layers or self.not_captured:
            lines.append(f"  {self.captured_layers} of {len(self.layers)} layers are captured in CUDA graphs")
        return lines + [f"  {count} not captured: {reason}" for reason, count in self.not_captured]

    def _runs(self) -> list[tuple[int, int, LayerReport]]:
        """Neighbouring layers that were treated alike."""
        runs: list[tuple[int, int, LayerReport]] = []
        for index, layer in enumerate(self.layers):
            place = _place(layer.name, index)
            if runs and runs[-1][1] == place - 1 and replace(layer, name="") == replace(runs[-1][2], name=""):
                runs[-1] = (runs[-1][0], place, layer)
            else:
                runs.append((place, place, layer))
        return runs

    def _reasons(self) -> dict[str, str]:
        """The layers that are left out, "layers 0-2, 4-6", by reason."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for index, (name, reason) in enumerate(self.left_out.items()):
            place, found = _place(name, index), spans.setdefault(reason, [])
            if found and found[-1][1] == place - 1:
                found[-1] = (found[-1][0], place)
            else:
                found.append((place, place))
        texts = {
            reason: [str(first) if first == last else f"{first}-{last}" for first, last in found]
            for reason, found in spans.items()
        }
        return {
            reason: f"layer{'s' if len(found) > 1 or '-' in found[0] else ''} {', '.join(found)}"
            for reason, found in texts.items()
        }


def _place(name: str, default: int) -> int:
    """The layer's number in its list, the last number of its name."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), default)


def _kept(sparsity: float, channels: tuple[int, int]) -> str:
    return f"{channels[0]} of {channels[1]} channels" if sparsity else "dense"


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
    around = lifetime.attached_model(model)
    if around is not None:
        raise AttachError(
            f"The layers of this {type(model).__name__} are attached already, as those of a {type(around).__name__}. "
            "Call detach() on that model first."
        )
    layers = find_layers(model)
    state = SparsityState(model, layers, config, _backend_of(model, layers))
    model.__dict__["_sparsity_state"] = state
    try:
        state.refuse_other_adapters()
        _refuse_shared_modules(state)
        _keep_four_bit_weights_unpacked(state, on=True)
        for runtime in state.runtimes.values():
            state.backend.install(runtime)
        removed = _remove_rows_without_loss(state)
        _replace_whole_layers(state)
        _register_hooks(state)
        _probe(state)
        _keep_proved_layers(state)
        _prepare_graphs(state)
        prepare(state, calibration_samples)
    except BaseException:
        detach(model)
        raise
    _save_config_with_adapter(model)
    lifetime.watch(state)
    forget_bases(module for layer in layers for module in layer.projections().values())
    report = _report(state, removed)
    _warn_if_slow(report)
    return report


def detach(model: nn.Module) -> None:
    """Takes every sparse path off ``model`` again; its own forwards, hooks and methods are those of before.

    Raises:
        AttachError: the model is not attached.
    """
    state = get_state(model)
    if state is None:
        if lifetime.was_unloaded(model):
            return
        raise AttachError("This model is not attached.")
    model = state.model
    if state.planner is not None:
        state.planner.restore()
    if state.graphs is not None:
        state.graphs.clear()
    prefill.switch(state, on=False)
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
    lifetime.unwatch(state)
    model.__dict__.pop("_sparsity_state", None)


def get_state(model: nn.Module) -> SparsityState | None:
    """The state of an attached model, inside DDP and ``torch.compile`` wrappers too; None if it is not attached."""
    while model is not None:
        state = getattr(model, "__dict__", {}).get("_sparsity_state")
        if state is not None:
            return state
        modules = getattr(model, "_modules", {})
        model = modules.get("module") or modules.get("_orig_mod")
    return None


def _refuse_shared_modules(state: SparsityState) -> None:
    """Raises AttachError where two layers have a module in common: its calls would be told apart by nothing."""
    owners: dict[nn.Module, str] = {}
    for runtime in state.runtimes.values():
        layer = runtime.layer
        for name, module in {"mlp": layer.mlp, "self_attn": layer.self_attn, **layer.projections()}.items():
            if module in owners:
                raise runs_twice(f"{owners[module]}, which is {layer.name}.{name} too,")
            owners[module] = f"{layer.name}.{name}"


def _backend_of(model: nn.Module, layers: list[DecoderLayer]) -> str:
    """Unsloth's hook points where its fast path put them, else the projections.

    Raises:
        AttachError: a model that Unsloth runs through its compiled path, which has no hook points.
    """
    if "apply_qkv" in layers[0].self_attn.__dict__:
        return "unsloth"
    if model.__dict__.get("_sparse_backend") == "unsloth":
        raise AttachError(
            f"Unsloth runs {type(layers[0].module).__name__} through its general compiled path, which has no hook "
            "points (as for Granite, Cohere, mixtures of experts and 8-bit bases). Load it with backend='peft'."
        )
    return "peft"


def _remove_rows_without_loss(state: SparsityState) -> str:
    """Hooks the exact removal (design section 5) where the configuration wants it and the backend has it.

    Returns:
        What leaves such rows out, for the report.
    """
    if state.backend_name != "unsloth" or not state.config.exact_removal:
        return ""
    last = state.layers[-1]
    state.handles.append(install_loss_removal(state.model, last.module))
    stack = state.model.get_submodule(last.name.rpartition(".")[0])
    if not isinstance(stack, nn.ModuleList) or stack[-1] is not last.module:
        return "logits and loss; not the last layer, which is of another kind than the others"
    runtime = state.runtimes.get(last.index) or LayerRuntime(state, last, state.layer_sparsity[-1])
    reasons = state.backend.install_on_last_layer(runtime)
    state.last_layer = runtime if runtime.parts else None
    done = ["logits and loss", *(LAST_LAYER_PARTS[part] for part in runtime.parts)]
    return "; ".join(
        [", ".join(done), *(f"not {LAST_LAYER_PARTS[part]}: {reason}" for part, reason in reasons.items())]
    )


def _replace_whole_layers(state: SparsityState) -> None:
    """Lets the layers of a sparse model run as a whole where that is faster, dense ones among them too."""
    if state.backend_name != "unsloth" or not (state.runtimes or state.recorded_dense):
        return
    state.whole_forwards = [
        state.runtime(layer) or LayerRuntime(state, layer, sparsity)
        for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True)
    ]
    state.backend.install_whole_layers(state.whole_forwards)
    state.whole_layers = {
        runtime.layer.index: runtime
        for runtime in state.whole_forwards
        if runtime.layer.index not in state.runtimes and not runtime.not_whole
    }


def _keep_proved_layers(state: SparsityState) -> None:
    """Gives layers whose whole forward failed in the probe their own back; what is sparse in them stays hooked."""
    for runtime in state.whole_forwards:
        if not runtime.not_whole:
            continue
        state.backend.uninstall_whole_layer(runtime)
        if state.whole_layers.pop(runtime.layer.index, None) is not None and runtime is not state.last_layer:
            state.uncompiled[runtime.layer.index].remove()


def _prepare_graphs(state: SparsityState) -> None:
    """Raises AttachError where `cuda_graphs` is wanted and no layer has the form for it, or there is no GPU."""
    if not state.config.cuda_graphs:
        return
    layers = [*state.whole_forwards] or [*state.runtimes.values()]
    if not layers:  # dense: the backend has no whole layers, and none has a hook
        raise AttachError(
            f"cuda_graphs: no layer of this model can be captured: {state.backend.NO_GRAPHS}. Set cuda_graphs: false."
        )
    for runtime in layers:
        runtime.not_captured = state.backend.why_not_captured(runtime)
    if all(runtime.not_captured for runtime in layers):
        reasons = "; ".join(f"{reason} ({count} layers)" for reason, count in _reasons(layers, "not_captured"))
        raise AttachError(f"cuda_graphs: no layer of this model can be captured: {reasons}. Set cuda_graphs: false.")
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
    reason = packed_attention.why_not_recorded(*heads, like, state.graphs.recorder)
    state.graphs.clear()
    if reason:
        state.graphs.documents = False
        logger.warning(
            "cuda_graphs: attention within packed documents cannot be recorded (%s). In packed and padding-free "
            "batches it runs as it is, between recordings of what is before and behind it.",
            reason,
        )


def _register_hooks(state: SparsityState) -> None:
    state.handles.append(state.model.register_forward_pre_hook(_enter_model, with_kwargs=True))
    if state.hooked:
        state.handles.append(state.model.register_forward_hook(_leave_model, with_kwargs=True))
    for layer in state.layers:
        runtime = state.runtime(layer)
        layer.module.__dict__["_sparse_runtime"] = runtime
        if runtime is not None:
            state.uncompiled[layer.index] = Uncompiled(layer.module)
            state.handles.append(state.uncompiled[layer.index])
    last = state.loss_rows.last
    if last is not None and state.runtimes:
        state.handles.append(last.register_forward_hook(_leave_last_layer))
    for place, (name, module) in enumerate(state.stack.items()):
        enter = partial(_enter_layer, place, name, module is last)
        state.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if module.__dict__.get("_sparse_runtime") is not None:
            state.handles.append(module.register_forward_hook(_leave_layer, always_call=True))


def _enter_model(model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    if CONTEXT_ARGUMENT in kwargs:
        return None
    state = model.__dict__["_sparsity_state"]
    state.inside = True
    if state.graphs is not None and not args:
        kwargs = state.few_sizes(model, kwargs)
    context = state.open_forward(model, args, kwargs)
    return None if context is None else (args, {**kwargs, CONTEXT_ARGUMENT: context})


def _leave_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    state = model.__dict__["_sparsity_state"]
    state.inside = False
    state.close_forward(kwargs.get(CONTEXT_ARGUMENT))
    loss = None if model.training or kwargs.get("labels") is None else getattr(output, "loss", None)
    if loss is not None and loss.requires_grad:
        loss.register_hook(partial(_say_evaluated, state))


def _say_evaluated(state: SparsityState, gradient: Any) -> None:
    state.say_once(
        "A backward pass came from a forward in evaluation mode, where everything is dense. Call model.train() before "
        "training."
    )


def _enter_layer(place: int, name: str, last: bool, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Takes the context of the forward that comes through; ``place`` and ``name``: in the model's stack.

    Raises:
        AttachError: the layer ran in this forward already, or recomputes what another one left out.
    """
    runtime: LayerRuntime | None = layer.__dict__.get("_sparse_runtime")
    context: SparseContext | None = kwargs.pop(CONTEXT_ARGUMENT, None)
    if context is not None:
        if in_backward():
            _check_recompute(context, place, name, runtime)
        elif name in context.entered and runtime is not None:
            raise runs_twice(name)
        context.entered.add(name)
        if last and context.loss_rows is not None:
            layer.__dict__["_sparse_context"] = context
    if runtime is not None:
        runtime.context = context
        if context is None and layer.training and not runtime.state.inside:
            lifetime.say_bypassed(runtime.state)
    return args, kwargs


def _check_recompute(context: SparseContext, place: int, name: str, runtime: LayerRuntime | None) -> None:
    """Raises AttachError where a recompute goes on behind a layer whose MLP left its output out (`exact_removal`)."""
    if name not in context.entered or not torch.is_grad_enabled():
        return
    before, this = context.recomputed, torch._C._current_graph_task_id()
    if before is not None and before[0] == this and before[1] == place - 1 and before[2]:
        raise AttachError(
            f"{name} and the layer before it are checkpointed together, so that its recompute reads an output that is "
            "left out there. Checkpoint every decoder layer by itself (gradient_checkpointing_enable()), or set "
            "exact_removal: false."
        )
    context.recomputed = this, place, runtime is not None and runtime.leaves_output_out(context)


def _leave_layer(layer: nn.Module, args: tuple, output: Any) -> None:
    runtime: LayerRuntime = layer.__dict__["_sparse_runtime"]
    if runtime.context is not None and runtime.context.first_backward is not None:
        runtime.context.first_backward.watch(runtime.layer.index, output)
    runtime.context = None


def _leave_last_layer(layer: nn.Module, args: tuple, output: Any) -> None:
    context: SparseContext | None = layer.__dict__.pop("_sparse_context", None)
    if context is not None:
        context.loss_rows.watch(context, output)


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


def _report(state: SparsityState, exact_removal: str) -> AttachReport:
    rows = []
    for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True):
        keys = layer.num_kv_heads * layer.head_dim
        rows.append(
            LayerReport(
                name=layer.name,
                mlp=sparsity.mlp,
                self_attn=sparsity.self_attn,
                mlp_channels=(keep_count(layer.intermediate_size, sparsity.mlp), layer.intermediate_size),
                key_channels=(keep_count(keys, sparsity.self_attn), keys),
            )
        )
    forwards = state.whole_forwards
    captured = [runtime for runtime in forwards if not runtime.not_captured] if state.graphs is not None else []
    return AttachReport(
        state.backend_name,
        tuple(rows),
        exact_removal,
        state.config.backward_rows,
        row_layers=len(state.runtimes) if state.by_rows else 0,
        left_out=left_out_layers(state.stack, state.layers),
        whole_layers=sum(not runtime.not_whole for runtime in forwards),
        captured_layers=len(captured),
        not_whole=_reasons(forwards, "not_whole"),
        not_captured=_reasons(forwards, "not_captured"),
    )


def _reasons(runtimes: Iterable[LayerRuntime], name: str) -> tuple[tuple[str, int], ...]:
    """``(reason, number of layers)``, the commonest first."""
    return tuple(Counter(reason for runtime in runtimes if (reason := getattr(runtime, name))).most_common())


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
        prefill.save_estimator_with_adapter(state, Path(save_directory))
        if unsaved := left_unsaved(self, Path(save_directory)):
            state.say_once(
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
