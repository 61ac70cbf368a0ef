"""Reads rows of local files and hub data sets, whole or as a stream, and splits off held-out samples."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.data.json_rows import PEEKED, decode, is_list, json_dataset, json_rows, stream_rows
from sparse_unsloth.data.ledger import HELD_OUT, TRAINING, Ledger, Reading, Split, counted
from sparse_unsloth.errors import DataError
from sparse_unsloth.utils.saved_adapters import is_lost
from sparse_unsloth.utils.unreadable import first_line, root_of, unreadable

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset, IterableDataset

    from sparse_unsloth.data.arguments import DataArguments

logger = logging.getLogger("sparse_unsloth")

FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OTHER_FILES = (".txt", ".tsv", ".xml", ".xlsx", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml", ".md", ".pkl")
"""Suffixes of local files; a name without one of these is a hub name."""
# Files that the published experiments trained on, and where they come from.
KNOWN_FILES = {
    "math_10k.json": "ft-training_set/ of https://github.com/AGI-Edgerunners/LLM-Adapters",
    "commonsense_170k.json": "ft-training_set/ of https://github.com/AGI-Edgerunners/LLM-Adapters",
}


def stored_splits(
    arguments: DataArguments,
    evaluation: bool,
    reading: Callable[[list[str], dict[str, Any]], Reading],
    key: Any,
    ledger: Ledger,
    label: str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Loads training and held-out samples of a local file or a hub data set.

    Args:
        arguments: the recipe's data block.
        evaluation: whether held-out samples are wanted.
        reading: makes the `Reading` of a split from its columns and first row; it is applied before the split.
        key: what ``reading`` depends on besides ``arguments``, for the cache of a streamed split.
        ledger: counts the samples.
        label: a column that may hold numbers; all other columns of a CSV file are texts.

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
            f"dataset_name: {path} is none of {', '.join(FILE_LOADERS)}, the types of files that can be read. "
            "Convert it, or rename it if that is what it holds."
        )
    if is_lost(arguments.dataset_name) or (path.suffix in OTHER_FILES and not path.exists()):
        raise DataError(f"dataset_name: there is no file or folder {path} (looked for from {Path.cwd()}).")
    if from_file and arguments.dataset_train_split != "train":
        logger.warning(
            "dataset_train_split: %r plays no part: %s is one file of rows.", arguments.dataset_train_split, path
        )
    held_out = arguments.dataset_test_size

    def read(name: str, size: int | None, split: str) -> Dataset:
        account = ledger.split(split)

        def load() -> tuple[Any, Reading]:
            from datasets import IterableDataset

            data, encoded = _load(arguments, name, from_file, label)
            first: dict[str, Any] = {}  # a value of every column that has one nearby
            columns = getattr(data, "column_names", None)
            for row in itertools.islice(iter(data), 1 if isinstance(data, IterableDataset) else PEEKED):
                row = {column: decode(value) if column in encoded else value for column, value in row.items()}
                first |= {column: value for column, value in row.items() if first.get(column) is None}
            found = replace(reading(columns or list(first), first), encoded=encoded)
            ledger.used, ledger.unused = ledger.used or found.used, ledger.unused or list(found.unused)
            twice = [column for group in found.used.values() for column in group if f"{column}.1" in found.unused]
            if twice and path.suffix == ".csv":  # as pandas calls the second one
                raise DataError(f"dataset_name: {path} has several columns called {twice[0]}: rename all but one.")
            return data, found

        if not arguments.dataset_streaming:
            data, found = load()
            return found.samples(data, account)
        if size is None:
            raise DataError(
                "dataset_streaming: say with dataset_size (and dataset_test_size) how many samples to read."
            )
        return _first_samples(load, arguments, (name, size, key), size, ledger, account)

    size = arguments.dataset_size
    train = read("train" if from_file else arguments.dataset_train_split, size and size + (held_out or 0), TRAINING)
    test, account = None, ledger.split(TRAINING)
    if held_out:
        if held_out >= len(train):
            of_rows = f" (of {account.read} rows; the others are left out)" if account.left_out else ""
            raise DataError(f"dataset_test_size: {held_out} of {len(train)} samples leave none{of_rows}.")
        # Held out without an evaluation too: the adapter may be judged on these samples later.
        parts = train.train_test_split(held_out, seed=arguments.dataset_seed)
        train, test = parts["train"], parts["test"] if evaluation else None
        account.set_aside[HELD_OUT] = held_out
        if evaluation:
            ledger.split(HELD_OUT).read = held_out
    elif evaluation and from_file:
        raise DataError(f"dataset_test_size: say how many samples of {path} to hold out for evaluation.")
    elif evaluation:
        test = read(arguments.dataset_test_split, size, HELD_OUT)
    if size and size > len(train):
        ledger.others.append(f"dataset_size asks for {size:,} samples, and {len(train):,} are there")
    elif size and size < len(train):
        account.set_aside["beyond dataset_size"] = len(train) - size
        train = train.select(range(size))
    return train, test


def _first_samples(
    load: Callable[[], tuple[Any, Reading]],
    arguments: DataArguments,
    key: tuple,
    size: int,
    ledger: Ledger,
    split: Split,
) -> Dataset:
    """Reads the first ``size`` samples of a stream and caches them by `datasets`, so that the stream is opened once.

    The columns, and the rows left out before each sample, are cached with the samples.
    """
    import datasets
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.fingerprint import Hasher

    path = Path(arguments.dataset_name)
    version = path.stat().st_mtime_ns if path.is_file() else None
    fingerprint = Hasher.hash((vars(arguments), version, key, Reading.version))

    def samples() -> Iterator[dict[str, Any]]:
        rows, found = load()
        return found.stream(rows, size, split)

    try:
        return counted(datasets.Dataset.from_generator(samples, fingerprint=fingerprint), ledger, split)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, SchemaInferenceError):
            return datasets.Dataset.from_list([])
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(unreadable(arguments.dataset_name, cause)) from error


def _load(
    arguments: DataArguments, split: str, from_file: bool, label: str | None = None
) -> tuple[Any, frozenset[str]]:
    """Loads the rows of a split, to be iterated over any number of times, and the columns that hold JSON text."""
    import datasets

    name, streaming = arguments.dataset_name, arguments.dataset_streaming
    if from_file:
        kind, path = FILE_LOADERS[Path(name).suffix], Path(name)
        try:
            if kind == "json" and label is None:
                if not streaming:
                    return json_dataset(path)
                if is_list(path):
                    rows = list(json_rows(path))
                    names = dict.fromkeys(name for row in rows for name in row)
                    return [{name: row.get(name) for name in names} for row in rows], frozenset()
                return _Lines(
                    datasets.load_dataset("text", data_files=name, split=split, streaming=True), path
                ), frozenset()
            options = _csv_options(name, label) if kind == "csv" else {}
            data = datasets.load_dataset(kind, data_files=name, split=split, streaming=streaming, **options)
            if not streaming:
                data.data.validate(full=True)  # texts that are not UTF-8 would fail where they are read first
            return data, frozenset()
        except DataError:
            raise
        except Exception as error:  # of every kind: it depends on where in `datasets` the file's contents first fail
            raise DataError(unreadable(name, error)) from error
    if Path(name).is_dir():
        try:
            return datasets.load_dataset(name, arguments.dataset_config, split=split, streaming=streaming), frozenset()
        except Exception as error:  # likewise
            reason = first_line(root_of(error))
            files = sorted(path.name for path in Path(name).iterdir() if path.suffix in FILE_LOADERS)
            found = f"of those in it: {', '.join(files[:5])}" if files else "such as .jsonl; there is none in it"
            raise DataError(
                f"dataset_name: {name} is a folder that `datasets` cannot read as a data set: {reason}. Name a "
                f"file ({found})."
            ) from error
    try:
        return datasets.load_dataset(name, arguments.dataset_config, split=split, streaming=streaming), frozenset()
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


class _Lines:
    """The rows of a stream of JSON lines; every iteration opens the stream again."""

    def __init__(self, stream: IterableDataset, path: Path):
        self.stream, self.path = stream, path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return stream_rows(self.stream, self.path)


def _csv_options(name: str, label: str | None) -> dict[str, Any]:
    """Reads every column as text: NA, None and 007 are values, and only an empty field is missing.

    Raises:
        DataError: rows have more fields than the header, so that values would move to another column.
    """
    import pandas
    from datasets import Features, Value

    options = {"keep_default_na": False, "na_values": [""]}
    head = pandas.read_csv(name, nrows=100, dtype=str, **options)
    if not isinstance(head.index, pandas.RangeIndex):
        raise DataError(
            f"dataset_name: {name} has more fields in its rows than in its header ({', '.join(head.columns)}): put "
            "texts with commas in quotes, or name every column."
        )
    kinds = {column: Value("string") for column in head.columns}
    if label in kinds:
        kinds[label] = Value(_number(pandas.read_csv(name, usecols=[label], dtype=str, **options)[label]))
    return {**options, "features": Features(kinds)}


def _number(labels: pandas.Series) -> str:
    """Returns the type of a column of labels: integers, numbers or texts."""
    import pandas

    values = pandas.to_numeric(labels, errors="coerce")
    if values.isna().sum() > labels.isna().sum() or labels.isna().all():
        return "string"
    whole = labels.dropna().str.fullmatch(r"\s*[+-]?\d+\s*").all()
    if not whole:
        return "float64"
    return "string" if labels.isna().any() else "int64"


def _wanted_columns(arguments: DataArguments) -> str:
    if arguments.dataset_columns:
        return " and ".join(arguments.dataset_columns)
    return "prompt and completion, messages, or question and answer"
