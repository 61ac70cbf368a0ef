"""Parses ``--key value`` words of a command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from sparse_unsloth.errors import RecipeError


def parse_overrides(words: Iterable[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Parses ``--key value ...`` into pairs of a key's path and its raw value (a text, a list of texts, or True).

    Raises:
        RecipeError: a value precedes the first key.
    """
    pairs: list[tuple[tuple[str, ...], list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            first, *rest = name.split(".")
            pairs.append(((first.replace("-", "_"), *rest), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise RecipeError(f"command line: {word!r} stands before any --key; a recipe is one name or one file.")
    return [(path, True if not values else values[0] if len(values) == 1 else values) for path, values in pairs]


class Words:
    """A command-line value that may be plain text or YAML."""

    def __init__(self, value: Any):
        self.value = value

    def parsed(self) -> Any:
        """The value as YAML reads it."""
        return parsed(self.value)


def parsed(value: Any) -> Any:
    """Parses a text, or each text of a list, as YAML; other values, and invalid YAML, are returned unchanged."""
    if isinstance(value, list):
        return [parsed(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
