"""Runs the command ``sparse-unsloth quickstart``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.options import whole

DESCRIPTION = """\
On a CPU: fine-tunes SmolLM2-135M-Instruct on verifiable tasks three times, in under five minutes: dense, sparse, and
dense with as many FLOPs as the sparse run. With a GPU: Llama-3.2-1B-Instruct in 4 bits, by stock Unsloth and with
`auto`; `CUDA_VISIBLE_DEVICES= sparse-unsloth quickstart` takes the CPU. Dense and sparse steps take turns; the report
has the loss, the accuracy and the median of the pairs' times."""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("quickstart", DESCRIPTION)
    parser.add_argument("--steps", type=whole(), help="optimiser steps of the two runs that are compared")
    parser.add_argument("--test-size", type=whole(), help="held-out samples to evaluate on")
    parser.add_argument("--model", help="a hub name or a folder, instead of these models")
    parser.add_argument("--output-dir", default="runs/quickstart", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    """Runs the quickstart.

    Raises:
        SparsityError: see `quickstart`; `InstallError` for missing libraries.
    """
    arguments = build_parser().parse_args(words)
    require("quickstart", "quickstart", "reasoning_gym", "matplotlib", "gguf")
    from sparse_unsloth.backends.choose import explain_backend

    if explain_backend()[0] == "unsloth":
        importlib.import_module("unsloth")  # before TRL, as it asks
    from sparse_unsloth.quickstart import quickstart

    quickstart(arguments.output_dir, arguments.steps, arguments.test_size, arguments.model)
    return 0
