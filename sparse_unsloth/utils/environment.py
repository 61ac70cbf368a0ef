"""Versions and hardware as plain data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

PACKAGE = "sparse-unsloth"
OPTIONAL = {
    "xformers": "comes with Unsloth",
    "flash-attn": "faster attention, for GPUs that have it",
}


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain data: enough to repeat a run or to report a fault."""
    names = [PACKAGE, *(requirement.name for requirement in requirements()), *OPTIONAL]
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "packages": {name: version for name in dict.fromkeys(names) if (version := version_of(name))},
    }


def commit_of(folder: Path) -> str:
    """The git commit that ``folder`` is at, with "-dirty" where files were changed; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() or "unknown"


def requirements() -> list[Requirement]:
    """The package's own dependencies that apply to this machine; they state the tested ranges."""
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in texts]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def version_of(package: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The CPU's name."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
