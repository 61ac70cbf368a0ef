"""Plans runs of a benchmark with arms, and times in child processes what the table lacks."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from sparse_unsloth.bench.arms import FLAT, PADDED, arm_of, why_not_installed
from sparse_unsloth.bench.methods import backend_of
from sparse_unsloth.bench.models import load_arm, load_model
from sparse_unsloth.bench.processes import Parent, Process
from sparse_unsloth.bench.table import Kind, append_rows, read_table, table_of_run, with_ratios, write_table
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.utils.environment import version_of

Piece = Mapping[str, str]
"""The columns that identify the work of one row; rows of methods have an empty ``arm``."""
SAME_RUN = datetime.timedelta(hours=2)
"""The greatest age of a run that a call resumes."""


def layouts_of(names: str) -> list[str]:
    """Returns layouts from names separated by commas.

    Raises:
        ConfigError: a name is unknown.
    """
    layouts = list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in layouts if name not in (FLAT, PADDED)]:
        raise ConfigError(f"--layouts names {', '.join(unknown)}; layouts are {FLAT} and {PADDED}")
    return layouts


def pieces_of(args: argparse.Namespace, cases: Iterable[Mapping[str, object]]) -> list[dict]:
    """Combines arms, and methods in their layouts, with every case.

    Args:
        args: with ``model``, ``dtype``, ``arms`` by name, ``methods``, and their ``layouts`` and ``checkpointing``.
        cases: further columns of a row.
    """
    found = []
    for name, arm in args.arms.items():
        method, checkpointing = f"{arm.backend}-dense", str(arm.lora.get("use_gradient_checkpointing", "unsloth"))
        found.append({"arm": name, "method": method, "layout": arm.layout, "checkpointing": checkpointing})
    for method in args.methods:
        for layout in args.layouts:
            found.append({"arm": "", "method": method, "layout": layout, "checkpointing": args.checkpointing})
    weights, cases = {"model": Path(args.model).name, "dtype": args.dtype}, list(cases)
    return [piece | weights | case for piece in found for case in cases]


@dataclass(frozen=True)
class Plan:
    """The rows that a run adds to one table.

    Args:
        path, kind: of the table.
        pieces: one for each row.
        run: the run's name.
        common: columns that all rows share.
    """

    path: Path
    kind: Kind
    pieces: Sequence[Piece]
    run: str = ""
    common: dict[str, str] = field(default_factory=dict)

    def left(self) -> list[dict]:
        """Returns the pieces without a row; a row that says why there is no time counts."""
        done = self._keys(read_table(self.path, self.kind.columns))
        return [dict(piece) for piece in self.pieces if self._key(piece) not in done]

    def is_timed(self) -> bool:
        """Whether every piece has a time."""
        timed = self._keys(row for row in read_table(self.path, self.kind.columns) if row[self.kind.time])
        return all(self._key(piece) in timed for piece in self.pieces)

    def write(self, row: Mapping[str, object]) -> None:
        """Appends a row to the table: the columns of a piece and the measurements."""
        versions = {"run": self.run, "unsloth": version_of("unsloth"), "torch": version_of("torch")}
        whole = dict.fromkeys(self.kind.columns, "") | self.common | versions | dict(row)
        append_rows(self.path, [{name: whole[name] for name in self.kind.columns}], self.kind.columns)

    def fill_ratios(self) -> None:
        """Writes the ratios into the table's rows."""
        if self.path.exists():
            rows = with_ratios(read_table(self.path, self.kind.columns), self.kind)
            write_table(self.path, rows, self.kind.columns)

    def _key(self, row: Piece) -> tuple[str, ...]:
        names = {"model", "dtype", "checkpointing", "arm", "method", "layout", *self.kind.case}
        return tuple(str(row[name]) for name in self.kind.columns if name in names)

    def _keys(self, rows: Iterable[Piece]) -> set[tuple[str, ...]]:
        return {self._key(row) for row in rows if row["run"] == self.run}


def run_to_resume(plans: Iterable[Plan], common: Mapping[str, str], date: str) -> str:
    """Returns the newest run in the tables if it is of this machine and code and incomplete; else a new one.

    Args:
        common: columns that rows of this call share.
        date: of this call; it names a new run.
    """
    plans, node = list(plans), platform.node()
    rows = [row for plan in plans for row in read_table(plan.path, plan.kind.columns) if row["run"]]
    if rows:
        newest = max(rows, key=lambda row: row["date"])
        begun, _, where = newest["run"].partition(" ")
        # The table itself may be one of the repository's files, which its first rows made dirty.
        alike = newest["commit"].removesuffix("-dirty") == common["commit"].removesuffix("-dirty")
        alike = alike and all(newest[name] == common[name] for name in ("device", "versions"))
        unfinished = any(replace(plan, run=newest["run"]).left() for plan in plans)
        if where == node and alike and unfinished and _is_recent(begun, date):
            return newest["run"]
    return f"{date} {node}".strip()


def _is_recent(begun: str, date: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(date) - datetime.datetime.fromisoformat(begun) < SAME_RUN
    except ValueError:
        return False  # a name of the user's


def fill(plans: Mapping[str, Plan], processes: Iterable[Process], command: Sequence[str], parent: Parent) -> bool:
    """Runs the rest of the plans; returns whether everything has a time. Pieces without one get a row with the reason.

    Args:
        plans: by the name that children give their rows.
        processes: time the pieces; those with nothing left are not started.
        command: of the children.
    """
    for process in processes:
        for name, piece in _left(plans, process):
            if piece["arm"] and (why := why_not_installed(arm_of(piece["arm"]))):
                plans[name].write(piece | {"note": why})
        names = [piece["arm"] or piece["method"] for _, piece in _left(plans, process)]
        if not names:
            continue
        smaller = replace(
            process,
            arms=tuple(name for name in process.arms if name in names),
            methods=tuple(name for name in process.methods if name in names),
        )
        print(f"-- {', '.join(dict.fromkeys(names))}: in a new process", flush=True)
        error = parent.run(smaller, command, lambda report: plans[report["table"]].write(report["row"]))
        if error is not None:
            for name, piece in _left(plans, smaller):
                plans[name].write(piece | {"note": f"failed: {error}"})
    for plan in plans.values():
        plan.fill_ratios()
    if parent.stopped:
        left = sum(len(plan.left()) for plan in plans.values())
        print(f"stopped, {parent.stopped}: {left} times are left; call again to go on", flush=True)
    return all(plan.is_timed() for plan in plans.values())


def _left(plans: Mapping[str, Plan], process: Process) -> list[tuple[str, dict]]:
    """Returns the pieces left for a process, with their plan's name."""
    return [
        (name, piece)
        for name, plan in plans.items()
        for piece in plan.left()
        if (piece["arm"] in process.arms if piece["arm"] else piece["method"] in process.methods)
    ]


def printed_table(path: Path, kind: Kind, run: str = "") -> str:
    """Formats the rows of a run, the newest by default, with a heading for each model.

    Raises:
        ConfigError: the table has no such run.
    """
    rows = [row for row in read_table(path, kind.columns) if row["run"]]
    run = run or (rows[-1]["run"] if rows else "")
    rows = [row for row in rows if row["run"] == run]
    if not rows:
        raise ConfigError(f"{path} has no run {run}".rstrip())
    parts = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        of_model = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        first = of_model[0]
        heading = (
            f"Run {run}: {first['device']}, {model} in {dtype}, Unsloth {first['unsloth']}, torch {first['torch']}"
        )
        parts.append(f"{heading}, commit {first['commit']}\n\n{table_of_run(of_model, kind)}")
    return "\n\n".join(parts)


def load_for(args: argparse.Namespace, max_seq_length: int) -> nn.Module:
    """Loads the model of a child: of its arms, which need the same variables and arguments, or of its methods."""
    if args.arms:
        return load_arm(args, next(iter(args.arms.values())), max_seq_length)
    return load_model(args, backend_of(args.methods[0]), max_seq_length)
