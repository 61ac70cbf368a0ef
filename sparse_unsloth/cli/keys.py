"""Runs the command ``sparse-unsloth keys``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser, print_line


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("keys", "")
    parser.add_argument("word", nargs="?", default="", help="only keys whose name or help contains this")
    return parser


def main(words: Sequence[str]) -> int:
    """Lists the keys of a recipe, all or those that match a word; returns 1 if there are none."""
    arguments = build_parser().parse_args(words)
    from rich.console import Console
    from rich.table import Table

    from sparse_unsloth.training.keys import block_keys, describe, did_you_mean, recipe_keys

    word, known = arguments.word.lower(), [*block_keys(), *recipe_keys().values()]
    keys = [key for key in known if word in key.name.lower() or word in key.help.lower()]
    if not keys:
        hint = did_you_mean(word, [key.name for key in known])
        print_line(f"no key of a recipe has to do with {arguments.word!r}{hint}")
        return 1
    table = Table("key", "type", "default", "what it does", box=None, pad_edge=False)
    table.columns[0].min_width = max(len(key.name) for key in keys)  # never shortened
    for key in keys:
        kinds = {"sparsity": "a preset, a file or a block", "rank": "a block"}
        kind = kinds.get(key.name) or describe(key.kind)
        table.add_row(key.name, kind, str(key.default), key.help.replace("%%", "%").replace("[", "\\["))
    Console().print(table)
    return 0
