"""Draws README's picture from the figures of its first table: thousands of tokens a second, by kind of data.

    python benchmarks/plot_readme.py

The PNG keeps the table that it shows, so that a test finds a picture of other figures (`table_of`).
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "benchmarks" / "results" / "readme.png"
COLOURS = ("tab:gray", "black", "tab:blue", "tab:orange")
NAMES = ("stock Unsloth", "best arm of Unsloth", "ours, exact", "ours, rows (approximate)")
KEPT_AS = "Description"
"""The text field of the PNG that holds the table."""


def figures(table: list[str]) -> dict[str, list[float]]:
    """Returns thousands of tokens a second of each arm (`NAMES`), by micro-batch, from the lines of a table."""
    found = {}
    for line in table[2:]:
        batch, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        sizes = re.search(r"(?:(\d+) x )?(\d[\d,]+)(?: tokens)?", batch)
        assert sizes is not None, f"no size in {batch!r}"
        tokens = int(sizes[1] or 1) * int(sizes[2].replace(",", ""))
        found[batch] = [tokens / float(re.split(r"\D", cell, maxsplit=1)[0]) for cell in cells]
    return found


def table_of(readme: str) -> list[str]:
    """Returns the lines of the first table of a page."""
    return re.search(r"(?:^\|.*\n)+", readme, re.MULTILINE)[0].splitlines()


def draw(table: list[str], path: Path) -> None:
    """Draws the table's figures as bars, with the ratio to stock Unsloth above ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes, speeds = figure.subplots(), figures(table)
    for arm, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        places = [case + 0.2 * (arm - 1.5) for case in range(len(speeds))]
        heights = [values[arm] for values in speeds.values()]
        bars = axes.bar(places, heights, 0.18, color=colour, label=name)
        if arm:
            axes.bar_label(bars, [f"{values[arm] / values[0]:.1f}x" for values in speeds.values()], fontsize=8)
    axes.set_xticks(range(len(speeds)), [textwrap.fill(batch, 26) for batch in speeds], fontsize=9)
    axes.set_ylabel("thousand tokens a second")
    axes.set_title("LoRA on Llama-3-8B sizes, 4-bit, one H200 (higher is faster; times stock Unsloth)", fontsize=10)
    axes.margins(y=0.22)
    axes.legend(ncols=4, fontsize=8, loc="upper center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120, metadata={KEPT_AS: "\n".join(table), "Software": None})


if __name__ == "__main__":
    draw(table_of((ROOT / "README.md").read_text(encoding="utf-8")), PICTURE)
