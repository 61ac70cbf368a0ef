"""Hooks plain transformers models with PEFT adapters: the MLP's forward, and that of each attention projection.

Instances are changed, classes never. The replaced forward stays on the module. It runs whenever the masked forward does
not apply: without a context (evaluation, generation, dense steps), or with merged, disabled or several active adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sparse_unsloth.backends import channel_hooks, row_hooks
from sparse_unsloth.backends.channel_hooks import select
from sparse_unsloth.backends.patching import original_forward, replace_forward, restore_forward, runs
from sparse_unsloth.backends.probes import check, probe_projection
from sparse_unsloth.backends.whole_layer import layer_forward
from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.attention import AttentionCall, by_interface
from sparse_unsloth.model.decoder_layer import ATTENTION_PROJECTIONS, DecoderLayer
from sparse_unsloth.ops.linear import sparse_linear
from sparse_unsloth.ops.projection import read_projection
from sparse_unsloth.runtime.state import Backend, LayerRuntime
from sparse_unsloth.utils.distributed import is_flattened


def install(runtime: LayerRuntime) -> None:
    """Hooks the sparse parts of a layer, and lists the modules in ``runtime.state.hooked``.

    Raises:
        AttachError: the sparse functions cannot compute a projection, or compute it differently.
    """
    layer = runtime.layer
    if runtime.state.row_sparse:
        row_hooks.install(runtime)
        return
    if runtime.sparsity.mlp > 0:
        channel_hooks.install_mlp(runtime)
    if runtime.sparsity.self_attn > 0:
        check(layer, "self_attn")
        for name in ATTENTION_PROJECTIONS:
            module = getattr(layer.self_attn, name)
            probe_projection(f"{layer.name}.self_attn.{name}", module)
            module.__dict__["_sparse_projection"] = name
            replace_forward(module, _projection_forward, runtime)


def is_installed(module: nn.Module) -> bool:
    """Whether the forward that `install` put on ``module`` is still there."""
    parts = channel_hooks.mlp_forward, _projection_forward, row_hooks.part_forward
    return runs(module, layer_forward, *parts)


def _projection_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    runtime: LayerRuntime = self._sparse_runtime
    name = self._sparse_projection
    partition = runtime.partition("self_attn", self, hidden_states)
    projection = None if partition is None else read_projection(self)
    if projection is None:
        return original_forward(self, hidden_states, *args, **kwargs)
    chosen = runtime.attention_channels(partition, None if name == "o_proj" else hidden_states)
    part = select(projection, name[0], chosen)
    if name == "o_proj":
        runtime.record_run("self_attn")
    (output,) = sparse_linear(hidden_states, partition, [part])
    return output


def check_not_sharded(layer: DecoderLayer) -> None:
    """Raises where weights are sharded when the sparse functions read them: in the MLP and in attention's projections.

    FSDP2 gathers a unit's weights while the unit's own forward and backward run. So the MLP and each attention
    projection must be a unit or lie in one; decoder layers as units satisfy this.

    Raises:
        AttachError: FSDP1, DeepSpeed ZeRO-3, or FSDP2 units inside the MLP or inside a projection.
    """
    for name, module in layer.projections().items():
        inner = list(module.modules())
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            raise AttachError(
                f"{layer.name}.{name}: DeepSpeed ZeRO-3 partitions its weight and gathers it module by module, "
                "out of reach of the sparse functions. Use FSDP2 (fsdp_version: 2), ZeRO-2 or DDP."
            )
        if any(is_flattened(part) for part in inner):
            raise AttachError(
                f"{layer.name}.{name}: FSDP1 flattened its weight. Use FSDP2 (fsdp_version: 2 in accelerate's "
                "configuration), or DDP."
            )
        if any(isinstance(part, FSDPModule) for part in inner[0 if name.startswith("mlp") else 1 :]):
            raise AttachError(
                f"{layer.name}.{name}: FSDP2 gathers its weight by itself, after the sparse functions read it. Wrap "
                "whole decoder layers (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)."
            )


def _read_attention(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> AttentionCall:
    return by_interface(runtime.fast.spec, runtime.layer.self_attn, arguments)


BACKEND = Backend(
    "peft",
    install=install,
    uninstall=restore_forward,
    is_installed=is_installed,
    check_not_sharded=check_not_sharded,
    read_attention=_read_attention,
    keeps_weights=False,
)
