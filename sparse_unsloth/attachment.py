"""Installs the sparse paths on a model, proves that they run, reports them, and takes them off again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_unsloth import lifetime, prefill
from sparse_unsloth.backends.replaced import BoundMethod
from sparse_unsloth.config import CONFIG_NAME, SparsityConfig
from sparse_unsloth.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.errors import AttachError
from sparse_unsloth.functions import packed_attention
from sparse_unsloth.functions.graphs import Graphs
from sparse_unsloth.functions.implementation import use_kernels
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import DecoderLayer, find_layers
from sparse_unsloth.loss import install_loss_removal
from sparse_unsloth.modes import training_flags
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.preparation import prepare
from sparse_unsloth.runtime import SparsityState
from sparse_unsloth.selection import AttentionSelection, MlpSelection, keep_count
from sparse_unsloth.weights import forget_bases

logger = logging.getLogger("sparse_unsloth")

LAST_LAYER_PARTS = {"self_attn": "the last layer's queries and O projection", "mlp": "the last layer's MLP"}


@dataclass(frozen=True)
class LayerReport:
    """What was hooked in one decoder layer: sparsities (0 is dense) and how many channels context rows keep.

    ``output_*`` says the same of output tokens.
    """

    name: str
    mlp: float
    self_attn: float
    mlp_channels: tuple[int, int]
    key_channels: tuple[int, int]
    output_mlp: float = 0.0
    output_self_attn: float = 0.0
    output_mlp_channels: int | None = None
    output_key_channels: int | None = None


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer.

    Attributes:
        exact_removal: what leaves out rows without loss, "" for nothing.
        backward_rows: see `SparsityConfig.backward_rows`; ``row_layers``: in how many layers.
    """

    backend: str
    layers: tuple[LayerReport, ...]
    exact_removal: str = ""
    backward_rows: float = 1.0
    row_layers: int = 0

    @property
    def num_sparse(self) -> int:
        return self.row_layers or sum(bool(layer.mlp or layer.self_attn) for layer in self.layers)

    def __str__(self) -> str:
        lines = [
            f"sparse_unsloth: {self.num_sparse} of {len(self.layers)} layers sparse on context tokens ({self.backend})"
        ]
        if self.row_layers:
            lines.append(f"  exact forward; backward through {self.backward_rows:.3g} of the context tokens in each")
        for first, last, layer in () if self.row_layers else self._runs():
            span = f"layer {first}" if first == last else f"layers {first}-{last}"
            mlp = _kept(layer.mlp, layer.mlp_channels, layer.output_mlp, layer.output_mlp_channels)
            attention = _kept(layer.self_attn, layer.key_channels, layer.output_self_attn, layer.output_key_channels)
            lines.append(f"  {span}: MLP {mlp}; attention {attention}")
        if self.exact_removal:
            lines.append(f"  rows without loss: left out of {self.exact_removal}")
        return "\n".join(lines)

    def _runs(self) -> list[tuple[int, int, LayerReport]]:
        """Neighbouring layers that were treated alike."""
        runs: list[tuple[int, int, LayerReport]] = []
        for index, layer in enumerate(self.layers):
            if runs and replace(layer, name="") == replace(runs[-1][2], name=""):
                runs[-1] = (runs[-1][0], index, layer)
            else:
                runs.append((index, index, layer))
        return runs


def _kept(sparsity: float, channels: tuple[int, int], output: float, output_channels: int | None) -> str:
    if not sparsity:
        return "dense"
    return f"{channels[0]} of {channels[1]} channels" + (f" (output tokens {output_channels})" if output else "")


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
        _keep_four_bit_weights_unpacked(state, on=True)
        for runtime in state.runtimes.values():
            state.backend.install(runtime)
        removed = _remove_rows_without_loss(state)
        _replace_whole_layers(state)
        _prepare_graphs(state)
        _register_hooks(state)
        _probe(state)
        prepare(state, calibration_samples)
    except BaseException:
        detach(model)
        raise
    _save_config_with_adapter(model)
    lifetime.watch(state)
    forget_bases(module for layer in layers for module in layer.projections().values())
    return _report(state, removed)


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
    for layer in state.layers:
        layer.module.__dict__.pop("_sparse_runtime", None)
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
    runtimes = [
        state.runtime(layer) or LayerRuntime(state, layer, sparsity)
        for layer, sparsity in zip(state.layers, state.layer_sparsity, strict=True)
    ]
    state.backend.install_whole_layers(runtimes)
    installed = {id(module) for module in state.hooked}
    state.whole_layers = {
        runtime.layer.index: runtime
        for runtime in runtimes
        if runtime.layer.index not in state.runtimes and id(runtime.layer.module) in installed
    }


def _prepare_graphs(state: SparsityState) -> None:
    """Raises AttachError where `cuda_graphs` is wanted and no layer has the form for it, or there is no GPU."""
    if not state.config.cuda_graphs:
        return
    runtimes = state.whole_layers if state.recorded_dense else state.runtimes
    whole = any(state.backend.can_record(runtime) for runtime in runtimes.values())
    if not whole or not use_kernels(next(state.model.parameters())):
        which = "layer" if state.recorded_dense else "sparse layer"
        raise AttachError(
            f"cuda_graphs: no {which} of this model runs as a whole (Unsloth's Llama, Mistral, Qwen2 and Qwen3 "
            "layers do, with LoRA on all of their projections, and with Triton's kernels). Set cuda_graphs: false."
        )
    if len({next(layer.module.parameters()).device for layer in state.layers}) > 1:
        raise AttachError(
            "cuda_graphs: the layers lie on several devices, and a recording is one device's. Set cuda_graphs: false."
        )
    state.graphs = Graphs()
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
        state.handles.append(layer.module.register_forward_pre_hook(_enter_layer, with_kwargs=True))
        if runtime is not None:
            state.handles.append(layer.module.register_forward_hook(_leave_layer, always_call=True))


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


def _enter_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    runtime: LayerRuntime | None = layer.__dict__.get("_sparse_runtime")
    context = kwargs.pop(CONTEXT_ARGUMENT, None)
    if runtime is not None:
        runtime.context = context
        if context is None and layer.training and not runtime.state.inside:
            lifetime.say_bypassed(runtime.state)
    return args, kwargs


def _leave_layer(layer: nn.Module, args: tuple, output: Any) -> None:
    layer.__dict__["_sparse_runtime"].context = None


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
    for layer, sparsity, output in zip(state.layers, state.layer_sparsity, state.output_sparsity, strict=True):
        keys = layer.num_kv_heads * layer.head_dim
        rows.append(
            LayerReport(
                name=layer.name,
                mlp=sparsity.mlp,
                self_attn=sparsity.self_attn,
                mlp_channels=(keep_count(layer.intermediate_size, sparsity.mlp), layer.intermediate_size),
                key_channels=(keep_count(keys, sparsity.self_attn), keys),
                output_mlp=output.mlp,
                output_self_attn=output.self_attn,
                output_mlp_channels=keep_count(layer.intermediate_size, output.mlp),
                output_key_channels=keep_count(keys, output.self_attn),
            )
        )
    row_layers = len(state.runtimes) if state.by_rows else 0
    return AttachReport(state.backend_name, tuple(rows), exact_removal, state.config.backward_rows, row_layers)


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
