"""Trains with LLaMA-Factory: its own training function, with a callback that attaches the model to train.

LLaMA-Factory has no plugins and refuses unknown keys, so this module takes the place of ``llamafactory-cli train``:

    python -m sparse_unsloth.integrations.llamafactory train.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import TrainerCallback

from sparse_unsloth.callback import register_with_trainers
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import ConfigError, SparsityError
from sparse_unsloth.integrations.attaching import KEY, attach_adapters


class AttachCallback(TrainerCallback):
    """Attaches the model of a trainer when the trainer has been built, for front ends that take callbacks alone.

    `register_with_trainers` must have been called before: the trainer then has the `SparsityCallback` that drives it.

    Args:
        sparsity: see `attach`.

    Raises:
        ConfigError: ``sparsity`` is wrong.
    """

    def __init__(self, sparsity: Any = "auto"):
        self.sparsity = SparsityConfig.from_any(sparsity)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        attach_adapters(model, self.sparsity, "Set finetuning_type: lora in LLaMA-Factory's configuration.")


def train(arguments: Mapping[str, Any]) -> None:
    """Trains as ``llamafactory-cli train`` does, sparsely.

    Args:
        arguments: LLaMA-Factory's, and ``sparse_unsloth``: what ``sparsity`` of a recipe takes, "auto" by default.

    Raises:
        AttachError, ConfigError, EstimatorError: see `attach`.
        ImportError: LLaMA-Factory is not installed.
    """
    from llamafactory.train.tuner import run_exp

    own = dict(arguments)
    callback = AttachCallback(own.pop(KEY, "auto"))
    register_with_trainers()
    run_exp(own, callbacks=[callback])


def main() -> None:
    """Trains the configuration that the command line names, as LLaMA-Factory reads it.

    Raises:
        ConfigError: it names no YAML or JSON file.
    """
    from llamafactory.hparams import read_args

    arguments = read_args()
    if not isinstance(arguments, dict):
        raise ConfigError("give LLaMA-Factory's configuration as a file: train.yaml [key=value ...]")
    train(arguments)


if __name__ == "__main__":
    try:
        main()
    except SparsityError as error:
        sys.exit(f"{KEY}: {error}")
