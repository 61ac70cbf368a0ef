"""Loads labelled texts and computes GLUE's metrics for classification recipes (``lora_task_type: SEQ_CLS``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.files import stored_splits
from sparse_unsloth.data.ledger import HELD_OUT, TRAINING, Ledger, Outcome, Reading
from sparse_unsloth.data.smollm2 import resolve_tokenizer
from sparse_unsloth.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PretrainedConfig

LABEL = "label"
TEXT_COLUMNS = (
    ("sentence",), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("text",),
)  # fmt: skip
"""Text columns, in the order of the search; ``dataset_columns`` names others."""
GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""Metrics of each GLUE task; runs are compared by the first one."""


def load_labelled(
    arguments: DataArguments, evaluation: bool, ledger: Ledger | None = None
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Loads training and held-out rows with a label, and the names of their one or two text columns.

    Rows without a text are left out, and rows whose label is missing or negative, as in GLUE's test splits.
    ``ledger`` counts and logs them.

    Raises:
        DataError: the data set, its columns or its labels do not exist.
    """
    for key in ("dataset_system_prompt", "dataset_filters", "dataset_options"):
        if getattr(arguments, key):
            raise DataError(f"{key}: is for text generation, and this recipe trains a classifier (SEQ_CLS).")
    if arguments.dataset_drop_long:
        raise DataError("dataset_drop_long: is for text generation; a classifier's texts are cut at max_length.")
    account = Ledger() if ledger is None else ledger
    account.dataset = arguments.dataset_name or ""

    def reading(names: list[str], first: dict[str, Any]) -> Reading:
        columns = _text_columns(arguments, names)

        def read(row: dict[str, Any]) -> Outcome:
            label, texts = row[LABEL], [row[name] for name in columns]
            if label is None or label == "" or (not isinstance(label, str) and not label >= 0):
                return None, "without a label", None
            if None in texts:
                return None, "without a text", None
            if all(isinstance(text, str) for text in texts):
                return row, None, None
            return {**row, **dict(zip(columns, map(str, texts), strict=True))}, None, None

        unused = tuple(name for name in names if name not in (*columns, LABEL))
        return Reading(read, used={"text": columns, "label": [LABEL]}, unused=unused)

    train, test = stored_splits(arguments, evaluation, reading, "classification", account, label=LABEL)
    for split, data in ((TRAINING, train), (HELD_OUT, test)):
        if data is None:
            continue
        account.split(split).kept = len(data)
        if len(data) == 0:
            raise DataError(f"{arguments.dataset_name}: the {split} split has no row with a label.")
    account.log()
    return train, test, account.used["text"]


def label_names(train: Dataset, test: Dataset | None) -> list[str] | None:
    """Returns the classes in the order of their numbers; None for a regression on real numbers.

    Raises:
        DataError: there is one class only, or a held-out label does not occur in training.
    """
    feature = train.features[LABEL]
    if getattr(feature, "names", None):
        return list(feature.names)
    if str(feature.dtype).startswith("float"):
        return None
    seen = sorted(set(train[LABEL]))
    if not isinstance(seen[0], str):
        seen = list(range(seen[-1] + 1))
    unknown = [] if test is None else sorted(set(test[LABEL]) - set(seen))
    if unknown:
        raise DataError(f"held-out label {unknown[0]!r} does not occur in training (labels: {seen}).")
    if len(seen) < 2:
        raise DataError(f"the training data has one label only, {seen[0]!r}: there is nothing to tell apart.")
    return [str(name) for name in seen]


def encode(data: Dataset, columns: list[str], names: list[str] | None, tokenizer: Any, max_length: int | None):
    """Tokenises each row into ids, mask and ``labels``, without padding: the collator pads to a batch's longest row."""
    is_text = data.features[LABEL].dtype == "string"

    def convert(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            *(batch[name] for name in columns), truncation=max_length is not None, max_length=max_length
        )
        labels = [names.index(label) for label in batch[LABEL]] if is_text else batch[LABEL]
        return {**encoded, "labels": [float(label) for label in labels] if names is None else labels}

    return data.map(convert, batched=True, remove_columns=data.column_names)


def model_config(model_name: str, names: list[str] | None, pad_token_id: int, **hub: Any) -> PretrainedConfig:
    """Returns the checkpoint's configuration with a head for the classes ``names``, or for one real number."""
    from transformers import AutoConfig

    labels = {"num_labels": 1, "problem_type": "regression"}
    if names is not None:
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }
    config = AutoConfig.from_pretrained(model_name, **labels, **hub)
    # The head reads the last token that is not padding, so it must know the padding token.
    config.get_text_config().pad_token_id = config.pad_token_id = pad_token_id
    return config


def load_tokenizer(model_name: str, **hub: Any) -> Any:
    """Loads the tokenizer of ``model_name``; it pads on the right, with its padding token if it has one.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer(model_name), **hub)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(f"model_name_or_path: the tokenizer of {model_name!r} cannot be loaded: {first}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def metrics_for(task: str | None, names: list[str] | None) -> tuple[str, ...]:
    """Returns the metrics' names: those of a GLUE task, else accuracy and F1 for classes, correlations for numbers."""
    if task in GLUE_METRICS:
        return GLUE_METRICS[task]
    if names is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1") if len(names) == 2 else ("accuracy",)


def score(metrics: tuple[str, ...], predictions: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    """Computes each metric of ``predictions [n]`` (classes or numbers) against ``labels [n]``.

    Raises:
        DataError: scikit-learn is missing.
    """
    try:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError:
        raise DataError("GLUE's metrics need scikit-learn: `pip install 'sparse-unsloth[eval]'`.") from None
    from scipy.stats import pearsonr, spearmanr

    functions: dict[str, Callable[..., float]] = {
        "accuracy": accuracy_score,
        "f1": lambda wanted, given: f1_score(wanted, given, zero_division=0.0),
        "matthews_correlation": matthews_corrcoef,
        "pearson": lambda wanted, given: _correlation(pearsonr, wanted, given),
        "spearman": lambda wanted, given: _correlation(spearmanr, wanted, given),
    }
    return {name: float(functions[name](labels, predictions)) for name in metrics}


def predictions_of(logits: numpy.ndarray, names: list[str] | None) -> numpy.ndarray:
    """Returns the classes of the highest logits ``[n]``, or the predicted numbers ``[n]``."""
    return logits.reshape(len(logits)) if names is None else logits.argmax(-1)


def compute_metrics(metrics: tuple[str, ...], names: list[str] | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Computes the metrics in the form of transformers' ``Trainer``."""
    return lambda found: score(metrics, predictions_of(found.predictions, names), found.label_ids.reshape(-1))


def task_of(arguments: DataArguments) -> str | None:
    """The GLUE task of a data set, by its configuration or a local file's name."""
    return arguments.dataset_config or Path(arguments.dataset_name or "").stem.partition("-")[0] or None


def _text_columns(arguments: DataArguments, columns: list[str]) -> list[str]:
    asked = arguments.dataset_columns
    if asked is not None and not 1 <= len(asked) <= 2:
        raise DataError(f"dataset_columns: a classifier reads one or two text columns; given {', '.join(asked)}.")
    wanted = asked or next((list(form) for form in TEXT_COLUMNS if set(form) <= set(columns)), None)
    if wanted is None:
        forms = "; ".join(" and ".join(form) for form in TEXT_COLUMNS)
        raise DataError(
            f"{arguments.dataset_name}: its columns are {', '.join(columns)}. A classifier needs {LABEL} and one of: "
            f"{forms}; others are named by dataset_columns."
        )
    missing = [name for name in (*wanted, LABEL) if name not in columns]
    if missing:
        raise DataError(
            f"{arguments.dataset_name}: has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(columns) or 'none'}."
        )
    return wanted


def _correlation(function: Callable, wanted: numpy.ndarray, given: numpy.ndarray) -> float:
    """Returns the correlation, and 0 where it is undefined because one side is constant."""
    if len(wanted) < 2 or numpy.ptp(wanted) == 0 or numpy.ptp(given) == 0:
        return 0.0
    return function(wanted, given).statistic
