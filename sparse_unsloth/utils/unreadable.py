"""Says what is wrong with a data file that cannot be read, and in which line."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

from sparse_unsloth.errors import SparsityError

_WORDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def text_of(path: Path, kind: type[SparsityError], name: str = "") -> str:
    """Reads a file of the user as UTF-8 text.

    Args:
        path: of a file that is there.
        kind: what to raise.
        name: of the file, in the message; default: its path.

    Raises:
        SparsityError: ``kind``, where the file is no such text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise kind(f"{name or path}: line {line} is not UTF-8 text ({error.reason}).") from None


def first_line(error: BaseException) -> str:
    """The first line of the error's message; its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unreadable(name: str, error: Exception) -> str:
    """The message for the data file ``name`` that could not be read, with the place in it."""
    path = Path(name)
    place = None
    if path.is_file() and path.stat().st_size == 0:
        place = "it holds nothing."
    elif path.suffix in (".json", ".jsonl") and path.is_file():
        place = _first_bad_json(path)
    return f"dataset_name: {name} is empty, or cannot be read: {place or first_line(root_of(error))}"


def root_of(error: BaseException) -> BaseException:
    """The first error in the chain of causes; those of `datasets` only say that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_bad_json(path: Path) -> str | None:
    """The first row of a JSON file that is invalid, or has other types than the rows before; None: there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return f"line {line} is not UTF-8 text ({error.reason})."
    if text.lstrip().startswith("["):
        try:
            rows = [(f"entry {number}", row) for number, row in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is no JSON: {error.msg} (column {error.colno})."
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                return f"line {number} is no JSON: {error.msg} (column {error.colno}). Each line must be one."
    kinds: dict[str, tuple[str, type]] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            return f"{place} holds {reprlib.repr(row)}, and a row must be an object, {{column: value}}."
        for column, value in row.items():
            first, kind = kinds.setdefault(column, (place, type(value))) if value is not None else (place, None)
            if kind not in (None, type(value)) and {kind, type(value)} != {int, float}:
                return f"{place}: {column} is {_WORDS[type(value)]}, and {_WORDS[kind]} in {first}."
    return None
