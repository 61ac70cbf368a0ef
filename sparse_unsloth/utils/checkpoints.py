"""Finds the checkpoint from which a run can resume, and says what is wrong with damaged ones."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from sparse_unsloth.errors import SparsityError

logger = logging.getLogger("sparse_unsloth")

LAST_FILE = "trainer_state.json"
"""The file that transformers' Trainer writes into a checkpoint last."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
SHARDED = ("pytorch_model_fsdp_", "global_step")
"""Prefixes of the folders that hold weights of FSDP and DeepSpeed."""


class CheckpointError(SparsityError):
    """Training cannot resume from the checkpoint."""


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest complete ``checkpoint-STEP`` in ``folder``; None where there is none.

    A killed run may leave a newer, incomplete one. A warning names it, and it is skipped.

    Raises:
        CheckpointError: the newest complete checkpoint has no optimiser state.
    """
    for path in stored_checkpoints(folder):
        fault = damage(path)
        if fault is None:
            _check_optimizer(path)
            return str(path)
        logger.warning("%s is not whole, so it is passed over: %s. It can be deleted.", path, fault)
    return None


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raises CheckpointError unless training can resume from ``checkpoint``."""
    path = Path(checkpoint)
    fault = damage(path)
    if fault is not None:
        whole = next((other for other in stored_checkpoints(path.parent) if damage(other) is None), None)
        fix = f"Take {whole}, which is." if whole else "There is no other one beside it that is: start the run again."
        raise CheckpointError(f"resume_from_checkpoint: {path} is not whole: {fault}. {fix}")
    _check_optimizer(path)


def stored_checkpoints(folder: str | Path) -> list[Path]:
    """Every ``checkpoint-STEP`` in ``folder``, the newest first, complete or not."""
    found = [
        (int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The trainer's state in a complete checkpoint: steps, logs, callbacks."""
    return json.loads((Path(checkpoint) / LAST_FILE).read_text(encoding="utf-8"))


def damage(checkpoint: Path) -> str | None:
    """How the checkpoint is incomplete or damaged; None where it is not."""
    try:
        whole = isinstance(read_state(checkpoint).get("global_step"), int)
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        missing = not (checkpoint / LAST_FILE).is_file()
        return f"{LAST_FILE}, which is written last, {'is missing' if missing else 'is damaged'}"
    for file in sorted(checkpoint.rglob("*.safetensors")):
        if not _is_whole_safetensors(file):
            return f"{file.relative_to(checkpoint)} is damaged"
    for file in sorted(path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)):
        if not _is_whole_torch_file(file):
            return f"{file.name} is damaged"
    names = [path.name for path in checkpoint.iterdir()]
    nested = any((checkpoint / name / file).is_file() for name in names for file in WEIGHTS)
    sharded = any(name.startswith(SHARDED) or name.endswith((".index.json", "_fsdp.bin")) for name in names)
    if not (set(WEIGHTS) & set(names) or nested or sharded):
        return f"it holds no weights ({WEIGHTS[0]})"
    if any(name.startswith(("optimizer", "scheduler")) for name in names):
        for part in ("optimizer", "scheduler", "rng_state"):
            if not any(name.startswith(part) for name in names):
                return f"it holds no {part}"
    return None


def _check_optimizer(checkpoint: Path) -> None:
    if any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        return
    raise CheckpointError(
        f"resume_from_checkpoint: {checkpoint} holds no optimizer state (save_only_model: true leaves it out), so "
        "training would go on with a fresh one, another learning rate and other random numbers. Begin a new run with "
        f"its adapter instead: --model_name_or_path {checkpoint} --output_dir ANOTHER; with save_only_model: false "
        "the next run can be resumed."
    )


_STEP = re.compile(r"checkpoint-(\d+)")


def _is_whole_safetensors(file: Path) -> bool:
    """Whether the file has the length that its header states."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                return False
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0) == size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_whole_torch_file(file: Path) -> bool:
    """Whether a file of ``torch.save`` has its zip directory, which is at the end; older formats have none."""
    with open(file, "rb") as stream:
        start = stream.read(2)
    return zipfile.is_zipfile(file) if start == b"PK" else bool(start)
