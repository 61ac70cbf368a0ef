"""Runs the command ``sparse-unsloth compare``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.faults import check_output

DESCRIPTION = """\
Compares trained runs: training and held-out loss, every score of `sparse-unsloth evaluate`, tokens per second, seconds,
peak memory. Runs of the same recipe that differ only in their seed form a group: mean, standard deviation, and paired
tests against the first group. Writes comparison.md, comparison.json and comparison.png."""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("compare", DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; the first one's group is the baseline")
    parser.add_argument("--output-dir", default="runs/comparison", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    """Compares the run folders of a command line, prints the tables and writes the files.

    Raises:
        CompareError: a folder holds no finished run, or a run occurs twice.
        InstallError: a library is missing.
    """
    arguments = build_parser().parse_args(words)
    from rich.console import Console
    from rich.table import Table

    from sparse_unsloth.evaluation.compare import compare, draw, group_runs, markdown, notes, read_run, rows, test_rows

    require("study", "compare", "scipy", "matplotlib")
    check_output(arguments.output_dir, "output-dir")
    groups = group_runs([read_run(folder) for folder in arguments.runs])
    comparison = compare(groups)
    folder, console = Path(arguments.output_dir), Console()
    folder.mkdir(parents=True, exist_ok=True)
    for heading, body in (rows(comparison), test_rows(comparison)):
        table = Table()
        for index, name in enumerate(heading):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in body:
            table.add_row(*row)
        if body:
            console.print(table)
    for note in notes(comparison):
        console.print(note, highlight=False)
    runs = {group.name: [vars(run) | {"losses": None} for run in group.runs] for group in groups}
    text = json.dumps({**comparison, "runs": runs}, indent=2)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    draw(groups, comparison, folder / "comparison.png")
    console.print(f"Tables, figures and picture: {folder}/comparison.md, .json, .png", highlight=False)
    return 0
