"""Dispatches the command line ``sparse-unsloth``; each command imports the heavy libraries that it needs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import Formatter, Parser, print_line

DESCRIPTION = "Faster LoRA and QLoRA fine-tuning by contextual sparsity, through TRL's SFTTrainer."

SUBCOMMANDS = {
    "train": "train a recipe",
    "recipes": "list the shipped recipes, or print one",
    "keys": "list the keys of a recipe",
    "doctor": "report versions, GPU, backend and kernels, and what is missing",
    "quickstart": "train a small model dense and sparse, and compare",
    "estimate": "predict the speed-up before training: tokens, FLOPs, time, memory",
    "calibrate": "measure on your data what sparsity costs in each layer, and choose it",
    "explain": "explain what sparsity did in a run: stability, energy captured, FLOPs saved, by layer",
    "bench": "time training steps on the GPU, dense and sparse",
    "evaluate": "evaluate runs: HumanEval, MT-Bench, commonsense, arithmetic, GLUE, ARC-AGI",
    "compare": "compare runs and seeds: loss, scores, tokens per second, memory, with paired tests",
    "study": "study low-rank approximations: toy matrices, a model's spectra, pruned adapters",
    "completion": "print the script that completes command lines in bash, zsh or fish",
}
"""The help of each command; the module of that name in this package has its parser and its ``main``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 this machine cannot run it, 2 invalid input.

    The exit code is 141, as a shell's, where the reader of the output left.

    Errors that the user can fix are one line on standard error; ``--debug`` adds the traceback.

    Raises:
        Exception: an unexpected error, with its traceback.
    """
    if argv is None:
        quiet_libraries()
    words, debug = take_debug(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        code = importlib.import_module(f"sparse_unsloth.cli.{arguments.command}").main(arguments.words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print_line("interrupted.")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end
            return 141
        from sparse_unsloth.utils.faults import explain, is_fault_of_training

        if is_fault_of_training(error):
            raise
        if debug:
            traceback.print_exception(error)
        line, code = explain(error)
        print_line(line)
        return code


def reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as `head` when it has its lines."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


NOISY = "bitsandbytes.backends.cpu.ops", "torch.utils._pytree"
"""Loggers of libraries that warn at each import."""


def quiet_libraries() -> None:
    """Turns off the bars of libraries that load models and data where standard error is no terminal, as ours are.

    Of ``NO_COLOR`` and ``FORCE_COLOR`` the first wins, for this process and those that it starts. Importing
    bitsandbytes warns that it has no CPU kernel for 4-bit products, and importing torchao of its own names in PyTorch:
    neither is a fault of the user's.
    """
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ.get("NO_COLOR"):
        os.environ.pop("FORCE_COLOR", None)
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


def take_debug(words: list[str]) -> tuple[list[str], bool]:
    """Removes a bare ``--debug``; returns the other words, and whether it was there (TRL has a key of that name)."""
    kept, found = [], False
    for index, word in enumerate(words):
        following = words[index + 1 : index + 2]
        if word == "--debug" and (index == 0 or not following or following[0].startswith("--")):
            found = True
        else:
            kept.append(word)
    return kept, found


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; it leaves the words after a command to that command."""
    from sparse_unsloth import __version__

    parser = Parser(prog="sparse-unsloth", description=DESCRIPTION, allow_abbrev=False)
    parser.formatter_class = Formatter
    parser.add_argument("--version", action="version", version=f"sparse-unsloth {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, with every command")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in SUBCOMMANDS.items():
        # No word is an option here, not even --help.
        command = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
        command.add_argument("words", nargs="*")
    return parser
