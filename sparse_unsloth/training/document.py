"""Reads a recipe's file and the recipes that it extends, and keeps the place of each key."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparse_unsloth.config.files import yaml_problem
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import ConfigError, RecipeError
from sparse_unsloth.training.keys import did_you_mean
from sparse_unsloth.training.overrides import Words, parsed

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIXES = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Traversable]:
    """Returns the recipes of the package by name."""
    folder = importlib.resources.files("sparse_unsloth") / "recipes"
    found = {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(SUFFIXES)}
    return dict(sorted(found.items()))


def find_recipe(source: str) -> Traversable:
    """Finds the file of a recipe, given its path or the name of a shipped recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    path = Path(source)
    if path.is_dir() and source not in shipped_recipes():
        inner = path / "recipe.yaml"
        raise RecipeError(f"{source} is a folder; name a file{f': {inner}' if inner.is_file() else ' in it'}.")
    if source.endswith(SUFFIXES) or "/" in source:
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {source} (looked for in {Path.cwd()}).")
        return path
    shipped = shipped_recipes()
    if source not in shipped:
        hint = did_you_mean(source, shipped) or "."
        raise RecipeError(
            f"there is no shipped recipe {source!r}{hint} Shipped: {', '.join(shipped)}; a file's name ends in .yaml."
        )
    return shipped[source]


class Document:
    """A recipe's values, with those of the recipe that it extends, and the place of each key in its file."""

    def __init__(self, entry: Traversable, extended_by: tuple[str, ...] = ()):
        self.name = name = entry.name
        self.problems: list[str] = []
        self.adopted: dict[str, Any] = {}  # of the adapter that training goes on with
        try:
            text = entry.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.values: dict[str, Any] = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise RecipeError(yaml_problem(name, error)) from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: cannot be read as YAML: it is not UTF-8 text ({error}).") from None
        if not isinstance(self.values, dict):
            raise RecipeError(f"{name}: must hold a mapping of keys, but holds a {type(self.values).__name__}.")
        self.places: dict[str, str] = {}
        for key, _ in root.value if root is not None else ():
            place = f"{name}:{key.start_mark.line + 1}: {key.value}"
            if key.value in self.places:
                self.problems.append(f"{place}: given twice, first as {self.places[key.value]}")
            self.places[key.value] = place
        self.problems += [
            problem for _, block in (root.value if root is not None else ()) for problem in _duplicate_keys(name, block)
        ]
        self._resolve_sparsity_file(entry)
        if "extends" in self.values:
            self._extend(entry, (*extended_by, name))

    def _extend(self, entry: Traversable, chain: tuple[str, ...]) -> None:
        """Adds the missing keys from the recipe named by ``extends``; blocks are replaced as a whole.

        Raises:
            RecipeError: that recipe does not exist, cannot be read, or extends this one in turn.
        """
        source, place = self.values.pop("extends"), self.places.pop("extends")
        if not isinstance(source, str):
            raise RecipeError(f"{place}: must be the name or the file of a recipe, given {source!r}")
        beside = entry.parent / source if isinstance(entry, Path) else None
        try:
            base = beside if beside is not None and beside.is_file() else find_recipe(source)
        except RecipeError as error:
            raise RecipeError(f"{place}: {error}") from None
        if base.name in chain:
            raise RecipeError(f"{place}: recipes extend each other in a circle: {' -> '.join([*chain, base.name])}.")
        under = Document(base, chain)
        self.problems += under.problems
        self.values, self.places = under.values | self.values, under.places | self.places

    def _resolve_sparsity_file(self, entry: Traversable) -> None:
        sparsity = self.values.get("sparsity")
        if (
            isinstance(sparsity, str)
            and isinstance(entry, Path)
            and (entry.parent / sparsity.partition("#")[0]).is_file()
        ):
            # A file named in a recipe is searched beside the recipe first.
            self.values["sparsity"] = str(entry.parent / sparsity)

    def override(self, path: tuple[str, ...], value: Any) -> None:
        key = path[0]
        place = f"command line: --{'.'.join(path)}"
        if len(path) == 1:
            self.places[key], self.values[key] = place, Words(value)
            return
        self.places[key] = f"{self.places[key]}, {place}" if key in self.places else place
        block = self.values.get(key)
        if isinstance(block, Words):
            block = block.parsed()
        if key == "sparsity" and isinstance(block, str):
            try:
                block = SparsityConfig.from_any(block).model_dump(mode="json", exclude_defaults=True)
            except ConfigError as error:
                self.problems += problem_lines(error, self.places[key])
                block = {}
        # A copy: the block may be shared with a YAML anchor elsewhere.
        self.values[key] = block = dict(block) if isinstance(block, Mapping) else {}
        for name in path[1:-1]:
            block[name] = block = dict(block.get(name) or {})
        block[path[-1]] = parsed(value)


def _duplicate_keys(name: str, node: yaml.Node) -> list[str]:
    """Finds keys that occur twice in a block; YAML silently keeps the last one."""
    problems, seen = [], {}
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            place = f"{name}:{key.start_mark.line + 1}: {key.value}"
            if key.value in seen:
                problems.append(f"{place}: given twice, first as {seen[key.value]}")
            seen[key.value] = place
        problems += _duplicate_keys(name, value)
    return problems


def problem_lines(error: ConfigError, place: str) -> list[str]:
    """Splits a configuration error into its problems, each with the place of the block."""
    first, *others = str(error).split("\n")
    return [f"{place}: {line.strip()}" for line in others or [first.removeprefix("sparsity configuration: ")]]
