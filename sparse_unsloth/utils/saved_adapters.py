"""Finds saved LoRA adapters, and reads what they need: base model, tokenizer, vocabulary."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.errors import ConfigError, DataError
from sparse_unsloth.utils.unreadable import first_line

if TYPE_CHECKING:
    from torch import nn

ADAPTER_CONFIG, ADAPTER_FOLDER = "adapter_config.json", "adapter"
SAFE_WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Keys of a recipe that define an adapter, and their names in PEFT's ``adapter_config.json``."""
ALL_LINEAR = "all-linear"
"""The name in PEFT and TRL for every linear layer but the head."""
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings")
RESUMED = ("recipe.yaml", "trainer_state.json")
"""Files that only the folder of a run or of a checkpoint has."""


def find_adapter(name: str | Path) -> Path | None:
    """The folder of the adapter that ``name`` means; it may name an adapter, a checkpoint or a finished run.

    Returns:
        None where ``name`` means none: a hub name, or a base model's folder.

    Raises:
        DataError: the folder of a run that has no adapter yet.
    """
    folder = Path(name)
    for candidate in (folder, folder / ADAPTER_FOLDER):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    if not (folder / "config.json").is_file() and any((folder / file).is_file() for file in RESUMED):
        from sparse_unsloth.utils.checkpoints import last_whole_checkpoint

        last = last_whole_checkpoint(folder)
        fix = f"Name its last checkpoint, {last}, or train it to the end" if last else "Train it to the end"
        raise DataError(
            f"model_name_or_path: the run {folder} has no adapter ({folder / ADAPTER_FOLDER}). {fix} first."
        )
    return None


def read_settings(adapter: Path) -> dict[str, Any]:
    """The adapter's ``adapter_config.json``.

    Raises:
        DataError: the file cannot be read, or names no base model.
    """
    file = adapter / ADAPTER_CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: is damaged, or no adapter's configuration: {type(error).__name__}: {error}. Take the folder of "
            "another checkpoint, or a copy of the file."
        ) from error
    if not isinstance(base, str) or not base:
        raise DataError(f"{file}: names no base model. Write its folder or hub name as base_model_name_or_path there.")
    return settings


def base_of(adapter: Path) -> str:
    """The base model that the adapter was trained over: a folder, or a hub name.

    Raises:
        DataError: see `read_settings`; or the base was a folder that no longer exists.
    """
    base = read_settings(adapter)["base_model_name_or_path"]
    if is_lost(base):
        raise _no_base(adapter, base, f"there is no such folder (looked for from {Path.cwd()})")
    return base


def is_lost(name: str) -> bool:
    """Whether ``name`` is a path that does not exist, and no hub name (`name` or `owner/name`)."""
    path = Path(name).expanduser()
    return not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2)


def base_not_loaded(adapter: Path, error: Exception) -> DataError:
    """The error for a base model of an adapter that cannot be loaded."""
    return _no_base(adapter, read_settings(adapter)["base_model_name_or_path"], first_line(error))


def _no_base(adapter: Path, base: str, reason: str) -> DataError:
    return DataError(
        f"{adapter}: the adapter was trained over the base model {base!r}, which cannot be loaded: {reason}. Put the "
        f"model back there, or write its new folder or hub name as base_model_name_or_path into "
        f"{adapter / ADAPTER_CONFIG}."
    )


def tokenizer_of(adapter: Path) -> str:
    """The folder or hub name of the adapter's tokenizer: its own folder, else its base model's."""
    return str(adapter) if has_tokenizer(adapter) else base_of(adapter)


def has_tokenizer(adapter: Path) -> bool:
    """Whether a tokenizer was saved with the adapter."""
    return any((adapter / name).is_file() for name in TOKENIZER_FILES)


def load_whole(adapter: Path | None, load: Callable[[], Any]) -> Any:
    """The result of ``load()``, checked to hold every tensor of ``adapter``.

    PEFT only warns of tensors without saved values, and ignores saved tensors that the model does not have.

    Args:
        adapter: None: nothing is checked.
        load: loads base and adapter; returns a model, or a tuple that begins with one.

    Raises:
        DataError: the adapter does not fit the model.
    """
    if adapter is None:
        return load()
    fix = (
        f"It was trained over another model, or by another release whose modules have other names. Write its base "
        f"model as base_model_name_or_path into {adapter / ADAPTER_CONFIG}, or take the folder of another checkpoint."
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = load()
    except UserWarning as warning:
        names = re.findall(r"'([^']+)'", str(warning))
        raise DataError(
            f"{adapter}: holds no values for {len(names) or 'some'} tensors of the model's adapter"
            f"{f' (first: {names[0]})' if names else ''}, which would start untrained. {fix}"
        ) from None
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        first = next(line for line in str(error).splitlines() if "size mismatch" in line).strip()
        raise DataError(f"{adapter}: does not fit its base model: {first} {fix}") from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    saved = sum("lora_" in name for name, _ in _shapes(adapter))
    placed = sum("lora_" in name for name in model.state_dict())
    if saved > placed:
        raise DataError(f"{adapter}: {saved - placed} of its {saved} tensors have no place in the model. {fix}")
    return loaded


def left_unsaved(model: nn.Module, folder: Path) -> list[str]:
    """The trained tensors of ``model`` that are neither the adapter's nor saved beside it in ``folder``."""
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not re.search(r"lora_|\.modules_to_save\.|\.trainable_tokens_", name)
    ]
    if not others or not any((folder / file).is_file() for file in (SAFE_WEIGHTS, OLD_WEIGHTS)):
        return []
    saved = {name.replace(".base_layer.", ".") for name, _ in _shapes(folder)}
    return [name for name in others if name.replace(".base_layer.", ".") not in saved]


def vocabulary_of(adapter: Path) -> int | None:
    """The number of rows of the embedding or head saved with the adapter; None where neither was saved.

    Raises:
        DataError: the adapter's weights are missing or damaged.
    """
    sizes = {_rows(name, shape) for name, shape in _shapes(adapter)} - {None}
    if len(sizes) > 1:
        raise DataError(
            f"{adapter}: its embedding and its head are of different sizes, {sorted(sizes)}: it is damaged."
        )
    return sizes.pop() if sizes else None


def _rows(name: str, shape: list[int]) -> int | None:
    """The vocabulary's size, if the tensor ``name`` has a dimension of that size."""
    parts = name.split(".")
    factor = next((part for part in parts if part.startswith("lora_")), None)
    if set(EMBEDDINGS) & set(parts):
        dimension = {"lora_embedding_A": 1, None: 0 if parts[-1] == "weight" else None}.get(factor)
    elif "lm_head" in parts:
        dimension = {"lora_B": 0, None: 0}.get(factor)
    else:
        return None
    return None if dimension is None else shape[dimension]


def _shapes(adapter: Path) -> Iterator[tuple[str, list[int]]]:
    from safetensors import SafetensorError, safe_open

    file = adapter / SAFE_WEIGHTS
    try:
        if file.is_file():
            with safe_open(file, framework="pt") as tensors:
                yield from [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
            return
        import torch

        file = adapter / OLD_WEIGHTS
        yield from ((name, list(tensor.shape)) for name, tensor in torch.load(file, weights_only=True).items())
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        problem = "is damaged" if file.is_file() else f"is missing, and so is {SAFE_WEIGHTS}"
        raise DataError(f"{file}: {problem}: {error}. Take the folder of another checkpoint.") from error


def named_targets(names: list[str] | str | None) -> list[str] | str | None:
    """A recipe's ``lora_target_modules`` for PEFT, which would read a single name as a regular expression.

    TRL turns a list of one name into that name.
    """
    if isinstance(names, list) and len(names) == 1:
        names = names[0]
    return [names] if isinstance(names, str) and names != ALL_LINEAR and re.fullmatch(r"[\w.]+", names) else names


def check_targets(model: nn.Module, targets: Sequence[str] | str | None, key: str = "lora_target_modules") -> None:
    """Raises for target names that match no module of ``model``; PEFT ignores them if another name matches.

    Unsloth takes the names of a gated MLP for the weights of experts, too.

    Args:
        targets: ends of module names, or one regular expression of whole names, or "all-linear", as for PEFT; None: no
            names.
        key: the option's name, for the message.

    Raises:
        ConfigError: names match no module; the message suggests the nearest names.
    """
    if targets is None or targets == ALL_LINEAR:
        return
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in modules) else [targets]
        except re.error as error:
            raise ConfigError(f"{key}: {targets!r} is no regular expression: {error}") from None
    else:
        missing = [name for name in targets if not any(f".{module}".endswith(f".{name}") for module in modules)]
    if model.__dict__.get("_sparse_backend") == "unsloth" and any("experts" in name.split(".") for name in modules):
        missing = [name for name in missing if name not in GATED_MLP]
    if not missing:
        return
    ends = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
    suggestions = []
    for name in missing:
        near = difflib.get_close_matches(name, ends, n=1)
        suggestions.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    raise ConfigError(
        f"{key}: {', '.join(suggestions)} not found in the base model, whose modules are called {', '.join(ends)}."
        + (f" {ALL_LINEAR!r} takes every linear layer." if "target" in key else "")
    )
