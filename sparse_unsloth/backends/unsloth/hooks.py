"""Hooks Unsloth's fast path: ``mlp.forward``, ``self_attn.apply_qkv``, ``self_attn.apply_o``, for parts of layers.

Whole layers need none of these. In other layers RoPE, attention dispatch and norms stay Unsloth's. Replaced functions
are kept, and called whenever the masked forward does not apply, so dense steps run Unsloth's own code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.backends import channel_hooks, row_hooks, whole_layer
from sparse_unsloth.backends.channel_hooks import select
from sparse_unsloth.backends.patching import restore_forward, runs, untraced
from sparse_unsloth.backends.probes import check
from sparse_unsloth.backends.unsloth.attention import read_attention
from sparse_unsloth.backends.unsloth.contract import check_part
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.errors import AttachError
from sparse_unsloth.model.decoder_layer import DecoderLayer
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
    if runtime.state.row_sparse:
        check_not_sharded(runtime.layer)
        mlp, output = runtime.layer.row_parts
        row_hooks.install_part(runtime, mlp)
        check_part(runtime.layer, "self_attn")
        attention = runtime.layer.self_attn
        row_hooks.probe(runtime.layer, output, partial(attention.apply_o, attention))
        _hook_attention(runtime)
        return
    for part in PARTS:
        if getattr(runtime.sparsity, part) > 0:
            _install(runtime, part)


def install_on_last_layer(runtime: LayerRuntime) -> dict[str, str]:
    """Lets the last layer skip unused rows, where it can.

    Args:
        runtime: the last layer's; its sparse parts are hooked already.

    Returns:
        The reason for each part that cannot skip them. Training is then the same, and slower.
    """
    reasons = {}
    for part in PARTS:
        if getattr(runtime.sparsity, part) == 0:
            try:
                _install(runtime, part)
            except AttachError as error:
                reasons[part] = str(error)
    runtime.loss_only_parts = tuple(part for part in PARTS if part not in reasons)
    return reasons


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


def _install(runtime: LayerRuntime, part: str) -> None:
    layer = runtime.layer
    check_not_sharded(layer)
    check_part(layer, part)
    if part == "mlp":
        channel_hooks.install_mlp(runtime)
        return
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
        return runs(module, whole_layer.layer_forward, channel_hooks.mlp_forward, row_hooks.part_forward)
    ours = module.apply_qkv is untraced(_apply_qkv) and module.apply_o is untraced(_apply_o)
    return ours and "_sparse_runtime" in module.__dict__


def _apply_qkv(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    runtime: LayerRuntime = self._sparse_runtime
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
    read_attention=read_attention,
    keeps_weights=True,
)
