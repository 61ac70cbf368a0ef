"""What is wrong with a file of rows that cannot be read, and in which line."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

_WORDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def first_line(error: BaseException) -> str:
    """Of its message; its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unreadable(name: str, error: Exception) -> str:
    """What is wrong with a file of rows, and where in it."""
    path = Path(name)
    place = None
    if path.is_file() and path.stat().st_size == 0:
        place = "it holds nothing."
    elif path.suffix in (".json", ".jsonl") and path.is_file():
        place = _first_bad_json(path)
    return f"dataset_name: {name} is empty, or cannot be read: {place or first_line(root_of(error))}"


def root_of(error: BaseException) -> BaseException:
    """What `datasets` met: its own errors say that one occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_bad_json(path: Path) -> str | None:
    """The first place in a file of JSON rows where there is none, or one unlike those before; None if all are alike."""

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
