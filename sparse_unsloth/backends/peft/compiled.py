"""What attaching regards where modules are compiled, as by Unsloth (docs/how-it-works.md, section 7.5)."""

from __future__ import annotations

from typing import Any

from sparse_unsloth.layer.attention import CAPTURABLE
from sparse_unsloth.model.decoder_layer import DecoderLayer

FLEX = "flex_attention"


def stance(layer: DecoderLayer) -> str:
    """How torch.compile runs while a model is attached: not at all, so that probes of a few rows compile nothing.

    Flex attention cannot run eagerly.
    """
    return "default" if _implementation(layer) == FLEX else "force_eager"


def probe_arguments(layer: DecoderLayer) -> dict[str, Any]:
    """Arguments of the probe forward: the kernel that flex attention takes for few queries has no right backward."""
    return {"kernel_options": {"FORCE_USE_FLEX_ATTENTION": True}} if _implementation(layer) == FLEX else {}


def why_not_captured(layer: DecoderLayer) -> str:
    """Why CUDA graphs cannot hold the layer's attention; "" where they can."""
    name = _implementation(layer)
    if name in CAPTURABLE:
        return ""
    return f"its attention is {name}, which launches other kernels each time; load it with attn_implementation='sdpa'"


def _implementation(layer: DecoderLayer) -> str | None:
    """transformers' name of the layer's attention."""
    return getattr(getattr(layer.self_attn, "config", None), "_attn_implementation", None)
