"""Runs the command ``sparse-unsloth train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser, load_recipe_to_train

DESCRIPTION = """\
Trains a recipe and writes a run folder: recipe.yaml (resolved, can be run again), adapter/, checkpoints,
metrics.json and environment.json.

RECIPE is a YAML file, or the name of a shipped one (`sparse-unsloth recipes`). Its keys are TRL's (SFTConfig and
ModelConfig, all under their usual names), dataset_* keys, `backend` (auto, unsloth, peft) and a `sparsity` block.
`sparse-unsloth keys` lists them all. Any key can be overridden here; dots reach into blocks.

Unlike TRL's, these defaults suit sparse LoRA training: use_peft true, lora_dropout 0, dtype auto."""

EPILOG = """\
examples:
  sparse-unsloth train quickstart --max_steps 20 --output_dir runs/try
  sparse-unsloth train my.yaml --learning_rate 1e-4 --sparsity o2
  sparse-unsloth train my.yaml --sparsity.mlp '{"1-29": 0.5}' --sparsity.estimator.rank 16
  sparse-unsloth train my.yaml --lora_target_modules q_proj v_proj --packing
  sparse-unsloth train my.yaml --resume_from_checkpoint

Unknown keys and wrong types are errors, all reported together (exit code 2). A finished run that is resumed does not
change. model_name_or_path may be an adapter, a checkpoint or a run's folder: training continues from it."""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser; it leaves ``--key value`` words to `parse_overrides`."""
    parser = command_parser("train", DESCRIPTION, EPILOG, usage="RECIPE [--key value ...]")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    return parser


def main(words: Sequence[str]) -> int:
    """Trains the recipe of a command line.

    Raises:
        SparsityError: see `run`.
    """
    parser = build_parser()
    arguments = parser.parse_args(words)
    if {"-h", "--help"} & set(arguments.overrides):
        parser.print_help()
        return 0
    recipe = load_recipe_to_train(arguments.recipe, arguments.overrides, say=True)

    from sparse_unsloth.training.run import run
    from sparse_unsloth.utils.distributed import is_main

    result = run(recipe)
    if is_main() and result.trained:
        print(f"sparse-unsloth: trained {result.metrics['steps']} steps; adapter and metrics are in {result.folder}")
    return 0
