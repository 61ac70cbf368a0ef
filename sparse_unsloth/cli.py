"""The command ``sparse-unsloth``. Heavy libraries are imported by the sub-command that needs them."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from sparse_unsloth.words import positive

DESCRIPTION = "Faster LoRA and QLoRA fine-tuning by contextual sparsity, through TRL's SFTTrainer."

TRAIN_DESCRIPTION = """\
Trains a recipe and writes a run folder: recipe.yaml (resolved, can be run again), adapter/, checkpoints,
metrics.json and environment.json.

RECIPE is a YAML file, or the name of a shipped one (`sparse-unsloth recipes`). Its keys are TRL's own (SFTConfig and
ModelConfig, all under their usual names), dataset_* keys, `backend` (auto, unsloth, peft) and a `sparsity` block.
`sparse-unsloth keys` lists them all. Any key can be overridden here; dots reach into blocks.

Unlike TRL's, these defaults suit sparse LoRA training: use_peft true, lora_dropout 0, dtype auto."""

TRAIN_EPILOG = """\
examples:
  sparse-unsloth train quickstart --max_steps 20 --output_dir runs/try
  sparse-unsloth train my.yaml --learning_rate 1e-4 --sparsity o2
  sparse-unsloth train my.yaml --sparsity.mlp '{"1-29": 0.5}' --sparsity.estimator.rank 16
  sparse-unsloth train my.yaml --lora_target_modules q_proj v_proj --packing
  sparse-unsloth train my.yaml --resume_from_checkpoint

Unknown keys and wrong types are errors, all of them reported at once (exit code 2). A finished run that is resumed
stays as it is. model_name_or_path may be an adapter, a checkpoint or a run's folder: training goes on from that."""

OWN_WORDS = {
    "estimate": ("say before training what sparsity will gain: tokens, FLOPs, time, memory", "forecast.command"),
    "calibrate": ("measure on your data what sparsity costs in each layer, and choose it", "autosparsity.command"),
    "explain": ("say what sparsity did in a run: stability, energy captured, FLOPs saved, by layer", "explain.command"),
    "bench": ("time training steps on the GPU, dense and sparse", "bench.speed"),
    "evaluate": ("judge runs: HumanEval, MT-Bench, commonsense, arithmetic, GLUE, ARC-AGI", "evaluation.command"),
    "compare": ("compare runs and seeds: loss, scores, tokens a second, memory, with paired tests", "compare"),
    "study": ("study low rank: toy matrices, a model's spectra, pruned adapters", "study.cli"),
}
"""Commands that read the words behind them by a parser of their own: its help here, and where its ``main`` is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 this machine cannot run it, 2 it was asked wrongly.

    What the user or his machine can change is said in one line on standard error; ``--debug`` adds the traceback.

    Raises:
        Exception: what nobody expected while training, with its traceback.
    """
    words, debug = take_debug(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        if debug:
            raise
        print_line("interrupted.")
        return 130
    except Exception as error:
        from sparse_unsloth.faults import explain, is_fault_of_training

        if is_fault_of_training(error):
            raise
        if debug:
            traceback.print_exception(error)
        line, code = explain(error)
        print_line(line)
        return code


def take_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without a bare ``--debug``, and whether there was one; TRL has a key of that name, which takes "
    "values."""
    kept, found = [], False
    for index, word in enumerate(words):
        following = words[index + 1 : index + 2]
        if word == "--debug" and (index == 0 or not following or following[0].startswith("--")):
            found = True
        else:
            kept.append(word)
    return kept, found


def print_line(text: str) -> None:
    """On standard error, under the program's name."""
    print(f"sparse-unsloth: {text}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser; ``train`` leaves its ``--key value`` words to `recipe.parse_overrides`."""
    parser = argparse.ArgumentParser(prog="sparse-unsloth", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, with every command")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a recipe",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
        usage="sparse-unsloth train RECIPE [--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    train.set_defaults(print_help=train.print_help)

    recipes = commands.add_parser("recipes", help="list the shipped recipes, or print one", allow_abbrev=False)
    recipes.add_argument("name", nargs="?", help="print this recipe, to be copied and changed")

    keys = commands.add_parser("keys", help="list the keys of a recipe", allow_abbrev=False)
    keys.add_argument("word", nargs="?", default="", help="only keys whose name or help contains this")

    commands.add_parser(
        "doctor",
        help="report versions, GPU, backend and kernels, and what is missing",
        description="Reports versions against the tested ranges, the GPU, which backend and kernels will run and why, "
        "and what is missing. Exit code 1 if training cannot run here.",
        allow_abbrev=False,
    )

    quickstart = commands.add_parser(
        "quickstart",
        help="train a small model dense and sparse on the CPU, and compare",
        description="Fine-tunes SmolLM2-135M-Instruct on verifiable tasks three times: dense, sparse, and dense with "
        "as many FLOPs as the sparse run. Reports loss, accuracy and measured step time side by side.",
        allow_abbrev=False,
    )
    quickstart.add_argument("--steps", type=positive, help="optimiser steps of the dense and the sparse run")
    quickstart.add_argument("--test-size", type=positive, help="held-out samples to evaluate on")
    quickstart.add_argument("--output-dir", default="runs/quickstart", help="default: %(default)s")

    for name, (text, _) in OWN_WORDS.items():
        # No word is an option here, not even --help.
        command = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
        command.add_argument("words", nargs="*")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(arguments.overrides):
        arguments.print_help()
        return 0
    from sparse_unsloth.distributed import is_main
    from sparse_unsloth.language_model import explain_backend
    from sparse_unsloth.recipe import BACKENDS, load_recipe, raw_backend

    asked = raw_backend(arguments.recipe, arguments.overrides)
    if asked in BACKENDS:
        backend, reason = explain_backend(asked)
        if is_main():
            print(f"sparse-unsloth: backend {backend} ({reason})")
        if backend == "unsloth":
            # It patches TRL and transformers, so it comes before the recipe's keys are read from TRL.
            importlib.import_module("unsloth")
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from sparse_unsloth.train import run

    result = run(recipe)
    if is_main() and result.trained:
        print(f"sparse-unsloth: trained {result.metrics['steps']} steps; adapter and metrics are in {result.folder}")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from sparse_unsloth.recipe import find_recipe, shipped_recipes

    if arguments.name is not None:
        print(find_recipe(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    for name, entry in shipped_recipes().items():
        first_line = entry.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:24} {first_line.lstrip('# ')}")
    return 0


def _keys(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from sparse_unsloth.recipe import describe, recipe_keys

    word = arguments.word.lower()
    keys = [key for key in recipe_keys().values() if word in key.name.lower() or word in key.help.lower()]
    if not keys:
        print_line(f"no key of a recipe has to do with {arguments.word!r}")
        return 1
    table = Table("key", "type", "default", "what it does", box=None, pad_edge=False)
    for key in keys:
        kinds = {"sparsity": "a preset, a file or a block", "rank": "a block"}
        kind = kinds.get(key.name) or describe(key.kind)
        table.add_row(key.name, kind, str(key.default), key.help.replace("%%", "%").replace("[", "\\["))
    Console().print(table)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from sparse_unsloth.doctor import diagnose, print_report, try_training

    findings = diagnose()
    print("sparse-unsloth: trying each mode on a small random model (under two minutes)", flush=True)
    findings += try_training()
    print_report(findings)
    return int(any(finding.status == "problem" for finding in findings))


def _quickstart(arguments: argparse.Namespace) -> int:
    from sparse_unsloth.quickstart import quickstart

    quickstart(arguments.output_dir, steps=arguments.steps, test_size=arguments.test_size)
    return 0


def _own_words(arguments: argparse.Namespace) -> int:
    _, home = OWN_WORDS[arguments.command]
    return importlib.import_module(f"sparse_unsloth.{home}").main(arguments.words)


def _version() -> str:
    from sparse_unsloth import __version__

    return f"sparse-unsloth {__version__}"


COMMANDS = {
    "train": _train,
    "recipes": _recipes,
    "keys": _keys,
    "doctor": _doctor,
    "quickstart": _quickstart,
    **dict.fromkeys(OWN_WORDS, _own_words),
}

if __name__ == "__main__":
    sys.exit(main())
