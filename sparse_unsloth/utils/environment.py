"""Collects versions and hardware as plain data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from sparse_unsloth.errors import InstallError

PACKAGE = "sparse-unsloth"
UNSLOTH = "unsloth"
"""The extra with the fast backend."""
FOR_DEVELOPERS = ("docs", "dev")
"""Extras that no command needs."""
OPTIONAL = {
    "triton": "kernels; comes with PyTorch for GPUs",
    "xformers": "comes with Unsloth",
    "flash-attn": "faster attention, for GPUs that have it",
}


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain data: enough to repeat a run or to report a fault."""
    declared = [*requirements(), *requirements(UNSLOTH)]
    names = [PACKAGE, *(requirement.name for requirement in declared), *OPTIONAL]
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
    """The git commit of ``folder``, with "-dirty" where files are changed; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() or "unknown"


def requirements(extra: str = "") -> list[Requirement]:
    """The dependencies that apply to this machine, with the tested ranges: the package's, or those an extra adds."""
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in texts]
    base = [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return base
    return [item for item in found if item not in base and item.marker.evaluate({"extra": extra})]


def extras() -> dict[str, list[str]]:
    """The extras for users of the package, each with what of it is missing or of another version."""
    try:
        names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        name: [f"{item.name}{item.specifier}" for item in requirements(name) if not _is_there(item)]
        for name in names
        if name not in FOR_DEVELOPERS
    }


def require(extra: str, purpose: str, *modules: str) -> None:
    """Checks that optional libraries are there, before anything is computed for which they are needed.

    Args:
        extra: the extra of the package that brings them.
        purpose: what needs them, to begin the message with.
        modules: their names as they are imported.

    Raises:
        InstallError: one is missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{purpose} needs {' and '.join(missing)}, which the extra {extra} brings: "
            f"`pip install '{PACKAGE}[{extra}]'`."
        )


def _is_there(requirement: Requirement) -> bool:
    version = version_of(requirement.name)
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


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
