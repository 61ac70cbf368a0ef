"""Draws progress bars of waits above two seconds, or writes lines, on terminals alone and without colours."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from sparse_unsloth.utils.distributed import is_main

SHORT = 2.0
"""Seconds that a wait may last without a bar."""


def bar(items: Iterable[Any] | None, title: str, unit: str, *, total: int | None = None, shown: bool = True) -> tqdm:
    """Returns a bar on standard error: iterates over ``items``, or with ``items`` None counts by ``update()``.

    Nothing is drawn by other processes than the main one, where standard error is no terminal, or before `SHORT`
    seconds have passed.

    Args:
        items: what is waited for, one after the other.
        title: what happens, before the bar.
        unit: what is counted, in the singular.
        total: how many there are, where ``items`` has no length.
        shown: False draws nothing.
    """
    quiet = None if shown and is_main() else True  # None: tqdm asks whether it writes to a terminal
    return tqdm(items, desc=title, unit=unit, total=total, delay=SHORT, disable=quiet)


def line(text: str) -> None:
    """Writes a line above bars that are drawn, on standard error: for waits that are spread over a training's steps.

    Nothing is written by other processes than the main one, or where standard error is no terminal.
    """
    if is_main() and sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)
