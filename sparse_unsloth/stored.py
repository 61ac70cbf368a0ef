"""Rows of local files and hub data sets: read whole or as a stream, held out, counted off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.errors import DataError
from sparse_unsloth.saved_adapters import is_lost
from sparse_unsloth.unreadable import first_line, root_of, unreadable

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sparse_unsloth.data import DataArguments

logger = logging.getLogger("sparse_unsloth")

FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OTHER_FILES = (".txt", ".tsv", ".xml", ".xlsx", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml", ".md", ".pkl")
"""Ends of files' names, not of hub names."""
# Files that the published experiments trained on, and where they come from.
KNOWN_FILES = {
    "math_10k.json": "ft-training_set/ of https://github.com/AGI-Edgerunners/LLM-Adapters",
    "commonsense_170k.json": "ft-training_set/ of https://github.com/AGI-Edgerunners/LLM-Adapters",
}


def stored_splits(
    arguments: DataArguments,
    evaluation: bool,
    prepare: Callable[[Any], Any] = lambda data: data,
    key: Any = None,
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows of a local file or a hub data set.

    Args:
        arguments: the recipe's data block.
        evaluation: whether held-out rows are wanted.
        prepare: applied to a split before rows are counted off; it may map and filter.
        key: what ``prepare`` depends on beside ``arguments``, for the cache of a streamed split.

    Raises:
        DataError: see `load_dataset_for`.
    """
    path = Path(arguments.dataset_name)
    from_file = path.suffix in FILE_LOADERS
    if from_file and not path.is_file():
        known = KNOWN_FILES.get(path.name)
        where = f" It is in {known}; download it, and name it with --dataset_name." if known else ""
        raise DataError(f"dataset_name: there is no file {path} (looked for in {Path.cwd()}).{where}")
    if path.is_file() and not from_file:
        raise DataError(
            f"dataset_name: {path} is none of {', '.join(FILE_LOADERS)}: these are what is read, by the name's end. "
            "Convert it, or rename it if that is what it holds."
        )
    if is_lost(arguments.dataset_name) or (path.suffix in OTHER_FILES and not path.exists()):
        raise DataError(f"dataset_name: there is no file or folder {path} (looked for from {Path.cwd()}).")
    if from_file and arguments.dataset_train_split != "train":
        logger.warning(
            "dataset_train_split: %r plays no part: %s is one file of rows.", arguments.dataset_train_split, path
        )
    held_out = arguments.dataset_test_size

    def read(split: str, size: int | None) -> Dataset:
        if not arguments.dataset_streaming:
            return prepare(_load(arguments, split, from_file))
        if size is None:
            raise DataError(
                "dataset_streaming: say with dataset_size (and dataset_test_size) how many samples to read."
            )
        return _first_rows(lambda: prepare(_load(arguments, split, from_file)), arguments, (split, size, key), size)

    size = arguments.dataset_size
    train = read("train" if from_file else arguments.dataset_train_split, size and size + (held_out or 0))
    test = None
    if held_out:
        if held_out >= len(train):
            raise DataError(f"dataset_test_size: {held_out} of {len(train)} samples leave none.")
        # Held out without an evaluation too: the adapter may be judged on these samples later.
        parts = train.train_test_split(held_out, seed=arguments.dataset_seed)
        train, test = parts["train"], parts["test"] if evaluation else None
    elif evaluation and from_file:
        raise DataError(f"dataset_test_size: say how many samples of {path} to hold out for evaluation.")
    elif evaluation:
        test = read(arguments.dataset_test_split, size)
    if size:
        train = train.select(range(min(size, len(train))))
    return train, test


def _first_rows(stream: Callable[[], IterableDataset], arguments: DataArguments, key: tuple, size: int) -> Dataset:
    """The first ``size`` rows of a stream, written to the cache of `datasets` once; it is not opened a second time."""
    import datasets
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.fingerprint import Hasher

    path = Path(arguments.dataset_name)
    version = path.stat().st_mtime_ns if path.is_file() else None
    fingerprint = Hasher.hash((vars(arguments), version, key))
    try:
        return datasets.Dataset.from_generator(lambda: iter(stream().take(size)), fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, SchemaInferenceError):
            return datasets.Dataset.from_list([])
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(unreadable(arguments.dataset_name, cause)) from error


def _load(arguments: DataArguments, split: str, from_file: bool) -> Dataset | IterableDataset:
    import datasets

    name, streaming = arguments.dataset_name, arguments.dataset_streaming
    if from_file:
        try:
            data = datasets.load_dataset(
                FILE_LOADERS[Path(name).suffix], data_files=name, split=split, streaming=streaming
            )
            if not streaming:
                data.data.validate(full=True)  # texts that are not UTF-8 would fail where they are read first
            return data
        except Exception as error:  # of every kind: it depends on where in `datasets` the file's contents first fail
            raise DataError(unreadable(name, error)) from error
    if Path(name).is_dir():
        try:
            return datasets.load_dataset(name, arguments.dataset_config, split=split, streaming=streaming)
        except Exception as error:  # likewise
            reason = first_line(root_of(error))
            files = sorted(path.name for path in Path(name).iterdir() if path.suffix in FILE_LOADERS)
            found = f"of those in it: {', '.join(files[:5])}" if files else "such as .jsonl; there is none in it"
            raise DataError(
                f"dataset_name: {name} is a folder that `datasets` cannot read as a data set: {reason}. Name a "
                f"file ({found})."
            ) from error
    try:
        return datasets.load_dataset(name, arguments.dataset_config, split=split, streaming=streaming)
    except (ConnectionError, TimeoutError, FileNotFoundError) as error:
        # DatasetNotFoundError is a FileNotFoundError: without a network the two cannot be told apart.
        raise DataError(
            f"dataset_name: {name!r} cannot be loaded from the Hugging Face hub: {first_line(error)}\nCheck the "
            "name and the connection, or give a local file (.json, .jsonl, .csv, .parquet) with the columns "
            f"{_wanted_columns(arguments)}: --dataset_name FILE --dataset_test_size N. "
            "reasoning-gym:needle_haystack,family_relationships needs no network."
        ) from error
    except ValueError as error:
        raise DataError(f"dataset_name: {name!r}, split {split!r}: {first_line(error)}") from error


def _wanted_columns(arguments: DataArguments) -> str:
    if arguments.dataset_columns:
        return " and ".join(arguments.dataset_columns)
    return "prompt and completion, messages, or question and answer"
