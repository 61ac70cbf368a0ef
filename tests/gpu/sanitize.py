"""Runs every kernel at small odd shapes under compute-sanitizer, and in the midst of poisoned memory without it.

    python tests/gpu/sanitize.py --out FOLDER [--seconds 60]       all of it: about two minutes on an H100

First a run of its own (which also compiles the kernels): each tensor lies between poisoned margins, so that what a
kernel reads or writes beyond it, or leaves unwritten, shows (`checks.Guard`). Then, side by side, runs under the
tools of compute-sanitizer, each tensor in an allocation of its own: memcheck, initcheck, racecheck, and memcheck on a
kernel that writes one element too far, which must be found. Logs go to FOLDER; the exit code is 0 if everything ran and
is clean, 1 for a fault, 2 where the tool is missing or the time was up.

The inner runs, to be put under a tool by hand:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --run bare
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "initcheck", "racecheck")
PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/compute-sanitizer*")
FAULT, INCOMPLETE = 1, 2
FOUND = 9
"""What compute-sanitizer is told to exit with when it found something."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the logs")
    parser.add_argument("--seconds", type=float, default=60, help="of each run's cases, start-up apart (%(default)s)")
    parser.add_argument("--run", choices=("guarded", "bare", "planted"), help="one run in this process")
    parser.add_argument("--only", default="", metavar="WORD", help="kernels whose name contains this")
    args = parser.parse_args(argv)
    if args.run == "planted":
        return run_planted()
    if args.run:
        return run_cases(args.run == "guarded", args.only, args.seconds)
    if args.out is None:
        parser.error("give --out FOLDER, or --run")
    return orchestrate(args)


def orchestrate(args: argparse.Namespace) -> int:
    """The guarded run, then the tools side by side."""
    args.out.mkdir(parents=True, exist_ok=True)
    began, limit = time.perf_counter(), args.seconds + 90
    words = [sys.executable, __file__, "--only", args.only, "--seconds", str(args.seconds), "--run"]
    log = args.out / "sanitize-guarded.txt"
    code = _wait(_start([*words, "guarded"], log), began + limit)
    codes = {"guarded": code if code in (0, INCOMPLETE) else FAULT}
    _say("guarded", codes["guarded"], began, log)
    tool = find_sanitizer()
    if tool is None:
        print("compute-sanitizer was not found: install CUDA's toolkit, or put it on the PATH", flush=True)
        return codes["guarded"] or INCOMPLETE
    options = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    runs = {name: ([tool, "--tool", name, *options], "bare") for name in TOOLS}
    runs["planted"] = [tool, "--tool", "memcheck", *options], "planted"
    logs = {name: args.out / f"sanitize-{name}.txt" for name in runs}
    started = {name: _start([*command, *words, run], logs[name]) for name, (command, run) in runs.items()}
    deadline = time.perf_counter() + limit
    for name, process in started.items():
        codes[name] = _judge(name, _wait(process, deadline), logs[name].read_text(errors="replace"))
        _say(name, codes[name], began, logs[name])
    return max(codes.values(), key=(0, INCOMPLETE, FAULT).index)


def _judge(name: str, code: int, log: str) -> int:
    if "Device not supported" in log or code == INCOMPLETE:
        return INCOMPLETE
    if name == "planted":
        return 0 if "Invalid __global__ write" in log else FAULT
    return FAULT if code else 0


def find_sanitizer() -> str | None:
    """The program, from the PATH or where CUDA's toolkits lie."""
    if found := shutil.which("compute-sanitizer"):
        return found
    for place in PLACES:
        for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True):
            if os.access(folder / "compute-sanitizer", os.X_OK):
                return str(folder / "compute-sanitizer")
    return None


def run_cases(guarded: bool, word: str, seconds: float) -> int:
    """Every kernel at the sizes `ODD` and `EVEN`, checked against plain PyTorch on the CPU."""
    if not guarded:
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor its own allocation, as long as it is
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.kernel_suite import cases, checks
    from benchmarks.kernel_suite import inputs as suite

    torch.set_num_threads(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    began, run, left_out = time.perf_counter(), 0, []
    for sizes in (suite.ODD, suite.EVEN):
        for case in cases.cases(sizes, suite.Draw("cpu", dtype, seed=run), word):
            if time.perf_counter() - began > seconds:
                left_out.append(f"{case.kernel} {case.shape}")
                continue
            memory = checks.Guard() if guarded else checks.Bare()
            inputs = checks.change_tensors(case.inputs, lambda tensor, hold=memory.hold: hold(tensor, device))
            try:
                checks.check(case, inputs, memory)
            except checks.WrongOutput as wrong:
                print(f"FAULT: {wrong}", flush=True)
                return FAULT
            run += 1
    print(f"{run} cases in {time.perf_counter() - began:.1f} s, {dtype} on {device}, as their references", flush=True)
    if left_out:
        print(f"{len(left_out)} were not run, the time was up: {'; '.join(left_out)}", flush=True)
    return INCOMPLETE if left_out or not run else 0


def run_planted() -> int:
    """A kernel that writes one element beyond its output; 0, as nothing here can see it."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    import torch
    from overrun import overrun

    overrun(torch.zeros(1000, dtype=torch.float32, device="cuda"))
    torch.cuda.synchronize()
    return 0


def _start(command: Sequence[str], log: Path) -> subprocess.Popen:
    with log.open("w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def _wait(process: subprocess.Popen, deadline: float) -> int:
    try:
        return process.wait(max(1.0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: the tool and the Python that it runs
        return INCOMPLETE


def _say(name: str, code: int, began: float, log: Path) -> None:
    word = {0: "clean", FAULT: "FAULT", INCOMPLETE: "INCOMPLETE"}[code]
    if name == "planted":
        word = {0: "found, as it must be", FAULT: "NOT FOUND"}.get(code, word)
    print(f"{name}: {word} ({time.perf_counter() - began:.0f} s)", flush=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]:
        print(f"  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
