"""Refuses versions of libraries that cannot train on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from packaging.version import Version

from sparse_unsloth.errors import BackendError
from sparse_unsloth.utils.environment import version_of

# From this release on, TRL's SFTTrainer computes its loss in a Triton kernel.
TRL_NEEDS_GPU = Version("1.15.0")
Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: what was examined, what was found, and the fix (empty: none needed)."""

    name: str
    found: str
    wanted: str = ""
    status: Status = "ok"
    fix: str = ""


def check_can_train(use_cpu: bool = False) -> None:
    """Refuses combinations of versions and hardware that would fail inside TRL with an obscure error.

    Args:
        use_cpu: whether the training is told not to use the GPU.

    Raises:
        BackendError: TRL's trainer needs a GPU and there is none.
    """
    finding = trl_without_gpu(use_cpu)
    if finding.status == "problem":
        raise BackendError(f"{finding.name}: {finding.found}. {finding.fix}")


def trl_without_gpu(use_cpu: bool = False) -> Finding:
    """Tests whether TRL's trainer runs on this machine."""
    version = version_of("trl")
    gpu = not use_cpu and (torch.cuda.is_available() or torch.xpu.is_available())
    if version and Version(version) >= TRL_NEEDS_GPU and not gpu:
        return Finding(
            "TRL without a GPU",
            f"TRL {version} computes its loss in Triton and cannot train without a GPU",
            "below 1.15 without a GPU",
            "problem",
            "Install an older one: `pip install 'trl<1.15'`.",
        )
    return Finding("TRL's trainer", "can train on this device" if version else "TRL is missing")
