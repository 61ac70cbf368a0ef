"""Trains and evaluates a model with a LoRA adapter on a small classification task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.data.files import FILE_LOADERS
from sparse_unsloth.data.smollm2 import resolve_model
from sparse_unsloth.reporting.tables import StudyError

SST2 = "stanfordnlp/sst2"
TEXT_COLUMNS = ("sentence", "text", "review")
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Samples:
    """Token ids ``[n, length]`` (padded), their mask, and labels ``[n]`` from 0 up."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Returns the samples ``index`` as model inputs, cut to the longest of them."""
        length = int(self.mask[index].sum(1).max())
        return {
            "input_ids": self.ids[index, :length],
            "attention_mask": self.mask[index, :length],
            "labels": self.labels[index],
        }


@dataclass(frozen=True)
class Task:
    train: Samples
    test: Samples
    num_labels: int


def load_task(dataset: str, tokenizer: Any, train_size: int, test_size: int, max_length: int) -> Task:
    """Loads labelled sentences of ``"sst2"``, another hub data set, or a local .csv, .json, .jsonl or .parquet file.

    Rows need a label and a text (column "sentence", "text" or "review"). The validation split is held out if there is
    one, else rows of the training split that a fixed seed chooses.

    Raises:
        StudyError: the file or data set does not exist, or has other columns, too few rows or fewer than two labels.
    """
    from datasets import load_dataset

    try:
        if Path(dataset).suffix in FILE_LOADERS:
            if not Path(dataset).is_file():
                raise StudyError(f"dataset: there is no file {dataset}.")
            splits = load_dataset(FILE_LOADERS[Path(dataset).suffix], data_files=str(dataset))
        else:
            splits = load_dataset(SST2 if dataset == "sst2" else dataset)
    except (OSError, ValueError, ConnectionError) as error:
        if isinstance(error, StudyError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise StudyError(f"dataset: {dataset!r} cannot be loaded: {first}") from error
    columns = splits["train"].column_names
    text = next((name for name in TEXT_COLUMNS if name in columns), None)
    if text is None or "label" not in columns:
        raise StudyError(f"dataset: {dataset} has the columns {columns}; needed are label and one of {TEXT_COLUMNS}.")
    rows = [(row[text], row["label"]) for row in splits["train"]]
    random.Random(0).shuffle(rows)
    held_out = [(row[text], row["label"]) for row in splits["validation"]] if "validation" in splits else None
    if held_out is None:
        held_out, rows = rows[:test_size], rows[test_size:]
    if min(len(rows), len(held_out)) < 1:
        raise StudyError(f"dataset: {dataset} has {len(rows) + len(held_out)} rows, too few to hold {test_size} out.")
    rows, held_out = rows[:train_size], held_out[:test_size]
    names = sorted({label for _, label in rows + held_out}, key=str)
    if len(names) < 2:
        raise StudyError(f"dataset: {dataset} has one label only, {names[0]!r}.")

    def encode(chosen: list[tuple[str, Any]]) -> Samples:
        # Right padding: cutting a batch to its longest sample relies on it.
        tokenizer.padding_side = "right"
        encoded = tokenizer(
            [sentence for sentence, _ in chosen],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        labels = torch.tensor([names.index(label) for _, label in chosen])
        return Samples(encoded["input_ids"], encoded["attention_mask"], labels)

    return Task(encode(rows), encode(held_out), len(names))


def load_tokenizer(model: str) -> Any:
    """Loads the tokenizer of ``model`` with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    except OSError as error:
        raise StudyError(f"model: {model!r} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_classifier(model: str, tokenizer: Any, num_labels: int, rank: int, seed: int) -> nn.Module:
    """Builds the model with a new classification head and LoRA of ``rank`` (alpha = 2 rank) on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(model), num_labels=num_labels, dtype=torch.float32, problem_type="single_label_classification"
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(base, config)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, steps: int, batch_size: int, seed: int
) -> None:
    """Runs ``steps`` optimiser steps on batches that depend on ``seed`` only."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(samples), (batch_size,), generator=generator)
        model(**samples.batch(index)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> tuple[float, float]:
    """Returns ``(accuracy, mean cross-entropy in nats)``."""
    model.eval()
    loss, right = 0.0, 0
    for index in torch.arange(len(samples)).split(EVALUATION_BATCH):
        batch = samples.batch(index)
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.float()
        loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += (logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(samples), loss / len(samples)
