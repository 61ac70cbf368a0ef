"""Trains by TRL's ``SFTTrainer`` on real text: Unsloth in each of its arms, and the same script with our import.

    python benchmarks/end_to_end.py --model llama8b --data chat --micro-batches 2x4 --seconds 480
    python benchmarks/end_to_end.py --table           (also --plot, --check)
    python benchmarks/end_to_end.py --backend peft --model tiny --steps 4 --warmup 1 --data chat     (without a GPU)

What a user sees, where `sparse-unsloth bench` sees a step alone: data loading, collation, loss, clipping, optimiser and
logging are in the time; loading the model and preparing the data are not. A *cell* is a model, a data set, a
micro-batch (``2x4``: two documents, four micro-batches a step; ``8x1`` has the same eight documents in one) and an arm,
in a process of its own. All arms get the same documents in the same order, real text (`benchmarks.real_text`);
``long16k`` is always one document a step (``1x1``). An arm is `script` with the arguments that the arm means:

    unsloth-stock, unsloth-padded, unsloth-graphs (UNSLOTH_BLOCK_CUDAGRAPHS=1), unsloth-kept
    (checkpoint_skip_layers="max"), unsloth-no-checkpointing; ours-exact (nothing left out, CUDA graphs); ours-auto
    (what `auto` decides); peft, the stock of --backend peft. Further arms of `sparse-unsloth bench` are joined by +:
    ours-exact+no-checkpointing, unsloth-padded+no-checkpointing.

How long a cell takes (Llama-3-8B in 4 bits on one H200, predicted): 20 s of imports, 10 s (Unsloth) to 42 s (ours, with
its probes) to load, and 30 steps of chat: 50 s stock, 10 to 30 s ours; padded arms compile for 20 to 100 s more. So 75
to 120 s a cell, five cells in ``--seconds 480``; bf16 likewise; the 1B half; long-prompts 90 to 150 s; long16k 90 s.
The first call makes the random model and the data: 60 s for the 8B. Ours captures a size at its third micro-batch: give
8x1 a longer ``--warmup``; the note tells how many forwards were replayed.

Tokens are those of the documents. ``tokens_per_s`` leaves out the first ``--warmup`` steps, ``total_s`` is the time of
all ``--steps``. Then come ``--profile`` further steps, for the share of the time in which kernels run. ``peak_gib`` is
PyTorch's allocated memory with captured graphs (on a CPU the process's). Rows are appended to ``--out``; each step's
loss goes to the file ``NAME-losses.jsonl`` beside it. ``--seconds`` limits the time; called again on the same machine
within two hours the job resumes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from plot_end_to_end import CASE, CELLS, ONE, fill_ratios, losses_path, plot, table
from real_text import KINDS, make_rows, make_tokenizer, report

from sparse_unsloth.bench.arms import PADDED, Arm, arm_notes, arm_of, why_not_installed, why_unavailable
from sparse_unsloth.bench.processes import Parent, Process, emit, first_line, serve
from sparse_unsloth.bench.profiling import covered
from sparse_unsloth.bench.runs import Plan, run_to_resume
from sparse_unsloth.bench.speed import describe, device_name
from sparse_unsloth.cli.bench import add_run_options
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.utils.environment import processor
from sparse_unsloth.utils.options import whole

RESULTS = Path(__file__).parent / "results" / "end_to_end.csv"
LONG = "long16k"
SHORTER = {"graphs": "block-graphs", "kept": "skip-max"}
"""Names of arms here, and in `sparse_unsloth.bench.arms`."""
DEFAULT_ARMS = {
    "unsloth": "unsloth-stock,ours-exact,ours-exact+no-checkpointing,unsloth-no-checkpointing,unsloth-padded,"
    "unsloth-padded+no-checkpointing,unsloth-kept,unsloth-graphs",
    "peft": "peft,ours-exact",
}
_LONGEST = {"max_position_embeddings": 131072}
MODELS = {
    "llama8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, **_LONGEST,
    },
    "llama1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
        "tie_word_embeddings": True, **_LONGEST,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True,
        **_LONGEST,
    },
    "tiny": {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **_LONGEST},
}  # fmt: skip
"""Random models of the sizes of Llama-3-8B, Llama-3.2-1B and SmolLM2-135M, and one for rehearsals on a CPU."""


@dataclass(frozen=True)
class Entry:
    """One arm here: an arm of the bench, and what our script adds to it.

    Attributes:
        arm: its variables, its layout, its arguments of ``get_peft_model``.
        ours: our import instead of Unsloth's.
        sparsity: our argument of ``get_peft_model``.
    """

    arm: Arm
    ours: bool = False
    sparsity: Mapping[str, object] = field(default_factory=dict)


def entry_of(name: str, backend: str) -> Entry:
    """Returns the arm of a name.

    Raises:
        ConfigError: there is no such arm, or the package lacks what it measures.
    """
    owner, _, rest = name.partition("-")
    first, *joined = (SHORTER.get(part, part) for part in rest.split("+"))
    if owner == "ours" and first in ("exact", "auto"):
        arm = arm_of("+".join([backend if backend == "peft" else "stock", *joined]))
        exact = {"preset": "dense", "cuda_graphs": torch.cuda.is_available()}
        return Entry(arm, True, exact if first == "exact" else {"preset": "auto"})
    arm = None
    if owner == "unsloth" == backend or name.split("+")[0] == backend == "peft":
        arm = arm_of("+".join([first, *joined]) if owner == "unsloth" else name)
    if arm is not None and arm.backend == backend:
        return Entry(arm)
    raise ConfigError(f"there is no arm {name} with --backend {backend}; arms are {DEFAULT_ARMS[backend]}, ours-auto")


# -- In the process of a cell -----------------------------------------------------------------------------------------


def script(
    FastLanguageModel, model_name: str, max_length: int, load_in_4bit: bool, lora: dict, dataset, settings: dict
):
    """Is the user's script, as README.md shows it; ``FastLanguageModel`` is the import that changes."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name, max_seq_length=max_length, load_in_4bit=load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, **lora)
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=SFTConfig(**settings))


def library_of(entry: Entry):
    """Imports what the arm imports; Unsloth first, as it asks. Ours keeps to the arm's backend."""
    if entry.arm.backend == "unsloth":
        unsloth = importlib.import_module("unsloth")
    if entry.ours:
        from sparse_unsloth import FastSparseLanguageModel as ours

        load = partial(ours.from_pretrained, backend=entry.arm.backend)
        return SimpleNamespace(from_pretrained=load, get_peft_model=ours.get_peft_model)
    return unsloth.FastLanguageModel if entry.arm.backend == "unsloth" else PlainPeft


class PlainPeft:
    """Loads models by transformers and adds adapters by PEFT, nothing of ours attached."""

    @staticmethod
    def from_pretrained(model_name: str, max_seq_length: int, load_in_4bit: bool):
        from sparse_unsloth.backends.peft.loading import load

        return load(model_name, max_seq_length, None, load_in_4bit)

    @staticmethod
    def get_peft_model(model, **lora):
        from sparse_unsloth.backends.peft.loading import add_lora
        from sparse_unsloth.language_model import TARGET_MODULES

        return add_lora(model, target_modules=list(TARGET_MODULES), lora_dropout=0.0, bias="none", **lora)


def settings_of(entry: Entry, kind: str, batch: int, accumulation: int, steps: int, folder: str) -> dict:
    """Returns the arguments of ``SFTConfig``; only the layout and the checkpointing differ between arms."""
    found = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "max_length": KINDS[kind].max_length, "packing": False,
        "completion_only_loss": True, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "logging_steps": 1,
        "bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available(), "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": 0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if entry.arm.layout == PADDED and entry.arm.backend == "unsloth":
        found["padding_free"] = False
    if entry.arm.lora.get("use_gradient_checkpointing", True) is False:
        found["gradient_checkpointing"] = False  # TRL's default is True
    return found


def measure_cell(args: argparse.Namespace) -> None:
    """Trains the one cell of this process and reports its row, and the curve of its losses."""
    piece, entry = cells_of(args)[0], next(iter(args.arms.values()))
    library = library_of(entry)
    from datasets import Dataset

    batch, accumulation = sizes_of(piece["micro_batch"])
    lora = dict(entry.arm.lora) | ({"sparsity": dict(entry.sparsity)} if entry.ours else {})
    count = (args.steps + args.profile) * batch * accumulation
    lines = (args.data_file or data_path(args, piece["data"])).read_text(encoding="utf-8").splitlines()
    dataset = Dataset.from_list([json.loads(line) for line in lines[:count]])
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(entry, piece["data"], batch, accumulation, args.steps + args.profile, folder)
        try:
            began = time.perf_counter()
            trainer = script(
                library, str(model_folder(args)), settings["max_length"], args.dtype == "4bit", lora, dataset, settings
            )
            ready = time.perf_counter() - began
            if not entry.ours and (why := why_unavailable(entry.arm, trainer.model)):
                emit(row=piece | {"note": why})
                return
            clock = make_clock(trainer, args.steps, args.warmup)
            trainer.add_callback(clock)
            trainer.train()
        except torch.OutOfMemoryError:
            emit(row=piece | {"note": "out of memory"})
            return
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    per_step = batch * accumulation
    tokens = [sum(lengths[at : at + per_step]) for at in range(0, len(lengths), per_step)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][: args.steps]
    speed = sum(tokens[args.warmup : args.steps]) / (clock.end - clock.warm)
    notes = [f"loaded in {ready:.0f} s", notes_of(entry, trainer.model, clock)]
    try:
        busy = busy_share(clock, sum(tokens[args.steps :]), speed)
    except Exception as error:  # the times are there already
        busy, notes = None, [*notes, f"no profile: {first_line(error)}"]
    found = {
        "tokens_per_s": round(speed, 1), "total_s": round(clock.end - clock.begin, 2), "busy_share": busy,
        "peak_gib": round(clock.peak / 2**30, 3), "note": ", ".join(filter(None, notes)),
        "final_loss": round(statistics.fmean(losses[-max(1, args.steps // 10) :]), 4),
    }  # fmt: skip
    times = [round(end - start, 4) for start, end in zip([clock.begin, *clock.ends], clock.ends, strict=False)]
    print(f"{describe_cell(piece)}: {found}", flush=True)
    emit(row=piece | found, curve={"losses": losses, "tokens": tokens[: args.steps], "step_s": times[: args.steps]})


def make_clock(trainer, steps: int, warmup: int):
    """Makes the callback that times the steps, and profiles those after ``steps``.

    It waits for the GPU at the beginning, after the warm-up, and at the end, not at each step; the trainer itself waits
    once a step, for the loss that it logs.
    """
    from transformers import TrainerCallback

    from sparse_unsloth import get_state
    from sparse_unsloth.training.step_times import forget_peak_memory, now, peak_memory

    attached = get_state(trainer.model)

    class Clock(TrainerCallback):
        def __init__(self):
            self.begin = self.warm = self.end = 0.0
            self.ends: list[float] = []
            self.peak = self.forwards = self.replayed = 0
            self.profile = None
            self.sizes: int | None = None
            self._step = self._last = 0
            trainer.model.register_forward_pre_hook(self._begin_forward)

        @property
        def graphs(self):  # with `auto` known when training begins
            return getattr(attached, "graphs", None)

        def on_step_begin(self, args, state, control, **kwargs):
            self._step = state.global_step
            if state.global_step == 0:
                forget_peak_memory()
                self.begin = now()
            if state.global_step == warmup:
                self.warm = now()
            if state.global_step == steps and torch.cuda.is_available():
                self.profile = torch.profiler.profile(activities=(torch.profiler.ProfilerActivity.CUDA,))
                self.profile.start()

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())
            if state.global_step == steps:
                self.end = now()
                self.peak = (memory := peak_memory()).get("gpu_allocated", memory["host"])
                if self.graphs is not None:
                    self.peak += self.graphs.memory()
                    self.sizes = len(self.graphs.captured_keys)
            if state.global_step == state.max_steps and self.profile is not None:
                now()
                self.profile.stop()

        def _begin_forward(self, *_):
            """Counts a timed forward (merged micro-batches have one), and whether the one before was replayed."""
            number = 0 if self.graphs is None else self.graphs.forward_number
            counts = warmup <= self._step < steps
            self.forwards += counts
            self.replayed, self._last = self.replayed + (counts and number != self._last), number

    return Clock()


def busy_share(clock, tokens: int, speed: float) -> float | None:
    """Returns the share of the timed steps in which kernels run; None without a GPU, or without profiled steps.

    The kernels' time of a token in the profiled steps counts, against the time of a token without the profiler.
    """
    if clock.profile is None:
        return None
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in clock.profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return round(min(covered(kernels) / 1e6 / tokens * speed, 1.0), 3) if kernels else None


def notes_of(entry: Entry, model, clock) -> str:
    """Describes after the training what ran."""
    if not entry.ours:
        return arm_notes(entry.arm, model)
    if clock.sizes is None:
        return "no CUDA graphs"
    return f"{clock.replayed / max(clock.forwards, 1):.0%} of the timed forwards replayed, {clock.sizes} sizes captured"


# -- In the parent ----------------------------------------------------------------------------------------------------


def cells_of(args: argparse.Namespace) -> list[dict]:
    """Returns the columns that identify each cell; the arms of a case are neighbours."""
    return [
        {
            "model": Path(args.model).name, "dtype": args.dtype, "data": kind, "micro_batch": micro, "arm": arm,
            "steps": str(args.steps), "warmup_steps": str(args.warmup),
        }
        for kind in args.data
        for micro in ([ONE] if kind == LONG else args.micro_batches)
        for arm in args.arms
    ]  # fmt: skip


def sizes_of(micro_batch: str) -> tuple[int, int]:
    """Returns ``(documents of a micro-batch, micro-batches of a step)``.

    Raises:
        ConfigError: it is not of the form AxB.
    """
    parts = micro_batch.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--micro-batches: {micro_batch!r} is not of the form 2x4 (documents x micro-batches a step)")
    return int(parts[0]), int(parts[1])


def model_folder(args: argparse.Namespace) -> Path:
    return args.work / args.model / "llama" if args.model in MODELS else Path(args.model)


def data_path(args: argparse.Namespace, kind: str) -> Path:
    """Returns the file of a data set; it has enough samples for all micro-batches."""
    micros = [ONE] if kind == LONG else args.micro_batches
    count = (args.steps + args.profile) * max(batch * accumulation for batch, accumulation in map(sizes_of, micros))
    return args.work / "data" / f"{Path(args.model).name}-{kind}-{count}.jsonl"


def prepare(args: argparse.Namespace) -> None:
    """Makes the random model and the data sets where they are missing; what is there is not made again."""
    from transformers import AutoTokenizer

    from sparse_unsloth.bench.families import write_models

    folder = model_folder(args)
    if args.model in MODELS and not (folder / "tokenizer_config.json").is_file():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_models(folder.parent, ("llama",), device=device, **MODELS[args.model])
        for file in (*folder.glob("*token*"), *folder.glob("chat_template*")):
            file.unlink()  # of a tokenizer of words
        make_tokenizer().save_pretrained(folder)
    tokenizer = None
    for kind in args.data:
        path = data_path(args, kind)
        if path.is_file() and not args.check:
            continue
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
        rows = make_rows(kind, tokenizer, int(path.stem.rpartition("-")[2]))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.replace(path)
        print(report(kind, rows, tokenizer), flush=True)


def prepare_elsewhere(argv: list[str]) -> None:
    """Calls `prepare` in another process: this one must not use the GPU."""
    subprocess.run([sys.executable, __file__, *argv, "--prepare"], check=True)


def conduct(args: argparse.Namespace, argv: list[str]) -> bool:
    """Trains every cell that the table lacks, each in a child; returns whether all have a speed. Sets ``args.run``."""
    with Parent(args.seconds).listening() as parent:
        common = describe(args, device_name() if torch.cuda.is_available() else processor())
        plan = Plan(args.out, CELLS, cells_of(args))
        args.run = args.run or run_to_resume([plan], common, args.date)
        print(f"run {args.run}", flush=True)
        plan = Plan(args.out, CELLS, plan.pieces, args.run, common)
        if plan.left():
            prepare_elsewhere(argv)
        longest = 0.0
        for piece in plan.left():
            arm = args.arms[piece["arm"]].arm
            if why := why_not_installed(arm):
                plan.write(piece | {"note": why})
                continue
            if parent.deadline is not None and time.time() + longest > parent.deadline:
                parent.stopped = parent.stopped or f"the next cell takes some {longest:.0f} s"
            if parent.stopped:
                break
            print(f"-- {describe_cell(piece)}: in a new process", flush=True)
            began = time.time()
            command = [sys.executable, __file__, *argv, "--run", args.run, "--date", args.date]
            command += ["--data", piece["data"], "--micro-batches", piece["micro_batch"]]
            command += ["--data-file", str(data_path(args, piece["data"]))]
            env = {**arm.env, "UNSLOTH_DATASET_NUM_PROC": "none"}  # no worker processes after CUDA has started
            error = parent.run(Process((piece["arm"],), (), env), command, partial(take, plan))
            longest = max(longest, time.time() - began)
            if error is not None:
                plan.write(piece | {"note": f"failed: {error}"})
        fill_ratios(args.out)
        if parent.stopped:
            print(f"stopped, {parent.stopped}: {len(plan.left())} cells are left; call again to go on", flush=True)
    return plan.is_timed()


def take(plan: Plan, reported: dict) -> None:
    """Writes a child's row, and the losses beside the table."""
    row = reported["row"]
    plan.write({**row, "busy_share": "" if row.get("busy_share") is None else row["busy_share"]})
    if "curve" in reported:
        identity = {name: row[name] for name in (*CASE, "arm")}
        with losses_path(plan.path).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"run": plan.run, **identity, **reported["curve"]}) + "\n")


def describe_cell(row: Mapping[str, str]) -> str:
    return " ".join(row[name] for name in ("model", "dtype", "data", "micro_batch", "arm"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama8b", help=f"{', '.join(MODELS)} (random), or an instruct model's folder"
    )
    parser.add_argument("--dtype", choices=("4bit", "bf16"), help="default: 4bit on a GPU, bf16 (float32) elsewhere")
    parser.add_argument("--backend", choices=list(DEFAULT_ARMS), default="unsloth")
    parser.add_argument("--arms", help="; ".join(f"with {name}: {arms}" for name, arms in DEFAULT_ARMS.items()))
    parser.add_argument("--data", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--micro-batches", default="2x4,8x1", help=f"default: %(default)s; {LONG} always has {ONE}")
    parser.add_argument(
        "--steps", type=whole(), default=30, help="optimiser steps, with the warm-up; default: %(default)s"
    )
    parser.add_argument("--warmup", type=whole(0), default=10, help="steps left out of tokens/s; default: %(default)s")
    parser.add_argument("--profile", type=whole(0), default=2, help="profiled steps after them; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("/tmp/end_to_end"), help="random models and data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only make the data, and print lengths beside targets")
    parser.add_argument("--plot", action="store_true", help="only draw a run, the newest by default")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--methods", help=argparse.SUPPRESS)  # of a child's words, not used here
    parser.add_argument("--data-file", type=Path, help=argparse.SUPPRESS)
    add_run_options(parser)
    args = parser.parse_args(argv)
    args.checkpointing = ""
    args.dtype = args.dtype or ("4bit" if torch.cuda.is_available() else "bf16")
    names = DEFAULT_ARMS[args.backend] if args.arms is None else args.arms
    args.arms = {name: entry_of(name, args.backend) for name in names.split(",") if name}
    args.data, args.micro_batches = args.data.split(","), args.micro_batches.split(",")
    if unknown := [kind for kind in args.data if kind not in KINDS]:
        raise ConfigError(f"--data names {', '.join(unknown)}; data sets are {', '.join(KINDS)}")
    for micro in args.micro_batches:
        sizes_of(micro)
    if not 0 < args.warmup < args.steps:
        raise ConfigError(f"--warmup must be from 1 to below --steps ({args.steps}), given {args.warmup}")
    return args


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns 1 if a cell has no speed yet, or cannot be trained."""
    args = parse(argv)
    if args.child:
        return serve(partial(measure_cell, args))
    if args.prepare or args.check:
        prepare(args)
        return 0
    if args.plot:
        print(*plot(args.out, args.run), sep="\n")
        return 0
    complete = args.table or conduct(args, argv)
    print(table(args.out, args.run), flush=True)
    return int(not complete)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"end_to_end: {error}")
