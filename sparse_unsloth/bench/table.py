"""The one long table of measurements, and what a run says when its rows are compared with its dense baseline."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_unsloth.bench.methods import BASELINE, LLAMA_3_8B, TARGETS, flop_limit
from sparse_unsloth.costs import ModelShape
from sparse_unsloth.errors import ConfigError

COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "checkpointing", "shape", "method", "tokens", "median_ms",
    "p20_ms", "p80_ms", "peak_gib",
)  # fmt: skip
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "peak_gib")
SHARED = COLUMNS[:7]
"""What all rows of a run have in common."""
PROFILE_COLUMNS = (*SHARED, "shape", "method", "kind", "ms", "launches")
"""Of the table of profiles beside it: rows for the kinds of kernels in a step, for its whole time, and for the rest."""
STEP = "whole step"


def append_rows(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Adds rows at the end of the table, which begins with its heading.

    Raises:
        ConfigError: the file there has other columns.
        ValueError: a row with a column too many or too few.
    """
    rows = list(rows)
    if any(set(row) != set(columns) for row in rows):
        raise ValueError(f"a row must have the columns {', '.join(columns)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    _read(path, columns)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict]:
    """The rows, with numbers as numbers; none where there is no file.

    Raises:
        ConfigError: the file has other columns.
    """
    rows = _read(path, COLUMNS)
    return [row | {"tokens": int(row["tokens"])} | {name: float(row[name]) for name in NUMBERS} for row in rows]


def profile_path(table: Path) -> Path:
    """The table of profiles that lies beside a table of times."""
    return table.with_name(f"{table.stem}-profile.csv")


def read_profile_rows(path: Path) -> list[dict]:
    """`read_rows` of a table of profiles."""
    rows = _read(path, PROFILE_COLUMNS)
    return [row | {"ms": float(row["ms"]), "launches": int(row["launches"])} for row in rows]


def _read(path: Path, columns: Sequence[str]) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ConfigError(f"{path} has other columns than a table of speed; write to another file")
        return list(reader)


@dataclass(frozen=True)
class Comparison:
    """A row beside the dense baseline of its run and shape; None where there is none, or where none is stated."""

    row: dict
    speedup: float | None
    memory: float | None
    target: float | None
    limit: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.row["tokens"] / self.row["median_ms"] * 1000

    @property
    def of_limit(self) -> float | None:
        """The share of the FLOP limit that the speed-up reaches."""
        return None if self.speedup is None or self.limit is None else self.speedup / self.limit


def compare(rows: list[dict], model: ModelShape | None) -> list[Comparison]:
    """The rows of one run against its dense Unsloth; ``model`` None: limits are not known.

    Where dense was measured more than once at a shape (``--then``), the row before counts, or else the first.
    """
    dense = {row["shape"]: row for row in reversed(rows) if row["method"] == BASELINE}
    comparisons = []
    for row in rows:
        shape, method = row["shape"], row["method"]
        if method == BASELINE:
            dense[shape] = row
        base, checkpointing = dense.get(shape), row["checkpointing"] != "False"
        comparisons.append(
            Comparison(
                row,
                speedup=None if base is None else base["median_ms"] / row["median_ms"],
                memory=None if base is None else row["peak_gib"] / base["peak_gib"],
                target=TARGETS.get((shape, method), (None,))[0] if checkpointing and model == LLAMA_3_8B else None,
                limit=None if model is None or shape == "host" else flop_limit(shape, method, model, checkpointing),
            )
        )
    return comparisons


def report(rows: list[dict], model: ModelShape | None, methods: Collection[str]) -> str:
    """One line for each row of ``methods`` that has a baseline among the ``rows`` of its run."""
    lines = []
    for one in compare(rows, model):
        if one.speedup is None or one.row["method"] == BASELINE or one.row["method"] not in methods:
            continue
        parts = [f"{one.row['method']:20} {one.row['shape']:13} {one.speedup:.2f}x the speed of dense"]
        if one.target is not None:
            parts.append(f"target {one.target:g}x {'reached' if one.speedup >= one.target else 'MISSED'}")
        if one.limit is not None:
            parts.append(f"{one.of_limit:.0%} of the FLOP limit {one.limit:.2f}x")
        parts += [f"{one.memory:.2f}x the peak memory", f"{one.tokens_per_second:.0f} tokens/s"]
        lines.append(", ".join(parts))
    return "\n".join(lines)
