"""Runs the command ``sparse-unsloth estimate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser, parse, recipe_source
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.utils.options import whole

DESCRIPTION = """\
Predicts the gain of sparsity before any training: the context share of the data under this template and loss setting,
tokens, FLOPs and time of a step, dense and sparse, peak memory, and advice. It reads the model's configuration and
tokenizer, never its weights, and needs no GPU.

RECIPE is a YAML file or the name of a shipped one. MODEL and DATASET are what a recipe has as model_name_or_path and
dataset_name: hub names, folders, files. Any key of a recipe can be set by --key value."""

EPILOG = """\
examples:
  sparse-unsloth estimate my.yaml
  sparse-unsloth estimate my.yaml --sparsity o2 --packing --json
  sparse-unsloth estimate Qwen/Qwen3-8B my.jsonl --preset o2 --load_in_4bit --per_device_train_batch_size 4 \\
      --max_length 2048 --assistant_only_loss"""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the options that are not keys of a recipe; it does not parse the names before them."""
    from sparse_unsloth.forecast.estimate import SAMPLES

    parser = command_parser("estimate", DESCRIPTION, EPILOG, usage="RECIPE|MODEL DATASET [options] [--key value ...]")
    parser.add_argument("--preset", help="rows, o1, o2, dense, or a sparsity file (MODEL DATASET: rows by default)")
    parser.add_argument(
        "--samples", type=whole(0), default=SAMPLES, help="to look at, 0 for all (default: %(default)s)"
    )
    parser.add_argument("--device", help="a measured GPU, such as h100 (default: the newest measurements)")
    parser.add_argument("--speed-table", help="rows of your own `sparse-unsloth bench`, in place of the package's")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")
    return parser


def main(words: Sequence[str]) -> int:
    """Prints the estimate of a command line.

    Raises:
        SparsityError: see `estimate`; `ConfigError` for invalid arguments.
    """
    parser = build_parser()
    parsed = parse(parser, words, ConfigError)
    if parsed is None:
        return 0
    names, arguments, overrides = parsed
    from sparse_unsloth.forecast.estimate import estimate
    from sparse_unsloth.forecast.report import as_dict, report

    recipe = _recipe(names, overrides, arguments.preset)
    result = estimate(recipe, arguments.samples or None, arguments.device, arguments.speed_table)
    print(json.dumps(as_dict(result), indent=2) if arguments.json else report(result))
    return 0


def _recipe(names: list[str], overrides: list[str], preset: str | None):
    """Loads the recipe; for a model and a data set the preset is rows unless another one is given."""
    if preset is not None:
        overrides = [*overrides, "--sparsity", preset]
    with recipe_source(names, sparsity="rows") as source:
        return _on_any_machine(source, overrides)


def _on_any_machine(source: str, overrides: list[str]):
    """Loads a recipe for another machine: TRL would refuse its 16-bit keys where there is no GPU."""
    import torch

    from sparse_unsloth.training.recipe import load_recipe, raw_values

    if raw_values(source, overrides).get("use_cpu") is True or torch.cuda.is_available():
        return load_recipe(source, overrides)
    recipe = load_recipe(source, [*overrides, "--use_cpu", "true"])
    recipe.training.use_cpu = False
    return recipe
