"""Runs the command ``sparse-unsloth quickstart``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser, positive
from sparse_unsloth.utils.environment import require

DESCRIPTION = """\
Fine-tunes SmolLM2-135M-Instruct on verifiable tasks three times: dense, sparse, and dense with as many FLOPs as the
sparse run. Reports loss, accuracy and measured step time side by side."""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("quickstart", DESCRIPTION)
    parser.add_argument("--steps", type=positive, help="optimiser steps of the dense and the sparse run")
    parser.add_argument("--test-size", type=positive, help="held-out samples to evaluate on")
    parser.add_argument("--output-dir", default="runs/quickstart", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    """Runs the quickstart.

    Raises:
        SparsityError: see `quickstart`; `InstallError` for missing libraries.
    """
    arguments = build_parser().parse_args(words)
    require("quickstart", "quickstart", "reasoning_gym", "matplotlib", "gguf")
    from sparse_unsloth.quickstart import quickstart

    quickstart(arguments.output_dir, steps=arguments.steps, test_size=arguments.test_size)
    return 0
