"""Proves on a few random rows that an MLP or a projection computes what the sparse functions compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer.probe import HALF_TOLERANCE, difference
from sparse_unsloth.model.adapters import refuse_foreign_leaves
from sparse_unsloth.model.decoder_layer import MLP_PROJECTIONS, DecoderLayer
from sparse_unsloth.model.training_flags import training_mode
from sparse_unsloth.ops.linear import SelectedProjection, sparse_linear
from sparse_unsloth.ops.mlp import GatedMlp, sparse_mlp
from sparse_unsloth.ops.projection import (
    BaseWeight,
    Projection,
    check_adapters,
    check_frozen,
    read_base,
    read_projection,
)
from sparse_unsloth.tokens.partition import TokenPartition

PROBE_TOKENS = 8


def probe_rows(base: BaseWeight) -> Tensor:
    """Random inputs of a projection, ``[1, PROBE_TOKENS, in_features]``."""
    dtype = base.weight.dtype if base.quant_state is None else base.quant_state.dtype
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, PROBE_TOKENS, base.shape[1], generator=generator).to(base.device, dtype)


def allowed(dtype: torch.dtype) -> float:
    """The largest relative `difference` that rounding explains."""
    return 1e-3 if dtype == torch.float32 else HALF_TOLERANCE


def check(layer: DecoderLayer, part: str) -> None:
    """Raises for projections that the sparse functions cannot compute.

    Raises:
        AttachError: an unsupported layer type or LoRA variant, or a trained base weight.
    """
    if part == "self_attn" and not layer.queries_alone:
        raise AttachError(
            f"{layer.name}.self_attn.q_proj: it gives more than the queries that o_proj's input is made of (a gate "
            "beside them, as in Qwen3.5), so its channels cannot be paired with those of k_proj and o_proj. Leave "
            "self_attn out of the configuration; mlp channels and rows (backward_rows) work."
        )
    for name, module in layer.projections().items():
        if not name.startswith(part):
            continue
        where = f"{layer.name}.{name}"
        check_adapters(module, where)
        check_frozen(read_base(module, where), where)


def probe_mlp(layer: DecoderLayer) -> None:
    """Proves that `sparse_mlp` with every channel kept equals the layer's own MLP.

    Raises:
        AttachError: it does not (an extra norm, scale or dropout in the MLP, say), or the MLP depends on other trained
            tensors.
    """
    projections = [read_projection(getattr(layer.mlp, name), f"{layer.name}.mlp.{name}") for name in MLP_PROJECTIONS]
    if None in projections:
        raise _not_live(f"{layer.name}.mlp")
    channels = torch.arange(layer.intermediate_size, device=projections[0].base.device)
    mlp = GatedMlp(*projections, layer.activation)
    _compare(layer.mlp, projections, lambda x, partition: sparse_mlp(x, partition, channels, mlp), layer.name)


def probe_projection(where: str, module: nn.Module) -> None:
    """Proves that `sparse_linear` with every channel kept equals the projection's own forward.

    Raises:
        AttachError: it does not.
    """
    projection = read_projection(module, where)
    if projection is None:
        raise _not_live(where)
    channels = torch.arange(projection.base.shape[0], device=projection.base.device)
    part = SelectedProjection(projection, out_index=channels)
    _compare(module, [projection], lambda x, partition: sparse_linear(x, partition, [part])[0], where)


def _compare(
    module: nn.Module, projections: list[Projection], sparse: Callable[[Tensor, TokenPartition], Tensor], where: str
) -> None:
    x = probe_rows(projections[0].base)
    rows = torch.arange(PROBE_TOKENS, device=x.device)
    half = PROBE_TOKENS // 2
    partition = TokenPartition((1, PROBE_TOKENS), rows[:half], rows[half:], rows[:0], rows[:half])
    # In training mode: in evaluation bitsandbytes may repack 4-bit weights on a CPU for good.
    with training_mode(module):
        with torch.enable_grad():
            expected = module(x)
        loras = [projection.lora for projection in projections if projection.lora]
        refuse_foreign_leaves(where, expected, (factor for lora in loras for factor in (lora.A, lora.B)))
        with torch.no_grad():
            error, tolerance = difference(sparse(x, partition), expected.detach()), allowed(x.dtype)
    if not error <= tolerance:
        raise AttachError(
            f"{where}: with every channel kept the sparse function differs from the module's own forward by "
            f"{error:.2g} (allowed {tolerance}). {type(module).__name__} computes something else than the projections "
            "and activation found in it, so it has no sparse path. Leave this layer dense."
        )


def _not_live(where: str) -> AttachError:
    return AttachError(
        f"{where}: its adapter is merged or disabled, or several are active. Attach with one active, unmerged adapter."
    )
