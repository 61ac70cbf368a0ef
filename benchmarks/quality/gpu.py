"""Runs a queue of trainings of `benchmarks.quality` in several processes that share one GPU, the most telling first.

    python -m benchmarks.quality.gpu --seconds 420 --out WORK --tar $OUT/quality.tgz      # quality.csv, details, logs
    cp WORK/quality* benchmarks/results/ && python -m benchmarks.quality update && python -m benchmarks.quality report

Each finished setting is appended to OUT at once, and settings that OUT has are not trained again, so it may be cut off
and called again. A job begins when the GPU's memory has room for it and it could end in time. It needs SmolLM2's GGUF
file and data of `prepare`, and Gemma's as `benchmarks.quality.gemma3 trim` makes them. On a CPU, for a rehearsal:
`--flags "--seeds 2 --steps 4 ..."`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.__main__ import ROOT
from benchmarks.quality.table import paired, read_rows
from sparse_unsloth.utils.options import real, whole

SMOLLM2, GEMMA3 = "smollm2", "gemma3"
START_SECONDS = 70
"""What a process needs to import, load and compile, and to train something after that."""
MEMORY = {"A": 8, "B": 7, "C": 10, "D": 17, "E": 10}
"""GiB that a training takes at most, of either model: a row of Gemma saves 7 % more bytes than one of SmolLM2, but it
has fewer rows, and with the 32,768 tokens of `trim` smaller logits. All its tokens would take 20 GiB more on D (12
bytes a logit).
"""


@dataclass(frozen=True)
class Job:
    """One process: settings of a task, ``together`` of them at once, with options of `run`."""

    model: str
    task: str
    settings: str
    together: int = 1
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.model, self.task, self.settings.split(",")[0], *(o.strip("-") for o in self.options)])

    @property
    def memory(self) -> int:
        """GiB on the GPU."""
        count = min(self.together, self.settings.count(",") + 1)
        return count * MEMORY[self.task]


def dense_and_rows(model: str, task: str) -> Job:
    return Job(model, task, "dense,default,dense-65")


FP8 = "fp8-context,fp8"
JOBS = (
    Job(SMOLLM2, "D", "dense,dense-50,dense-65"),
    Job(SMOLLM2, "E", "dense,dense-50,dense-65"),
    Job(SMOLLM2, "D", "default,random-rows-25"),
    Job(SMOLLM2, "E", "default,random-rows-25"),
    Job(SMOLLM2, "D", FP8),
    Job(SMOLLM2, "A", f"{FP8},falling-25"),
    Job(SMOLLM2, "C", f"{FP8},falling-25"),
    Job(SMOLLM2, "B", f"{FP8},falling-25"),
    dense_and_rows(GEMMA3, "A"),
    dense_and_rows(GEMMA3, "E"),
    dense_and_rows(GEMMA3, "C"),
    dense_and_rows(GEMMA3, "D"),
    Job(SMOLLM2, "C", "dense,default", options=("--steps", "900")),
    Job(SMOLLM2, "C", "dense,default", options=("--rate", "0.003")),
    Job(SMOLLM2, "C", "dense,default", options=("--rate", "0.0003")),
    Job(SMOLLM2, "E", f"{FP8},falling-25"),
    Job(SMOLLM2, "A", "dense,default", options=("--rate", "0.003")),
    Job(SMOLLM2, "A", "dense,default", options=("--rate", "0.0003")),
    Job(SMOLLM2, "A", "dense,default", options=("--steps", "2700")),
)
"""In the order of their importance."""


@dataclass
class Queue:
    """Jobs that wait, and the processes of those that run."""

    arguments: argparse.Namespace
    ends: float
    waiting: list[Job]
    running: dict[Job, tuple[subprocess.Popen, bool]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    packed: float = 0.0

    def start(self, job: Job, compiled: bool) -> None:
        """Begins a process, and prints that."""
        own, left = self.arguments, self.ends - time.perf_counter()
        data, model = (own.data, own.smollm2) if job.model == SMOLLM2 else (own.gemma3_data, own.gemma3_folder)
        command = [
            sys.executable, "-u", "-m", "benchmarks.quality", "run", "--tasks", job.task, "--settings", job.settings,
            "--together", str(job.together), "--model", str(model), "--data", str(data), "--out", str(own.out),
            "--seconds", f"{left:.0f}", "--commit", own.commit, *job.options, *shlex.split(own.flags),
            *(["--compile"] if compiled else []),
        ]  # fmt: skip
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
        with (own.out / f"{job.name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        self.running[job] = process, compiled
        self.say(f"{job.name} begins" + ("" if compiled else ", not compiled"))

    def fill(self) -> None:
        """Begins the jobs that there is room, time and a model for, in their order."""
        for job in list(self.waiting):
            if len(self.running) == self.arguments.processes or self.ends - time.perf_counter() < START_SECONDS:
                return
            used = sum(other.memory for other in self.running)
            ready = job.model == SMOLLM2 or self.arguments.gemma3_folder.exists()
            if ready and used + job.memory <= self.arguments.memory:
                self.waiting.remove(job)
                self.start(job, self.arguments.compile)

    def collect(self) -> None:
        """Notices processes that ended; one that failed although it was compiled is tried once more without."""
        for job, (process, compiled) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[job]
            self.say(f"{job.name} ended" + (f" with {process.returncode}, see its log" if process.returncode else ""))
            if process.returncode and compiled and self.ends - time.perf_counter() > START_SECONDS:
                self.start(job, False)

    def pack(self) -> None:
        """Writes all of --out into one file, where it has changed: machines bring few files back."""
        target, files = self.arguments.tar, list(self.arguments.out.iterdir())
        newest = max((file.stat().st_mtime for file in files), default=0.0)
        if target is None or newest <= self.packed:
            return
        self.packed, begun = newest, target.with_suffix(".part")
        with tarfile.open(begun, "w:gz") as tar:
            for file in files:
                tar.add(file, file.name)
        begun.rename(target)

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        print(f"{time.perf_counter() - self.began:5.0f} s: {text}", flush=True)

    def run(self) -> None:
        """Works until nothing waits or the time is up; ends what still runs then."""
        while time.perf_counter() < self.ends:
            self.collect()
            self.fill()
            self.pack()
            late = self.ends - time.perf_counter() < START_SECONDS
            if not self.running and (late or not self.waiting):
                break
            time.sleep(0.5)
        for process, _ in self.running.values():
            process.kill()
        self.pack()
        self.say(f"left: {', '.join(job.name for job in [*self.running, *self.waiting]) or 'nothing'}")


def table(path: Path) -> list[str]:
    """The mean answer loss of each setting, and its paired difference to dense with its interval."""
    losses: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(path):
        losses[row["model"], row["task"]][row["config"]][row["seed"]] = row["answer_nll"]
    lines = []
    for (model, task), settings in sorted(losses.items()):
        dense = settings.get("dense", {})
        for name, found in settings.items():
            mean, width, _ = paired([loss - dense[seed] for seed, loss in found.items() if seed in dense])
            against = "" if name == "dense" else f"  against dense {mean:+.4f} ± {width:.4f}"
            lines.append(f"{model:13} {task:14} {name:15} {len(found)} {statistics.fmean(found.values()):.4f}{against}")
    return lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=real(least=0), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tar", type=Path, help="keep a .tgz of all of --out here")
    parser.add_argument("--processes", type=whole(), default=10)
    parser.add_argument("--memory", type=whole(), default=120, help="GiB of the GPU (default: %(default)s)")
    parser.add_argument("--smollm2", type=Path, default=Path("/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--gemma3", type=Path, default=Path("/tmp/gemma3/model.gguf"), help="of `trim`")
    parser.add_argument("--gemma3-folder", type=Path, default=Path("/tmp/gemma3/model"), help="made of it if need be")
    parser.add_argument("--data", type=Path, default=ROOT / ".quality" / "data.npz")
    parser.add_argument("--gemma3-data", type=Path, default=ROOT / ".quality" / "gemma3-small.npz")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--jobs", default="", help="only those whose name holds one of these, parted by commas")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--flags", default="", help="more options of `run`")
    own = parser.parse_args(words)
    own.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS if any(part in job.name for part in own.jobs.split(","))]
    queue, converting = Queue(own, time.perf_counter() + own.seconds - 8, jobs), None
    needed = any(job.model == GEMMA3 for job in jobs) and not own.gemma3_folder.exists()
    if needed and own.gemma3.exists() and own.gemma3_data.exists():
        command = [sys.executable, "-m", "benchmarks.quality.gemma3", "unpack", own.gemma3, own.gemma3_folder]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with (own.out / "convert.log").open("w") as log:
            converting = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
    elif needed:
        queue.waiting = [job for job in jobs if job.model != GEMMA3]
        queue.say(f"no Gemma 3: {own.gemma3} or {own.gemma3_data} is missing")
    queue.run()
    if converting is not None:
        converting.kill()
    if (own.out / "quality.csv").exists():
        print("\n".join(table(own.out / "quality.csv")))


if __name__ == "__main__":
    main()
