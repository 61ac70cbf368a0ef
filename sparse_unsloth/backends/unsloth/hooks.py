"""Hooks Unsloth's fast path: ``mlp.forward``, ``self_attn.apply_qkv``, ``self_attn.apply_o``, and whole layers.

RoPE, attention dispatch, norms, loss and checkpointing with offload stay Unsloth's. Replaced functions are kept, and
called whenever the masked forward does not apply, so dense layers and dense steps run Unsloth's own code.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.backends import channel_hooks, row_hooks
from sparse_unsloth.backends.channel_hooks import select
from sparse_unsloth.backends.patching import restore_forward, runs, untraced
from sparse_unsloth.backends.probes import check
from sparse_unsloth.backends.unsloth import channels_layer, rows_layer
from sparse_unsloth.backends.unsloth.contract import Contract
from sparse_unsloth.backends.unsloth.layer_plan import SKIPS_UNUSED_ROWS, why_not
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.linear import SelectedProjection, sparse_linear
from sparse_unsloth.ops.projection import read_projection
from sparse_unsloth.runtime.state import Backend, LayerRuntime
from sparse_unsloth.utils.distributed import is_flattened


def install(runtime: LayerRuntime) -> None:
    """Hooks the sparse parts of a layer, and lists the modules in ``runtime.state.hooked``.

    Raises:
        AttachError: Unsloth did not put its function on the layer, or its class no longer calls it; or the sparse
            functions cannot compute a projection.
    """
    contract = Contract()
    if runtime.state.row_sparse:
        check_not_sharded(runtime.layer)
        row_hooks.install_mlp(runtime)
        contract.check_attention(runtime.layer)
        attention = runtime.layer.self_attn
        row_hooks.probe(runtime.layer, "self_attn.o_proj", partial(attention.apply_o, attention))
        _hook_attention(runtime)
        return
    for part in PARTS:
        if getattr(runtime.sparsity, part) > 0:
            _install(contract, runtime, part)


def install_on_last_layer(runtime: LayerRuntime) -> dict[str, str]:
    """Lets the last layer skip unused rows, where it can.

    Args:
        runtime: the last layer's; its sparse parts are hooked already.

    Returns:
        The reason for each part that cannot skip them. Training is then the same, and slower.
    """
    contract, reasons = Contract(), {}
    for part in PARTS:
        if getattr(runtime.sparsity, part) == 0:
            try:
                _install(contract, runtime, part)
            except AttachError as error:
                reasons[part] = str(error)
    runtime.loss_only_parts = tuple(part for part in PARTS if part not in reasons)
    return reasons


def install_whole_layers(runtimes: Iterable[LayerRuntime]) -> None:
    """Replaces the forward of layers that can run as whole layers, after their parts are hooked.

    The probe forward proves them afterwards. ``not_whole`` of each runtime says why a layer cannot.
    """
    contract = Contract()
    for runtime in runtimes:
        row_sparse = runtime.state.row_sparse
        skips_rows = row_sparse and runtime.layer.index not in runtime.state.runtimes
        reason = rows_layer.why_not if row_sparse else why_not
        runtime.not_whole = SKIPS_UNUSED_ROWS if skips_rows else reason(runtime)
        if runtime.not_whole:
            continue
        try:
            if "_sparse_original" not in runtime.layer.self_attn.__dict__:
                _install(contract, runtime, "self_attn")
        except AttachError as error:
            runtime.not_whole = str(error)
        else:
            (rows_layer if row_sparse else channels_layer).replace(runtime)


def uninstall_whole_layer(runtime: LayerRuntime) -> None:
    """Restores a layer's own forward; hooks of its parts stay where the parts are sparse or skip unused rows."""
    module, attention, state = runtime.layer.module, runtime.layer.self_attn, runtime.state
    if not runs(module, channels_layer.layer_forward, rows_layer.layer_forward):
        return
    removed = [module]
    uninstall(module)
    module.__dict__["_sparse_runtime"] = runtime  # the layer's hooks read it
    if not (state.row_sparse or runtime.sparsity.self_attn > 0 or "self_attn" in runtime.loss_only_parts):
        uninstall(attention)
        removed.append(attention)
    state.hooked = [hooked for hooked in state.hooked if not any(hooked is gone for gone in removed)]


def check_not_sharded(layer: DecoderLayer) -> None:
    """Raises AttachError if FSDP shards the layer's weights, which the hooks read outside FSDP's gathering."""
    for name, module in layer.projections().items():
        for part in module.modules():
            weight = getattr(part, "weight", None)
            sharded = isinstance(weight, DTensor) or is_flattened(part)
            if isinstance(weight, Tensor) and sharded:
                raise AttachError(
                    f"{layer.name}.{name}: its weight is sharded by FSDP, and the hooks of the Unsloth backend read "
                    "whole weights. Load the model with backend='peft' for FSDP, or train with DDP (one model a GPU)."
                )


def _install(contract: Contract, runtime: LayerRuntime, part: str) -> None:
    layer = runtime.layer
    check_not_sharded(layer)
    if part == "mlp":
        contract.check_mlp(layer)
        channel_hooks.install_mlp(runtime)
        return
    contract.check_attention(layer)
    check(layer, "self_attn")
    _hook_attention(runtime)


def _hook_attention(runtime: LayerRuntime) -> None:
    attention = runtime.layer.self_attn
    attention.__dict__["_sparse_original"] = attention.apply_qkv, attention.apply_o
    attention.__dict__["_sparse_runtime"] = runtime
    attention.apply_qkv, attention.apply_o = untraced(_apply_qkv), untraced(_apply_o)
    runtime.state.hooked.append(attention)


def uninstall(module: nn.Module) -> None:
    """Restores the functions of ``module`` that `install` replaced."""
    if "apply_qkv" not in module.__dict__:
        restore_forward(module)
        return
    module.apply_qkv, module.apply_o = module.__dict__.pop("_sparse_original")
    module.__dict__.pop("_sparse_runtime")


def is_installed(module: nn.Module) -> bool:
    """Whether the functions that `install` put on ``module`` are still there."""
    if "apply_qkv" not in module.__dict__:
        whole = channels_layer.layer_forward, rows_layer.layer_forward
        return runs(module, *whole, channel_hooks.mlp_forward, row_hooks.mlp_forward)
    ours = module.apply_qkv is untraced(_apply_qkv) and module.apply_o is untraced(_apply_o)
    return ours and "_sparse_runtime" in module.__dict__


def why_not_captured(runtime: LayerRuntime) -> str:
    """Why CUDA graphs cannot hold the layer; "" where they can."""
    if not use_kernels(next(runtime.layer.module.parameters())):
        return "Triton's kernels do not run here"
    return runtime.not_whole or (runtime.not_fusable if runtime.state.row_sparse else "")


def _apply_qkv(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.precomputed_qkv is not None:
        return runtime.precomputed_qkv
    partition = runtime.partition("self_attn", self, hidden_states)
    modules = (self.q_proj, self.k_proj, self.v_proj)
    projections = None if partition is None else [read_projection(module) for module in modules]
    if projections is None or None in projections:
        return self._sparse_original[0](self, hidden_states, *args, **kwargs)
    context = runtime.context
    if not runtime.is_sparse("self_attn"):  # the last layer, which needs keys and values of every row
        query, *others = (SelectedProjection(projection) for projection in projections)
        (q,) = sparse_linear(hidden_states, partition, [query])
        return q, *sparse_linear(hidden_states, context.every_row_dense(), others)
    chosen = runtime.attention_channels(context.partition, hidden_states)
    parts = [select(*each, chosen) for each in zip(projections, "qkv", strict=True)]
    return sparse_linear(hidden_states, context.partition, parts)


def _apply_o(self: nn.Module, attention_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.skip_output_projection:
        return attention_output
    choice = runtime.row_choice(self, attention_output)
    if choice is not None and not (args or kwargs):
        function = partial(self._sparse_original[1], self)
        return row_hooks.run_output_projection(function, attention_output, self.o_proj, choice, runtime)
    partition = runtime.partition("self_attn", self, attention_output)
    projection = None if partition is None else read_projection(self.o_proj)
    if projection is None:
        return self._sparse_original[1](self, attention_output, *args, **kwargs)
    part = select(projection, "o", runtime.attention_channels(partition))
    runtime.record_run("self_attn")
    return sparse_linear(attention_output, partition, [part])[0]


BACKEND = Backend(
    "unsloth",
    install=install,
    uninstall=uninstall,
    is_installed=is_installed,
    check_not_sharded=check_not_sharded,
    why_not_captured=why_not_captured,
    why_not_whole=why_not,
)
