"""Checks the arguments by which a script loads a model and adds LoRA, before a library takes or ignores them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from sparse_unsloth.errors import ConfigError, DataError

NEAR = 0.8
"""From this similarity on an unknown name is a typing error; others may be meant for a library."""
FOLDER_FILES = ("config.json", "adapter_config.json")
"""One of these makes a folder a model's."""


def check_names(given: Iterable[str], takers: Iterable[Callable[..., Any]], others: Iterable[str] = ()) -> None:
    """Raises ConfigError for names that are nearly, but not quite, a parameter of ``takers``.

    Args:
        given: names of keyword arguments.
        takers: functions, or dataclasses by their fields.
        others: names that are right, too.
    """
    known = set(others)
    for taker in takers:
        if dataclasses.is_dataclass(taker):
            known |= {field.name for field in dataclasses.fields(taker)}
        else:
            parameters = inspect.signature(taker).parameters.values()
            known |= {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    for name in sorted(set(given) - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
        if near:
            raise ConfigError(f"{name}: unknown argument; did you mean {near[0]!r}?")


def check_lora(r: Any, lora_alpha: Any, lora_dropout: Any) -> None:
    """Raises ConfigError for sizes of an adapter that cannot train, or are no numbers."""
    problems = []
    if not (_is_number(r, Integral) and r >= 1):
        problems.append(f"r is {r!r}, and the rank is an integer from 1 on")
    if not (_is_number(lora_alpha, Real) and lora_alpha > 0):
        problems.append(f"lora_alpha is {lora_alpha!r}, and the adapter's scale, lora_alpha / r, must be above 0")
    if not (_is_number(lora_dropout, Real) and 0 <= lora_dropout < 1):
        problems.append(f"lora_dropout is {lora_dropout!r}, and it is a probability from 0 to below 1")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_length(max_seq_length: Any) -> None:
    """Raises ConfigError unless ``max_seq_length`` is a positive integer, or None."""
    if max_seq_length is not None and not (_is_number(max_seq_length, Integral) and max_seq_length >= 1):
        raise ConfigError(f"max_seq_length is {max_seq_length!r}, and it is a number of tokens, from 1 on.")


def check_folder(model_name: str, subfolder: str = "") -> None:
    """Raises DataError where ``model_name`` is a path, and no model is there, or in its ``subfolder``."""
    path = Path(model_name)
    if path.is_dir():
        if not any((path / subfolder / name).is_file() for name in FOLDER_FILES):
            raise DataError(f"{model_name}: this folder holds no {' or '.join(FOLDER_FILES)}, so it holds no model.")
    elif path.is_file():
        raise DataError(f"{model_name}: this is a file; give the folder that it is in (and gguf_file= of a GGUF file).")
    elif path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") > 1:
        raise DataError(f"{model_name}: there is no such folder.")


def why_not_found(model_name: str, hub: Mapping[str, Any]) -> DataError | None:
    """What to raise where loading failed because of the model's name; None where its configuration can be read.

    Args:
        hub: arguments of transformers' ``from_pretrained`` that tell where the configuration is (token, revision, ...).
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model_name, **hub)
    except (OSError, ValueError, ImportError, KeyError) as found:
        first = (str(found).strip().splitlines() or [type(found).__name__])[0]
        return DataError(
            f"{model_name}: its configuration cannot be read: {first} Check the name ('owner/name' on huggingface.co, "
            "or a folder); a private or gated model needs token= or `hf auth login`; without network, download it "
            "first."
        )
    return None
