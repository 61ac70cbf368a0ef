"""Runs the command ``sparse-unsloth recipes``."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("recipes", "")
    parser.add_argument("name", nargs="?", help="print this recipe, to be copied and changed")
    return parser


def main(words: Sequence[str]) -> int:
    """Lists the shipped recipes, or prints the named one.

    Raises:
        RecipeError: there is no recipe of that name.
    """
    name = build_parser().parse_args(words).name
    from sparse_unsloth.training.document import find_recipe, shipped_recipes

    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name, entry in shipped_recipes().items():
        first_line = entry.read_text(encoding="utf-8").partition("\n")[0]
        print(textwrap.fill(f"{name:24} {first_line.lstrip('# ')}", width, subsequent_indent=" " * 25))
    return 0
