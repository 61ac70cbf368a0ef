"""What attaching regards where modules are compiled, as by Unsloth (docs/how-it-works.md, section 7.5)."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_unsloth.layer.attention import CAPTURABLE

FLEX = "flex_attention"


def stance(layer: nn.Module) -> str:
    """How torch.compile runs while a model with such a layer is attached: not, so that small probes compile nothing.

    Flex attention cannot run eagerly.
    """
    return "default" if _implementation(layer) == FLEX else "force_eager"


def probe_arguments(layer: nn.Module) -> dict[str, Any]:
    """Arguments of the probe forward: the kernel that flex attention takes for few queries has no right backward."""
    return {"kernel_options": {"FORCE_USE_FLEX_ATTENTION": True}} if _implementation(layer) == FLEX else {}


def why_not_captured(layer: nn.Module) -> str:
    """Why CUDA graphs cannot hold the layer's attention; "" where they can."""
    name = _implementation(layer)
    if name in CAPTURABLE:
        return ""
    return f"its attention is {name}, which launches other kernels each time; load it with attn_implementation='sdpa'"


def _implementation(layer: nn.Module) -> str | None:
    """transformers' name of the layer's attention."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((name for config in configs if (name := getattr(config, "_attn_implementation", None))), None)
