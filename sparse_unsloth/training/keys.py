"""Defines the keys that a recipe may hold: types, ranges and defaults."""

from __future__ import annotations

import ast
import difflib
import enum
import functools
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from sparse_unsloth.config import removed
from sparse_unsloth.config.files import did_you_mean
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.errors import RecipeError
from sparse_unsloth.training.overrides import Words

# Defaults that differ from TRL's: adapters, without dropout, in the checkpoint's dtype.
MODEL_DEFAULTS = {"use_peft": True, "lora_dropout": 0.0, "dtype": "auto"}
BACKENDS = ("auto", "unsloth", "peft")
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
# The keys that each value of `peft` sets.
PEFT_METHODS = {
    "lora": {"load_in_4bit": False, "use_dora": False},
    "qlora": {"load_in_4bit": True, "use_dora": False},
    "dora": {"load_in_4bit": False, "use_dora": True},
}
DEVICES = ("device", "devices", "gpu", "gpus", "cuda", "cpu", "device_map", "no_cuda", "gpu_ids")
"""Keys that users try although no block has them."""


@dataclass(frozen=True)
class Key:
    """One key that a recipe may hold."""

    name: str
    kind: Any
    default: Any
    help: str
    owner: str


def recipe_keys() -> dict[str, Key]:
    """Returns every key that a recipe may hold, by name; imports TRL, which takes seconds."""
    keys = {"backend": Key("backend", Literal[BACKENDS], "auto", "What runs the model.", "sparse_unsloth")}
    keys["sparsity"] = Key(
        "sparsity",
        Any,
        "auto",
        "A preset (auto, rows, o1, o2, dense), a file, or a block of SparsityConfig.",
        "sparse_unsloth",
    )
    keys["extends"] = Key(
        "extends", str, None, "A recipe (a file beside this one, or a shipped one) whose keys this one changes.", "-"
    )
    keys["peft"] = Key(
        "peft",
        Literal[tuple(PEFT_METHODS)] | None,
        None,
        "lora, qlora (sets load_in_4bit) or dora (sets use_dora, and trains densely, as the published baseline).",
        "sparse_unsloth",
    )
    keys["rank"] = Key(
        "rank", Any, None, "A block of RankConfig: compute only the rank components that matter.", "sparse_unsloth"
    )
    for block in key_blocks().values():
        hints = typing.get_type_hints(block)
        for entry in fields(block):
            if not entry.init:
                continue
            default = entry.default if entry.default is not MISSING else None
            if entry.default_factory is not MISSING:
                default = entry.default_factory()
            default = MODEL_DEFAULTS.get(entry.name, default)
            choices = entry.metadata.get("choices")
            kind = _enums_only(hints[entry.name]) if not choices else Literal[tuple(choices)]
            if choices and default is None:
                kind = kind | None
            if entry.name == "resume_from_checkpoint":
                kind = bool | kind
            keys[entry.name] = Key(entry.name, kind, default, entry.metadata.get("help", ""), block.__name__)
    return keys


def block_keys() -> list[Key]:
    """Returns the keys of the block `sparsity`, by their names on a command line."""
    found = []
    for prefix, kind in {"sparsity.": SparsityConfig, "sparsity.estimator.": EstimatorConfig}.items():
        texts = field_texts(kind)
        found += [
            Key(prefix + name, field.annotation, field.default, texts[name], kind.__name__)
            for name, field in kind.model_fields.items()
            if field.annotation is not EstimatorConfig
        ]
    return found


def field_texts(kind: type) -> dict[str, str]:
    """Returns the docstring below each field of a class, in one line."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@functools.cache
def key_blocks() -> dict[str, type]:
    """Returns the dataclasses whose fields are keys."""
    from trl import ModelConfig, SFTConfig

    return {"data": DataArguments, "model": ModelConfig, "training": SFTConfig}


_COUNT = (lambda x: x >= 1, "1 or more")
_FROM_0 = (lambda x: x >= 0, "0 or more")
_ABOVE_0 = (lambda x: x > 0, "above 0")
_SHARE = (lambda x: 0 <= x <= 1, "from 0 to 1")
_PART = (lambda x: 0 <= x < 1, "0 or more and below 1")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda x: 0 < x <= 1, "above 0 and at most 1 (usually 1e-5 to 1e-3)"),
    "max_steps": (lambda x: x == -1 or x >= 1, "1 or more, or -1 for num_train_epochs"),
    **dict.fromkeys(
        (
            "lora_r", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "max_length", "save_total_limit", "eval_accumulation_steps", "dataset_num_proc",
        ),
        _COUNT,
    ),
    "dataset_size": (lambda x: x >= 1, "1 or more, or null for all"),
    "dataset_test_size": (lambda x: x >= 1, "1 or more, or null for none"),
    **dict.fromkeys(("lora_alpha", "num_train_epochs", "save_steps", "logging_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(
        (
            "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha", "seed", "data_seed",
            "dataset_seed", "dataloader_num_workers", "eval_delay",
        ),
        _FROM_0,
    ),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), _PART),
    "warmup_ratio": _SHARE,
    "pad_to_multiple_of": (lambda x: x >= 1, "1 or more, or null for none"),
}  # fmt: skip
"""Valid ranges of values that the libraries accept silently or refuse late: the test, and its wording."""


def check_range(key: str, value: Any) -> None:
    """Raises RecipeError for a number out of `RANGES`."""
    if key not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return
    fits, words = RANGES[key]
    if not math.isfinite(value) or not fits(value):
        raise RecipeError(f"must be {words}, given {value}")


def typed(key: Key, value: Any) -> Any:
    """Converts ``value`` to the key's type. Command-line words are tried as YAML first, then as text.

    Raises:
        RecipeError: the value has none of the key's types.
    """
    candidates = [value]
    if isinstance(value, Words):
        candidates = [value.parsed(), value.value]
    if _takes_only_lists(key.kind):
        # As TRL's parser does: `lora_target_modules: all-linear` is a list of one.
        candidates += [[candidate] for candidate in candidates if isinstance(candidate, str)]
    adapter = TypeAdapter(key.kind, config={"arbitrary_types_allowed": True})
    for candidate in candidates:
        # YAML reads a bare no (eval_strategy: no) as false.
        if candidate is False and "no" in _choices(key.kind):
            candidate = "no"
        if isinstance(candidate, bool) and not _takes_bool(key.kind):
            continue
        try:
            result = adapter.validate_python(candidate)
        except ValidationError:
            continue
        # TRL's parser gives these fields plain texts too.
        return result.value if isinstance(result, enum.Enum) else result
    last = value.value if isinstance(value, Words) else value
    given = reprlib.repr(last)
    choices = _choices(key.kind)
    raise RecipeError(f"must be {describe(key.kind)}, given {given}{did_you_mean(str(last), choices)}")


def _enums_only(kind: Any) -> Any:
    """Replaces ``SomeEnum | str``, which accepts any text, by the enum, which accepts its values only."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = typing.get_args(kind)
        if any(isinstance(part, type) and issubclass(part, enum.Enum) for part in parts):
            return typing.Union[tuple(part for part in parts if part is not str)]  # noqa: UP007
    return kind


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(kind) for choice in _choices(part)]
    return []


def _takes_bool(kind: Any) -> bool:
    """Whether the type takes a bool, which pydantic would also read as a number."""
    parts = typing.get_args(kind)
    return kind is bool or any(isinstance(part, bool) or _takes_bool(part) for part in parts)


def _takes_only_lists(kind: Any) -> bool:
    """Whether the type takes a list of texts, and no single text."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return list[str] in parts and str not in parts


def describe(kind: Any) -> str:
    """Names a type in the words of YAML."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = [describe(part) for part in typing.get_args(kind)]
        return " or ".join(dict.fromkeys(sorted(parts, key=lambda part: part == "null")))
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if kind in names:
        return names[kind]
    origin = typing.get_origin(kind) or kind
    return {dict: "a mapping", list: "a list"}.get(origin, getattr(kind, "__name__", str(kind)))


def nearest(key: str, keys: Iterable[str]) -> str:
    """Ends a message about an unknown key with the key to use instead."""
    names = {name: name for name in keys}
    names |= {name: f"sparsity.estimator.{name}" for name in EstimatorConfig.model_fields if name not in names}
    names |= {name: f"sparsity.{name}" for name in SparsityConfig.model_fields if name not in names}
    names |= {f"sparsity.{name}": f"sparsity.{name}" for name in SparsityConfig.model_fields}
    if key in DEVICES:
        return "; use_cpu: true chooses the CPU, CUDA_VISIBLE_DEVICES=N in the environment a GPU"
    if key in names:
        return f"; did you mean {names[key]}?"
    if gone := removed.unknown(key):
        return f"; {gone}"
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else "; `sparse-unsloth keys` lists the valid ones"
