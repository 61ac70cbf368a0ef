"""Times training steps, method beside method: the same process, model, batches and optimiser.

One step is forward, backward and a fused AdamW step over the LoRA weights, in bf16 autocast as trainers run it, on
fresh random tokens. Each method is attached to the same loaded model, checked (a method that does not compute what it
should is not timed), warmed up, and timed with CUDA events. Rows go into the table as soon as a method is done, or when
the job is told to stop (SIGTERM).

With --rounds above 1 the methods take turns, so that a drift of the GPU's clocks meets them all; a row is the median of
all rounds. Methods peft-* run in a process of their own, which never imports Unsloth, on the same batches; for them
--checkpointing unsloth is transformers' own.

Several runs share one process and date: what stands behind --then is a further run, which keeps the options before it
but for those that it gives. The model is loaded again only for another --model, --dtype, --rank or checkpointing (not
for --checkpointing False). Methods are compared with the dense baseline of the same dtype and checkpointing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from sparse_unsloth.bench.methods import CALIBRATED, METHODS, backend_of, methods_of, sparsity_of
from sparse_unsloth.bench.models import CHECKPOINTING, Models
from sparse_unsloth.bench.shapes import HOST, SHAPES, Shape, make_batch, shapes_of
from sparse_unsloth.bench.table import PROFILE_COLUMNS, STEP, append_rows, profile_path, read_rows, report
from sparse_unsloth.costs import ModelShape
from sparse_unsloth.errors import BackendError, ConfigError, SparsityError
from sparse_unsloth.functions.graphs import SEEN_BEFORE, Graphs
from sparse_unsloth.words import command_parser

ROOT = Path(__file__).resolve().parents[2]
EPILOG = f"""\
shapes: {", ".join(SHAPES)} (these are "all"), {", ".join(HOST)}, custom-TOKENS-SHARE
methods:
""" + "\n".join(f"  {name:20} {what}" for name, what in METHODS.items())
THEN, FIRST = "--then", "first"
PACKAGES = ("torch", "triton", "transformers", "peft", "unsloth", "bitsandbytes")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", __doc__, EPILOG, "--model MODEL [options] [--then further options] ...")
    in_source = ROOT / "benchmarks" / "results"
    table = in_source / "speed.csv" if in_source.is_dir() else Path("speed.csv")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit", help="of the base weights")
    parser.add_argument("--methods", default="unsloth-dense,rows-25,rows-10,sparse-o2", help="default: %(default)s")
    parser.add_argument("--shapes", help='"all" (default), or some of the shapes below')
    parser.add_argument("--tokens", type=int, help="adds a shape: one sequence of so many tokens (8192)")
    parser.add_argument("--context-share", type=float, help="adds a shape: the share of prompt in it (0.75)")
    parser.add_argument("--checkpointing", choices=list(CHECKPOINTING), default="unsloth")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count, in each round")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="how often the methods take turns")
    profile = "profile a step of each method at these of the shapes (without a name: the first)"
    parser.add_argument("--profile", nargs="?", const=FIRST, default="", metavar="SHAPES", help=profile)
    parser.add_argument("--out", type=Path, default=table, help="the table, default: %(default)s")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    parser.add_argument("--date", default=now, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with ``methods`` and ``shapes`` resolved.

    Raises:
        ConfigError: an unknown method or shape, a count below 1, or a table of another kind to append to.
    """
    args = build_parser().parse_args(argv)
    args.methods = methods_of(args.methods)
    args.shapes = shapes_of(args.shapes, args.tokens, args.context_share)
    if args.profile == FIRST:
        args.profile = next(iter(args.shapes))
    args.profile = args.profile.split(",") if args.profile else []
    if unknown := [name for name in args.profile if name not in args.shapes]:
        raise ConfigError(f"--profile names {', '.join(unknown)}, which is none of the shapes {', '.join(args.shapes)}")
    for name in ("rank", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, given {getattr(args, name)}")
    read_rows(args.out)
    return args


def parse_runs(argv: Sequence[str]) -> list[argparse.Namespace]:
    """The runs of a command line, parted by ``--then``; each has its ``words``, and all have one date.

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
    return runs or [parse(argv)]


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; 1 if a method could not be timed.

    Raises:
        ConfigError: see `parse`.
        BackendError: no CUDA GPU.
    """
    runs = parse_runs(argv)
    if not torch.cuda.is_available():
        raise BackendError("the benchmark times steps on a CUDA GPU, and there is none here")
    environment = dict(os.environ)  # importing Unsloth changes it
    backends = {backend_of(method) for args in runs for method in args.methods}
    backend = "unsloth" if "unsloth" in backends else "peft"
    models = Models(backend, max(2048, *(shape.length for args in runs for shape in args.shapes.values())))
    complete, further = True, []
    for args in runs:
        methods = [method for method in args.methods if backend_of(method) == backend]
        others = [method for method in args.methods if method not in methods]
        model = models.get(args) if methods else None
        if model is not None:
            complete = Run(args, model).measure(methods) and complete
            print(report(rows_of_run(args), ModelShape.from_config(model.config), methods), flush=True)
            del model
        else:
            others = args.methods
        if others:
            further += [THEN] * bool(further) + [*args.words, "--methods", ",".join(others), "--date", args.date]
    models.drop()
    if further:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child hears it too, and still writes its rows
        code = subprocess.call([sys.executable, "-m", "sparse_unsloth.cli", "bench", *further], env=environment)
        complete = complete and code == 0
    return int(not complete)


def rows_of_run(args: argparse.Namespace) -> list[dict]:
    """Rows of this date that can be compared with each other."""
    wanted = {
        "date": args.date, "model": Path(args.model).name, "dtype": args.dtype, "checkpointing": args.checkpointing
    }  # fmt: skip
    return [row for row in read_rows(args.out) if all(row[name] == value for name, value in wanted.items())]


class Stepper:
    """One training step after another on fresh batches.

    Args:
        model: outermost.
        shape: of the batches.
        forward: what is called in the model's place, a DDP wrapper of it for one.
        seed: of the batches; each rank has its own.
    """

    def __init__(self, model: nn.Module, shape: Shape, forward: nn.Module | None = None, seed: int = 0):
        self.model, self.shape, self.count = model, shape, seed
        self.forward = model if forward is None else forward
        self.device = next(model.parameters()).device
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self) -> float:
        """Milliseconds of the step."""
        self.count += 1
        batch = make_batch(self.shape, self.model.config.vocab_size, self.count, self.device)
        clock = _Clock(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.forward(**batch).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        milliseconds = clock.milliseconds()
        if not torch.isfinite(loss):
            raise SparsityError(f"the loss is {loss.item()}")
        return milliseconds


class _Clock:
    """Milliseconds since it was made, by events of the GPU; on a CPU (rehearsals) by the clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self.start.record()
        else:
            self.start = time.perf_counter()

    def milliseconds(self) -> float:
        if not self.cuda:
            return 1000 * (time.perf_counter() - self.start)
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end)


class Run:
    """Measurements of several methods on one loaded model, and their rows."""

    def __init__(self, args: argparse.Namespace, model: nn.Module):
        self.args, self.model = args, model
        self.times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.peaks: dict[tuple[str, str], float] = defaultdict(float)
        self.failed: set[str] = set()
        self.common = describe(args)

    def measure(self, methods: list[str]) -> bool:
        """Whether every method was timed at every shape; rows of those that were are in the table."""
        from sparse_unsloth.bench.checks import plain_steps

        plain = plain_steps(self.model)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with tempfile.TemporaryDirectory() as folder:
            try:
                for number in range(self.args.rounds):
                    for method in methods:
                        if method in self.failed:
                            continue
                        try:
                            self._take_turn(method, number, plain, Path(folder))
                        except SparsityError as error:
                            self.times.pop(method, None)
                            self._fail(method, f"NOT TIMED: {error}")
            finally:
                for method in list(self.times):
                    self._write(method)
        return not self.failed

    def _take_turn(self, method: str, number: int, plain, folder: Path) -> None:
        from sparse_unsloth.bench.checks import check

        last = number == self.args.rounds - 1
        with self._attached(method, folder, say=number == 0):
            if number == 0:
                began = time.perf_counter()
                found = check(self.model, method, plain)
                print(f"{method}: {found} ({time.perf_counter() - began:.1f} s)", flush=True)
            for name, shape in self.args.shapes.items():
                try:
                    self._time(method, name, shape)
                except torch.OutOfMemoryError:
                    self._fail(method, f"{name}: out of memory")
            if last:
                self._write(method)
            for name in self.args.profile if last else ():
                self._profile(method, name)

    def _profile(self, method: str, name: str) -> None:
        """Of one step: printed, and its sums written beside the table."""
        from sparse_unsloth.bench.profiling import IDLE, profile

        stepper = self._recorded_stepper(self.args.shapes[name], self._fresh_graphs())
        found = profile(stepper, self.model.config.num_hidden_layers)
        print(f"-- {method} {name}: {found.text}", flush=True)
        launches = sum(count for _, count in found.kinds.values())
        sums = {STEP: (found.step_ms, launches), **found.kinds, IDLE: (found.idle_ms, 0)}
        row = self.common | {"shape": name, "method": method}
        rows = [row | {"kind": kind, "ms": round(ms, 2), "launches": count} for kind, (ms, count) in sums.items()]
        append_rows(profile_path(self.args.out), rows, PROFILE_COLUMNS)

    @contextlib.contextmanager
    def _attached(self, method: str, folder: Path, say: bool) -> Iterator[None]:
        """The model with the sparse paths of ``method``; factors are kept in ``folder`` for the next round."""
        from sparse_unsloth import attach, detach, get_state

        file = str(folder / f"{method}.safetensors") if self.args.rounds > 1 else None
        sparsity = sparsity_of(method, self.model.config.num_hidden_layers, file)
        if sparsity is None:
            yield
            return
        began = time.perf_counter()
        attached = attach(self.model, sparsity, self._samples() if method in CALIBRATED else None)
        if say:
            print(f"{attached}\n  attached in {time.perf_counter() - began:.1f} s", flush=True)
        try:
            state = get_state(self.model)
            state.begin_training(driver="benchmark", max_steps=1_000_000)
            state.set_step(0)
            yield
        finally:
            detach(self.model)

    def _fresh_graphs(self) -> Graphs | None:
        """The attached model's, without the recordings of other shapes, which would count as memory of this one."""
        from sparse_unsloth import get_state

        state = get_state(self.model)
        graphs = None if state is None else state.graphs
        if graphs is not None:
            graphs.clear()
        return graphs

    def _recorded_stepper(self, shape: Shape, graphs: Graphs | None) -> Stepper:
        """Steps of ``shape``, after those that ``graphs`` need until every further one is a replay."""
        stepper = Stepper(self.model, shape)
        for _ in range(0 if graphs is None else SEEN_BEFORE + 1):
            stepper()
        return stepper

    def _samples(self) -> list[dict[str, torch.Tensor]]:
        """What estimators calibrate on: random tokens, as the steps train on."""
        shape, device = Shape(1, 1024, 64), next(self.model.parameters()).device
        return [make_batch(shape, self.model.config.vocab_size, -seed, device) for seed in range(1, 5)]

    def _time(self, method: str, name: str, shape: Shape) -> None:
        graphs = self._fresh_graphs()
        gc.collect()
        torch.cuda.empty_cache()
        stepper = self._recorded_stepper(shape, graphs)
        for _ in range(self.args.warmup):
            stepper()
        torch.cuda.reset_peak_memory_stats()
        times = [stepper() for _ in range(self.args.steps)]
        # What graphs hold is not counted as allocated.
        peak = (torch.cuda.max_memory_allocated() + (0 if graphs is None else graphs.memory())) / 2**30
        self.times[method][name] += times
        self.peaks[method, name] = max(self.peaks[method, name], peak)
        middle, low, high = quantiles(times)
        rate = shape.tokens / middle * 1000
        print(
            f"{method:20} {name:13} {middle:8.1f} ms  ({low:.1f} to {high:.1f})  {rate:7.0f} tokens/s  "
            f"peak {peak:.2f} GiB",
            flush=True,
        )

    def _write(self, method: str) -> None:
        """Puts the rows of a method into the table, once."""
        rows = []
        for name, times in self.times.pop(method, {}).items():
            middle, low, high = quantiles(times)
            rows.append(
                self.common
                | {
                    "shape": name,
                    "method": method,
                    "tokens": self.args.shapes[name].tokens,
                    "median_ms": round(middle, 2),
                    "p20_ms": round(low, 2),
                    "p80_ms": round(high, 2),
                    "peak_gib": round(self.peaks[method, name], 3),
                }
            )
        append_rows(self.args.out, rows)

    def _fail(self, method: str, why: str) -> None:
        self.failed.add(method)
        print(f"{method}: {why}", flush=True)


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    return tuple(torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist())


def describe(args: argparse.Namespace) -> dict[str, str]:
    """The columns that all rows of a run share."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name}={importlib.metadata.version(name)}")
    return {
        "date": args.date,
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(),
        "versions": " ".join(versions),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
    }
