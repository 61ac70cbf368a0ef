"""Draws figures without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(columns: int, rows: int = 1, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """Makes a figure of ``rows`` times ``columns`` panels with a light grid; returns it and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten().tolist()
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
