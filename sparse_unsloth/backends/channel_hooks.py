"""Hooks an MLP for channel sparsity, in both backends (docs/how-it-works.md, section 4.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_unsloth.backends.patching import original_forward, replace_forward
from sparse_unsloth.backends.probes import check, probe_mlp
from sparse_unsloth.model.decoder_layer import MLP_PROJECTIONS
from sparse_unsloth.ops.linear import SelectedProjection
from sparse_unsloth.ops.mlp import GatedMlp, sparse_mlp
from sparse_unsloth.ops.projection import Projection, read_projection
from sparse_unsloth.ops.selection import AttentionSelection
from sparse_unsloth.runtime.state import LayerRuntime


def install_mlp(runtime: LayerRuntime) -> None:
    """Hooks the MLP.

    Raises:
        AttachError: see `check` and `probe_mlp`.
    """
    check(runtime.layer, "mlp")
    probe_mlp(runtime.layer)
    replace_forward(runtime.layer.mlp, mlp_forward, runtime)


def mlp_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The channel-sparse MLP; the module's own forward where it is dense."""
    runtime: LayerRuntime = self._sparse_runtime
    partition = runtime.partition("mlp", self, hidden_states)
    projections = None if partition is None else [read_projection(getattr(self, name)) for name in MLP_PROJECTIONS]
    if projections is None or None in projections:
        return original_forward(self, hidden_states, *args, **kwargs)
    channels = runtime.mlp_channels(hidden_states, partition)
    runtime.record_run("mlp")
    return sparse_mlp(
        hidden_states,
        partition,
        channels,
        GatedMlp(*projections, runtime.layer.activation),
        runtime.context.memo(runtime.layer.index),
        skip_unused_output=runtime.state.config.exact_removal and runtime.layer.adds_mlp_output,
    )


def select(projection: Projection, name: str, chosen: AttentionSelection | None) -> SelectedProjection:
    """The projection ``name`` ("q", "k", "v", "o") with the channels that context tokens keep; None: all of them."""
    channels = None if chosen is None else getattr(chosen, name)
    if name == "o":
        return SelectedProjection(projection, in_index=channels)
    return SelectedProjection(projection, out_index=channels)
