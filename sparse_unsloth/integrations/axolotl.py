"""Trains with axolotl: a plugin that attaches the model once axolotl has loaded it and added its adapters.

axolotl names it in its ``plugins``. Trainers that are built afterwards have a `SparsityCallback` of their own.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator
from torch import nn

from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.integrations.attaching import KEY, attach_adapters

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""axolotl's own fused LoRA functions, which it turns on where they are not given; they replace what is attached."""


class SparseUnslothArgs(BaseModel):
    """The plugin's part of axolotl's configuration; the block stays as written: "auto" decides what is not given."""

    sparse_unsloth: Any = "auto"

    @field_validator(KEY)
    @classmethod
    def _is_a_configuration(cls, value: Any) -> Any:
        SparsityConfig.from_any(value)
        return value


class SparseUnslothPlugin(BasePlugin):
    """axolotl's plugin; see docs/front-ends.md for the configuration."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Turns off axolotl's own LoRA functions, before it reads its configuration.

        Raises:
            ConfigError: they were asked for.
        """
        given = [name for name in KERNELS if cfg.get(name)]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: axolotl's functions would replace those of {KEY}. Leave them out, or the plugin."
            )
        cfg.update(dict.fromkeys(KERNELS, False))

    def get_input_args(self) -> str:
        """The name of the class that checks the plugin's part of the configuration."""
        return f"{__name__}.{SparseUnslothArgs.__name__}"

    def post_model_load(self, cfg: dict[str, Any], model: nn.Module) -> None:
        """Attaches the model; axolotl calls this for inference and merging too, where it stays as it is.

        Raises:
            AttachError, ConfigError, EstimatorError: see `attach_adapters`.
        """
        attach_adapters(model, _plain(cfg[KEY]), "Set adapter: lora or qlora in axolotl's configuration.")


def _plain(value: Any) -> Any:
    """``value`` with mappings of plain dictionaries: axolotl's return None for what is not there."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value
