"""Runs the command ``sparse-unsloth explain``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.faults import check_output

DESCRIPTION = """\
Explains what sparsity did in a training, finished or running: by layer, the channels kept from step to step, their
share of the oracle's energy, and the FLOPs saved. Writes explain.md and explain.png.

RUN is the output folder of `sparse-unsloth train`, or of any trainer whose model was attached. `explain_steps` of the
sparsity block sets how often channels are sampled (default: every 50 sparse steps)."""


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("explain", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the training's output folder")
    parser.add_argument("--output-dir", help="for report and picture (default: RUN)")
    parser.add_argument("--json", action="store_true", help="print the records as JSON, and write nothing")
    return parser


def main(words: Sequence[str]) -> int:
    """Explains the run of a command line.

    Raises:
        ConfigError: the folder has no records.
        InstallError: a library is missing.
    """
    arguments = build_parser().parse_args(list(words))
    from sparse_unsloth.explain.records import read
    from sparse_unsloth.explain.report import PICTURE_FILE, REPORT_FILE, summary, write

    folder = Path(arguments.run)
    records = read(folder)
    if arguments.json:
        print(json.dumps(records, indent=2))
        return 0
    require("study", "explain", "matplotlib")
    out = folder if arguments.output_dir is None else Path(arguments.output_dir)
    check_output(out, "output-dir")
    write(folder, out)
    print("\n".join(f"- {line}" for line in summary(records)))
    print(f"sparse-unsloth: the table is {out / REPORT_FILE}, the picture {out / PICTURE_FILE}")
    return 0
