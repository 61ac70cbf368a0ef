"""Times training steps, method beside method: the same process, model, batches and optimiser.

One step is forward, backward and a fused AdamW step over the LoRA weights, in bf16 autocast as trainers run it, on
fresh random tokens. Each method is attached to the same loaded model, checked (a method that does not compute what it
should is not timed), warmed up, and timed with CUDA events. Rows go into the table as soon as a method is done, or when
the job is told to stop (SIGTERM).

With --rounds above 1 the methods take turns, so that a drift of the GPU's clocks meets them all; a row is the median of
all rounds. Methods peft-* run in a process of their own, which never imports Unsloth, on the same batches; for them
--checkpointing unsloth is transformers' own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
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

from sparse_unsloth.bench.methods import EQUAL_TO_PLAIN, METHODS, backend_of, methods_of, sparsity_of
from sparse_unsloth.bench.shapes import HOST, SHAPES, Shape, make_batch, shapes_of
from sparse_unsloth.bench.table import append_rows, read_rows, report
from sparse_unsloth.costs import ModelShape
from sparse_unsloth.errors import BackendError, ConfigError, SparsityError
from sparse_unsloth.words import command_parser

ROOT = Path(__file__).resolve().parents[2]
EPILOG = f"""\
shapes: {", ".join(SHAPES)} (these are "all"), {", ".join(HOST)}, custom-TOKENS-SHARE
methods:
""" + "\n".join(f"  {name:20} {what}" for name, what in METHODS.items())
PACKAGES = ("torch", "triton", "transformers", "peft", "unsloth", "bitsandbytes")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", __doc__, EPILOG)
    in_source = ROOT / "benchmarks" / "results"
    table = in_source / "speed.csv" if in_source.is_dir() else Path("speed.csv")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit", help="of the base weights")
    parser.add_argument("--methods", default="unsloth-dense,sparse-o1,sparse-o2", help="default: %(default)s")
    parser.add_argument("--shapes", help='"all" (default), or some of the shapes below')
    parser.add_argument("--tokens", type=int, help="adds a shape: one sequence of so many tokens (8192)")
    parser.add_argument("--context-share", type=float, help="adds a shape: the share of prompt in it (0.75)")
    parser.add_argument("--checkpointing", choices=("unsloth", "True", "False"), default="unsloth")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count, in each round")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="how often the methods take turns")
    parser.add_argument("--profile", action="store_true", help="profile a step of each method at the first shape")
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
    for name in ("rank", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, given {getattr(args, name)}")
    read_rows(args.out)
    return args


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; 1 if a method could not be timed.

    Raises:
        ConfigError: see `parse`.
        BackendError: no CUDA GPU.
    """
    args = parse(argv)
    if not torch.cuda.is_available():
        raise BackendError("the benchmark times steps on a CUDA GPU, and there is none here")
    environment = dict(os.environ)  # importing Unsloth changes it
    by_backend = {
        backend: methods
        for backend in ("unsloth", "peft")
        if (methods := [method for method in args.methods if backend_of(method) == backend])
    }
    backend, methods = next(iter(by_backend.items()))
    model = load_model(args, backend)
    sizes = ModelShape.from_config(model.config)
    complete = Run(args, model).measure(methods)
    print(report([row for row in read_rows(args.out) if row["date"] == args.date], sizes, methods), flush=True)
    if len(by_backend) == 2:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child hears it too, and still writes its rows
        words = [*argv, "--methods", ",".join(by_backend["peft"]), "--date", args.date]
        code = subprocess.call([sys.executable, "-m", "sparse_unsloth.cli", "bench", *words], env=environment)
        complete = complete and code == 0
    return int(not complete)


def load_model(args: argparse.Namespace, backend: str) -> nn.Module:
    """The model with adapters that are not zero, nothing attached, ready to train."""
    if backend == "unsloth":
        importlib.import_module("unsloth")  # first, as it asks
    from sparse_unsloth import FastSparseLanguageModel, detach

    checkpointing = {"unsloth": "unsloth", "True": True, "False": False}[args.checkpointing]
    began = time.perf_counter()
    model, _ = FastSparseLanguageModel.from_pretrained(
        args.model,
        max_seq_length=max(2048, *(shape.length for shape in args.shapes.values())),
        dtype=torch.bfloat16,
        load_in_4bit=args.dtype == "4bit",
        backend=backend,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=args.rank, use_gradient_checkpointing=checkpointing, sparsity="dense"
    )
    detach(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, it would hide faults of the gradients of lora_A
            nn.init.normal_(parameter, std=0.02)
    print(f"{args.model} loaded for {backend} in {time.perf_counter() - began:.1f} s", flush=True)
    return model.train()


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
        from sparse_unsloth.bench.checks import loss_and_gradients

        plain = loss_and_gradients(self.model) if set(methods) & set(EQUAL_TO_PLAIN) else None
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
        from sparse_unsloth.bench.profiling import profile

        last = number == self.args.rounds - 1
        with self._attached(method, folder, say=number == 0):
            if number == 0:
                print(f"{method}: {check(self.model, method, plain)}", flush=True)
            for name, shape in self.args.shapes.items():
                try:
                    self._time(method, name, shape)
                except torch.OutOfMemoryError:
                    self._fail(method, f"{name}: out of memory")
            if last:
                self._write(method)
            if last and self.args.profile:
                name, shape = next(iter(self.args.shapes.items()))
                stepper = Stepper(self.model, shape)
                print(f"-- {method} {name}: {profile(stepper, self.model.config.num_hidden_layers)}", flush=True)

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
        attached = attach(self.model, sparsity)
        if say:
            print(f"{attached}\n  attached in {time.perf_counter() - began:.1f} s", flush=True)
        try:
            state = get_state(self.model)
            state.begin_training(driver="benchmark", max_steps=1_000_000)
            state.set_step(0)
            yield
        finally:
            detach(self.model)

    def _time(self, method: str, name: str, shape: Shape) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        stepper = Stepper(self.model, shape)
        for _ in range(self.args.warmup):
            stepper()
        torch.cuda.reset_peak_memory_stats()
        times = [stepper() for _ in range(self.args.steps)]
        peak = torch.cuda.max_memory_allocated() / 2**30
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
