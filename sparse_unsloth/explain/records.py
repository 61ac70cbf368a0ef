"""Writes, reads and summarises the records of observed steps, as `Observer.take` returns them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.config.sparsity import CONFIG_NAME, SparsityConfig
from sparse_unsloth.errors import ConfigError

RECORDS_FILE = "explain.jsonl"
ROWS, ENERGY = "rows", "gradient_energy"
"""The part of a layer and the figure in records of row sparsity."""
LABELS = {**PARTS, ROWS: "chosen rows"}
"""The parts that occur in records, and their names in reports."""
FIGURES = ("captured", "overlap", ENERGY)


def append(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Appends ``records`` to the file in ``folder``, one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECORDS_FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in ``folder``, by step; of several records of one step (a resumed run) the last one counts.

    A truncated last line is left out.

    Raises:
        ConfigError: there are no records, or the file is damaged.
    """
    path = folder / RECORDS_FILE
    if not path.is_file() and _is_row_sparse(folder):
        raise ConfigError(
            f"{folder} was trained with backward_rows, and has no {RECORDS_FILE}: there every explain_steps (default "
            "50) steps that a trainer logs the energy of the gradient in the chosen rows is written by layer. Either "
            "explain_steps was 0, or nothing was logged."
        )
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {RECORDS_FILE}. It must be the output folder of a training that had two sparse steps in "
            "a row and explain_steps above 0 in its sparsity block (default 50), and has logged since."
        )
    records: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ConfigError(f"{path}: line {number} is no record of a step; the file is damaged.") from None
    if not records:
        raise ConfigError(f"{path}: holds no whole record yet.")
    return [records[step] for step in sorted(records)]


def _is_row_sparse(folder: Path) -> bool:
    """Whether the configuration beside the run's last adapter has row sparsity."""
    files = sorted(folder.glob(f"*/{CONFIG_NAME}"))
    return bool(files) and SparsityConfig.from_file(files[-1]).row_sparse


def values(record: Mapping[str, Any], part: str, metric: str) -> dict[int, float]:
    """One figure of one part by layer, for the layers that have it."""
    return {row["layer"]: row[metric] for row in record["layers"] if row["part"] == part and metric in row}


def parts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parts that occur, of `LABELS`."""
    return sorted({row["part"] for record in records for row in record["layers"]} & LABELS.keys())


def means(record: Mapping[str, Any]) -> dict[str, float]:
    """Values for a log line: the mean of each figure over the layers, and the FLOPs that the forward saved.

    Empty for a record of row sparsity, whose means every log line has.
    """
    lines = {"sparsity/saved_flops": record["saved_flops"]} if "saved_flops" in record else {}
    for part in (part for part in parts([record]) if part in PARTS):
        for metric in FIGURES:
            found = values(record, part, metric)
            if found:
                lines[f"sparsity/{metric}/{part}"] = sum(found.values()) / len(found)
    return lines


def by_layer(record: Mapping[str, Any]) -> dict[str, float]:
    """Values for a log line: each figure of each layer."""
    return {
        f"sparsity/{metric}/{row['part']}/layer_{row['layer']:02}": row[metric]
        for row in record["layers"]
        for metric in (*FIGURES, "saved_flops")
        if metric in row
    }
