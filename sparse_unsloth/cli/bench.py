"""Runs the command ``sparse-unsloth bench``."""

from __future__ import annotations

import argparse
import datetime
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sparse_unsloth.bench.arms import ARMS, DEFAULT_ARMS, PADDED, arms_of
from sparse_unsloth.bench.methods import DENSE, METHODS, OURS, methods_of
from sparse_unsloth.bench.models import CHECKPOINTING
from sparse_unsloth.bench.processes import Parent, own_command, processes_of, serve
from sparse_unsloth.bench.runs import Plan, fill, layouts_of, pieces_of, printed_table, run_to_resume
from sparse_unsloth.bench.shapes import HOST, SHAPES, shapes_of
from sparse_unsloth.bench.speed import cases_of, describe, device_name, measure_in_child, model_shape, rows_of_run
from sparse_unsloth.bench.table import COLUMNS, SPEED, read_rows, read_table, report
from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.utils.options import real, whole

DESCRIPTION = """\
Times training steps: arms, which are Unsloth or PEFT without us, and our methods beside them, on the same batches.

One step is forward, backward and a fused AdamW step over the LoRA weights, in bf16 autocast as trainers run it, on
fresh random tokens. Each arm of Unsloth runs in a separate process (arms with the same variables and arguments share
one), our methods in another, so that each sees the machine as a user's process does. Each is checked (a method with
wrong results is not timed), warmed up until its steps are steady, and timed with CUDA events. Rows are written to the
table as soon as they are measured, or when the job is stopped (SIGTERM); an arm that fails, or that this Unsloth does
not have, gets a row with the reason. At the end every row of the run gets its ratios: to Unsloth's defaults (stock),
and to the best arm at that shape.

--seconds limits the time; called again with the same --out on the same machine within two hours, the job resumes
where it stopped. With --rounds above 1 the methods take turns, so that a drift of the GPU's clocks affects all; a
row is the median of all rounds. With --backend peft the methods are ours through the PEFT backend, and the arms are
PEFT with and without Liger's kernels; both backends fit in one run (methods peft-*). Methods and arms of PEFT run in
processes that never import Unsloth; for them --checkpointing unsloth is transformers' checkpointing.

The words after --then are a further run of the same date, which keeps the options before it except those that it
gives. Arms are as they are listed below, whatever --checkpointing says, and are timed once for each dtype.
"""

EPILOG = f"""\
shapes: {", ".join(SHAPES)} (these are "all"), {", ".join(HOST)}, custom-TOKENS-SHARE
arms (joined by + they are one arm):
""" + "\n".join(
    [f"  {name:20} {arm.what}" for name, arm in ARMS.items()]
    + ["methods:"]
    + [f"  {name:20} {what}" for name, what in METHODS.items()]
    + [f"  {DENSE:20} unsloth-dense-exact or peft-dense-exact, by --backend"]
    + [f"  peft-NAME            through the PEFT backend; NAME is {', '.join(OURS)}"]
)
THEN, FIRST = "--then", "first"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of time, run and table, and those of a child process."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    parser.add_argument("--seconds", type=real(least=0), help="time limit of the job; call again to resume")
    parser.add_argument("--run", default="", help="the run to resume, or whose table to print")
    parser.add_argument("--table", action="store_true", help="only print the table of a run, the newest by default")
    parser.add_argument("--date", default=now, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)


def add_arm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `resolve_arms_and_methods` reads, but for ``--methods``."""
    parser.add_argument("--backend", choices=list(DEFAULT_ARMS), default="unsloth", help="of the methods")
    defaults = "; ".join(f"with --backend {backend} {names}" for backend, names in DEFAULT_ARMS.items())
    parser.add_argument("--arms", help=f'"" for none; default: {defaults}')
    parser.add_argument("--checkpointing", choices=list(CHECKPOINTING), default="unsloth", help="of the methods")


def resolve_arms_and_methods(args: argparse.Namespace) -> None:
    """Replaces the names of arms and methods in ``args``.

    Raises:
        ConfigError: a name is unknown.
    """
    args.arms = arms_of(DEFAULT_ARMS[args.backend] if args.arms is None else args.arms)
    args.methods = methods_of(args.methods, args.backend) if args.methods else []


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", DESCRIPTION, EPILOG, "--model MODEL [options] [--then further options] ...")
    parser.add_argument("--model", help="checkpoint folder or hub name")
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit", help="of the base weights")
    add_arm_options(parser)
    parser.add_argument(
        "--methods", default="dense-graphs,rows-25,rows-25-graphs,sparse-o2", help="default: %(default)s"
    )
    layouts = "of the methods' batches: padded (a row for each sequence) or flat (one row, as Unsloth lays them out)"
    parser.add_argument("--layouts", default=PADDED, help=f"{layouts}, or both; default: %(default)s")
    parser.add_argument("--shapes", help='"all" (default), or some of the shapes below')
    parser.add_argument("--tokens", type=whole(2), help="adds a shape: one sequence of so many tokens (8192)")
    parser.add_argument(
        "--context-share", type=real(least=0, below=1), help="adds a shape: the share of prompt in it (0.75)"
    )
    parser.add_argument("--rank", type=whole(), default=16, help="of the adapters")
    parser.add_argument("--warmup", type=whole(0), default=3, help="steps before those that count, in each round")
    parser.add_argument("--steps", type=whole(), default=8, help="steps that count, in each round")
    parser.add_argument("--rounds", type=whole(), default=1, help="how often the methods take turns")
    profile = "profile a step of each method at these of the shapes (without a name: the first)"
    parser.add_argument("--profile", nargs="?", const=FIRST, default="", metavar="SHAPES", help=profile)
    parser.add_argument("--out", type=Path, default=Path("speed.csv"), help="the table, default: %(default)s")
    add_run_options(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments and resolves ``arms``, ``methods``, ``layouts`` and ``shapes``.

    Raises:
        ConfigError: an arm, method, layout or shape is unknown, or the table to append to has other columns.
    """
    args = build_parser().parse_args(argv)
    if args.model is None and not args.table:
        raise ConfigError("bench needs --model, a checkpoint folder or hub name")
    resolve_arms_and_methods(args)
    args.layouts = layouts_of(args.layouts)
    args.shapes = shapes_of(args.shapes, args.tokens, args.context_share)
    if args.profile == FIRST:
        args.profile = next(iter(args.shapes))
    args.profile = args.profile.split(",") if args.profile else []
    if unknown := [name for name in args.profile if name not in args.shapes]:
        raise ConfigError(f"--profile names {', '.join(unknown)}, which is none of the shapes {', '.join(args.shapes)}")
    read_rows(args.out)
    return args


def parse_runs(argv: Sequence[str]) -> list[argparse.Namespace]:
    """Parses the runs of a command line, separated by ``--then``; each has its ``words``, and all have one date.

    Raises:
        ConfigError: as `parse`.
    """
    words, runs = [], []
    for further, part in itertools.groupby(argv, lambda word: word == THEN):
        if further:
            continue
        words = [*words, *part]
        runs.append(parse(words))
        runs[-1].words, runs[-1].date = words, runs[0].date
    if not runs:
        runs = [parse(argv)]
        runs[0].words = []
    return runs


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns 1 if an arm or a method has no time yet, or cannot be timed.

    Raises:
        ConfigError: see `parse`; or the run whose table is requested does not exist.
        BackendError: there is no CUDA GPU.
    """
    runs = parse_runs(argv)
    first = runs[0]
    if first.child:
        return serve(partial(measure_in_child, first))
    if first.table:
        print(printed_table(first.out, SPEED, first.run))
        return 0
    device = device_name()
    whole = Plan(first.out, SPEED, [piece for args in runs for piece in pieces_of(args, cases_of(args))])
    run = first.run or run_to_resume([whole], describe(first, device), first.date)
    print(f"run {run}", flush=True)
    complete = True
    with Parent(first.seconds).listening() as parent:
        for args in runs:
            args.run = run
            plan = Plan(args.out, SPEED, pieces_of(args, cases_of(args)), run, describe(args, device))
            command = own_command(["bench", *args.words, "--run", run, "--date", args.date])
            complete = fill({"speed": plan}, processes_of(list(args.arms), args.methods), command, parent) and complete
            print(report(rows_of_run(args), model_shape(args.model), args.methods), flush=True)
    if any(row["run"] == run for row in read_table(first.out, COLUMNS)):
        print(printed_table(first.out, SPEED, run), flush=True)
    return int(not complete)
