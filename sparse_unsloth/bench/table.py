"""Reads and writes tables of measurements, and compares rows with Unsloth's arms."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_unsloth.bench.arms import BASELINES, FLAT, PADDED, PEFT, STOCK
from sparse_unsloth.bench.methods import BASELINE, LLAMA_3_8B, TARGETS, flop_limit
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.reporting.tables import append_csv
from sparse_unsloth.utils.unreadable import text_of

ARM_COLUMNS = ("arm", "warmup_s", "over_stock", "over_best_arm", "best_arm", "run", "unsloth", "torch", "note")
"""Of every table with arms: ``arm`` is empty in rows of our methods, ``note`` says why a row has no time; the ratios
are the time of the stock arm, and of the best arm, at the same case in the same run, over the row's."""
COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "checkpointing", "shape", "method", "tokens", "median_ms",
    "p20_ms", "p80_ms", "peak_gib", *ARM_COLUMNS, "layout",
)  # fmt: skip
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "peak_gib")
SHARED = COLUMNS[:7]
"""The columns that all rows of a run share."""
PROFILE_COLUMNS = (*SHARED, "shape", "method", "kind", "ms", "launches")
"""Of the table of profiles beside it: rows for the kinds of kernels in a step, for its whole time, and for the rest."""
STEP = "whole step"


@dataclass(frozen=True)
class Kind:
    """A kind of table with arms.

    Attributes:
        columns: all columns.
        case: the columns of the timed case: rows that share them, the run, model and dtype are compared.
        time: the column that is empty in a row without a time.
        milliseconds: returns the time of a micro-batch from a timed row.
    """

    columns: tuple[str, ...]
    case: tuple[str, ...]
    time: str
    milliseconds: Callable[[Mapping[str, str]], float]


SPEED = Kind(COLUMNS, ("shape",), "median_ms", lambda row: float(row["median_ms"]))


def append_rows(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Appends rows to the table, which begins with its heading; older tables without arms get the columns of arms.

    Raises:
        ConfigError: the file has other columns.
        ValueError: a row has a column too many or too few.
    """
    without = dict.fromkeys(set(columns) - set(_older(columns)), "")
    rows = [without | row for row in rows]
    _check_columns(rows, columns)
    if path.exists() and _heading(path, columns) != tuple(columns):
        write_table(path, read_table(path, columns), columns)
    append_csv(path, rows, columns)


def write_table(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Replaces the table; the old one stays until the new one is written."""
    rows = list(rows)
    _check_columns(rows, columns)
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Reads the rows as text; none where there is no file. Columns that a table without arms lacks are empty.

    Raises:
        ConfigError: the file has other columns.
    """
    if not path.exists():
        return []
    missing = dict.fromkeys(set(columns) - set(_heading(path, columns)), "")
    with path.open(newline="", encoding="utf-8") as file:
        return [row | missing for row in csv.DictReader(file)]


def read_rows(path: Path, arms: bool = False) -> list[dict]:
    """Reads the rows with a time, with numbers as numbers; none where there is no file.

    Args:
        arms: include all rows of arms and of flat batches, not only those of `is_of_method`.

    Raises:
        ConfigError: the file has other columns.
    """
    rows = [row for row in read_table(path, COLUMNS) if row["median_ms"]]
    return [
        row | {"tokens": int(row["tokens"])} | {name: float(row[name]) for name in NUMBERS}
        for row in rows
        if arms or is_of_method(row)
    ]


def is_of_method(row: Mapping[str, object]) -> bool:
    """Whether a row is of padded batches and a method, or of an arm that is a method of `PLAIN` under another name."""
    return row.get("arm", "") in ("", PADDED, PEFT) and row.get("layout") != FLAT


def profile_path(table: Path) -> Path:
    """Returns the path of the table of profiles beside a table of times."""
    return table.with_name(f"{table.stem}-profile.csv")


def read_profile_rows(path: Path) -> list[dict]:
    """Reads the rows of a table of profiles."""
    rows = read_table(path, PROFILE_COLUMNS)
    return [row | {"ms": float(row["ms"]), "launches": int(row["launches"])} for row in rows]


def _check_columns(rows: list[dict], columns: Sequence[str]) -> None:
    if any(set(row) != set(columns) for row in rows):
        raise ValueError(f"a row must have the columns {', '.join(columns)}")


def _heading(path: Path, columns: Sequence[str]) -> tuple[str, ...]:
    """Reads the heading of the file: the present columns, or an older table's, which are the first of them."""
    heading = tuple(next(csv.reader(text_of(path, ConfigError).splitlines()), ()))
    if heading != tuple(columns[: max(len(heading), len(_older(columns)))]):
        raise ConfigError(f"{path} has other columns than this table; write to another file")
    return heading


def _older(columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns of tables without arms."""
    return tuple(columns[: columns.index("arm")] if "arm" in columns else columns)


def with_ratios(rows: Iterable[dict], kind: Kind) -> list[dict]:
    """Fills in the ratios of rows of `read_table`, as far as their run has timed the arms."""
    rows = list(rows)
    groups = defaultdict(list)
    for row in rows:
        if row["run"] and row[kind.time]:
            groups[tuple(row[name] for name in ("run", "model", "dtype", *kind.case))].append(row)
    ratios = {}
    for group in groups.values():
        times = {row["arm"]: kind.milliseconds(row) for row in group if row["arm"]}
        best = min(times, key=times.__getitem__, default="")
        for row in group:
            milliseconds = kind.milliseconds(row)
            over = {
                column: f"{times[arm] / milliseconds:.3f}" if arm in times else ""
                for column, arm in (("over_stock", STOCK), ("over_best_arm", best))
            }
            ratios[id(row)] = over | {"best_arm": best}
    return [row | ratios.get(id(row), {}) for row in rows]


def table_of_run(rows: Iterable[dict], kind: Kind) -> str:
    """Formats a run in Markdown, every row beside the stock arm and the best one; arms come before methods.

    Args:
        rows: of one run and model, as `with_ratios` returns them.
    """
    heading = (
        *kind.case,
        "arm or method",
        "layout",
        "ms",
        "over stock",
        "over best arm",
        "best arm",
        "peak GiB",
        "note",
    )
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    places: dict[tuple, int] = {}
    rows = [(places.setdefault(tuple(row[name] for name in kind.case), len(places)), row) for row in rows]
    for _, row in sorted(rows, key=lambda one: (one[0], not one[1]["arm"])):
        cells = [*(row[name] for name in kind.case), row["arm"] or row["method"], row["layout"]]
        cells += [f"{kind.milliseconds(row):.1f}" if row[kind.time] else ""]
        cells += [f"{float(row[name]):.2f}x" if row[name] else "" for name in ("over_stock", "over_best_arm")]
        cells += [row["best_arm"], row["peak_gib"], row["note"].replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """A row beside the dense baseline of its run and shape; fields are None where they are unknown.

    The baseline is the first of `BASELINES` that the run has, or the method ``unsloth-dense`` in a run without arms.
    """

    row: dict
    base: dict | None
    target: float | None
    limit: float | None

    @property
    def speedup(self) -> float | None:
        return None if self.base is None else self.base["median_ms"] / self.row["median_ms"]

    @property
    def memory(self) -> float | None:
        return None if self.base is None else self.row["peak_gib"] / self.base["peak_gib"]

    @property
    def tokens_per_second(self) -> float:
        return self.row["tokens"] / self.row["median_ms"] * 1000

    @property
    def of_limit(self) -> float | None:
        """Returns the share of the FLOP limit that the speed-up reaches."""
        return None if self.speedup is None or self.limit is None else self.speedup / self.limit


def is_baseline(row: dict) -> bool:
    """Whether this row is the baseline of rows without a stock arm."""
    return row["arm"] == STOCK or (not row["arm"] and row["method"] == BASELINE)


def compare(rows: list[dict], model: ModelShape | None) -> list[Comparison]:
    """Compares the rows of one run with its baseline; limits need the ``model``, and are unknown for arms.

    Where dense was measured more than once at a shape (``--then``), the preceding row counts, or else the first.
    """
    arms = {row["shape"]: row for arm in reversed(BASELINES) for row in rows if row["arm"] == arm}
    dense = {row["shape"]: row for row in reversed(rows) if is_baseline(row)}
    comparisons = []
    for row in rows:
        shape, method = row["shape"], row["method"]
        if is_baseline(row):
            dense[shape] = row
        base = arms.get(shape, dense.get(shape))
        target = limit = None
        if not row["arm"]:
            checkpointing = row["checkpointing"] != "False"
            target = TARGETS.get((shape, method), (None,))[0] if checkpointing and model == LLAMA_3_8B else None
            if model is not None and shape != "host":
                base_checkpointing = base is None or base["checkpointing"] != "False"
                limit = flop_limit(shape, method, model, checkpointing, base_checkpointing)
        comparisons.append(Comparison(row, base, target, limit))
    return comparisons


def report(rows: list[dict], model: ModelShape | None, methods: Collection[str]) -> str:
    """Formats one line for each row of ``methods`` that has a baseline among the ``rows`` of its run.

    Args:
        rows: with their ratios (`with_ratios`) and numbers as numbers.
    """
    lines = []
    for one in compare(rows, model):
        row = one.row
        if one.speedup is None or is_baseline(row) or row["arm"] or row["method"] not in methods:
            continue
        parts = [f"{row['method']:20} {row['shape']:13} {one.speedup:.2f}x the speed of {one.base['arm'] or 'dense'}"]
        if row["over_best_arm"]:
            parts.append(f"{float(row['over_best_arm']):.2f}x of the best arm ({row['best_arm']})")
        if one.target is not None:
            parts.append(f"target {one.target:g}x {'reached' if one.speedup >= one.target else 'MISSED'}")
        if one.limit is not None:
            parts.append(f"{one.of_limit:.0%} of the FLOP limit {one.limit:.2f}x")
        parts += [f"{one.memory:.2f}x the peak memory", f"{one.tokens_per_second:.0f} tokens/s"]
        lines.append(", ".join(parts))
    return "\n".join(lines)
