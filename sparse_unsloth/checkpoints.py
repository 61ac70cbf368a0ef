"""Checkpoints of a run that was ended in the middle of writing one."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

logger = logging.getLogger("sparse_unsloth")

LAST_FILE = "trainer_state.json"
"""The file that transformers' Trainer writes into a checkpoint after all others."""


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest ``checkpoint-STEP`` in ``folder`` that was written to its end; None where there is none.

    A killed run may leave a newer one behind without its last file, or with a part of that; such a one is named in a
    warning and passed over, so that the run goes on from the one before.
    """
    folder = Path(folder)
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning("%s was not written to its end, so it is passed over; it can be deleted.", path)
    return None


_STEP = re.compile(r"checkpoint-(\d+)")


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
