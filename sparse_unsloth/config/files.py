"""Reads and writes configuration files, and turns pydantic's errors into one `ConfigError`."""

import difflib
import json
import os
import re
import reprlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from sparse_unsloth.config import removed
from sparse_unsloth.errors import ConfigError

TITLE = "sparsity configuration"
SUFFIXES = (".yaml", ".yml", ".json")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Raises for a key given twice, where PyYAML silently keeps the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} given twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} given twice")
    return data


def _is_json(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: must end in {', '.join(SUFFIXES)}")
    return path.suffix == ".json"


def read(path: Path) -> object:
    """The contents of a YAML or JSON file (by suffix).

    Raises:
        ConfigError: the file is missing, has another suffix, or cannot be parsed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'is a folder, name a file in it' if path.is_dir() else 'no such file'}")
    is_json = _is_json(path)
    try:
        text = path.read_text(encoding="utf-8")
        if is_json:
            return json.loads(text, object_pairs_hook=_unique_keys)
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(yaml_problem(str(path), error)) from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as {'JSON' if is_json else 'YAML'}: {error}") from None


def yaml_problem(name: str, error: yaml.YAMLError) -> str:
    """Formats a YAML error as one line: file, line, column, and the problem."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    return (
        f"{place}: cannot be read as YAML: {', '.join(part for part in said if part) or ' '.join(str(error).split())}."
    )


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes ``data`` to a YAML or JSON file (by suffix), atomically.

    Raises:
        ConfigError: another suffix.
    """
    if _is_json(path):
        text = json.dumps(data, indent=2) + "\n"
    else:
        text = yaml.safe_dump(data, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def failure(source: str, problems: list[str]) -> ConfigError:
    """One error that lists all ``problems``."""
    if len(problems) == 1:
        return ConfigError(f"{source}: {problems[0]}")
    return ConfigError("\n  ".join([f"{source}: {len(problems)} problems", *problems]))


def problem(cls: type[BaseModel], detail: Any) -> str:
    """One of pydantic's error details as a line: the key's path, what is allowed, what was given."""
    location = [str(part) for part in detail["loc"] if part != "[key]"]
    key, kind, given = ".".join(location) or cls.__name__, detail["type"], reprlib.repr(detail["input"])
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(cls, location)} (given {given})"
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"]
        hint = did_you_mean(detail["input"], re.findall("[a-z0-9]+", allowed))
        return f"{key}: must be {allowed}, given {given}{hint}"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
    elif kind == "dict_type":
        message = "must be a mapping of layers to shares, such as {'3-30': 0.99}"
    elif kind == "model_type":
        message = f"must be a mapping with some of the keys {', '.join(_model_at(cls, location).model_fields)}"
    else:
        message = detail["msg"].replace("Input should", "must")
    return f"{key}: {message}, given {given}"


def _model_at(cls: type[BaseModel], location: Iterable[str]) -> type[BaseModel]:
    found: Any = cls
    for name in location:
        found = found.model_fields[name].annotation
    return found


def _nearest_key(cls: type[BaseModel], location: list[str]) -> str:
    """The end of a message that names the nearest valid key, in the same mapping or one below; else all valid keys."""
    if gone := removed.unknown(location[-1]):
        return f"; {gone}"
    parent = ".".join([*location[:-1], ""])
    names: dict[str, str] = {}
    for name, field in _model_at(cls, location[:-1]).model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= {nested: f"{parent}{name}.{nested}" for nested in field.annotation.model_fields}
    names |= {name: f"{parent}{name}" for name in _model_at(cls, location[:-1]).model_fields}
    near = difflib.get_close_matches(location[-1], names, n=1)
    if near:
        return f"; did you mean {names[near[0]]}?"
    return f"; valid keys: {', '.join(_model_at(cls, location[:-1]).model_fields)}"


def did_you_mean(given: object, valid: Iterable[str]) -> str:
    """The end of a message that names the nearest valid word, or ""."""
    near = difflib.get_close_matches(given, list(valid), n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
