"""Measures speed, peak memory and the longest sequence that fits, of dense Unsloth and of our methods, in one process.

    python benchmarks/long_sequence.py --model /tmp/llama8b --out runs/long --seconds 400
    python benchmarks/long_sequence.py --model /tmp/llama8b --out runs/long --seconds 140 --tiled
    python benchmarks/long_sequence.py --draw runs/long/long_sequence.csv

A *cell* is a layout (``single``: one document with 1024 labels; ``packed``: documents of 4096 tokens with 512 labels,
packed as TRL does), a mode of checkpointing (``unsloth``: every layer, inputs on the host; ``budget``: as few layers as
``memory_budget`` allows, not for dense; ``none``), a method and a length. Cells come in order of interest, dense and
sparse side by side; each is written as soon as it is timed. A cell in the table is not timed again, so an interrupted
run resumes where it stopped. Out of memory ends the lengths of that method. ``longest`` doubles the packed tokens until
a step does not fit on the GPU (or its inputs on the host), then halves the gap to an eighth; its row holds the longest
that fits, and the second step at that length.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from sparse_unsloth.reporting.tables import append_csv
from sparse_unsloth.utils.options import real

COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "checkpointing", "tiled", "layout", "method", "tokens",
    "median_ms", "p20_ms", "p80_ms", "peak_gib", "outcome",
)  # fmt: skip
DENSE = "unsloth-dense"
LENGTHS = (8192, 16384, 32768, 65536, 131072)
DOCUMENT, DOCUMENT_OUTPUTS, OUTPUTS = 4096, 512, 1024
LONG_DOCUMENT = 65536
"""Longer single documents take minutes a step's cell, and come last."""


@dataclass(frozen=True)
class Cell:
    layout: str
    checkpointing: str
    method: str
    tokens: int

    @property
    def row(self) -> tuple:
        """Returns the key of all its lengths."""
        return self.layout, self.checkpointing, self.method

    @property
    def key(self) -> tuple:
        """Returns the key that `key_of` reads from a row of the table."""
        return *self.row, None if self.layout == "longest" else self.tokens


def plan(lengths: list[int], methods: list[str], layouts: list[str], modes: list[str]) -> list[Cell]:
    """Returns the cells in order of interest: first what most users run."""
    cells = []
    order = [("single", "unsloth"), ("packed", "unsloth"), ("longest", "unsloth"), ("packed", "budget")]
    order += [("packed", "none"), ("longest", "none"), ("longest", "budget"), ("single", "budget"), ("single", "none")]
    for layout, mode in order:
        if layout not in layouts or mode not in modes:
            continue
        for tokens in lengths if layout != "longest" else lengths[-1:]:
            for method in methods:
                if mode != "budget" or method != DENSE:
                    cells.append(Cell(layout, mode, method, tokens))
    return sorted(cells, key=lambda cell: cell.layout == "single" and cell.tokens > LONG_DOCUMENT)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit")
    parser.add_argument("--methods", default=f"{DENSE},sparse-o2,rows-25")
    parser.add_argument("--layouts", default="single,packed,longest")
    parser.add_argument("--modes", default="unsloth,budget,none", help="of checkpointing")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--tiled", action="store_true", help="Unsloth's tiled MLP, in layers that are not sparse")
    parser.add_argument("--memory-budget", type=real(above=0), default=0.9, help="of the mode budget")
    parser.add_argument("--seconds", type=real(least=0), default=400, help="of everything")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU, through PEFT")
    parser.add_argument("--draw", type=Path, help="only draw this table")
    args = parser.parse_args(argv)
    args.rank, args.checkpointing = 16, "True" if args.cpu else "unsloth"
    args.lengths = [int(text) for text in args.lengths.split(",")]
    return args


class Run:
    """A loaded model, the remaining cells of the plan, and the table."""

    def __init__(self, args: argparse.Namespace, began: float):
        import torch

        self.args, self.deadline, self.torch = args, began + args.seconds, torch
        self.path = args.out / "long_sequence.csv"
        self.tiled = str(args.tiled)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = read(self.path)
        self.done = {(row["tiled"], *key_of(row)) for row in rows}
        self.ended = {key_of(row)[:3] for row in rows if row["tiled"] == self.tiled and not row["median_ms"]}
        self.took: dict[tuple, float] = {}
        self.checked: set[str] = set()

    def go(self) -> bool:
        """Times the remaining cells; returns whether the whole plan is done."""
        from sparse_unsloth.errors import SparsityError

        args = self.args
        cells = plan(args.lengths, args.methods.split(","), args.layouts.split(","), args.modes.split(","))
        left = [cell for cell in cells if (self.tiled, *cell.key) not in self.done]
        print(f"{len(cells) - len(left)} of {len(cells)} cells are in {self.path} already", flush=True)
        if not left:
            return True
        self.model, self.plain = load(args), None
        if not args.cpu and any(cell.method.startswith("rows-") for cell in left):
            from sparse_unsloth.bench.checks import plain_steps

            self.plain = plain_steps(self.model)  # which rows methods are checked against
        attached = None
        for number, cell in enumerate(left):
            if cell.row in self.ended:
                continue
            if self.expected(cell) > self.deadline - time.time():
                print(f"{cell}: left out, too little time", flush=True)
                if number == len(left) - 1 or time.time() > self.deadline:
                    break
                continue
            wanted = (cell.method, cell.checkpointing)
            if attached != wanted:
                self.attach(*wanted)
                attached = wanted
            try:
                (self.longest if cell.layout == "longest" else self.measure)(cell)
            except self.torch.OutOfMemoryError:
                self.end(cell, "out of memory")
            except (RuntimeError, SparsityError) as error:
                self.end(cell, f"failed: {str(error).splitlines()[0]}"[:120])
                traceback.print_exc()
                if self.torch.cuda.is_available():
                    self.torch.cuda.synchronize()  # raises again where the GPU is lost to this process
        return False

    def end(self, cell: Cell, why: str) -> None:
        """Leaves out longer sequences of this row."""
        self.ended.add(cell.row)
        self.write(cell, outcome=why)

    def expected(self, cell: Cell) -> float:
        """Predicts a cell's seconds from the one before it in its row; guesses the first."""
        if cell.layout == "longest":
            return 60
        before = self.took.get(cell.row)
        if before is None:
            return 15
        return before * (4 if cell.layout == "single" else 2)

    def attach(self, method: str, checkpointing: str) -> None:
        from sparse_unsloth import attach, detach, get_state
        from sparse_unsloth.bench.checks import check
        from sparse_unsloth.bench.methods import sparsity_of

        if get_state(self.model) is not None:
            detach(self.model)
        set_checkpointing(self.model, checkpointing != "none", self.args.cpu)
        factors = str(self.args.out / "estimator.safetensors")
        sparsity = sparsity_of(method, self.model.config.num_hidden_layers, factors)
        if sparsity is None:
            return
        if checkpointing == "budget":
            sparsity |= {"memory_budget": self.args.memory_budget}
        report = attach(self.model, sparsity)
        state = get_state(self.model)
        state.begin_training(driver="benchmark", max_steps=1_000_000)
        state.set_step(0)
        if method not in self.checked and not self.args.cpu:
            print(f"{report}\n{check(self.model, method, self.plain)}", flush=True)
            self.checked.add(method)

    def shape(self, layout: str, tokens: int):
        from sparse_unsloth.bench.shapes import Shape

        if layout == "single":
            return Shape(1, tokens, min(OUTPUTS, tokens // 2))
        length = min(DOCUMENT, tokens)
        outputs = DOCUMENT_OUTPUTS if length == DOCUMENT else length // 8
        # in one row, as TRL packs them: of several Unsloth makes one mask, of the square of all their tokens
        return Shape(tokens // length, length, outputs, packed=tokens)

    def measure(self, cell: Cell) -> None:
        """Times the cell and writes its row; fewer steps where one takes long."""
        from sparse_unsloth.bench.speed import Stepper, quantiles

        began = time.time()
        self.forget()
        step = Stepper(self.model, self.shape(cell.layout, cell.tokens))
        times = [step()]
        self.reset_peak()
        steps = 2 if times[0] > 8000 else 3 if times[0] > 3000 else 5
        times = [step() for _ in range(steps)]
        self.took[cell.row] = time.time() - began
        self.write(cell, quantiles(times), self.peak(), f"{steps} steps{self.kept()}")

    def longest(self, cell: Cell) -> None:
        """Doubles the tokens while a step fits, then halves the gap to an eighth; one step each, two of the longest."""
        best, failed, tokens = 0, None, 2 * self.args.lengths[-1]
        milliseconds = peak = 0.0
        ended = ""
        while failed is None or failed - best > max(failed // 8, DOCUMENT):
            if self.too_much_for_host(cell, tokens):
                failed, ended = tokens, "; the host's memory ends here, more fits on the GPU"
            elif best and 2.2 * tokens / best * milliseconds / 1000 > self.deadline - time.time():
                ended = "; stopped by the time limit, more may fit"
                break
            else:
                self.release_host()
                try:
                    milliseconds, peak = self.one_step(cell, tokens)
                    best = tokens
                except self.torch.OutOfMemoryError:
                    failed, ended = tokens, ""
            self.forget()
            print(f"  {cell.method} {cell.checkpointing}: {tokens} {'fits' if best == tokens else 'does not fit'}")
            if self.args.cpu and best >= 4 * self.args.lengths[-1]:
                ended = "; rehearsal"
                break
            tokens = best * 2 if failed is None else (best + failed) // 2 // DOCUMENT * DOCUMENT
            if tokens <= best:
                break
        if best:
            milliseconds, peak = self.one_step(cell, best)  # the first one pinned memory on the host
        self.write(cell, (milliseconds,) * 3, peak, f"longest that fits{ended}{self.kept()}", tokens=best)

    def release_host(self) -> None:
        """Releases the memory that Unsloth's checkpointing keeps pinned for the next step."""
        if self.args.cpu:
            return
        from unsloth_zoo import gradient_checkpointing

        # new, small buffers: its own reset leaves those it had at the beginning as large as they have become
        gradient_checkpointing.initialize_unsloth_gradient_checkpointing(gradient_checkpointing.GPU_BUFFER_DTYPE)
        self.torch.cuda.synchronize()
        gradient_checkpointing._empty_host_cache()

    def too_much_for_host(self, cell: Cell, tokens: int) -> bool:
        """Whether the layers' inputs would not fit into the host's memory."""
        return cell.checkpointing != "none" and not self.args.cpu and host_bytes(self.model, tokens) > free_host_bytes()

    def one_step(self, cell: Cell, tokens: int) -> tuple[float, float]:
        from sparse_unsloth.bench.speed import Stepper

        for module in self.model.modules():
            if hasattr(module, "max_seq_length"):  # Unsloth cuts longer rows; documents are as short as ever
                module.max_seq_length = max(module.max_seq_length, tokens)
        self.forget()
        self.reset_peak()
        return Stepper(self.model, self.shape("packed", tokens))(), self.peak()

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        if self.torch.cuda.is_available():
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.torch.cuda.is_available() else 0.0

    def kept(self) -> str:
        """Returns the number of layers without checkpointing in the last forward, under the memory budget."""
        from sparse_unsloth import get_state

        state = get_state(self.model)
        planner = None if state is None else state.planner
        return "" if planner is None else f"; {planner.num_kept} layers kept"

    def write(self, cell: Cell, times=(0.0, 0.0, 0.0), peak: float = 0.0, outcome: str = "", tokens=None) -> None:
        row = {
            **describe_run(self.args), "checkpointing": cell.checkpointing, "tiled": self.tiled, "layout": cell.layout,
            "method": cell.method, "tokens": cell.tokens if tokens is None else tokens, "peak_gib": round(peak, 3),
            "outcome": outcome,
            **dict(zip(("median_ms", "p20_ms", "p80_ms"), (round(value, 1) for value in times), strict=True)),
        }  # fmt: skip
        append_csv(self.path, [row], COLUMNS)
        rate = row["tokens"] / times[0] * 1000 if times[0] else 0
        print(
            f"{cell.layout:8} {cell.checkpointing:8} {cell.method:14} {row['tokens']:8d}  {times[0]:9.1f} ms "
            f"{rate:7.0f} tokens/s  {peak:6.2f} GiB  {outcome}",
            flush=True,
        )


def load(args: argparse.Namespace):
    """Loads the model of `sparse_unsloth.bench.models.load_model` for the longest row, with tiled MLPs if requested."""
    from sparse_unsloth.bench.models import load_model

    model = load_model(args, "peft" if args.cpu else "unsloth", max(2048, *args.lengths))
    if args.tiled and not args.cpu:
        from unsloth_zoo.tiled_mlp import patch_mlp

        for module in model.modules():
            if module.__class__.__name__.endswith("MLP") and "forward" in module.__dict__:
                fused = module.__dict__["forward"]
                patch_mlp(module)
                module._unsloth_forward = fused  # as when tiling is patched before LoRA is fused
    return model


def set_checkpointing(model, on: bool, cpu: bool) -> None:
    """Sets checkpointing of all layers, in the backend's way."""
    from sparse_unsloth import FastSparseLanguageModel

    FastSparseLanguageModel.for_training(
        model, use_gradient_checkpointing=(True if cpu else "unsloth") if on else False
    )
    if not on:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def host_bytes(model, tokens: int) -> int:
    """Returns the host's bytes of Unsloth's checkpointing: every layer's input, pinned in powers of two."""
    config = model.config.get_text_config()
    one = tokens * config.hidden_size * 2
    return (1 << (one - 1).bit_length()) * config.num_hidden_layers


def free_host_bytes() -> float:
    """Returns four fifths of the host's available memory, with the memory pinned for an earlier step."""
    import torch

    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 0.8 * (available + torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def describe_run(args: argparse.Namespace) -> dict[str, str]:
    from sparse_unsloth.bench.speed import describe

    args.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if args.cpu:
        return dict.fromkeys(COLUMNS[:6], "cpu")
    found = describe(args)
    return {name: found[name] for name in COLUMNS[:6]}


def read(path: Path) -> list[dict]:
    """Reads the rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row
            | {"tokens": int(row["tokens"]), "median_ms": float(row["median_ms"]), "peak_gib": float(row["peak_gib"])}
            for row in csv.DictReader(file)
        ]


def key_of(row: dict) -> tuple:
    """Returns the cell of a row; the longest sequence that fits has any length, and counts as the plan's."""
    tokens = row["tokens"] if row["layout"] != "longest" else None
    return row["layout"], row["checkpointing"], row["method"], tokens


def main(argv: list[str]) -> int:
    began = time.time()
    args = parse(argv)
    if args.draw is not None:
        import plot_long_sequence

        plot_long_sequence.main(args.draw, read(args.draw))
        return 0
    if not args.cpu:
        import unsloth  # noqa: F401  # first, as it asks
    complete = Run(args, began).go()
    print("complete" if complete else "run again for what is left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
