"""Parses what the commands share: ``RECIPE`` or ``MODEL DATASET``, then options and keys of a recipe."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sparse_unsloth.errors import SparsityError

if TYPE_CHECKING:
    from sparse_unsloth.training.recipe import Recipe


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width, but for those with indented lines, such as lists of examples."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse forgets that the names of commands are indented

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(part if "\n  " in f"\n{part}" else textwrap.fill(part, width) for part in parts)


def command_parser(command: str, description: str, epilog: str = "", usage: str = "") -> argparse.ArgumentParser:
    """Makes the parser of the words after ``sparse-unsloth COMMAND``; ``usage`` is given without this prefix."""
    return argparse.ArgumentParser(
        prog=f"sparse-unsloth {command}",
        usage=f"sparse-unsloth {command} {usage}" if usage else None,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
    )


def print_line(text: str) -> None:
    """Prints a line with the program's name on standard error."""
    print(f"sparse-unsloth: {text}", file=sys.stderr)


def positive(text: str) -> int:
    """Parses an argument that is an integer from 1 up."""
    return _from(1, text)


def not_negative(text: str) -> int:
    """Parses an argument that is an integer from 0 up."""
    return _from(0, text)


def _from(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, given {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, given {text}")
    return number


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str], error: type[SparsityError]
) -> tuple[list[str], argparse.Namespace, list[str]] | None:
    """Parses ``(names, options of the parser, overrides of the recipe)``; None where help was printed.

    Args:
        parser: parses the options that are not keys of a recipe; the names precede them.
        words: the command line after the command.
        error: the exception to raise.

    Raises:
        SparsityError: ``error``, where there are not one or two names.
    """
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return None
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    names = list(words[:first])
    arguments, overrides = parser.parse_known_args(list(words[first:]))
    if len(names) not in (1, 2):
        command = parser.prog.rpartition(" ")[2]
        raise error(f"{command} takes RECIPE, or MODEL and DATASET; given {' '.join(names) or 'nothing'}.")
    return names, arguments, overrides


@contextmanager
def recipe_source(names: Sequence[str], **keys: str) -> Iterator[str]:
    """Returns the source for `load_recipe`: the named recipe, or a file with model, data set and ``keys``."""
    if len(names) == 1:
        yield names[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        given = {"model_name_or_path": names[0], "dataset_name": names[1], **keys}
        file.write_text(yaml.safe_dump(given), encoding="utf-8")
        yield str(file)


def load_recipe_to_train(source: str, overrides: Sequence[str], say: bool = False) -> Recipe:
    """Loads a recipe; imports Unsloth first where it will run, because it patches TRL, whose keys a recipe has.

    Args:
        source, overrides: see `load_recipe`.
        say: print the backend, and the reason for it.

    Raises:
        RecipeError: see `load_recipe`.
        BackendError: the requested backend cannot run.
    """
    from sparse_unsloth.backends.choose import explain_backend
    from sparse_unsloth.training.keys import BACKENDS
    from sparse_unsloth.training.recipe import load_recipe, raw_backend
    from sparse_unsloth.utils.distributed import is_main

    asked = raw_backend(source, overrides)
    if asked in BACKENDS:
        backend, reason = explain_backend(asked)
        if say and is_main():
            print(f"sparse-unsloth: backend {backend} ({reason})")
        if backend == "unsloth":
            importlib.import_module("unsloth")
    return load_recipe(source, overrides)
