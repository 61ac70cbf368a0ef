"""Writes an evaluation's answers, one by one, and its ``results.json`` for `sparse-unsloth compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_unsloth.evaluation.model import EvaluationError
from sparse_unsloth.utils.unreadable import text_of

RESULTS_FILE, SETTINGS_FILE = "results.json", "settings.json"


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads the objects of a JSON-lines file.

    Raises:
        EvaluationError: there is no such file, it is no text, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"there is no file {path}.")
    for number, line in enumerate(text_of(path, EvaluationError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}:{number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}:{number}: is no JSON object.")
        yield row


class AnswerFile:
    """A file of JSON lines with unique keys, written one by one; lines of an interrupted evaluation are kept.

    Args:
        path: the file.
        key: the field that identifies a line.
        settings: the settings of the answers; stored beside the file.

    Raises:
        EvaluationError: the file's answers were made with other settings.
    """

    def __init__(self, path: Path, key: str, settings: Mapping[str, Any]):
        self.path, self.key = path, key
        self.rows: dict[Any, dict[str, Any]] = {}
        beside = path.with_name(SETTINGS_FILE)
        wanted = json.loads(json.dumps(settings, default=str))
        if path.is_file():
            found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
            if found != wanted:
                found = found or {}
                differing = sorted(name for name in {*wanted, *found} if found.get(name) != wanted.get(name))
                raise EvaluationError(
                    f"{path} holds answers made with other settings ({', '.join(differing)}). Delete its folder, or "
                    "give another --output-dir."
                )
            self.rows = {row[key]: row for row in read_lines(path)}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Appends one line."""
        self.rows[row[self.key]] = row
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def save_results(
    folder: Path,
    suite: str,
    name: str,
    scores: Mapping[str, float],
    items: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Writes ``results.json`` into ``folder`` and returns what it holds.

    Args:
        folder: of the suite, inside the run's evaluation folder.
        suite, name: the suite, and the evaluated source.
        scores: by metric; runs are compared by the first one.
        items: scores of single items by name, for paired tests.
        more: settings and the like.
    """
    results = {"suite": suite, "name": name, "scores": dict(scores), "items": dict(items or {}), **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return results
