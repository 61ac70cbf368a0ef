"""Reads, writes and aggregates tables of figures in CSV files."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_unsloth.errors import SparsityError

Row = Mapping[str, Any]


class StudyError(SparsityError):
    """A study that cannot run with the given options, files or packages."""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes ``rows``, which have the same keys, under a header line.

    Raises:
        ValueError: there are no rows, or their keys differ.
    """
    if not rows:
        raise ValueError(f"{path}: there are no rows to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Appends rows to a file; a new file gets a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a file of `write_csv`; every value is text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def groups(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    """Groups rows by their values at ``keys``, in the order of first appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def aggregate(rows: Iterable[Row], keys: Sequence[str], values: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each combination of ``keys``: the number of rows, and mean and deviation of each value.

    The standard deviation is the sample's (n - 1), and 0 for a single row.
    """
    table = []
    for key, members in groups(rows, keys).items():
        entry: dict[str, Any] = dict(zip(keys, key, strict=True)) | {"n": len(members)}
        for value in values:
            numbers = [float(member[value]) for member in members]
            entry[f"{value}_mean"] = statistics.fmean(numbers)
            entry[f"{value}_std"] = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        table.append(entry)
    return table
