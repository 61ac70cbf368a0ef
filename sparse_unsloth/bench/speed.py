"""Times training steps of arms and of our methods on the same batches."""

from __future__ import annotations

import argparse
import contextlib
import gc
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparse_unsloth.bench.arms import FLAT, Arm, arm_notes, arm_of, replan_arm, why_unavailable
from sparse_unsloth.bench.methods import sparsity_of
from sparse_unsloth.bench.models import as_collated
from sparse_unsloth.bench.processes import Budget, emit, first_line, warm_up
from sparse_unsloth.bench.runs import Plan, load_for, pieces_of
from sparse_unsloth.bench.shapes import Shape, make_batch
from sparse_unsloth.bench.table import PROFILE_COLUMNS, SPEED, STEP, append_rows, profile_path, read_rows
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.errors import BackendError, SparsityError
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE, GraphCache
from sparse_unsloth.utils.environment import commit_of, version_of

if TYPE_CHECKING:
    from sparse_unsloth.bench.checks import PlainSteps

PACKAGES = ("torch", "triton", "transformers", "peft", "unsloth", "bitsandbytes", "liger-kernel")
WARM_ARM = 3
"""The least number of warm-up steps of an arm: compiling, capturing CUDA graphs, choosing layers."""


def cases_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns the columns of each shape."""
    return [{"shape": name, "tokens": str(shape.tokens)} for name, shape in args.shapes.items()]


def rows_of_run(args: argparse.Namespace) -> list[dict]:
    """Returns the timed rows of this run that are comparable: arms, and methods with this checkpointing."""
    wanted = {"run": args.run, "model": Path(args.model).name, "dtype": args.dtype}
    return [
        row
        for row in read_rows(args.out, arms=True)
        if row.items() >= wanted.items() and (row["arm"] or row["checkpointing"] == args.checkpointing)
    ]


def model_shape(model: str) -> ModelShape | None:
    """Returns the sizes of a checkpoint folder; None where it has no configuration."""
    from transformers import AutoConfig

    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(model))
    except OSError:
        return None


def device_name() -> str:
    """Returns the GPU's name, read in another process: this one must not allocate memory of it.

    Raises:
        BackendError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise BackendError("the benchmark times steps on a CUDA GPU, and there is none here")
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# -- In a child -------------------------------------------------------------------------------------------------------


def measure_in_child(args: argparse.Namespace) -> None:
    """Loads the model of this process, and times its arms or methods that the table lacks."""
    model = load_for(args, max(2048, *(shape.length for shape in args.shapes.values())))
    left = Plan(args.out, SPEED, pieces_of(args, cases_of(args)), args.run).left()
    Run(args, model, lambda row: emit(table="speed", row=row), Budget(args.deadline)).measure(left)


class Stepper:
    """Runs training steps on new batches.

    Args:
        model: the outermost module.
        shape: of the batches.
        forward: called in place of the model, such as its DDP wrapper.
        seed: of the batches; ranks have different seeds.
    """

    def __init__(self, model: nn.Module, shape: Shape, forward: nn.Module | None = None, seed: int = 0):
        self.model, self.shape, self.count = model, shape, seed
        self.forward = model if forward is None else forward
        self.device = next(model.parameters()).device
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self) -> float:
        """Runs a step; returns its milliseconds."""
        self.count += 1
        batch = make_batch(self.shape, self.model.config.get_text_config().vocab_size, self.count, self.device)
        batch = as_collated(self.model, batch)
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
    """Measures milliseconds since it was made, by events of the GPU; on a CPU (rehearsals) by the clock."""

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
    """Measures the arms, or the methods, that share one loaded model.

    Args:
        write: called with each row, as `plan_of` describes it, and its figures.
        budget: of the remaining seconds.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, write: Callable[[dict], None], budget: Budget):
        self.args, self.model, self.write, self.budget = args, model, write, budget
        self.times: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
        self.peaks: dict[tuple[str, str, str], float] = defaultdict(float)
        self.warmups: dict[tuple[str, str, str], float] = defaultdict(float)
        self.notes: dict[tuple[str, str, str], str] = {}
        self.failed: set[str] = set()

    def measure(self, left: list[dict]) -> bool:
        """Times all pieces and writes their rows, with the reason where there is no time; returns whether all have one.

        Args:
            left: the remaining pieces of this process.
        """
        from sparse_unsloth.bench.checks import plain_steps

        pieces: dict[str, list[dict]] = defaultdict(list)
        for piece in left:
            pieces[piece["arm"] or piece["method"]].append(piece)
        methods = [piece["method"] for piece in left if not piece["arm"]]
        plain = plain_steps(self.model, streams=any("fp8" in method for method in methods)) if methods else None
        with tempfile.TemporaryDirectory() as folder:
            try:
                for number in range(self.args.rounds):
                    for name, remaining in pieces.items():
                        if name in self.failed:
                            continue
                        try:
                            self._take_turn(name, remaining, number, plain, Path(folder))
                        except Exception as error:
                            if not isinstance(error, SparsityError):
                                traceback.print_exc()
                            self.times.pop(name, None)
                            self._fail(name, remaining, f"NOT TIMED: {first_line(error)}")
            finally:
                for name in list(self.times):
                    self._write(name, pieces[name])
        return not self.failed

    def _take_turn(self, name: str, pieces: list[dict], number: int, plain: PlainSteps | None, folder: Path) -> None:
        """Times one arm or method at all its shapes."""
        last, arm = number == self.args.rounds - 1, arm_of(name) if pieces[0]["arm"] else None
        if arm is not None and (why := why_unavailable(arm, self.model)):
            self._fail(name, pieces, why)
            return
        file = folder / f"{name}.safetensors" if self.args.rounds > 1 else None
        with attached(self.model, name, file, say=number == 0) if arm is None else contextlib.nullcontext():
            if number == 0:
                began = time.perf_counter()
                found = check_method(self.model, name, plain) if arm is None else check_arm(self.model, arm)
                print(f"{name}: {found} ({time.perf_counter() - began:.1f} s)", flush=True)
            for piece in pieces:
                try:
                    with self.budget.piece():
                        self._time(name, piece["layout"], piece["shape"])
                except torch.OutOfMemoryError:
                    self._fail(name, [piece], "out of memory")
            if last:
                self._write(name, pieces)
            for shape in self.args.profile if last else ():
                self._profile(name, pieces[0]["layout"], shape)

    def _profile(self, name: str, layout: str, shape: str) -> None:
        """Profiles one step: prints the profile, and writes its sums beside the table."""
        from sparse_unsloth.bench.profiling import IDLE, profile

        stepper = self._stepper_with_graphs(in_layout(self.args.shapes[shape], layout), self._fresh_graphs())
        found = profile(stepper, self.model.config.num_hidden_layers)
        print(f"-- {name} {shape}: {found.text}", flush=True)
        launches = sum(count for _, count in found.kinds.values())
        sums = {STEP: (found.step_ms, launches), **found.kinds, IDLE: (found.idle_ms, 0)}
        row = describe(self.args) | {"shape": shape, "method": name}
        rows = [row | {"kind": kind, "ms": round(ms, 2), "launches": count} for kind, (ms, count) in sums.items()]
        append_rows(profile_path(self.args.out), rows, PROFILE_COLUMNS)

    def _fresh_graphs(self) -> GraphCache | None:
        """Returns the attached model's cache, without graphs of other shapes, whose memory would count here."""
        from sparse_unsloth import get_state

        state = get_state(self.model)
        graphs = None if state is None else state.graphs
        if graphs is not None:
            graphs.clear()
        return graphs

    def _stepper_with_graphs(self, shape: Shape, graphs: GraphCache | None) -> Stepper:
        """Returns a stepper of ``shape`` after the steps that ``graphs`` need until all further ones are replays."""
        stepper = Stepper(self.model, shape)
        for _ in range(0 if graphs is None else RUNS_BEFORE_CAPTURE + 1):
            stepper()
        return stepper

    def _time(self, name: str, layout: str, shape_name: str) -> None:
        graphs, arm = self._fresh_graphs(), arm_of(name) if name in self.args.arms else None
        gc.collect()
        torch.cuda.empty_cache()
        shape, key, began = self.args.shapes[shape_name], (name, layout, shape_name), time.perf_counter()
        with frozen_heap():
            if arm is not None:
                replan_arm(arm, self.model, shape.batch, shape.length)
            stepper = self._stepper_with_graphs(in_layout(shape, layout), graphs)
            warm_up(stepper, self.args.warmup if arm is None else max(self.args.warmup, WARM_ARM))
            self.warmups[key] += time.perf_counter() - began
            torch.cuda.reset_peak_memory_stats()
            times = [stepper() for _ in range(self.args.steps)]
        # What graphs hold is not counted as allocated.
        peak = (torch.cuda.max_memory_allocated() + (0 if graphs is None else graphs.memory())) / 2**30
        self.times[name][layout, shape_name] += times
        self.peaks[key] = max(self.peaks[key], peak)
        self.notes[key] = "" if arm is None else arm_notes(arm, self.model)
        middle, low, high = quantiles(times)
        rate = shape.tokens / middle * 1000
        print(
            f"{name:20} {layout:6} {shape_name:13} {middle:8.1f} ms  ({low:.1f} to {high:.1f})  {rate:7.0f} tokens/s  "
            f"peak {peak:.2f} GiB  warmed up in {self.warmups[key]:.1f} s  {self.notes[key]}".rstrip(),
            flush=True,
        )

    def _write(self, name: str, pieces: list[dict]) -> None:
        """Writes the rows of an arm or a method, once."""
        for (layout, shape), times in self.times.pop(name, {}).items():
            middle, low, high = quantiles(times)
            piece = next(piece for piece in pieces if (piece["layout"], piece["shape"]) == (layout, shape))
            figures = {"median_ms": middle, "p20_ms": low, "p80_ms": high}
            self.write(
                piece
                | {column: round(value, 2) for column, value in figures.items()}
                | {
                    "peak_gib": round(self.peaks[name, layout, shape], 3),
                    "warmup_s": round(self.warmups[name, layout, shape], 1),
                    "note": self.notes.get((name, layout, shape), ""),
                }
            )

    def _fail(self, name: str, pieces: list[dict], why: str) -> None:
        """Writes rows with the reason why there is no time; the next round leaves the arm or method out."""
        self.failed.add(name)
        for piece in pieces:
            print(f"{name}: {piece['layout']} {piece['shape']}: {why}", flush=True)
            self.write(piece | {"note": why})


@contextlib.contextmanager
def attached(model: nn.Module, method: str, file: Path | None = None, say: bool = True) -> Iterator[None]:
    """Attaches the sparse paths of ``method``, as in training; plain methods attach nothing.

    Args:
        file: stores the estimator's factors for the next time.
        say: print what became sparse.
    """
    from sparse_unsloth import attach, detach, get_state

    sparsity = sparsity_of(method, model.config.num_hidden_layers, None if file is None else str(file))
    if sparsity is None:
        yield
        return
    began = time.perf_counter()
    found = attach(model, sparsity)
    if say:
        print(f"{found}\n  attached in {time.perf_counter() - began:.1f} s", flush=True)
    try:
        state = get_state(model)
        state.begin_training(driver="benchmark", max_steps=1_000_000)
        state.set_step(0)
        yield
    finally:
        detach(model)


def check_method(model: nn.Module, method: str, plain: PlainSteps) -> str:
    """Calls `sparse_unsloth.bench.checks.check`, which must not be imported before Unsloth."""
    from sparse_unsloth.bench.checks import check

    return check(model, method, plain)


def check_arm(model: nn.Module, arm: Arm) -> str:
    """Checks that the arm's step of a small batch differs from float32 by rounding only.

    Raises:
        CheckFailed: it differs by more.
    """
    from sparse_unsloth.bench.checks import check_plain, flat_batch, plain_steps, small_batch

    return check_plain(plain_steps(model, flat_batch if arm.layout == FLAT else small_batch))


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Freezes the heap, so that Python collects only new objects, as in Unsloth's ``train()`` (from 2026.10.9)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_layout(shape: Shape, layout: str) -> Shape:
    """Returns the shape in a layout: flat puts all sequences into one."""
    return replace(shape, packed=shape.tokens) if layout == FLAT else shape


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Returns median, 20th and 80th percentile."""
    return tuple(torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist())


def describe(args: argparse.Namespace, device: str | None = None) -> dict[str, str]:
    """Returns the columns that all rows of a run share.

    Args:
        device: the GPU's name; None: read it, which allocates memory of the GPU.
    """
    return {
        "date": args.date,
        "commit": commit_of(Path(__file__).parent),
        "device": torch.cuda.get_device_name() if device is None else device,
        "versions": " ".join(f"{name}={version}" for name in PACKAGES if (version := version_of(name))),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
    }
