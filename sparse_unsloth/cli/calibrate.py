"""Runs the command ``sparse-unsloth calibrate`` on the model and data of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_unsloth.cli.arguments import command_parser, load_recipe_to_train, parse, recipe_source
from sparse_unsloth.errors import CalibrationError
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.faults import SetUp, check_output
from sparse_unsloth.utils.options import real, whole

if TYPE_CHECKING:
    from torch import nn

    from sparse_unsloth.autosparsity.search import Calibration
    from sparse_unsloth.training.recipe import Recipe

BATCH = 8
"""Samples of a micro-batch, which share a channel selection; as in the calibration when training begins."""

DESCRIPTION = """\
Measures on a few dozen samples of your data what sparsity costs in each layer, and chooses the sparsity of each for a
FLOP budget or a bound on the loss. Writes sparsity.yaml (for a recipe's `sparsity:`), the estimator, and a report.

RECIPE is a YAML file or the name of a shipped one; its layer rules are ignored, the rest of its sparsity block is used.
MODEL and DATASET are what a recipe has as model_name_or_path and dataset_name. Any key of a recipe can be set by
--key value. A second start with the same model, data and settings goes on from what was measured."""

EPILOG = """\
examples:
  sparse-unsloth calibrate quickstart --budget 0.5 --output-dir runs/mine
  sparse-unsloth calibrate Qwen/Qwen3-8B my.jsonl --max-loss 0.01 --load_in_4bit true --max_length 2048
  sparse-unsloth train my.yaml --sparsity runs/mine/sparsity.yaml"""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the options that are not keys of a recipe; it does not parse the names before them."""
    from sparse_unsloth.autosparsity.search import ATTENTION_LEVELS, MLP_LEVELS

    parser = command_parser("calibrate", DESCRIPTION, EPILOG, usage="RECIPE|MODEL DATASET [options] [--key value ...]")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--budget",
        type=real(above=0, below=1),
        help="FLOPs of context tokens' frozen-weight matmuls, as a share of the dense ones (default: 0.5)",
    )
    bound.add_argument("--max-loss", type=real(above=0), help="instead: increase of the answer loss allowed, in nats")
    for name, levels in (("mlp", MLP_LEVELS), ("attention", ATTENTION_LEVELS)):
        text = f"sparsities to choose from, none: dense (default: {' '.join(map(str, levels))})"
        parser.add_argument(
            f"--{name}-levels", type=real(least=0, below=1), nargs="*", default=levels, metavar="SHARE", help=text
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, least, defaults, text in (
        ("samples", 1, {"cuda": 32, "cpu": 16}, "to calibrate the estimator on"),
        ("probe-samples", 1, {"cuda": 96, "cpu": 24}, "others, to measure losses on"),
        ("part-samples", 1, {"cuda": 16, "cpu": 8}, "of these, to measure single parts on"),
        ("held-out-samples", 0, {"cuda": 96, "cpu": 24}, "others still, to check the recipe on"),
    ):
        text += f" (default: {defaults['cuda']}, without a GPU {defaults['cpu']})"
        parser.add_argument(f"--{name}", type=whole(least), default=defaults[device], metavar="N", help=text)
    parser.add_argument("--output-dir", default="runs/calibrate", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    """Calibrates the recipe of a command line, and prints the outcome.

    Raises:
        SparsityError: see `calibrate_recipe`; `CalibrationError` for invalid arguments,
            `InstallError` for missing libraries.
    """
    parser = build_parser()
    parsed = parse(parser, words, CalibrationError)
    if parsed is None:
        return 0
    names, arguments, overrides = parsed
    counts = (arguments.samples, arguments.probe_samples, arguments.held_out_samples)
    require("study", "calibrate", "scipy", "matplotlib")
    check_output(arguments.output_dir, "output-dir")
    bounds = {name: getattr(arguments, name) for name in ("budget", "max_loss")}
    with recipe_source(names) as source:
        trainer = ["--output_dir", str(Path(arguments.output_dir) / "trainer")]
        recipe = load_recipe_to_train(source, [*overrides, *trainer])
    result = calibrate_recipe(
        recipe,
        arguments.output_dir,
        counts,
        bounds,
        part_batches=-(-arguments.part_samples // BATCH),
        mlp_levels=arguments.mlp_levels,
        attention_levels=arguments.attention_levels,
    )
    from sparse_unsloth.autosparsity.report import RECIPE_FILE, REPORT_FILE, summary

    print("\n".join(f"- {line}" for line in summary(result)))
    folder = Path(arguments.output_dir)
    print(f"sparse-unsloth: the recipe is {folder / RECIPE_FILE}, the report {folder / REPORT_FILE}")
    return 0


def calibrate_recipe(
    recipe: Recipe, output_dir: str | Path, counts: tuple[int, int, int], bounds: Mapping[str, float], **options: Any
) -> Calibration:
    """Calibrates the model of ``recipe`` on the first samples of its data, and writes the results to ``output_dir``.

    Args:
        recipe: its layer rules are ignored; the rest of its sparsity block (estimator, schedule, ...) is kept.
        output_dir: for sparsity.yaml, estimator.safetensors, report and measurements.
        counts: the numbers of samples for the estimator, for measured losses, and held out.
        bounds: ``budget`` or ``max_loss``, or neither.
        options: further ones of `calibrate`.

    Raises:
        SparsityError: see `calibrate` and `build_trainer`.
    """
    from sparse_unsloth.autosparsity.report import save
    from sparse_unsloth.autosparsity.search import JOURNAL_FILE, calibrate
    from sparse_unsloth.training.keys import SEQ_CLS

    if recipe.model.lora_task_type == SEQ_CLS:
        raise CalibrationError(
            "calibrate measures the loss of answer tokens, and a classifier (SEQ_CLS) has none. Its estimator "
            "calibrates by itself when training begins; its layers are given by hand."
        )
    with SetUp(output_dir, begun=(Path(output_dir) / JOURNAL_FILE).is_file):
        model, samples, probe_samples, held_out = load(recipe, counts)
        result = calibrate(
            model,
            samples,
            probe_samples=probe_samples,
            held_out=held_out,
            config=recipe.sparsity,
            lora_rank=recipe.model.lora_r,
            output_dir=output_dir,
            **bounds,
            **options,
        )
    save(result, Path(output_dir), recipe.data.dataset_name)
    return result


def load(recipe: Recipe, counts: tuple[int, int, int]) -> tuple[nn.Module, list, list, list]:
    """Loads the model with adapters, nothing attached, and three lists of batches of different samples."""
    from sparse_unsloth.attachment import detach
    from sparse_unsloth.config.sparsity import SparsityConfig
    from sparse_unsloth.training.run import build_trainer

    trainer, _ = build_trainer(replace(recipe, sparsity=SparsityConfig()))
    detach(trainer.model)
    loader = trainer.get_train_dataloader()
    rows = []
    for row in loader.dataset:
        rows.append(row)
        if len(rows) == sum(counts):
            break
    groups = divide(rows, counts)
    batches = (
        [loader.collate_fn(group[start : start + BATCH]) for start in range(0, len(group), BATCH)] for group in groups
    )
    return trainer.model, *batches


def divide(rows: Sequence[Any], counts: tuple[int, int, int]) -> list[list[Any]]:
    """Divides ``rows`` into groups of ``counts``, or in the same proportions where there are fewer.

    Raises:
        CalibrationError: there are fewer than two rows, one for each of the first two groups.
    """
    if len(rows) < 2:
        raise CalibrationError(
            f"The data set has {len(rows)} samples; calibration needs at least 2, and a few dozen to mean something."
        )
    if len(rows) < sum(counts):
        share = len(rows) / sum(counts)
        first = max(1, int(counts[0] * share))
        counts = (first, max(1, int(counts[1] * share)), len(rows))
    ends = [counts[0], counts[0] + counts[1], sum(counts)]
    return [list(rows[start:end]) for start, end in zip((0, *ends), ends, strict=False)]
