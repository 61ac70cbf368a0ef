"""Reads local JSON files and keeps every value as it is written.

Arrow's reader changes values in columns of mixed types: dates become times, 5 beside 2.5 becomes 5.0, and the text
"null" becomes a missing value.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1
PEEKED = 100


def json_dataset(path: Path) -> tuple[Dataset, frozenset[str]]:
    """Reads a JSON or JSON Lines file; returns the rows and the nested and mixed columns, which are kept as JSON text.

    Raises:
        DataError: the file is empty or not JSON, or a row names a column twice.
    """
    import datasets
    from datasets.fingerprint import Hasher

    kinds: dict[str, set[str]] = {}
    for row in json_rows(path):
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    if not kinds:
        raise DataError(f"dataset_name: {path} is empty, or cannot be read: it holds no row with a column.")
    values = {name: datasets.Value(_common(found)) for name, found in kinds.items()}
    encoded = frozenset(
        name for name, found in kinds.items() if _common(found) == "string" and found - {"null", "string"}
    )

    def rows() -> Iterator[dict[str, Any]]:
        for row in json_rows(path):
            row = {name: row.get(name) for name in kinds}
            yield {name: encode(value) if name in encoded else value for name, value in row.items()}

    state = path.stat()
    fingerprint = Hasher.hash((str(path.resolve()), state.st_mtime_ns, state.st_size, _VERSION))
    return datasets.Dataset.from_generator(rows, datasets.Features(values), fingerprint=fingerprint), encoded


def stream_rows(lines: Iterable[dict[str, str]], path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a stream of JSON lines, with the columns of the first hundred rows.

    Raises:
        DataError: a later row has another column, which would be lost.
    """
    stream = (_row(line["text"], path, number) for number, line in enumerate(lines, start=1) if line["text"].strip())
    first = list(itertools.islice(stream, PEEKED))
    names = dict.fromkeys(name for row in first for name in row)

    def complete(row: dict[str, Any]) -> dict[str, Any]:
        late = next((name for name in row if name not in names), None)
        if late is not None:
            raise DataError(
                f"dataset_name: {path} has the column {late!r} in a later row than its first {PEEKED}, which a stream "
                "cannot know: set dataset_streaming: false."
            )
        return {name: row.get(name) for name in names}

    return map(complete, itertools.chain(first, stream))


def is_list(path: Path) -> bool:
    """Whether the file is one JSON list, or one object of several lines, instead of JSON Lines."""
    with path.open(encoding="utf-8-sig") as file:
        begin = next((line for line in file if line.strip()), "").strip()
    if not begin or begin.startswith("["):
        return bool(begin)
    try:
        json.loads(begin)
    except ValueError:
        return True
    return False


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields each row; a bare text becomes a row with the column ``text``.

    Raises:
        DataError: the file is not JSON, or a row names a column twice.
    """
    with path.open(encoding="utf-8-sig") as file:
        if is_list(path):
            found = _row(file.read(), path, 1, whole=True)
            yield from (_as_row(item, path) for item in (found if isinstance(found, list) else [found]))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(line.strip(), path, number)


def encode(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def decode(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _row(text: str, path: Path, number: int, whole: bool = False) -> Any:
    def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"dataset_name: {path} names {twice!r} twice in one row (line {number}): rename one.")
        return row

    try:
        found = json.loads(text, object_pairs_hook=no_twice)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        why = f"line {line} is no JSON: {error.msg}"
        raise DataError(f"dataset_name: {path} is empty, or cannot be read: {why}.") from None
    return found if whole else _as_row(found, path)


def _as_row(item: Any, path: Path) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        why = f"its rows must be objects, but one is {item!r:.40}"
        raise DataError(f"dataset_name: {path} is empty, or cannot be read: {why}.")
    return item


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int64"
    return "string" if isinstance(value, str) else "other"


def _common(kinds: set[str]) -> str:
    """Returns the common type of two columns; "string" also holds JSON text."""
    found = kinds - {"null"}
    return found.pop() if len(found) == 1 and found <= {"bool", "int64"} else "string"
